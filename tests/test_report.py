"""The report: what is measured, when it is measured again, the table, the sheet of crops."""
import copy
import json

import numpy as np
import pytest
import torch

import data
import evaluate
import latency
import leaves
import models
import report
import upscale
from evaluate import Row
from run import Run
from tiny import tiny_drn

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


# ---- the sheet of crops -------------------------------------------------------------------------
def textured(height: int, width: int, box: tuple[slice, slice]) -> np.ndarray:
    """A grey picture with noise in one box."""
    image = np.full((height, width, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, image[box].shape)
    image[box] = noise
    return image


def test_the_crop_is_where_the_detail_is():
    image = textured(400, 480, (slice(112, 304), slice(256, 448)))
    assert report.busiest(image, 192) == (slice(112, 304), slice(256, 448))


def test_a_small_picture_is_shown_as_a_whole():
    rows, columns = report.busiest(textured(40, 50, (slice(8), slice(8))), 192)
    assert (rows.start, columns.start) == (0, 0)
    assert rows.stop >= 40
    assert columns.stop >= 50


def test_the_sheet_shows_every_upscaler_and_the_original():
    """Two pictures, one upscaler: 2 columns and 2 lines of 192 pixels, 18 for text, 4 between."""
    box = (slice(16, 208), slice(32, 224))
    originals = [textured(256, 256, box), textured(256, 256, box) // 2]
    pictures = data.Pictures(["a.png", "b.png"],
                             lambda i: data.Picture({1: originals[i][::4, ::4], 4: originals[i]}),
                             (1, 4))
    results = [255 - image for image in originals]
    rows = {"ours": [Row("a.png", 30.0, 0.9, 1.0, results[0]),
                     Row("b.png", 20.0, 0.9, 1.0, results[1])]}
    sheet = report.comparison(rows, pictures, 4)
    assert sheet.shape == (2 * (18 + 192) + 4, 2 * 192 + 4, 3)
    for i, top in enumerate((18, 18 + 192 + 4 + 18)):
        assert np.array_equal(sheet[top:top + 192, :192], results[i][box])
        assert np.array_equal(sheet[top:top + 192, 196:], originals[i][box])
        text = sheet[top - 18:top]
        assert text[:, :192].min() < 100 and text[:, 196:].min() < 100       # there are letters
    assert (sheet[:, 192:196] == 255).all()


def test_the_sheet_shows_the_middle_of_blur_kernels():
    """31×31 entries: the 15×15 in the middle, 4 pixels each, in the lower right of the crop."""
    image = textured(192, 192, (slice(192), slice(192)))
    true, found = np.random.default_rng(0).random((2, 31, 31), np.float32)
    pictures = data.Pictures(
        ["a"], lambda i: data.Picture({1: image[::4, ::4], 4: image}, true), (1, 4))
    sheet = report.comparison({"ours": [Row("a", 30.0, 0.9, 1.0, image, found)]}, pictures, 4)
    for left, kernel in ((0, found), (196, true)):
        inset = sheet[18 + 132:18 + 192, left + 132:left + 192]
        for colour in range(3):
            shown = upscale.kernel_picture(kernel[8:23, 8:23], 4)
            assert np.array_equal(inset[..., colour], shown)
