"""Several processes on one network: what they make together is what one makes alone."""
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import cache
import fitting
import flags
import gather
import models
import owner
import parallel
import report
import run
import train
from backbones.base import SR
from backbones.drn import DRN
from settings import PRESETS
from small_runs import DRIVER, SIZES, log, photo, wait_for, weights
from tiny import native_loss, pooled_batch, same, tiny_dat, tiny_drn

FORK = multiprocessing.get_context("fork")      # a new process would import torch for seconds


def member(function, rank: int, port: int, answer) -> None:
    """Process `rank` of two: as torchrun starts it, but by a fork, which CUDA does not survive."""
    torch.cuda.is_available = lambda: False
    os.environ |= dict(TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank),
                       WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost",
                       MASTER_PORT=str(port))
    parallel.start()
    answer.send_bytes(pickle.dumps(function()))
    parallel.leave()


def pair(function) -> list:
    """What function() returns in process 0 and in process 1 of two; None: it ended before that."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes, ends = [], []
    for k in range(2):
        end, answer = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=member, args=(function, k, port, answer)))
        processes[k].start()
        answer.close()
        ends.append(end)
    found = []
    for end in ends:
        try:
            found.append(pickle.loads(end.recv_bytes()) if end.poll(60) else None)
        except EOFError:
            found.append(None)
    for process in processes:
        process.join(10)
        process.kill()
    return found


# ---- sums and shares ----------------------------------------------------------------------------
def test_without_torchrun_nothing_is_shared():
    batch = pooled_batch(0, 3, 8)
    tensors = [torch.ones(2)]
    assert parallel.own(batch) is batch
    assert parallel.average(tensors, 0.5) is tensors
    assert (parallel.world(), parallel.rank(), parallel.share(3)) == (1, 0, 1)
    assert parallel.from_main(lambda: 7) == 7
    assert parallel.any_of(True)
    before = torch.get_rng_state()
    parallel.seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_share_a_batch_and_add_up():
    whole = SR({1: torch.arange(3.0).view(3, 1, 1, 1)}, torch.arange(3.0))

    def work():
        own = parallel.own(whole)
        matrix = torch.full((2, 2, 1, 1), 1.0 + parallel.rank())
        matrix = matrix.to(memory_format=torch.channels_last)
        parallel.add_up([matrix, vector := torch.tensor([1.0, 10.0 * parallel.rank()])])
        mean = parallel.average([own.images[1].mean()], parallel.share(3))
        lone = parallel.own(SR({1: whole.images[1][:1]}))
        alone = parallel.average([lone.images[1].mean() + 5], parallel.share(1))
        parallel.seed(0, 4)
        return dict(
            own=own.images[1].flatten().tolist(), kernel=own.kernel.tolist(),
            matrix=matrix.unique().tolist(), vector=vector.tolist(), mean=mean[0].item(),
            alone=alone[0].item(), any=parallel.any_of(parallel.rank() == 1),
            none=parallel.any_of(False), main=parallel.from_main(parallel.rank),
            drawn=torch.rand(1).item())

    first, second = pair(work)
    assert (first["own"], second["own"]) == ([0], [1, 2])
    assert (first["kernel"], second["kernel"]) == ([0], [1, 2])
    assert first.pop("drawn") != second.pop("drawn")
    for found in (first, second):
        assert found["matrix"] == [3]
        assert found["vector"] == [2, 10]
        assert found["mean"] == 1                # not 0.75, the mean of the two means
        assert found["alone"] == 5               # the process without a patch does not count
        assert (found["any"], found["none"], found["main"]) == (True, False, 0)


@pytest.mark.parametrize("end", [partial(os._exit, 9), partial(time.sleep, 3)],
                         ids=["killed", "hangs"])
def test_a_process_that_does_not_answer_is_a_sentence(monkeypatch, end):
    monkeypatch.setattr(parallel, "PATIENCE", parallel.timedelta(seconds=1))

    def work():
        if parallel.rank():
            end()
        try:
            parallel.barrier()
        except ConnectionError as error:
            return run.explain(error)

    first, _ = pair(work)
    assert "another process of this run has ended or did not answer for 1 seconds" in first
    assert "give the same command again" in first


def test_process_one_is_silent_but_for_its_errors():
    def work():
        silent = [getattr(stream, "name", "") == os.devnull for stream in (sys.stdout, sys.stderr)]
        return silent, parallel.audible(), sys.stderr is sys.__stderr__

    first, second = pair(work)
    assert first[:2] == ([False, False], "")
    assert second == ([True, True], "process 1 of 2: ", True)


def test_a_batch_too_small_for_all_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    settings = replace(PRESETS["drn", "quick"], batch=3, search_batch=2, select_batch=2)
    flags.check_shares(settings, gpu=True)
    for batch, parts in ((2, 1), (8, 3)):        # three parts of 8: 3, 3 and 2
        with pytest.raises(run.WrongUsage, match=f"--batch {batch} in {parts} part"):
            flags.check_shares(replace(settings, batch=batch, accumulate=parts), gpu=False)
    for uneven in (dict(batch=7), dict(search_batch=4), dict(select_batch=8)):
        flags.check_shares(replace(settings, **uneven), gpu=False)
        with pytest.raises(run.WrongUsage, match="do not divide equally among 3 GPUs"):
            flags.check_shares(replace(settings, **uneven), gpu=True)


def test_process_0_fills_the_cache_and_the_other_finds_it(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        photo(seed=i).save(folder / f"{i}.png")
    filled = []
    monkeypatch.setattr(cache, "fill", lambda *a, fill=cache.fill: filled.append(1) or fill(*a))
    wishes = gather.Wishes(32, 2**30, tmp_path / "cache", False)

    def work():
        with parallel.main_first():
            pictures = gather.training_pictures(str(folder), (1, 4), wishes, tmp_path)
        return len(filled), pictures.names, [picture.images[4].sum() for picture in pictures]

    first, second = pair(work)
    assert (first[0], second[0]) == (1, 0)
    assert first[1:] == second[1:]
    assert len(first[1]) == 3


# ---- training -----------------------------------------------------------------------------------
def trained(folder: Path, make, settings, batches: list) -> dict:
    """The weights of make() after a step on each of the batches."""
    torch.manual_seed(0)
    model, duals = make()
    model.train()
    loss_fn = native_loss(duals, model.rgb_range)
    made = fitting.fit(run.Run(folder, {}), "train", settings, model, duals, len(batches), 1e-4,
                       loss_fn, lambda start: (batch for batch in batches[start:]))
    return {name: x.double().clone() for name, x in [*made.state_dict().items(),
                                                     *duals.state_dict().items()]}


def test_batch_norm_and_moving_average_are_those_of_the_whole_batch(tmp_path):
    """Of DAT, on batches of 5 in two parts."""
    settings = replace(PRESETS["dat", "quick"], ema=0.5, accumulate=2, clip=1.0, warmup=0.0)
    work = partial(trained, make=tiny_dat, settings=settings,
                   batches=[pooled_batch(k, 5, 8) for k in range(2)])
    alone = work(tmp_path / "one")
    first, second = pair(partial(work, tmp_path / "two"))
    assert same(first, second)                   # to the last bit
    assert any("running_var" in name for name in alone)
    for name, expected in alone.items():
        # the bias before a norm has no gradient but for rounding, of which Adam makes whole steps
        most = 4e-4 if name.endswith(".bias") else 2e-5
        assert torch.allclose(first[name], expected, rtol=1e-3, atol=most), name


def test_a_share_may_be_photographs_without_originals_alone(tmp_path):
    """They give DRN's tail of scale 1 no gradient, the pair in the other process does."""
    whole = pooled_batch(0, 3, 8)
    batch = SR({s: x if s == 1 else x[:1] for s, x in whole.images.items()})
    work = partial(trained, make=tiny_drn, settings=replace(PRESETS["drn", "quick"], warmup=0.0),
                   batches=[batch])
    alone = work(tmp_path / "one")
    first, second = pair(partial(work, tmp_path / "two"))
    assert same(first, second)
    for name, expected in alone.items():
        assert torch.allclose(first[name], expected, atol=2e-5), name


def test_batch_norm_has_the_gradients_of_pytorch():
    x = torch.randn(5, 3, 4, 4)
    upstream = torch.randn(5, 3, 4, 4)

    def work(shared=True):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(3)
        nn.init.normal_(norm.weight)
        parallel.join_norms(norm)
        assert (type(norm) is parallel.BatchNorm) == shared
        at = parallel.part(5) if shared else slice(0, 5)
        own = x[at].clone().requires_grad_()
        y = norm(own)
        y.backward(upstream[at])
        parallel.add_up([norm.weight.grad, norm.bias.grad])
        return [t.detach().clone() for t in (y, own.grad, norm.weight.grad, norm.running_mean,
                                             norm.running_var)]

    expected = work(shared=False)
    first, second = pair(work)
    for i in (0, 1):
        assert torch.allclose(torch.cat((first[i], second[i])), expected[i], atol=1e-6)
    for i in (2, 3, 4):
        assert torch.allclose(first[i], expected[i], atol=1e-6)


# ---- whole runs ---------------------------------------------------------------------------------
def test_a_signal_to_one_stops_all_after_the_same_step_and_saves_once(tmp_path):
    def work():
        saves = []

        def one_step(k, batch):
            if k == 2 and parallel.rank():
                os.kill(os.getpid(), signal.SIGINT)
            return 0.0

        here = run.Run(tmp_path, {})
        write = here.write
        here.write = lambda name, content: saves.append(content["step"]) or write(name, content)
        try:
            here.repeat("train", 9, one_step, lambda start: (k for k in range(9)), {})
        except KeyboardInterrupt:
            return saves

    assert pair(work) == [[3], []]
    assert weights(tmp_path, "progress")["step"] == 3


RUN = ["--arch", "drn_tiny", "--prune", "0.3", "--steps", "20", "--search-steps", "4",
       "--tune-steps", "8", "--pictures", "4", "--patch", "32", "--batch", "3", "--device", "cpu"]
# the report takes no time, and the folder tells who was there
QUIET = """
import os, pathlib
import parallel, report
folder = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
folder.with_suffix(f".pid{parallel.rank()}").write_text(str(os.getpid()))
report.measure = lambda run, *_: run.write_json("report.json", {})
report.print_table = lambda run: print("reported")
run.command"""


def torchrun(folder: Path) -> subprocess.Popen:
    """RUN in two processes. (Without the -- torchrun would take --run for a flag of its own.)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "--no-python", "--", sys.executable, "-c",
               DRIVER.replace("run.command", QUIET), *RUN, "--run", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alone(folder: Path, **changed) -> None:
    """RUN in this process; changed: attributes of Run."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in changed.items():
            patched.setattr(run.Run, name, value)
        patched.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
        patched.setattr(run, "SAVE_SECONDS", 0)
        patched.setattr(report, "measure", lambda run, *_: run.write_json("report.json", {}))
        patched.setattr(report, "print_table", lambda run: None)
        patched.setattr(sys, "argv", ["train.py", *RUN, "--run", str(folder)])
        train.main()


def losses(folder: Path) -> dict:
    if not (folder / "log.jsonl").exists():
        return {}
    return {(line["stage"], line["step"]): line["loss"] for line in log(folder) if "step" in line}


def test_two_processes_one_and_two_again_make_the_run_of_one(tmp_path):
    """One of two is killed in fine-tuning, one alone goes on, is stopped, and two finish it."""
    whole, folder = tmp_path / "one", tmp_path / "two"
    alone(whole)
    running = torchrun(folder)
    wait_for(lambda: ("tune", 1) in losses(folder), running, seconds=240)
    os.kill(int(folder.with_suffix(".pid1").read_text()), signal.SIGKILL)
    first, errors = running.communicate(timeout=60)
    assert running.returncode
    assert "error: another process of this run has ended" in errors
    assert not (folder / "tune.pt").exists()
    save = run.Run.save

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alone(folder, save=stop)
    owner.HELD.clear()               # as if this process had ended, it unlocks the folder
    running = torchrun(folder)
    last, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    # process 1 is silent
    assert "2 processes, each with 1 CPU threads" in first
    for words, output in (("drn_tiny x4", first), ("data   ", first), ("search   ", first),
                          ("drn_tiny x4", last), ("data   ", last), ("reported", last)):
        assert output.count(words) == 1
    assert [line["processes"] for line in log(folder) if line["stage"] == "start"] == [2, 1, 2]

    assert weights(folder, "search")["widths"] == weights(whole, "search")["widths"]
    assert weights(folder, "select")["kept"] == weights(whole, "select")["kept"]
    expected = losses(whole)
    assert len(expected) == 20 + 4 + 8
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
