"""The report: what is measured, when it is measured again, the table, the command report.py."""
import copy
import json
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from PIL import Image

import data
import dual
import evaluate
import latency
import leaves
import models
import report
import train
from backbones.drn import DRN
from backbones.swinir import SwinIR
from run import Run
from small_runs import QUICK, SIZES
from tiny import run_command, tiny_drn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with two pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        data.write_image(folder / f"{i}.png", leaves.dead_leaves((i, 0), 64))
    return str(folder)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {})


def measured(run, test) -> dict:
    """report.json of a small DRN on these pictures."""
    model, duals = tiny_drn()
    report.measure(run, dict(dense=models.checkpoint(small(model), duals)), test, CPU)
    return json.loads((run.folder / "report.json").read_text())


@pytest.fixture(autouse=True)
def known(monkeypatch):
    model, _ = tiny_drn()
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (type(model), {4: dict(feats=8, blocks=1)}))


def small(model):
    model.arch = "drn_tiny"
    return model


# ---- measuring ----------------------------------------------------------------------------------
def test_the_report_is_what_evaluate_measures(run, photos):
    table = measured(run, photos)
    model, _ = tiny_drn()
    rows = evaluate.evaluate(models.inference(model), data.open_folder(photos, (1, 4)))
    assert list(table) == ["bicubic", "dense"]
    assert list(table["bicubic"]) == ["psnr", "ssim", "seconds"]
    dense = table["dense"]
    assert dense["psnr"] == pytest.approx((rows[0].psnr + rows[1].psnr) / 2, abs=1e-12)
    assert dense["ssim"] == pytest.approx((rows[0].ssim + rows[1].ssim) / 2, abs=1e-12)
    assert (dense["params"], dense["madds"]) == evaluate.count(model, 96, 96)
    assert dense["latency"]["ratio"] == 1
    assert dense["latency"]["seconds"] > 0
    assert dense["madds_720p"] == evaluate.count(model, 180, 320).madds       # 320·4 = 1280


def test_networks_are_timed_beside_the_first(monkeypatch):
    """Cut and pruned have the same widths, and are timed as one."""
    dense, _ = tiny_drn()
    narrow = dense.with_widths({"up0.rcab0": 4})
    timed = []

    def interleaved(networks, low):
        timed.append([network.widths["up0.rcab0"] for network in networks.values()])
        assert low.shape == (1, 3, 96, 96)
        return {shape: latency.Timing(1.0, 0.0, shape[2] / 32, 0.0) for shape in networks}

    monkeypatch.setattr(latency, "interleaved", interleaved)
    found = report.times(dict(dense=dense, cut=narrow, pruned=copy.deepcopy(narrow)), CPU)
    assert timed == [[32, 4]]
    assert [timing.ratio for timing in found.values()] == [1, 0.125, 0.125]
    assert list(found) == ["dense", "cut", "pruned"]


def test_a_report_is_made_once_for_the_same_pictures(run, photos, tmp_path):
    assert not report.is_current(run, photos)
    measured(run, photos)
    assert report.is_current(run, photos)
    assert not report.is_current(run, None)                # the photographs, they were not it
    assert not report.is_current(run, "elsewhere")
    (tmp_path / "report.json").unlink()
    assert not report.is_current(run, photos)


def test_half_a_line_in_the_log_does_no_harm(run, photos):
    measured(run, photos)
    with open(run.folder / "log.jsonl", "a") as log:
        log.write('{"stage": "rep')                        # what kill -9 may leave
    assert report.is_current(run, photos)


# ---- the table ----------------------------------------------------------------------------------
def test_the_table(run, capsys):
    run.write_json("report.json", {
        "bicubic": dict(psnr=30.27551, ssim=0.80654, seconds=0.009),
        "dense": dict(psnr=31.2259, ssim=0.82556, seconds=7.119, params=1_234_567,
                      madds=109_922_000_000, madds_720p=687_012_000_000,
                      latency=dict(seconds=1.2721, spread=0.1, ratio=1.0, ratio_spread=0.0)),
        "pruned": dict(psnr=31.2729, ssim=0.8261, seconds=4.46, params=2_770_529,
                       madds=67_460_000_000, madds_720p=421_700_000_000,
                       latency=dict(seconds=0.954, spread=0.1, ratio=0.75, ratio_spread=0.01)),
        "cut": dict(psnr=31.016, ssim=0.82101, seconds=4.64, params=2_770_529,
                    madds=67_460_000_000, madds_720p=421_700_000_000)})
    report.print_table(run)
    assert capsys.readouterr().out == f"""
            PSNR-Y    SSIM  parameters  MAdds 720p  MAdds 96x96  fewer  s 96x96  faster
bicubic     30.276  0.8065           -           -            -      -        -       -
dense       31.226  0.8256   1,234,567     687.0 G     109.92 G   1.00    1.272    1.00
pruned      31.273  0.8261   2,770,529     421.7 G      67.46 G   1.63    0.954    1.33
cut         31.016  0.8210   2,770,529     421.7 G      67.46 G   1.63        -       -

{run.folder}/: report.json
"""


# ---- the command --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that trained, searched, selected and tuned, but has no report."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
        patch.setattr(report, "measure", lambda *a: None)
        patch.setattr(report, "print_table", lambda *a: None)
        patch.setattr(sys, "argv", ["train.py", *QUICK, "--run", str(folder)])
        train.main()
    return folder


@pytest.fixture
def whole(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_the_report_of_a_run_is_made_anew(whole, photos, monkeypatch, capsys):
    code, output, errors = run_command(report, monkeypatch, capsys, whole, "--test", photos)
    assert code == 0, errors
    table = json.loads((whole / "report.json").read_text())
    assert list(table) == ["bicubic", "dense", "cut", "pruned"]
    assert f"pruned    {table['pruned']['psnr']:8.3f}" in output
    html = (whole / "report.html").read_text()
    for shown in (f"{table['pruned']['psnr']:.3f}", "drn_tiny ×4, run whole",
                  f"python train.py {' '.join(QUICK)}", f"python report.py {whole} --test"):
        assert shown in html
    kept = report.read_checkpoint(whole / "select.pt")["kept"]
    orders = re.findall(r'data-order="([^"]*)"', html)
    assert [json.loads(order) for order in orders] == list(kept.values())
    columns = 1 + len(["bicubic", "dense", "pruned"])          # and the original, but not "cut"
    assert Image.open(whole / "comparison.png").size == (columns * 221 - 5, 2 * 265 - 5)

    # without --test the pictures are the same again
    (whole / "report.json").unlink()
    assert run_command(report, monkeypatch, capsys, whole)[0] == 0
    again = json.loads((whole / "report.json").read_text())
    assert again["pruned"]["psnr"] == table["pruned"]["psnr"]


def test_several_runs_and_files_are_compared(whole, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    call = partial(run_command, report, monkeypatch, capsys, "whole", "whole/select.pt",
                   "--test", photos)
    code, output, errors = call()
    assert code == 0, errors
    assert output == "wrote compare.html\n"
    html = (tmp_path / "compare.html").read_text()
    for name in ("bicubic", "whole dense", "whole pruned", "whole/select.pt"):
        assert f"<td>{name}</td>" in html
        assert html.count(f'data-version="{name}"') == 2
    assert "whole cut" not in html
    assert before == {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert call()[0] == 0, "its own page may be overwritten"


def test_a_strange_file_is_not_overwritten(whole, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "mine.html"
    output.write_text("<p>Dear diary")
    call = partial(run_command, report, monkeypatch, capsys, whole / "tune.pt", "--test", photos,
                   "--output", output)
    code, _, errors = call()
    assert code == 2
    assert "mine.html exists and is no page of report.py" in errors
    assert output.read_text() == "<p>Dear diary"
    assert call("--force")[0] == 0
    assert report.page.MARK in output.read_text()


@pytest.mark.parametrize("arguments, code, sentence", [
    (["{run}", "--output", "x.html"], 2, "--output and --force are for several runs"),
    (["{run}", "{run}"], 2, "given twice"),
    (["{run}/nothing.pt", "{run}"], 1, "nothing.pt does not exist"),
    (["{run}/..", "{run}"], 1, "is no run folder of train.py: it has no config.json"),
    (["{run}/state.pt"], 1, "does not say what network it is: python evaluate.py"),
    (["{run}/train.pt", "{run}/twice.pt"], 1, "do not enlarge the same small pictures"),
    (["{run}", "--test", "{run}/none"], 1, "none is missing"),
])
def test_bad_input_is_one_sentence(whole, monkeypatch, capsys, arguments, code, sentence):
    torch.save(report.read_checkpoint(whole / "train.pt")["model"], whole / "state.pt")
    monkeypatch.setitem(models.PRESETS, "swinir_light", (
        SwinIR, {2: dict(dim=12, depths=(1,), heads=2, direct=True)}))
    twice = models.build("swinir_light", 2)
    torch.save(models.checkpoint(twice, dual.make_duals(twice)), whole / "twice.pt")
    given = [argument.format(run=whole) for argument in arguments]
    found, _, errors = run_command(report, monkeypatch, capsys, *given)
    assert sentence in errors
    assert found == code
    assert "Traceback" not in errors


@pytest.mark.parametrize("kept", [None, {}, 5, {"down0": ["a"]}])
def test_a_selection_that_is_damaged_is_one_sentence(kept, whole, monkeypatch, capsys):
    content = report.read_checkpoint(whole / "select.pt")
    torch.save(content | dict(kept=kept), whole / "select.pt")
    code, _, errors = run_command(report, monkeypatch, capsys, whole)
    assert code == 1
    assert "select.pt is damaged (" in errors
    assert "give the train.py command again" in errors


def test_an_unfinished_run_has_no_report(whole, monkeypatch, capsys):
    (whole / "tune.pt").unlink()
    code, _, errors = run_command(report, monkeypatch, capsys, whole)
    assert code == 1
    assert "is not finished, it has no tune.pt: give its train.py command again" in errors
    assert not (whole / "report.json").exists()
