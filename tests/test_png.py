"""png.py and files.write_rows: the same pixels as were given, from bands of any height."""
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import files
import png
import run
from pictures import picture
from tiny import ROOT


def bands(image: np.ndarray, heights: list[int]) -> list[np.ndarray]:
    """Cuts an image into bands of these heights and a last one with the rest."""
    return np.split(image, np.cumsum(heights))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 70), (100, 1), (71, 33)])
def test_pillow_reads_back_what_was_written(channels, mode, height, width):
    image = np.random.RandomState(0).randint(0, 256, (height, width, channels), np.uint8)
    ramp = np.arange(height * width).reshape(height, width, 1) // 7     # where the filter matters
    for each in (image, np.broadcast_to(ramp.astype(np.uint8), image.shape)):
        cut = bands(each, [1, height // 3])
        content = b"".join(png.encode(cut, height, width, channels))
        read = Image.open(io.BytesIO(content))
        assert read.mode == mode
        assert np.array_equal(np.asarray(read).reshape(each.shape), each)


def test_a_photograph_is_hardly_larger_than_by_pillow():
    photograph = Image.open(ROOT / "assets" / "crops.png").convert("RGB")
    image = np.asarray(photograph)
    whole = io.BytesIO()
    photograph.save(whole, "PNG")
    ours = b"".join(png.encode([image], *image.shape))
    assert len(ours) < 1.1 * len(whole.getvalue())


@pytest.mark.parametrize("suffix", sorted(files.FORMATS))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_format_takes_rows_as_it_takes_a_whole_picture(suffix, channels, tmp_path):
    if channels in (2, 4) and not files.FORMATS[suffix].alpha:
        return
    image = np.random.RandomState(0).randint(0, 256, (9, 14, channels), np.uint8)
    image = image[..., 0] if channels == 1 else image
    files.write_rows(tmp_path / f"rows{suffix}", bands(image, [4]), 9, 14, channels)
    files.write_image(tmp_path / f"whole{suffix}", image)
    rows, whole = (files.decode(tmp_path / f"{name}{suffix}") for name in ("rows", "whole"))
    assert np.array_equal(rows.rgb, whole.rgb) and rows.grey == whole.grey
    if channels in (2, 4):
        assert np.array_equal(rows.alpha, whole.alpha)


def test_what_fails_half_way_leaves_what_was_there(tmp_path):
    def broken():
        yield picture(4, 9)
        raise FloatingPointError("half way")

    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(FloatingPointError):
        files.write_rows(tmp_path / "a.png", broken(), 8, 9, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "mine"


def test_ctrl_c_leaves_no_half_file(tmp_path):
    """In another process, which is interrupted when the file has grown."""
    code = """
import itertools, time, numpy as np, files, run
def endless():
    for i in itertools.count():
        if i == 3:
            print("now", flush=True)
        time.sleep(0.01)
        yield np.random.randint(0, 256, (64, 500, 3)).astype(np.uint8)
run.command(lambda: files.write_rows("a.png", endless(), 10**6, 500, 3))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        assert [file.suffix for file in tmp_path.iterdir()] == [".tmp"]
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_come_in_pieces(tmp_path):
    run.write_file(tmp_path / "x", iter([b"ab", b"", b"c"]))
    assert (tmp_path / "x").read_bytes() == b"abc"


def test_only_a_png_may_be_huge():
    source = "a.jpg"
    for suffix, side in ((".jpg", 5000), (".tif", 5000)):
        job = files.Job(source, files.Path(f"b{suffix}"))
        with pytest.raises(ValueError, match="row by row.*use .png"):
            files.check_size(job, (side, side), 4)
        files.check_size(job, (4000, 3000), 4)
    files.check_size(files.Job(source, files.Path("b.png")), (20000, 20000), 4)
