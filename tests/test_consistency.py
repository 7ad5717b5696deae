"""The map of where not to trust a result, the flag of upscale.py that writes it, its benchmark."""
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import consistency
import data
import dual
import models
import upscale
from backbones.drn import DRN
from bench import consistency as bench
from pictures import picture, save
from small_runs import SIZES
from tiny import fill, run_command, tiny_drn, tiny_swinir

call = partial(run_command, upscale)


def brute_difference(low, high, duals):
    """The whole picture at once, in float64."""
    x = torch.from_numpy(high).permute(2, 0, 1)[None].double()
    back = dual.way_back(x, len(high) // len(low), duals.double())[0].permute(1, 2, 0).numpy()
    duals.float()
    return np.abs(back - low).mean(2)


@pytest.mark.parametrize("tiny, scale, height", [
    (tiny_drn, 4, 300), (tiny_swinir, 4, 9), (partial(tiny_swinir, 3), 3, 41), (tiny_drn, 4, 33),
    (partial(tiny_drn, scale=8), 8, 70)])
@torch.no_grad()
def test_strips_do_not_show(tiny, scale, height, monkeypatch):
    monkeypatch.setattr(consistency, "STRIP", 32)
    _, duals = tiny()
    low = picture(height, 13)
    high = picture(height * scale, 13 * scale, 1)
    found = consistency.difference(low, high, duals)
    assert found.shape == (height, 13)
    assert np.abs(found - brute_difference(low, high, duals)).max() < 1e-3


def test_colours_of_the_map():
    """Black, red, yellow, white: a third of the range for each."""
    levels = np.array([[0, 16 / 3, 32 / 3, 16, 100, 8 / 3]])
    shown = consistency.heat_map(levels, 2)
    assert shown.shape == (2, 12, 3)
    assert shown[0, ::2].tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255],
                                      [255, 255, 255], [128, 0, 0]]
    assert np.array_equal(shown[:1], shown[1:]) and np.array_equal(shown[:, ::2], shown[:, 1::2])


# ---- upscale.py --consistency -------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A photograph, and the weights of drn_tiny with duals and without."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "PRESETS", {**models.PRESETS, "drn_tiny": (DRN, {4: SIZES})})
    model = fill(models.build("drn_tiny"))
    state = models.checkpoint(model, fill(dual.make_duals(model)))
    torch.save(state, "w.pt")
    torch.save(model.state_dict(), "official.pt")
    save(tmp_path / "photo.png", picture(20, 30))
    return tmp_path


FLAGS = ["--weights", "w.pt", "--device", "cpu", "--consistency"]


def test_the_map_lies_beside_the_result(here, monkeypatch, capsys):
    code, out, errors = call(monkeypatch, capsys, "photo.png", *FLAGS)
    assert code == 0, errors
    model, states = models.load_networks("w.pt")
    duals = dual.restore_duals(model, states)
    high = np.asarray(Image.open("photo_x4.png"))
    values = consistency.difference(picture(20, 30), high, duals)
    assert (f"photo_x4_consistency.png: mapped down again it differs by {values.mean():.2f} grey "
            f"levels on average, {values.max():.1f} at most") in out
    shown = np.asarray(Image.open("photo_x4_consistency.png"))
    assert np.array_equal(shown, consistency.heat_map(values, 4))


def test_neither_maps_nor_results_are_enlarged_or_overwritten(here, monkeypatch, capsys):
    save(here / "set" / "a.png", picture(8, 8))
    assert call(monkeypatch, capsys, "set", *FLAGS)[0] == 0
    made = sorted(file.name for file in (here / "set").iterdir())
    assert made == ["a.png", "a_x4.png", "a_x4_consistency.png"]
    assert call(monkeypatch, capsys, "set", *FLAGS, "--force")[0] == 0
    assert sorted(file.name for file in (here / "set").iterdir()) == made
    (here / "set" / "a_x4.png").unlink()
    code, _, errors = call(monkeypatch, capsys, "set", *FLAGS)
    assert code == 2 and "a_x4_consistency.png exists already" in errors


def test_without_the_flag_there_is_no_map(here, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "photo.png", *FLAGS[:-1])
    assert code == 0 and "mapped down" not in out
    assert not (here / "photo_x4_consistency.png").exists()


@pytest.mark.parametrize("flags, code, words", [
    (["--bicubic", "--scale", "4"], 2, "--consistency needs a network with duals"),
    (["--weights", "official.pt", "--arch", "drn_tiny"], 1,
     "official.pt holds no duals, the way back that --consistency needs")])
def test_without_duals_it_is_one_sentence(flags, code, words, here, monkeypatch, capsys):
    found, _, errors = call(monkeypatch, capsys, "photo.png", *flags, "--consistency")
    assert found == code
    assert words in errors and "Traceback" not in errors
    assert not (here / "photo_x4.png").exists()


def test_duals_that_have_not_learned_are_noticed(here, monkeypatch, capsys):
    state = torch.load("w.pt", weights_only=True)
    for tensors in state["duals"]:
        for tensor in tensors.values():
            tensor.zero_()
    torch.save(state, "zero.pt")
    code, out, _ = call(monkeypatch, capsys, "photo.png", *FLAGS, "--weights", "zero.pt")
    assert code == 0
    assert "do not rely on the map" in out
    model, _ = models.load_networks("w.pt")
    duals = dual.make_duals(model)
    dual.start_from_averages(duals)
    flat = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    torch.save(dict(state, model=flat, duals=[d.state_dict() for d in duals]), "flat.pt")
    save(here / "black.png", np.zeros((8, 8, 3), np.uint8))
    code, out, _ = call(monkeypatch, capsys, "black.png", *FLAGS, "--weights", "flat.pt")
    assert code == 0
    assert "do not rely" not in out


# ---- bench.consistency --------------------------------------------------------------------------
def test_agreement_by_hand():
    wrong = np.arange(400.0).reshape(20, 20)
    assert bench.agreement(wrong, wrong) == pytest.approx((1, 1, 379.5 / 199.5))
    assert bench.agreement(-wrong, wrong) == pytest.approx((-1, -1, 19.5 / 199.5))
    assert bench.agreement(np.ones((20, 20)), wrong)[:2] == (0, 0)


def test_the_true_error_is_that_of_the_pixels_below():
    low = picture(8, 8)
    truth = picture(16, 16, 1)
    high = truth.copy()
    high[6:8, 2:4] = 255 - truth[6:8, 2:4]
    duals = dual.make_duals(tiny_swinir(2)[0])
    found = bench.maps(low, high, truth, duals)
    assert list(found)[-1] == "true error"
    error = np.abs(high[6:8, 2:4].astype(float) - truth[6:8, 2:4]).mean()
    assert found["true error"][3, 1] == pytest.approx(error)
    assert np.count_nonzero(found["true error"]) == 1
    flat = bench.maps(np.full_like(low, 9), high, truth, duals)
    assert np.abs(flat["contrast of x"]).max() < 1e-9


def test_the_benchmark_prints_a_table_for_each_file(here, monkeypatch, capsys):
    save(here / "test" / "a.png", data.imresize(picture(24, 24), 3))
    code, out, errors = run_command(bench, monkeypatch, capsys, "w.pt", "--test", "test",
                                    "--degradation", "nearest", "--device", "cpu")
    assert code == 0, errors
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| map", "| D(P(x)) − x", "| bicubic − x", "| contrast of x", "| true error"]
    assert "| true error | 1.00 | 1.00 | " in out
