"""What train.py is given: weights from elsewhere, a budget, a teacher, and files that are wrong."""
import json
import pickle
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch

import dual
import evaluate
import latency
import models
import prune
import train
from backbones.drn import DRN
from backbones.swinir import SwinIR
from run import Run
from settings import PRESETS
from small_runs import QUICK, SIZES, SMALL, log, photo, weights
from tiny import (
    Evil,
    parameters,
    run_command,
    same,
    tiny_dat,
    tiny_dcls,
    tiny_drn,
    tiny_swinir,
)

call = partial(run_command, train)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a picture to report on."""
    folder = tmp_path_factory.mktemp("photos")
    photo().save(folder / "0.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))


# ---- weights from elsewhere ---------------------------------------------------------------------
def steps_of_training(folder) -> int:
    """How many steps the log says that stage "train" had."""
    [line] = [line for line in log(folder) if line["stage"] == "train" and "seconds" in line]
    return line["steps"]


def test_pretrained_weights_are_taken_as_they_are(tmp_path, photos, monkeypatch, capsys):
    torch.manual_seed(1)                     # other weights than those that a run begins with
    model = models.build("drn_tiny")
    duals = dual.make_duals(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save([d.state_dict() for d in duals], tmp_path / "dual.pt")
    monkeypatch.setitem(PRESETS, ("drn", "quick"),
                        replace(PRESETS["drn", "quick"], dual_steps=2))
    base = ["--arch", "drn_tiny", *SMALL, "--test", photos, "--pretrained", tmp_path / "model.pt"]

    code, *_ = call(monkeypatch, capsys, *base, "--pretrained-dual", tmp_path / "dual.pt",
                    "--run", tmp_path / "both")
    both = weights(tmp_path / "both", "train")
    assert code == 0
    assert steps_of_training(tmp_path / "both") == 0
    assert same(both["model"], dict(model.state_dict()))
    assert same(both["duals"], [dict(d.state_dict()) for d in duals])

    code, *_ = call(monkeypatch, capsys, *base, "--run", tmp_path / "missing")
    missing = weights(tmp_path / "missing", "train")        # duals are missing: they are trained
    assert code == 0
    assert steps_of_training(tmp_path / "missing") == 2
    assert same(missing["model"], both["model"])

    code, *_ = call(monkeypatch, capsys, *base, "--steps", 1, "--run", tmp_path / "on")
    assert code == 0
    assert steps_of_training(tmp_path / "on") == 1
    assert not same(weights(tmp_path / "on", "train")["model"], both["model"])


@pytest.mark.parametrize("wrap", [None, "params", "params_ema"])
def test_official_transformer_files_bring_their_dual(wrap, photos, monkeypatch, capsys, tmp_path):
    """One dict with `dual_model.*` and derived buffers, bare or wrapped, as the release saves."""
    sizes = dict(dim=12, depths=(2,), heads=2, direct=True)
    monkeypatch.setitem(models.PRESETS, "swinir_tiny", (SwinIR, {2: sizes}))
    torch.manual_seed(1)                     # other weights than those that a run begins with
    model = models.build("swinir_tiny", 2)
    back, = dual.make_duals(model)
    state = dict(model.state_dict())
    state["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(1, 64, 64)
    for name, tensor in back.state_dict().items():
        state[f"dual_model.{name}"] = tensor
    torch.save({wrap: state} if wrap else state, tmp_path / "official.pth")
    base = ["--arch", "swinir_tiny", "--scale", 2, *SMALL, "--test", photos]

    code, *_ = call(monkeypatch, capsys, *base, "--run", tmp_path / "theirs",
                    "--pretrained", tmp_path / "official.pth")
    kept = weights(tmp_path / "theirs", "train")
    assert code == 0
    assert same(kept["model"], dict(model.state_dict()))
    assert same(kept["duals"], [dict(back.state_dict())])

    code, *_ = call(monkeypatch, capsys, *base, "--run", tmp_path / "ours",
                    "--pretrained", tmp_path / "theirs" / "train.pt")
    assert code == 0
    assert same(weights(tmp_path / "ours", "train"), kept)


def test_a_pruned_pretrained_network_needs_its_channels(tmp_path, photos, monkeypatch, capsys):
    dense = models.build("drn_tiny")
    small = prune.cut(dense, {pair.name: range(pair.width // 2) for pair in dense.pairs()})
    torch.save(small.state_dict(), tmp_path / "model.pt")
    (tmp_path / "channels.txt").write_text("\n".join(map(str, small.widths.values())))
    monkeypatch.setitem(PRESETS, ("drn", "quick"),
                        replace(PRESETS["drn", "quick"], dual_steps=1))
    base = ["--arch", "drn_tiny", *SMALL, "--test", photos, "--pretrained", tmp_path / "model.pt"]
    code, *_ = call(monkeypatch, capsys, *base, "--channels", tmp_path / "channels.txt",
                    "--run", tmp_path / "a")
    assert code == 0
    assert models.load(tmp_path / "a" / "train.pt").widths == small.widths
    code, _, errors = call(monkeypatch, capsys, *base, "--run", tmp_path / "b")
    assert code == 1
    assert "has shape (4, 8, 3, 3), this network needs (8, 8, 3, 3)" in errors


def test_without_a_dual_weight_missing_duals_are_not_trained(tmp_path, photos, monkeypatch,
                                                              capsys):
    torch.save(models.build("drn_tiny").state_dict(), tmp_path / "model.pt")
    code, *_ = call(monkeypatch, capsys, "--arch", "drn_tiny", *SMALL, "--test", photos,
                    "--pretrained", tmp_path / "model.pt", "--run", tmp_path / "run",
                    "--dual-weight", 0)
    assert code == 0
    lines = [line for line in log(tmp_path / "run") if line["stage"] == "train"]
    assert [line["steps"] for line in lines] == [0]


# ---- a budget, a teacher ------------------------------------------------------------------------
@pytest.mark.parametrize("widths", ["searched", "uniform"])
@pytest.mark.parametrize("kind", ["params", "madds"])
def test_a_budget_is_met(kind, widths, tmp_path, photos, monkeypatch, capsys):
    search = ["--search-steps", "5"] if widths == "searched" else []
    code, *_ = call(monkeypatch, capsys, "--arch", "drn_tiny", "--steps", 8, "--tune-steps", 6,
                    *SMALL, *search, "--run", tmp_path, "--test", photos,
                    "--budget", f"{kind}=0.7", "--widths", widths)
    assert code == 0
    dense, pruned = (evaluate.count(models.load(tmp_path / f"{stage}.pt"), 96, 96)
                     for stage in ("train", "tune"))
    assert 0.99 * 0.7 <= getattr(pruned, kind) / getattr(dense, kind) <= 0.7


def fake_time(clock, file) -> float:
    """Milliseconds of a pass of the network in a checkpoint, by the clock of conftest.py."""
    network = latency.ready(models.load(file), torch.device("cpu"))
    start = clock.seconds
    network(torch.zeros(1, 3, 16, 16))
    return 1000 * (clock.seconds - start)


def test_a_budget_of_time_is_met(tmp_path, photos, monkeypatch, capsys, stairs):
    """By a clock that goes by stairs. What was measured is not measured again."""
    arguments = [a for a in QUICK if a not in ("--prune", "0.3")]
    arguments += ["--run", tmp_path, "--test", photos, "--budget", "latency=0.7", "--round", "4"]
    code, printed, _ = call(monkeypatch, capsys, *arguments)
    assert code == 0
    part = fake_time(stairs, tmp_path / "tune.pt") / fake_time(stairs, tmp_path / "train.pt")
    assert abs(part / 0.7 - 1) < 0.05
    found = json.loads((tmp_path / "channels.json").read_text())
    assert found["widths"] == models.load(tmp_path / "tune.pt").widths
    assert found["latency"]["device"] == latency.device_name(torch.device("cpu"))
    assert found["latency"]["asked"] == 0.7
    assert found["latency"]["ratio"] == pytest.approx(part)
    assert f"latency   {part:.3f} of the dense network's time, asked for were 0.7" in printed
    table = json.loads((tmp_path / "report.json").read_text())
    assert table["pruned"]["latency"]["ratio"] == pytest.approx(part)
    # a run that lost its search keeps what it measured
    for stage in ("search", "select", "tune"):
        (tmp_path / f"{stage}.pt").unlink()
    monkeypatch.setattr(latency, "time_pass", lambda *_: pytest.fail("measured again"))
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    again = json.loads((tmp_path / "channels.json").read_text())
    assert again["widths"] == found["widths"]


def test_a_time_out_of_reach_is_refused_before_the_search(tmp_path, photos, monkeypatch, capsys,
                                                          stairs):
    monkeypatch.setattr(prune.Search, "step", lambda *_: pytest.fail("searched in vain"))
    code, _, errors = call(monkeypatch, capsys, *QUICK, "--run", tmp_path, "--test", photos,
                           "--budget", "latency=0.05")
    assert code == 1
    said = errors.splitlines()[-1]
    assert said.startswith("error: --budget latency=0.05 cannot be met: on ")
    assert said.endswith("choose another budget or another --prune")


def test_parameters_and_madds_are_linear_in_every_width(tmp_path):
    """So train.cost_limit counts one network more for each pair, and no other."""
    for tiny in (tiny_drn, tiny_swinir, tiny_dat, tiny_dcls):
        model, _ = tiny()
        searcher = prune.Search(model, None, 0.3, multiple=1)
        widths = {name: each[1] for name, each in searcher.sizes().items()}
        for kind in ("params", "madds"):
            settings = replace(PRESETS["drn", "quick"], budget=(kind, 0.7))
            budget = train.cost_limit(Run(tmp_path, {}), settings, None, searcher.model)
            expected = getattr(evaluate.count(model.with_widths(widths), 96, 96), kind)
            assert budget.cost(widths) == pytest.approx(expected, rel=1e-12)


def test_a_larger_teacher_can_be_given(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setitem(models.PRESETS, "drn_wide", (DRN, {4: dict(feats=12, blocks=1)}))
    torch.save(models.build("drn_wide").state_dict(), tmp_path / "wide.pt")
    base = [*QUICK, "--test", photos]
    assert call(monkeypatch, capsys, *base, "--run", tmp_path / "own")[0] == 0
    assert call(monkeypatch, capsys, *base, "--run", tmp_path / "wide",
                "--teacher", f"drn_wide:{tmp_path / 'wide.pt'}")[0] == 0
    for stage, expected in (("select", True), ("tune", False)):
        found = same(weights(tmp_path / "own", stage), weights(tmp_path / "wide", stage))
        assert found == expected
    own, wide = (models.load(tmp_path / name / "tune.pt") for name in ("own", "wide"))
    assert parameters(own) == parameters(wide)


# ---- wrong files: one sentence, exit code 1 -----------------------------------------------------
@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Paths of everything that is wrong with files."""
    root = tmp_path_factory.mktemp("bad")
    paths = {name: root / name for name in ("empty", "broken", "small", "mismatch")}
    for path in paths.values():
        path.mkdir()
    (paths["broken"] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    photo(20).save(paths["small"] / "a.png")
    for name, size in (("HR/a.png", 64), ("LR_bicubic/X4/ax4.png", 10)):
        (paths["mismatch"] / name).parent.mkdir(parents=True, exist_ok=True)
        photo(size).save(paths["mismatch"] / name)
    for name in ("evil", "other", "good", "channels"):
        paths[name] = root / f"{name}.pt"
    paths["executed"] = root / "executed"                  # made by nothing but the evil file
    paths["evil"].write_bytes(pickle.dumps(Evil(paths["executed"])))
    torch.save(DRN("drn_s", 4, 16, 1).state_dict(), paths["other"])
    torch.save(DRN("drn_tiny", 4, **SIZES).state_dict(), paths["good"])
    paths["channels"].write_text("4\n4\n4\n")
    return paths


OTHER = "weight head.weight has shape (16, 3, 3, 3), this network needs (8, 3, 3, 3)"


@pytest.mark.parametrize("line, words", [
    ("--kernels triton", "kernels triton cannot run here"),
    ("--data missing", "missing is missing: give a folder"),
    ("--data {empty}", "holds no picture"),
    ("--data {broken}", "cannot read {broken}/a.png as a picture"),
    ("--data {small}", "(20x20 pixels) is smaller than the patch (64)"),
    ("--data {mismatch}",
     "HR/a.png (64x64) is not 4 times {mismatch}/LR_bicubic/X4/ax4.png (10x10)"),
    ("--pretrained {evil}", "nothing in it was executed"),
    ("--pretrained {other}", OTHER),
    ("--teacher drn_tiny:{other}", OTHER),
    ("--pretrained {good} --channels {channels}",
     "has 3 channel numbers, this network needs 6"),
    ("--pretrained {good} --pretrained-dual {good}", "not the list of weights expected here"),
    ("--steps 3 --patch 32 --batch 1 --pictures 3 --rate 1e30", "of train: lower --rate"),
    ("--prune 0.3 --steps 1 --patch 32 --batch 1 --pictures 2",
     "the search needs at least 3 pictures")])
def test_wrong_input_is_one_sentence(line, words, bad, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["--arch", "drn_tiny", *line.format(**bad).split(), "--device", "cpu"]
    code, _, errors = call(monkeypatch, capsys, *arguments)
    said = errors.strip().splitlines()[-1]
    assert code == 1
    assert said.startswith("error: ")
    assert words.format(**bad) in said
    assert "Traceback" not in errors
    assert not bad["executed"].exists()


def test_duals_that_do_not_fit_are_named(bad, monkeypatch, capsys, tmp_path):
    """Which file, and which of its duals."""
    duals = dual.make_duals(models.build("drn_tiny"))
    torch.save([duals[0].state_dict()], tmp_path / "one.pt")
    torch.save([duals[0].state_dict(), {}], tmp_path / "hollow.pt")
    for name, words in (("one.pt", "one.pt holds 1 duals, drn_tiny x4 has 2"),
                        ("hollow.pt", "hollow.pt, dual 1: weight dual_module.0.0.weight is miss")):
        code, _, errors = call(
            monkeypatch, capsys, "--arch", "drn_tiny", *SMALL, "--run", tmp_path / "run",
            "--pretrained", bad["good"], "--pretrained-dual", tmp_path / name)
        assert code == 1
        assert words in errors


def test_a_broken_picture_does_not_end_a_run(photos, monkeypatch, capsys, tmp_path):
    """It is named, skipped and counted at the end; --strict stops."""
    for i in range(20):
        photo(32, i).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"")
    arguments = ["--arch", "drn_tiny", *SMALL[2:], "--steps", 2, "--data", tmp_path, "--test",
                 photos, "--run", tmp_path / "run", "--cache", tmp_path / "cache"]
    code, _, errors = call(monkeypatch, capsys, *arguments, "--strict")
    assert code == 1
    assert "07.png as a picture" in errors.splitlines()[-1]
    code, printed, _ = call(monkeypatch, capsys, *arguments)
    assert code == 0
    lines = printed.splitlines()
    assert any(line.startswith("skipped") and "07.png as a picture" in line for line in lines)
    assert "19 of 20 pictures" in printed
    assert lines[-1].startswith("skipped   1 of 20 pictures")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_largest_patch_of_all_stages_decides_what_is_too_small(tmp_path):
    """Pictures of 32 pixels are enough to train, but not for the search."""
    small = replace(PRESETS["drn", "quick"], search_patch=64, select_patch=64)
    for i in range(4):
        photo(32, i).save(tmp_path / f"{i}.png")
    settings = replace(small, arch="drn_tiny", data=str(tmp_path), patch=32)
    args = Namespace(memory=1, cache=None, strict=False)
    assert len(train.open_data(Run(tmp_path / "a", {}), settings, args)) == 4
    with pytest.raises(ValueError, match="4 of 4 .* smaller than the patch .64."):
        train.open_data(Run(tmp_path / "b", {}), replace(settings, prune=0.3), args)
