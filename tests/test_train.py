"""The command as a user gives it: from nothing to a report, stopped and continued anywhere."""
import json
import math
import resource
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dual
import evaluate
import fitting
import flags
import models
import prune
import report
import run
import train
import upscale
from backbones.dat import DAT
from backbones.dcls import DCLS
from backbones.drn import DRN
from backbones.swinir import SwinIR
from settings import PRESETS
from small_runs import (
    QUICK,
    SIZES,
    SMALL,
    STAGES,
    finish,
    log,
    photo,
    process,
    wait_for,
    weights,
)
from tiny import parameters, run_command, same

call = partial(run_command, train)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with the pictures to report on."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        photo(seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    """The folder and the output of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(process(folder, "--test", photos))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_learning_rate():
    s = replace(PRESETS["drn", "paper"], warmup=0.1, floor=0.0)
    cosine = [fitting.scheduled(s, 1.0, k, 100) for k in (0, 9, 10, 55, 100)]
    assert cosine == pytest.approx([0.1, 1, 1, 0.5, 0])
    s = replace(s, milestones=(0.5, 0.8))
    halved = [fitting.scheduled(s, 1.0, k, 100) for k in (0, 49, 50, 80)]
    assert halved == pytest.approx([0.1, 1, 0.5, 0.25])


# ---- a whole run --------------------------------------------------------------------------------
def test_a_run_leaves_what_it_promises(finished):
    folder, output = finished
    names = {f.name for f in folder.iterdir()}
    assert names == {"config.json", "train.pt", "search.pt", "select.pt", "tune.pt", "log.jsonl",
                     "channels.json", "report.json", "report.html", "comparison.png", ".lock"}
    stages = [line["stage"] for line in log(folder) if "seconds" in line]
    assert stages == [*STAGES, "report"]
    [start] = [line for line in log(folder) if line["stage"] == "start"]
    assert "--arch drn_tiny --prune 0.3" in start["command"]
    for words in ("drn_tiny x4", "preset quick", str(folder)):
        assert words in output.splitlines()[0]


def test_the_config_is_the_settings(finished, monkeypatch, photos):
    """Nothing else decides a run, so nothing else is in it: not the device, not the test folder."""
    folder, _ = finished
    _, settings = flags.parse_args(QUICK)
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads(json.dumps(asdict(settings)))
    assert str(photos) not in config.values()


def test_the_pruned_network_is_what_was_searched_for(finished):
    folder, _ = finished
    dense, pruned = models.load(folder / "train.pt"), models.load(folder / "tune.pt")
    chosen = json.loads((folder / "channels.json").read_text())["widths"]
    assert pruned.widths == chosen
    for name, n in chosen.items():
        assert n in prune.candidates(dense.widths[name], 0.3)
    kept = weights(folder, "select")["kept"]
    assert {name: len(order) for name, order in kept.items()} == chosen
    table = json.loads((folder / "report.json").read_text())
    assert list(table) == ["bicubic", "dense", "cut", "pruned"]
    assert table["pruned"]["params"] < 0.75 * table["dense"]["params"]


def test_the_log_tells_how_the_chances_moved(finished):
    folder, output = finished
    lines = [line for line in log(folder) if line["stage"] == "search"]
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3, 4, 5]
    pairs = len(models.load(folder / "train.pt").pairs())
    for line in lines[:-1]:
        assert len(line["alpha"]) == pairs
        for chances in line["alpha"]:
            assert len(chances) == 6
            assert sum(chances) == pytest.approx(1, abs=3e-4)
    assert lines[0]["alpha"] != lines[-2]["alpha"]
    assert f"in 0 of {pairs} layers more than one half" in lines[-1]["decision"]
    assert lines[-1]["decision"] in output
    assert not any("alpha" in line for line in log(folder) if line["stage"] != "search")


def test_uniform_widths_need_no_search(finished, photos, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(prune, "Search", lambda *a, **b: pytest.fail("searched"))
    line = [word for word in QUICK if word not in ("--search-steps", "5")]
    code, output, _ = call(monkeypatch, capsys, *line, "--widths", "uniform", "--run", tmp_path,
                           "--test", photos)
    assert code == 0
    dense, pruned = models.load(tmp_path / "train.pt"), models.load(tmp_path / "tune.pt")
    assert same(weights(tmp_path, "train"), weights(finished[0], "train"))
    for name, width in dense.widths.items():
        assert pruned.widths[name] == prune.candidates(width, 0.3)[-1]
    assert json.loads((tmp_path / "channels.json").read_text())["widths"] == pruned.widths
    assert "uniform widths, no search" in output


def test_without_a_dual_weight_the_duals_learn_nothing(finished, monkeypatch, capsys, photos,
                                                       tmp_path):
    code, *_ = call(monkeypatch, capsys, "--arch", "drn_tiny", "--steps", 2, *SMALL, "--run",
                    tmp_path, "--test", photos, "--dual-weight", 0)
    assert code == 0
    torch.manual_seed(0)
    fresh = dual.make_duals(models.build("drn_tiny", 4))
    dual.start_from_averages(fresh)
    for state, untouched in zip(weights(tmp_path, "train")["duals"], fresh):
        assert same(state, dict(untouched.state_dict()))


def test_a_finished_run_is_shown_again_without_work(finished, monkeypatch, capsys, photos):
    folder, output = finished
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("opened data again"))
    monkeypatch.setattr(report, "measure", lambda *a: pytest.fail("measured again"))
    code, again, _ = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", photos)
    assert code == 0
    assert again.splitlines()[-7:] == output.splitlines()[-7:]
    assert before == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


def test_a_lost_report_needs_no_training_pictures(finished, monkeypatch, capsys, photos, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "report.json").unlink()
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("opened data again"))
    code, *_ = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", photos)
    assert code == 0
    old, new = ((f / "report.json").read_text() for f in (finished[0], folder))
    same_apart_from_time = dict(seconds=0, latency=None)
    for name, line in json.loads(old).items():
        assert line | same_apart_from_time == json.loads(new)[name] | same_apart_from_time


def test_wrong_test_pictures_can_be_corrected(finished, monkeypatch, capsys, photos, tmp_path):
    """They are no setting: hours of training are not thrown away with them."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("trained again"))
    other = tmp_path / "other"
    code, _, errors = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", other)
    assert code == 1
    assert "other is missing" in errors
    other.mkdir()
    shutil.copy(photos / "1.png", other)
    code, *_ = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", other)
    assert code == 0
    found = json.loads((folder / "report.json").read_text())["dense"]["psnr"]
    [row] = evaluate.evaluate(models.load(folder / "train.pt"), data.open_folder(other, (1, 4)))
    assert found == row.psnr


# ---- stop and continue --------------------------------------------------------------------------
def test_kill_and_continue_ends_with_the_same_weights(finished, photos, tmp_path):
    """kill -9 in every stage, soon after the first state of it is on the disk."""
    whole, folder = finished[0], tmp_path / "killed"
    for stage in STAGES:
        running = subprocess.Popen(process(folder, "--test", photos), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)

        def has_begun(stage=stage):
            with suppress(FileNotFoundError):            # it goes when a stage is finished
                if stage.encode() in (folder / "progress.pt").read_bytes()[:2000]:
                    return True
            return (folder / f"{stage}.pt").exists()

        wait_for(has_begun, running)
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = finish(process(folder, "--test", photos))
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert same(weights(folder, stage), weights(whole, stage)), stage


def test_ctrl_c_saves_the_step_it_was_in(finished, photos, tmp_path):
    whole, folder = finished[0], tmp_path / "interrupted"
    arguments = process(folder, "--test", photos)
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "progress.pt").exists(), running)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    state = weights(folder, "progress")
    assert state["stage"] == "train"
    logged = [line["step"] for line in log(folder) if "step" in line]
    assert state["step"] >= max(logged, default=0)
    done = finish(arguments)
    assert done.returncode == 0
    steps = [line["step"] for line in log(folder) if line["stage"] == "train" and "step" in line]
    assert steps == list(range(1, 9)), "a step was done twice or left out"
    assert same(weights(folder, "tune"), weights(whole, "tune"))


def test_a_stopped_selection_goes_on_with_the_next_pair(finished, photos, monkeypatch, capsys,
                                                        tmp_path):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    save, pairs_done = run.Run.save, []

    def stop_after_two(self, stage, step, parts):
        save(self, stage, step, parts)
        if stage == "select":
            pairs_done.append(step)
            if pairs_done == [1, 2]:
                raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "save", stop_after_two)
    arguments = [*QUICK, "--run", tmp_path, "--test", photos]
    assert call(monkeypatch, capsys, *arguments)[0] == 130
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert pairs_done == [1, 2, 3, 4, 5, 6]
    assert same(weights(tmp_path, "select"), weights(finished[0], "select"))


def test_another_command_on_the_same_folder_is_refused(finished, monkeypatch, capsys, photos):
    for changed, words in (
            (("--tune-steps", "7"), "--tune-steps 6, now it is 7"),
            (("--seed", "1"), "--seed 0, now it is 1"),
            (("--prune", "0.5"), "--prune 0.3, now it is 0.5"),
            (("--preset", "default"), "--preset quick, now it is default")):
        code, _, errors = call(monkeypatch, capsys, *QUICK, "--run", finished[0], "--test", photos,
                               *changed)
        assert code == 2
        assert words in errors
        assert "Traceback" not in errors


def test_a_run_of_an_older_version_is_refused(finished, monkeypatch, capsys, tmp_path):
    """Before there were Settings, config.json had `test` and lacked the weights of the losses."""
    folder = shutil.copytree(finished[0], tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["dual_weight"]
    (folder / "config.json").write_text(json.dumps(config | dict(test=None)))
    code, output, errors = call(monkeypatch, capsys, *QUICK, "--run", folder)
    assert code == 2
    assert not output
    assert errors == (f"error: {folder} was made by another version of this program, its "
                      f"config.json has other entries: give another folder with --run\n")


def test_flags_can_be_corrected_before_any_work_is_done(photos, monkeypatch, capsys, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    photo(20).save(small / "a.png")
    for pictures, expected in ((small, 1), (photos, 0)):
        code, *_ = call(monkeypatch, capsys, "--arch", "drn_tiny", "--steps", 1, *SMALL,
                        "--data", pictures, "--test", photos, "--run", tmp_path / "run")
        assert code == expected


def test_a_full_disk_is_one_sentence_and_loses_nothing(finished, photos, tmp_path):
    """A limit on the size of files stands in for the full disk; finished stages stay."""
    folder = tmp_path / "full"
    limit = (finished[0] / "train.pt").stat().st_size // 2

    def shrink_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = finish(process(folder, "--test", photos), preexec_fn=shrink_the_disk)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.strip().splitlines()[-1]
    assert not list(folder.glob(".*.tmp"))
    done = finish(process(folder, "--test", photos))
    assert done.returncode == 0
    assert same(weights(folder, "tune"), weights(finished[0], "tune"))


# ---- the other backbones ------------------------------------------------------------------------
TRANSFORMERS = {
    "swinir_tiny": (SwinIR, {2: dict(dim=12, depths=(2,), heads=2, direct=True)}),
    "dat_tiny": (DAT, {2: dict(dim=32, groups=1, blocks=2, heads=2, expansion=2, direct=True)})}


@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_transformers_pass_all_stages_and_continue(arch, photos, monkeypatch, capsys, tmp_path):
    """With a moving average and stochastic depth, stopped in training and again in fine-tuning."""
    monkeypatch.setitem(models.PRESETS, arch, TRANSFORMERS[arch])
    family = arch.partition("_")[0]
    monkeypatch.setitem(PRESETS, (family, "quick"), replace(
        PRESETS[family, "quick"], ema=0.9, drop_path=0.5, search_patch=32, select_patch=32))
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    base = ["--arch", arch, "--scale", 2, "--prune", 0.3, "--steps", 5, "--search-steps", 2,
            "--tune-steps", 4, *SMALL, "--batch", 2, "--test", photos]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, _, errors = call(monkeypatch, capsys, *base, "--run", whole)
    assert code == 0, errors
    step, calls = torch.optim.Adam.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) in (3, 12):    # 5 + 1 again, 2·2 in the search: the 12th is in fine-tuning
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", interrupted)
        codes = [call(patched, capsys, *base, "--run", stopped)[0] for _ in range(3)]
    assert codes == [130, 130, 0]
    for stage in STAGES:
        assert same(weights(whole, stage), weights(stopped, stage)), stage
    assert not same(weights(whole, "select")["model"], weights(whole, "tune")["model"])
    dense, pruned = (models.load(whole / f"{stage}.pt") for stage in ("train", "tune"))
    assert parameters(pruned) < 0.95 * parameters(dense)


def test_averaged_weights_are_what_is_kept(photos, monkeypatch, capsys, tmp_path):
    """A moving average of 0.5 over two steps is the mean of the weights after each of them."""
    seen = []

    class Spy(fitting.AveragedModel):
        def update_parameters(self, model):
            seen.append([p.detach().clone() for p in model.parameters()])
            super().update_parameters(model)

    monkeypatch.setattr(fitting, "AveragedModel", Spy)
    monkeypatch.setitem(PRESETS, ("drn", "quick"),
                        replace(PRESETS["drn", "quick"], ema=0.5))
    code, *_ = call(monkeypatch, capsys, "--arch", "drn_tiny", "--steps", 2, *SMALL,
                    "--test", photos, "--run", tmp_path)
    assert code == 0
    first, second = seen
    for kept, a, b in zip(models.load(tmp_path / "train.pt").parameters(), first, second):
        assert torch.allclose(kept, (a + b) / 2, atol=1e-7)


def test_a_blind_run_sees_kernels_in_all_stages_and_continues(tmp_path, monkeypatch, capsys):
    """Stopped after the third training step and given again, it ends with the same weights."""
    sizes = dict(filters=(11, 9, 7, 5, 3), feats=16, groups=1, blocks=1, latent=12)
    monkeypatch.setitem(models.PRESETS, "dcls_tiny", (DCLS, {4: sizes}))
    monkeypatch.setattr(data, "PHOTOGRAPHS", ("chelsea.png",))
    losses, per_stage = [], {}
    blind_loss, finish_stage = dual.blind_loss, run.Run.finish

    def counted(kernel, true):
        assert true.shape == (1, 1, 31, 31)
        losses.append(1)
        return blind_loss(kernel, true)

    def finish_counted(self, stage, *arguments, **facts):
        per_stage[stage] = len(losses)
        losses.clear()
        return finish_stage(self, stage, *arguments, **facts)

    monkeypatch.setattr(dual, "blind_loss", counted)
    monkeypatch.setattr(run.Run, "finish", finish_counted)
    base = ["--arch", "dcls_tiny", "--prune", 0.1, "--pictures", 4, "--batch", 1, "--device", "cpu",
            "--steps", 5, "--search-steps", 1, "--tune-steps", 2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, errors = call(monkeypatch, capsys, *base, "--run", whole)
    assert code == 0, errors
    assert (per_stage["train"], per_stage["tune"]) == (5, 2)
    assert per_stage["search"] == 3 + 4              # the passes of one step, held-out batches
    # In each layer one pass for the first scores, and one for each round of up to 16 channels.
    rounds = [math.ceil(len(order) / 16) for order in weights(whole, "select")["kept"].values()]
    assert per_stage["select"] == 2 * sum(1 + n for n in rounds)             # 2 batches a pass

    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    save, steps = run.Run.save, []

    def stop(self, stage, step, parts):
        save(self, stage, step, parts)
        steps.append(step)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "save", stop)
    assert call(monkeypatch, capsys, *base, "--run", cut)[0] == 130
    assert call(monkeypatch, capsys, *base, "--run", cut)[0] == 0
    for stage in STAGES:
        assert same(weights(whole, stage), weights(cut, stage)), stage
    shown = np.asarray(Image.open(whole / "comparison.png"))
    true = data.photographs((1, 4), 31)[0].kernel[8:23, 8:23]
    inset = shown[44 + 216 - 60:44 + 216, -60:, 0]   # lower right of the last column
    assert np.array_equal(inset, upscale.kernel_picture(true, 4))
