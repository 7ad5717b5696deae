"""files.py: files of every kind come out as 8-bit RGB, what is no picture as one sentence."""
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import files
from pictures import picture, save


def coloured(grey):
    """The (H, W, 3) of a grey picture."""
    return np.dstack([grey] * 3)


# ---- reading -------------------------------------------------------------------------------------
def test_colour(tmp_path):
    image = picture(5, 7)
    rgb, alpha, grey = files.decode(save(tmp_path / "rgb.png", image))
    assert np.array_equal(rgb, image)
    assert rgb.dtype == np.uint8
    assert alpha is None
    assert not grey


def test_grey(tmp_path):
    image = picture(5, 7)[..., 0]
    rgb, alpha, grey = files.decode(save(tmp_path / "l.bmp", image))
    assert np.array_equal(rgb, coloured(image))
    assert alpha is None
    assert grey


def test_transparency(tmp_path):
    image = picture(5, 7)
    opacity = picture(5, 7, 1)[..., 0]
    rgb, alpha, grey = files.decode(save(tmp_path / "rgba.png", np.dstack([image, opacity])))
    assert np.array_equal(rgb, image)
    assert np.array_equal(alpha, opacity)
    assert not grey
    grey_image = image[..., 0]
    rgb, alpha, grey = files.decode(save(tmp_path / "la.png", np.dstack([grey_image, opacity])))
    assert np.array_equal(rgb, coloured(grey_image))
    assert np.array_equal(alpha, opacity)
    assert grey


def test_black_and_white(tmp_path):
    white = picture(5, 7)[..., 0] > 127
    rgb, _, grey = files.decode(save(tmp_path / "bit.png", white))
    assert np.array_equal(rgb, coloured(white * np.uint8(255)))
    assert grey


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png")
    rgb, alpha, grey = files.decode(tmp_path / "p.png")
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert alpha is None
    assert not grey
    image.save(tmp_path / "t.png", transparency=1)  # colour 1 means: nothing is here
    rgb, alpha, _ = files.decode(tmp_path / "t.png")
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    wide = np.array([[0, 128, 129, 257 * 99, 40000, 65535]], np.uint16)
    rgb, alpha, grey = files.decode(save(tmp_path / name, wide))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 99, 156, 255]
    assert alpha is None
    assert grey


@pytest.mark.parametrize("array", [np.array([[1 << 20]], np.int32), np.zeros((2, 2), np.float32)])
def test_values_beyond_16_bits_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match="16 bits"):
        files.decode(save(tmp_path / "b.tif", array))


def test_cmyk(tmp_path):
    flat = np.full((16, 16, 4), (0, 255, 255, 0), np.uint8)  # magenta and yellow full: red
    Image.fromarray(flat, "CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    rgb, alpha, _ = files.decode(tmp_path / "cmyk.jpg")
    assert abs(rgb.reshape(-1, 3).mean(0) - (255, 0, 0)).max() < 4
    assert alpha is None


def test_a_turned_camera(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: show it rotated by 90 degrees clockwise
    image = picture(5, 7)
    rgb = files.decode(save(tmp_path / "turned.png", image, exif=exif)).rgb
    assert np.array_equal(rgb, np.rot90(image, -1))


@pytest.mark.parametrize("name, words", [
    ("truncated.png", "as a picture"),
    ("flipped.png", "as a picture"),
    ("empty.png", "as a picture"),
    ("text.png", "as a picture"),
    (".", "as a picture"),
    ("missing.png", "does not exist: check the path")])
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, name, words):
    whole = save(tmp_path / "whole.png", picture(64, 64)).read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[:len(whole) // 2])
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle:middle + 40])
    (tmp_path / "flipped.png").write_bytes(whole[:middle] + flipped + whole[middle + 40:])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=words) as caught:
        files.decode(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_too_large_is_not_decoded(tmp_path, monkeypatch):
    file = save(tmp_path / "whole.png", picture(64, 64))
    monkeypatch.setattr(files, "MAX_PIXELS", 64 * 64)
    files.decode(file)
    monkeypatch.setattr(files, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="64x64 pixels, above the limit"):
        files.decode(file)


# ---- writing -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.webp", "a.tif"])
def test_colour_is_written_without_loss(tmp_path, name):
    image = picture(9, 8)
    files.write_image(tmp_path / name, image)
    assert np.array_equal(files.decode(tmp_path / name).rgb, image)


def test_grey_is_written_as_grey_and_alpha_as_alpha(tmp_path):
    grey = picture(9, 8)[..., 0]
    files.write_image(tmp_path / "grey.png", grey)
    read = files.decode(tmp_path / "grey.png")
    assert read.grey
    assert np.array_equal(read.rgb, coloured(grey))
    rgba = np.dstack([picture(9, 8), grey])
    files.write_image(tmp_path / "rgba.png", rgba)
    assert np.array_equal(files.decode(tmp_path / "rgba.png").alpha, grey)


def test_jpeg_is_written_with_quality_95(tmp_path):
    image = picture(64, 64)
    files.write_image(tmp_path / "a.jpg", image)
    save(tmp_path / "expected.jpg", image, quality=95)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()


@pytest.mark.parametrize("name, array", [
    ("a.xyz", picture(9, 8)),
    ("noextension", picture(9, 8)),
    ("a.jpg", np.zeros((9, 8, 4), np.uint8)),  # JPEG has no transparency
    ("a.png", picture(9, 8).astype(float))])
def test_write_image_refuses_what_a_format_cannot_hold(tmp_path, name, array):
    with pytest.raises(ValueError, match=name):
        files.write_image(tmp_path / name, array)
    assert list(tmp_path.iterdir()) == []


def test_size_is_width_times_height():
    assert files.size(picture(5, 7)) == "7x5"
    assert files.size(picture(5, 7)[..., 0]) == "7x5"


# ---- pictures that other programs read, too ------------------------------------------------------
def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return (struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content)))


def png(width: int, height: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG file of equal rows; colour: 0 grey, 2 RGB, 4 grey with alpha."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data
            + chunk(b"IEND", b""))


def test_a_transparent_grey_of_16_bits(tmp_path):
    row = struct.pack(">3H", 0, 1000, 65535)
    key = chunk(b"tRNS", struct.pack(">H", 1000))
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, 0, row, key))
    rgb, alpha, grey = files.decode(tmp_path / "a.png")
    assert rgb[0, :, 0].tolist() == [0, 4, 255]
    assert alpha.tolist() == [[255, 0, 255]] * 2
    assert grey


def test_grey_with_alpha_of_16_bits_stays_grey(tmp_path):
    row = struct.pack(">4H", 256 * 7, 65535, 65535, 256 * 99)
    (tmp_path / "a.png").write_bytes(png(2, 2, 16, 4, row))
    rgb, alpha, grey = files.decode(tmp_path / "a.png")
    assert rgb[0].tolist() == [[7] * 3, [255] * 3]
    assert alpha[0].tolist() == [255, 99]
    assert grey


@pytest.mark.parametrize("kind, head", [
    (b"zTXt", b"note\0\0"), (b"iTXt", b"note\0\1\0\0\0"), (b"iCCP", b"profile\0\0")])
def test_a_long_comment_or_profile_does_no_harm(kind, head, tmp_path):
    comment = chunk(kind, head + zlib.compress(bytes(3_000_000)))
    (tmp_path / "a.png").write_bytes(png(1, 1, 8, 2, bytes([1, 2, 3]), comment))
    assert files.decode(tmp_path / "a.png").rgb.tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("kind", [2, 7, 12])       # the resolution is text, bytes, nan
def test_broken_exif_does_no_harm_and_the_picture_is_upright(kind, tmp_path):
    entries = struct.pack("<HHIHH", files.ORIENTATION, 3, 1, 6, 0)
    entries += struct.pack("<HHII", 0x011A, kind, 8 if kind == 2 else 1, 8 + 2 + 2 * 12 + 4)
    exif = b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + struct.pack("<ii", -1, -1)
    image = picture(16, 24)
    save(tmp_path / "a.jpg", image, exif=b"Exif\0\0" + exif, quality=100, subsampling=0)
    turned = files.decode(tmp_path / "a.jpg").rgb
    assert turned.shape == (24, 16, 3)
    assert np.abs(turned.astype(int) - np.rot90(image, -1)).mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_pillows(orientation, tmp_path):
    exif = Image.Exif()
    exif[files.ORIENTATION] = orientation
    file = save(tmp_path / "a.png", picture(5, 7), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert np.array_equal(files.decode(file).rgb, expected)


def test_postscript_is_refused_and_no_program_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **b: pytest.fail("started a program"))
    (tmp_path / "eps.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match=r"cannot read .*eps\.png as a picture"):
        files.decode(tmp_path / "eps.png")
    assert files.look(tmp_path / "eps.png") == files.Header(1, 1, False)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it is a folder or a device"):
        files.decode(tmp_path / "a.png")
