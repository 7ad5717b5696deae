"""The command as a user gives it: it goes from nothing to a report, survives kill -9 and ctrl-C to the last bit, and
answers wrong input with one sentence. A tiny DRN stands in for the published sizes, so that a whole run takes seconds."""
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from PIL import Image

import data
import dual
import evaluate
import models
import prune
import train

TINY = dict(feats=8, blocks=1)
DRIVER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import models, train, evaluate
models.PRESETS["tiny"] = (models.DRN, {{4: dict({', '.join(f'{k}={v}' for k, v in TINY.items())})}})
models.ARCHS += ("tiny",)
train.SAVE_SECONDS = 0
evaluate.run(train.main)
"""
QUICK = "--arch tiny --prune 0.3 --pictures 4 --patch 32 --batch 1 --steps 8 --search-steps 5 --tune-steps 6 --device cpu".split()


def picture(side: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(data.dead_leaves((seed, 0), side))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the pictures to report on."""
    test = tmp_path_factory.mktemp("test")
    for i in range(2):
        picture(seed=i).save(test / f"{i}.png")
    return test


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "tiny", (models.DRN, {4: TINY}))
    monkeypatch.setattr(models, "ARCHS", (*models.ARCHS, "tiny"))


def command(run, *more) -> list[str]:
    return [sys.executable, "-c", DRIVER, *QUICK, "--run", str(run), *map(str, more)]


call = partial(run_command, train)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """The folder and the output of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(command(run, "--test", folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def weights(run, stage: str) -> dict:
    return torch.load(run / f"{stage}.pt", weights_only=True)


def same(a, b) -> bool:
    """Equality of nested containers of tensors, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def wait_for(condition, process, seconds: float = 120):
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, "the process ended before it could be stopped"
        assert time.monotonic() - start < seconds
        time.sleep(0.002)


# ---- a whole run
def test_a_run_leaves_what_the_readme_says(finished):
    run, output = finished
    names = {f.name for f in run.iterdir()}
    assert {"train.pt", "search.pt", "select.pt", "tune.pt", "log.jsonl", "channels.json", "report.json", "comparison.png"} <= names
    assert "progress.pt" not in names and not [n for n in names if n.endswith(".tmp")]
    table = json.loads((run / "report.json").read_text())
    assert list(table) == ["bicubic", "dense", "cut", "pruned"] and all(name in output for name in table)
    dense, pruned = evaluate.load_model(run / "train.pt"), evaluate.load_model(run / "tune.pt")
    assert (table["pruned"]["params"], table["pruned"]["madds"]) == evaluate.count(pruned, 96, 96)
    assert table["pruned"]["params"] < 0.75 * table["dense"]["params"]
    chosen = json.loads((run / "channels.json").read_text())["widths"]
    assert pruned.widths == chosen and all(n in prune.candidates(dense.widths[k], 0.3) for k, n in chosen.items())
    stages = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in stages if "seconds" in line] == ["train", "search", "select", "tune", "report"]
    width, height = Image.open(run / "comparison.png").size
    assert width > 4 * 192 and height > 2 * 64


def test_the_report_is_what_evaluate_measures(finished, folder):
    run, _ = finished
    rows = evaluate.evaluate(models.inference(evaluate.load_model(run / "tune.pt")), data.open_folder(folder, (1, 4)))
    table = json.loads((run / "report.json").read_text())
    assert np.mean([r.psnr for r in rows]) == pytest.approx(table["pruned"]["psnr"], abs=1e-9)


def test_a_finished_run_is_shown_again_without_work(finished, monkeypatch, capsys, folder):
    run, output = finished
    before = {f.name: f.stat().st_mtime_ns for f in run.iterdir()}
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("opened data again"))
    code, again, _ = call(monkeypatch, capsys, *QUICK, "--run", run, "--test", folder)
    assert code == 0 and again.splitlines()[-7:] == output.splitlines()[-7:]
    assert before == {f.name: f.stat().st_mtime_ns for f in run.iterdir()}


def test_a_lost_report_needs_no_training_pictures(finished, monkeypatch, capsys, folder, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "report.json").unlink()
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("opened data again"))
    code, *_ = call(monkeypatch, capsys, *QUICK, "--run", run, "--test", folder)
    old, new = (json.loads((r / "report.json").read_text())["pruned"] for r in (finished[0], run))
    assert code == 0 and {**old, "seconds": 0} == {**new, "seconds": 0}


# ---- stop and continue
def test_kill_and_continue_ends_with_the_same_weights(finished, folder, tmp_path):
    """kill -9 in every stage, soon after the first state of it is on the disk."""
    whole, run = finished[0], tmp_path / "killed"
    for stage in ("train", "search", "select", "tune"):
        process = subprocess.Popen(command(run, "--test", folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def running():
            state = run / "progress.pt"
            return state.exists() and stage.encode() in state.read_bytes()[:2000] or (run / f"{stage}.pt").exists()

        wait_for(running, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(run, "--test", folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("train", "search", "select", "tune"):
        assert same(weights(run, stage), weights(whole, stage)), stage


def test_interrupt_saves_the_step_it_was_in(finished, folder, tmp_path):
    whole, run = finished[0], tmp_path / "interrupted"
    arguments = command(run, "--test", folder)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "progress.pt").exists(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    state = torch.load(run / "progress.pt", weights_only=True)
    logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert state["stage"] == "train" and state["step"] >= max(logged, default=0)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    steps = [line["step"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["stage"] == "train" and "step" in line]
    assert done.returncode == 0 and sorted(set(steps)) == list(range(1, 9)) and len(steps) <= 9       # nothing done twice
    assert same(weights(run, "tune"), weights(whole, "tune"))


def test_another_command_on_the_same_folder_is_refused(finished, monkeypatch, capsys, folder):
    run, _ = finished
    for flags, words in ((("--tune-steps", "7"), "--tune-steps 6, now it is 7"), (("--seed", "1"), "--seed 0, now it is 1"),
                         (("--prune", "0.5"), "--prune 0.3, now it is 0.5"),
                         (("--preset", "default"), "--preset quick, now it is default")):
        code, _, errors = call(monkeypatch, capsys, *QUICK, "--run", run, "--test", folder, *flags)
        assert code == 2 and words in errors and "Traceback" not in errors


def test_flags_can_be_corrected_before_any_work_is_done(bad, folder, monkeypatch, capsys, tmp_path):
    for pictures, expected in ((bad["small"], 1), (folder, 0)):
        code, *_ = call(monkeypatch, capsys, "--arch", "tiny", "--steps", 1, "--patch", 32, "--batch", 1, "--device", "cpu",
                        "--data", pictures, "--test", folder, "--run", tmp_path / "run")
        assert code == expected


TRANSFORMERS = {"swinir_tiny": (models.SwinIR, dict(dim=12, depths=(2,), heads=2, direct=True)),
                "dat_tiny": (models.DAT, dict(dim=32, groups=1, blocks=2, heads=2, expansion=2, direct=True))}


@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_transformers_go_through_all_stages_and_continue(arch, folder, monkeypatch, capsys, tmp_path):
    """With a moving average and stochastic depth, stopped in training and again in fine-tuning."""
    cls, sizes = TRANSFORMERS[arch]
    monkeypatch.setitem(models.PRESETS, arch, (cls, {2: sizes}))
    monkeypatch.setattr(models, "ARCHS", (*models.ARCHS, arch))
    own = train.OWN[arch.partition("_")[0], "quick"]
    for name, value in dict(ema=0.9, drop_path=0.5, search_patch=32, select_patch=32).items():
        monkeypatch.setitem(own, name, value)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    base = f"--arch {arch} --scale 2 --prune 0.3 --pictures 4 --patch 32 --batch 2 --steps 5 --search-steps 2 --tune-steps 4 " \
           f"--device cpu --test {folder}".split()
    code, output, errors = call(monkeypatch, capsys, *base, "--run", tmp_path / "whole")
    assert code == 0, errors
    step, calls = torch.optim.Adam.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) in (3, 12):                         # 5 + 1 again, 2·2 in the search: the 12th is in fine-tuning
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", interrupted)
        codes = [call(patched, capsys, *base, "--run", tmp_path / "stopped")[0] for _ in range(3)]
    assert codes == [130, 130, 0]
    for stage in ("train", "search", "select", "tune"):
        assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "stopped", stage)), stage
    assert not same(weights(tmp_path / "whole", "select")["model"], weights(tmp_path / "whole", "tune")["model"])
    model = evaluate.load_model(tmp_path / "whole" / "tune.pt")
    assert evaluate.count(model, 32, 32).params < 0.95 * evaluate.count(evaluate.load_model(tmp_path / "whole" / "train.pt"), 32, 32).params


def test_averaged_weights_are_what_is_kept(folder, monkeypatch, capsys, tmp_path):
    """ema 0.5 over two steps is the mean of the weights after each of them."""
    seen = []

    class Spy(train.AveragedModel):
        def update_parameters(self, model):
            seen.append([p.detach().clone() for p in model.parameters()])
            super().update_parameters(model)

    monkeypatch.setattr(train, "AveragedModel", Spy)
    monkeypatch.setitem(train.COMMON, "ema", 0.5)
    code, *_ = call(monkeypatch, capsys, *"--arch tiny --steps 2 --patch 32 --batch 1 --pictures 2 --device cpu".split(),
                    "--test", folder, "--run", tmp_path)
    kept = evaluate.load_model(tmp_path / "train.pt").parameters()
    assert code == 0 and len(seen) == 2
    assert all(torch.allclose(k, (a + b) / 2, atol=1e-7) for k, a, b in zip(kept, *seen))


def test_distance_to_the_teacher():
    """DRN: between the channel means of the last features; the others: L1 of the images; both in the native range."""
    from conftest import tiny_drn, tiny_swinir
    for tiny, native in ((tiny_swinir, 1), (tiny_drn, 255)):
        (student, _), (teacher, _), x = tiny(), tiny(), torch.rand(1, 3, 8, 8)
        with torch.no_grad():
            next(teacher.parameters()).mul_(0.9)
        with train.distillation(student, teacher) as distance:
            out = student(x)
            found = distance(x, out)
        if native == 1:
            expected = (out.images[4] - teacher(x).images[4]).abs().mean()
        else:
            seen = []
            for network in (student, teacher):
                hook = network.tail[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(1)))
                network(x)
                hook.remove()
            expected = (seen[0] - seen[1]).square().mean()
        assert found > 0 and torch.allclose(found, expected)


def test_learning_rate():
    args = train.SimpleNamespace(warmup=0.1, milestones=(), floor=0.0)
    assert [train.scheduled(args, 1.0, k, 100) for k in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])
    args.milestones = (0.5, 0.8)
    assert [train.scheduled(args, 1.0, k, 100) for k in (0, 49, 50, 80)] == pytest.approx([0.1, 1, 0.5, 0.25])


def test_a_blind_run_sees_kernels_in_all_stages_and_continues(tmp_path, monkeypatch, capsys):
    """Stopped after the third training step and given again, it ends with the same weights; the report degrades the
    built-in photographs, and its picture shows kernels."""
    sizes = dict(filters=(11, 9, 7, 5, 3), feats=16, groups=1, blocks=1, latent=12)
    monkeypatch.setitem(models.PRESETS, "dcls_tiny", (models.DCLS, {4: sizes}))
    monkeypatch.setattr(models, "ARCHS", (*models.ARCHS, "dcls_tiny"))
    monkeypatch.setattr(data, "PHOTOGRAPHS", ("chelsea.png",))
    seen, blind_loss = [], dual.blind_loss
    monkeypatch.setattr(dual, "blind_loss", lambda k, true: seen.append(true.shape) or blind_loss(k, true))
    base = ("--arch dcls_tiny --prune 0.1 --pictures 4 --steps 5 --search-steps 1 --tune-steps 2 --batch 1 --device cpu "
            "--run").split()
    code, out, err = call(monkeypatch, capsys, *base, tmp_path / "whole")
    assert code == 0, err
    assert set(seen) == {(1, 1, 31, 31)} and len(seen) > 5 + 5 + 2 + 8
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    normal, steps = train.Run.save, []

    def stop(run, stage, step, parts):
        normal(run, stage, step, parts)
        steps.append(step)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", stop)
    assert call(monkeypatch, capsys, *base, tmp_path / "cut")[0] == 130
    assert call(monkeypatch, capsys, *base, tmp_path / "cut")[0] == 0
    assert all(same(weights(tmp_path / "whole", stage), weights(tmp_path / "cut", stage)) for stage in ("train", "tune"))
    table = json.loads((tmp_path / "whole" / "report.json").read_text())
    pictures = data.photographs((1, 4), 31)
    assert table["bicubic"]["psnr"] == pytest.approx(evaluate.evaluate(partial(data.imresize, scale=4), pictures)[0].psnr)
    shown = np.asarray(Image.open(tmp_path / "whole" / "comparison.png"))
    true = evaluate.kernel_picture(pictures[0]["kernel"][8:23, 8:23], 4)
    assert np.array_equal(shown[18 + 192 - 60:18 + 192, -60:, 0], true)


# ---- weights from elsewhere
def save_official(tmp_path, arch="tiny"):
    model = models.build(arch)
    duals = dual.make_duals(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save([d.state_dict() for d in duals], tmp_path / "dual.pt")
    return model, duals


def test_pretrained_weights_are_taken_as_they_are(tmp_path, folder, monkeypatch, capsys):
    model, duals = save_official(tmp_path)
    base = ["--arch", "tiny", "--pictures", 3, "--patch", 32, "--batch", 1, "--test", folder, "--device", "cpu",
            "--pretrained", tmp_path / "model.pt"]
    code, *_ = call(monkeypatch, capsys, *base, "--pretrained-dual", tmp_path / "dual.pt", "--run", tmp_path / "a")
    state = weights(tmp_path / "a", "train")
    assert code == 0 and same(state["model"], dict(model.state_dict())) and same(state["duals"], [dict(d.state_dict()) for d in duals])
    monkeypatch.setitem(train.PRESETS["quick"], "dual_steps", 2)
    code, *_ = call(monkeypatch, capsys, *base, "--run", tmp_path / "b")             # duals are missing: only they are trained
    assert code == 0 and same(weights(tmp_path / "b", "train")["model"], state["model"])
    code, *_ = call(monkeypatch, capsys, *base, "--steps", 1, "--run", tmp_path / "c")
    assert code == 0 and not same(weights(tmp_path / "c", "train")["model"], state["model"])


@pytest.mark.parametrize("wrap", [None, "params", "params_ema"])
def test_official_transformer_files_bring_their_dual(wrap, folder, monkeypatch, capsys, tmp_path):
    """One dict with `dual_model.*` and derived buffers, bare or wrapped, as the release saves SwinIR and DAT."""
    cls, sizes = TRANSFORMERS["swinir_tiny"]
    monkeypatch.setitem(models.PRESETS, "swinir_tiny", (cls, {2: sizes}))
    monkeypatch.setattr(models, "ARCHS", (*models.ARCHS, "swinir_tiny"))
    model = models.build("swinir_tiny", 2)
    back, = dual.make_duals(model)
    state = {**model.state_dict(), **{f"dual_model.{k}": v for k, v in back.state_dict().items()},
             "layers.0.residual_group.blocks.1.attn_mask": torch.zeros(1, 64, 64)}
    torch.save({wrap: state} if wrap else state, tmp_path / "official.pth")
    base = ["--arch", "swinir_tiny", "--scale", 2, "--pictures", 2, "--patch", 32, "--batch", 1, "--test", folder,
            "--device", "cpu", "--run"]
    code, *_ = call(monkeypatch, capsys, *base, tmp_path / "a", "--pretrained", tmp_path / "official.pth")
    kept = weights(tmp_path / "a", "train")
    assert code == 0 and same(kept["model"], dict(model.state_dict())) and same(kept["duals"], [dict(back.state_dict())])
    code, *_ = call(monkeypatch, capsys, *base, tmp_path / "b", "--pretrained", tmp_path / "a" / "train.pt")   # ours do too
    assert code == 0 and same(weights(tmp_path / "b", "train"), kept)


def test_a_pruned_pretrained_network_needs_its_channels(tmp_path, folder, monkeypatch, capsys):
    dense = models.build("tiny")
    small = prune.cut(dense, {pair.name: range(pair.width // 2) for pair in dense.pairs()})
    torch.save(small.state_dict(), tmp_path / "model.pt")
    (tmp_path / "channels.txt").write_text("\n".join(map(str, small.widths.values())))
    monkeypatch.setitem(train.PRESETS["quick"], "dual_steps", 1)
    base = ["--arch", "tiny", "--pictures", 3, "--patch", 32, "--batch", 1, "--test", folder, "--device", "cpu",
            "--pretrained", tmp_path / "model.pt"]
    code, *_ = call(monkeypatch, capsys, *base, "--channels", tmp_path / "channels.txt", "--run", tmp_path / "a")
    assert code == 0 and evaluate.load_model(tmp_path / "a" / "train.pt").widths == small.widths
    code, _, errors = call(monkeypatch, capsys, *base, "--run", tmp_path / "b")
    assert code == 1 and "has shape (4, 8, 3, 3), this network needs (8, 8, 3, 3)" in errors


def test_budget_is_met(tmp_path, folder, monkeypatch, capsys):
    for kind in ("params", "madds"):
        run = tmp_path / kind
        arguments = [a for a in QUICK if a not in ("--prune", "0.3")] + ["--run", run, "--test", folder, "--budget", f"{kind}=0.7"]
        code, *_ = call(monkeypatch, capsys, *arguments)
        table = json.loads((run / "report.json").read_text())
        assert code == 0 and 0.99 * 0.7 <= table["pruned"][kind] / table["dense"][kind] <= 0.7


def test_a_larger_teacher_can_be_given(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setitem(models.PRESETS, "wide", (models.DRN, {4: dict(feats=12, blocks=1)}))
    monkeypatch.setattr(models, "ARCHS", (*models.ARCHS, "wide"))
    torch.save(models.build("wide").state_dict(), tmp_path / "wide.pt")
    results = []
    for name, flags in (("own", []), ("wide", ["--teacher", f"wide:{tmp_path / 'wide.pt'}"])):
        code, *_ = call(monkeypatch, capsys, *QUICK, "--run", tmp_path / name, "--test", folder, *flags)
        assert code == 0
        results.append(weights(tmp_path / name, "tune"))
    assert same(weights(tmp_path / "own", "select"), weights(tmp_path / "wide", "select")) and not same(*results)


# ---- bad input: one sentence, the right exit code
WRONG = [
    ("--arch drn_m", 2, "invalid choice: 'drn_m'"),
    ("--arch drn_s --scale 3", 2, "drn_s has no scale 3: choose one of 4, 8"),
    ("--arch drn_s --prune 1", 2, "--prune: 1 is outside [0, 1)"),
    ("--arch drn_s --prune -0.1", 2, "--prune: -0.1 is outside [0, 1)"),
    ("--arch drn_s --prune nan", 2, "--prune: nan is outside [0, 1)"),
    ("--arch drn_s --prune x", 2, "invalid float value: 'x'"),
    ("--arch drn_s --steps 0", 2, "--steps: 0 is below 1"),
    ("--arch drn_s --rate 0", 2, "--rate: 0 must be above 0"),
    ("--arch drn_s --seed -1", 2, "--seed: -1 is below 0"),
    ("--arch drn_s --patch 30", 2, "--patch 30 is not a multiple of the scale 4"),
    ("--arch drn_s --budget params=1.5", 2, "'params=1.5' is not params=F or madds=F"),
    ("--arch drn_s --teacher drn_l", 2, "'drn_l' is not ARCH:FILE"),
    ("--arch drn_s --preset paper", 2, "--preset paper needs --data DIR"),
    ("--arch drn_s --channels c.txt", 2, "belong to --pretrained FILE"),
    ("--arch dat_light --batch 1", 2, "--batch 1: dat_light has BatchNorm over the patches of a step, give at least 2"),
    ("--arch drn_s --round 6", 2, "--round: invalid choice: 6"),
    ("--arch drn_s --kernels triton", 1, "kernels triton cannot run here"),
    ("--arch drn_s --data missing", 1, "missing is missing: give a folder"),
    ("--arch drn_s --data {empty}", 1, "holds no picture"),
    ("--arch tiny --data {broken}", 1, "cannot read {broken}/a.png as a picture"),
    ("--arch tiny --data {small}", 1, "(20x20 pixels) is smaller than the patch (64)"),
    ("--arch tiny --data {mismatch}", 1, "HR/a.png (64x64) is not 4 times {mismatch}/LR_bicubic/X4/ax4.png (10x10)"),
    ("--arch tiny --pretrained {evil}", 1, "nothing in it was executed"),
    ("--arch tiny --pretrained {other}", 1, "weight head.weight has shape (16, 3, 3, 3), this network needs (8, 3, 3, 3)"),
    ("--arch tiny --teacher tiny:{other}", 1, "weight head.weight has shape (16, 3, 3, 3), this network needs (8, 3, 3, 3)"),
    ("--arch tiny --pretrained {good} --channels {channels}", 1, "has 3 channel numbers, this network needs 6"),
    ("--arch tiny --pretrained {good} --pretrained-dual {good}", 1, "not the list of weights expected here"),
    ("--arch tiny --steps 3 --patch 32 --batch 1 --pictures 3 --rate 1e30", 1, "of train: lower --rate"),
    ("--arch tiny --prune 0.3 --steps 1 --patch 32 --batch 1 --pictures 2", 1, "the search needs at least 3 pictures"),
]


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.marker),)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Paths of everything that is wrong with files."""
    root = tmp_path_factory.mktemp("bad")
    paths = {name: root / name for name in ("empty", "broken", "small", "mismatch")}
    for path in paths.values():
        path.mkdir()
    (paths["broken"] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    picture(20).save(paths["small"] / "a.png")
    for name, size in (("HR/a.png", 64), ("LR_bicubic/X4/ax4.png", 10)):
        (paths["mismatch"] / name).parent.mkdir(parents=True, exist_ok=True)
        picture(size).save(paths["mismatch"] / name)
    Evil.marker = root / "executed"
    files = {name: root / f"{name}.pt" for name in ("evil", "other", "good", "channels")}
    files["evil"].write_bytes(pickle.dumps(Evil()))
    torch.save(models.DRN("drn_s", 4, 16, 1).state_dict(), files["other"])
    torch.save(models.DRN("tiny", 4, **TINY).state_dict(), files["good"])
    files["channels"].write_text("4\n4\n4\n")
    return {**paths, **files}


@pytest.mark.parametrize("line, code, words", WRONG)
def test_bad_input_is_one_sentence(line, code, words, bad, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, _, errors = call(monkeypatch, capsys, *line.format(**bad).split(), "--device", "cpu")
    last = errors.strip().splitlines()[-1]
    assert found == code and words.format(**bad) in last and "error: " in last and "Traceback" not in errors
    assert not Evil.marker.exists()


def test_a_full_disk_is_one_sentence_and_loses_nothing(finished, folder, tmp_path):
    """A limit on the size of files stands in for the full disk: the stage that does not fit fails, the earlier stay."""
    run = tmp_path / "full"
    limit = (finished[0] / "train.pt").stat().st_size // 2
    done = subprocess.run(command(run, "--test", folder), capture_output=True, text=True, timeout=300,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.strip().splitlines()[-1] and not list(run.glob(".*.tmp"))
    done = subprocess.run(command(run, "--test", folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and same(weights(run, "tune"), weights(finished[0], "tune"))


# ---- presets
def test_the_paper_preset_is_the_papers():
    paper = train.PRESETS["paper"]
    assert (paper["patch"], paper["batch"], paper["steps"], paper["rate"], paper["floor"]) == (384, 32, 1_000_000, 1e-4, 1e-7)
    assert (paper["search_steps"], paper["epoch"], paper["search_batch"], paper["search_patch"]) == (100 * 25, 25, 16, 192)
    assert (paper["select_patch"], paper["select_batch"], paper["select_batches"], paper["per_round"]) == (192, 16, 10, 1)
    assert not paper["reuse"] and not paper["first_order"]
    assert all(preset.keys() == paper.keys() for preset in train.PRESETS.values())
    known = {*paper, *train.COMMON}
    assert all(own.keys() <= known for own in train.OWN.values())
    swinir, dat = ({**train.COMMON, **paper, **train.OWN[arch, "paper"]} for arch in ("swinir", "dat"))
    for network in (swinir, dat):
        assert (network["patch"], network["batch"], network["steps"], network["rate"]) == (256, 32, 500_000, 2e-4)
        assert [part * 500_000 for part in network["milestones"]] == [250_000, 400_000, 450_000, 475_000]
        assert network["warmup"] * 500_000 == 4_000 and network["search_decay"] == 0 and network["drop_path"] == 0.1
    assert (swinir["ema"], dat["ema"], swinir["betas"], dat["betas"]) == (0.999, 0, (0.9, 0.999), (0.9, 0.99))


def test_quick_is_chosen_and_said_without_a_gpu(finished):
    first = finished[1].splitlines()[0]
    assert "tiny x4 on" in first and "CPU threads" in first and "preset quick (given" not in first and "preset quick (chosen" in first
