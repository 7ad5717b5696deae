"""preflight.py: what would fail after hours is one sentence before the first step, and what is
finished, or does not change the result, blocks nothing.
"""
import json
import shutil
from functools import partial

import pytest
import torch

import models
import report
import run
import train
from backbones.drn import DRN
from backbones.swinir import SwinIR
from small_runs import SIZES, SMALL, STAGES, log, photo, weights
from tiny import run_command, same

call = partial(run_command, train)
QUICK = ["--arch", "drn_tiny", "--prune", 0.3, "--steps", 2, "--search-steps", 1, "--tune-steps", 1,
         *SMALL]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    light = dict(dim=12, depths=(2,), heads=2, direct=True)
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
    monkeypatch.setitem(models.PRESETS, "swinir_tiny", (SwinIR, {4: light}))


@pytest.fixture
def photos(tmp_path):
    """A folder with a picture to report on."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo().save(folder / "0.png")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its test pictures."""
    root = tmp_path_factory.mktemp("whole")
    (root / "photos").mkdir()
    photo().save(root / "photos" / "0.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
        args = ["train.py", *QUICK, "--run", root / "run", "--test", root / "photos"]
        patched.setattr("sys.argv", [str(each) for each in args])
        train.main()
    return root


# ---- before the first step ----------------------------------------------------------------------
def cut_in_half(folder):
    blob = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(blob[:len(blob) // 2])


@pytest.mark.parametrize("more, words", [
    (["--test", "missing"], "missing is missing: give a folder of pictures"),
    (["--test", "empty"], "empty holds no picture"),
    (["--test", "small"], "0.png: an image of 16x16 pixels is too small to compare"),
    (["--test", "cut"], "1.png as a picture"),
    (["--budget", "params=.01"], "the budget of "),
    (["--budget", "madds=.01", "--widths", "uniform"], "cannot be met: layers of 4 channels"),
    (["--pictures", 2], "the search needs at least 3 pictures"),
    (["--teacher", "swinir_tiny:swinir.pt"], "--teacher swinir_tiny:swinir.pt: drn_tiny is "
     "compared with its teacher by the input of tail.2, which swinir_tiny has not: give a network"),
    (["--batch", 10**8], "--batch 100000000 patches of 32 pixels need "),
    (["--pictures", 10**8], "--pictures 100000000 of 384 pixels need "),
    (["--patch", 512], "--patch 512 is larger than the generated pictures of 384 pixels"),
    (["--device", "meta"], "'meta' cannot be used here: try cpu")])
def test_nothing_is_trained_in_vain(more, words, photos, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    photo(16).save(tmp_path / "small" / "0.png")
    shutil.copytree(photos, tmp_path / "cut")
    cut_in_half(tmp_path / "cut")
    torch.save(models.build("swinir_tiny").state_dict(), tmp_path / "swinir.pt")
    monkeypatch.setattr(run.Run, "repeat", lambda *a, **b: pytest.fail("trained in vain"))
    line = ["--arch", "drn_tiny", "--steps", 2, *SMALL, "--test", photos, "--run", "run", *more]
    if "--budget" not in more:
        line += ["--prune", 0.3]
    code, _, errors = call(monkeypatch, capsys, *line)
    assert code in (1, 2)
    assert words in errors.splitlines()[-1]


def test_what_was_refused_can_be_corrected(photos, monkeypatch, capsys, tmp_path):
    """The ratio that a budget implies is no flag that the user gave."""
    line = ["--arch", "drn_tiny", "--steps", 1, "--search-steps", 1, "--tune-steps", 1, *SMALL,
            "--run", tmp_path / "run"]
    assert call(monkeypatch, capsys, *line, "--test", "missing", "--budget", "params=.7")[0] == 1
    assert call(monkeypatch, capsys, *line, "--test", photos, "--budget", "params=.01")[0] == 1
    monkeypatch.setattr(train, "select_and_cut", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, capsys, *line, "--test", photos, "--budget", "params=.7")
    code, _, errors = call(monkeypatch, capsys, *line, "--test", photos, "--budget", "params=.6")
    assert code == 2
    assert "was made with --budget ['params', 0.7], now it is ['params', 0.6]" in errors


# ---- a finished run whose files are lost or damaged ---------------------------------------------
@pytest.mark.parametrize("stage", ["train", "search", "tune"])
def test_a_stage_that_is_gone_is_made_again_and_is_the_same(stage, whole, monkeypatch, capsys,
                                                            tmp_path):
    folder = shutil.copytree(whole / "run", tmp_path / "run")
    (folder / f"{stage}.pt").unlink()
    measured = []
    monkeypatch.setattr(report, "measure", lambda *a: measured.append(1))
    monkeypatch.setattr(report, "print_table", lambda run: None)
    code, _, errors = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test",
                           whole / "photos")
    assert code == 0, errors
    again = [line["stage"] for line in log(folder) if "seconds" in line][len(STAGES) + 1:]
    assert again == [stage]
    assert measured == [1], "the report is of what is gone"
    assert same(weights(folder, stage), weights(whole / "run", stage))


def test_wrong_widths_and_duals_are_damage(whole, monkeypatch, capsys, tmp_path):
    """Not to be told from the others by their form; the weights tell."""
    monkeypatch.setattr(report, "measure", lambda *a: None)
    monkeypatch.setattr(report, "print_table", lambda run: None)
    folder = shutil.copytree(whole / "run", tmp_path / "run")
    for stage, change in (("search", dict(widths={"down0": 4})), ("select", dict(kept={})),
                          ("tune", dict(duals=[]))):
        content = torch.load(folder / f"{stage}.pt", weights_only=True)
        torch.save(content | change, folder / f"{stage}.pt")
        code, said, errors = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test",
                                  whole / "photos")
        assert code == 0, errors
        assert f"{stage}.pt is damaged" in said
        assert same(weights(folder, stage), weights(whole / "run", stage))


@pytest.mark.parametrize("text", ["{", '{"dense": {"psnr": "high"}}'])
def test_a_damaged_report_is_made_again(text, whole, monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(whole / "run", tmp_path / "run")
    (folder / "report.json").write_text(text)
    monkeypatch.setattr(train, "open_data", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(report, "measure", lambda run, *_: shutil.copy(
        whole / "run" / "report.json", run.folder))
    code, said, _ = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", whole / "photos")
    assert code == 0
    assert "report.json is damaged" in said
    assert said.count("measured again") == 1


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"stage": 3}', '{"stage": "start"}', "half a",
                                  '{"stage": "report"}', '{"stage": "train", "loss": "x"}',
                                  '{"stage": "search", "alpha": 3, "step": 1}'])
def test_a_strange_line_of_the_log_is_left_out(line, tmp_path):
    good = dict(stage="train", step=1, loss=2.0)
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n")
    assert report.read_log(tmp_path) == [good, good]


def test_another_number_of_threads_is_told(whole, photos, monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(whole / "run", tmp_path / "run")
    (folder / "tune.pt").unlink()
    monkeypatch.setattr(report, "measure", lambda *a: None)
    monkeypatch.setattr(report, "print_table", lambda run: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    code, said, _ = call(monkeypatch, capsys, *QUICK, "--run", folder, "--test", photos)
    assert code == 0
    assert "note: this run was begun with threads 1, now it is 7: its weights will not be" in said
    starts = [line["threads"] for line in log(folder) if line["stage"] == "start"]
    assert starts == [1, 7]
