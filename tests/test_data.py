"""data.py against brute force, PyTorch's own antialiased bicubic, files of every kind, and its promises on batches."""

import errno
import hashlib
import itertools
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data

RANDOM = np.random.RandomState(0)


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


# ---- MATLAB bicubic --------------------------------------------------------------------------------------------------

def cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x ** 3 - 2.5 * x ** 2 + 1
    return -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x <= 2 else 0.0


def brute_line(line, scale, edge):
    """One line of samples resized by the textbook formula, one tap at a time, in float64 with 1-based coordinates."""
    n, shrink, out = len(line), min(scale, 1), []
    for x in range(1, math.ceil(n * scale) + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        total = norm = 0.0
        for j in range(math.floor(u - 2 / shrink) - 1, math.ceil(u + 2 / shrink) + 2):
            k = j
            while not 1 <= k <= n:
                k = min(max(k, 1), n) if edge == "clamp" else (1 - k if k < 1 else 2 * n + 1 - k)
            total += cubic((u - j) * shrink) * float(line[k - 1])
            norm += cubic((u - j) * shrink)
        out.append(total / norm)
    return out


def brute_axis(x, axis, scale, edge):
    return np.apply_along_axis(brute_line, axis, x.astype(np.float64), scale, edge)


@pytest.mark.parametrize("edge", ["clamp", "mirror"])
@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
def test_imresize_equals_brute_force(scale, edge):
    for shape in [(13, 37), (5, 2), (1, 4)]:  # a border in reach from both sides, more rows than one band of 16
        image = picture(*shape)
        expected = image
        for axis in (0, 1):
            expected = np.clip(np.floor(brute_axis(expected, axis, scale, edge) + 0.5), 0, 255).astype(np.uint8)
        assert np.array_equal(data.imresize(image, scale, edge), expected)
        assert np.array_equal(data.imresize(image[..., 1], scale, edge), expected[..., 1])
        x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 7 - 20
        plain = brute_axis(brute_axis(x.numpy(), 2, scale, edge), 3, scale, edge)
        assert np.abs(data.resize(x, scale, edge).numpy() - plain).max() < 1e-11
        assert np.abs(data.resize(x.float(), scale, edge).numpy() - plain).max() < 1e-4


def test_imresize_keeps_what_was_verified():
    """The hash of the version that reproduced all 57 LR images of Set5 and Set14 without a differing pixel."""
    image = picture(96, 132)
    digest = hashlib.sha256(b"".join(data.imresize(image, 1 / s).tobytes() for s in (2, 3, 4))).hexdigest()
    assert digest == "0cf365b0943b1e52835e10b2d2fd3bd39325fb2c4bc8d3d8ede06fb66dc148ac"


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_resize_equals_torch_on_a_mirrored_input(factor):
    x = torch.rand(2, 3, 5 * factor, 7 * factor, dtype=torch.float64)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (3 * factor,) * 2, (3 * factor,) * 2), "symmetric"))
    expected = F.interpolate(padded, scale_factor=1 / factor, mode="bicubic", antialias=True)[..., 3:-3, 3:-3]
    got = data.resize(x, 1 / factor, "mirror")
    assert got.shape == (2, 3, 5, 7) and got.is_contiguous()
    assert (got - expected).abs().max() < 1e-12


def test_resize_refuses_bad_arguments():
    for call in (lambda: data.resize(torch.zeros(3, 3, dtype=torch.uint8), 2), lambda: data.resize(torch.zeros(3), 2),
                 lambda: data.imresize(np.zeros((3, 3), np.float32), 2), lambda: data.imresize(picture(3, 3), 0),
                 lambda: data.imresize(picture(3, 3), 2, "wrap"), lambda: data.imresize(picture(0, 3), 2)):
        with pytest.raises(ValueError):
            call()


# ---- image files -----------------------------------------------------------------------------------------------------

def test_decode_grey_and_colour(tmp_path):
    image, grey = picture(5, 7), picture(5, 7)[..., 0]
    alpha = picture(5, 7, 1)[..., 0]
    rgb, a, is_grey = data.decode(save(tmp_path / "rgb.png", image))
    assert np.array_equal(rgb, image) and a is None and not is_grey and rgb.dtype == np.uint8
    rgb, a, is_grey = data.decode(save(tmp_path / "l.bmp", grey))
    assert np.array_equal(rgb, np.dstack([grey] * 3)) and a is None and is_grey
    rgb, a, is_grey = data.decode(save(tmp_path / "la.png", np.dstack([grey, alpha])))
    assert np.array_equal(rgb, np.dstack([grey] * 3)) and np.array_equal(a, alpha) and is_grey
    rgb, a, is_grey = data.decode(save(tmp_path / "rgba.png", np.dstack([image, alpha])))
    assert np.array_equal(rgb, image) and np.array_equal(a, alpha) and not is_grey
    Image.fromarray(grey > 127).save(tmp_path / "bit.png")
    rgb, a, is_grey = data.decode(tmp_path / "bit.png")
    assert np.array_equal(rgb, np.dstack([(grey > 127) * np.uint8(255)] * 3)) and is_grey


def test_decode_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png")
    rgb, alpha, grey = data.decode(tmp_path / "p.png")
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]] and alpha is None and not grey
    image.save(tmp_path / "t.png", transparency=1)
    rgb, alpha, grey = data.decode(tmp_path / "t.png")
    assert rgb.tolist() == [[[10, 20, 30], [40, 50, 60]]] and alpha.tolist() == [[255, 0]]


def test_decode_16_bit_is_scaled_not_clipped(tmp_path):
    wide = np.array([[0, 128, 129, 257 * 99, 40000, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        rgb, alpha, grey = data.decode(save(tmp_path / name, wide))
        assert rgb[0, :, 0].tolist() == [0, 0, 1, 99, 156, 255] and grey and alpha is None
    with pytest.raises(ValueError, match="16 bits"):
        data.decode(save(tmp_path / "b.tif", np.array([[1 << 20]], np.int32)))
    with pytest.raises(ValueError, match="16 bits"):
        data.decode(save(tmp_path / "c.tif", np.zeros((2, 2), np.float32)))


def test_decode_cmyk_and_exif_rotation(tmp_path):
    flat = np.full((16, 16, 4), (0, 255, 255, 0), np.uint8)  # cyan 0, magenta and yellow full: red
    Image.fromarray(flat, "CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    rgb, alpha, _ = data.decode(tmp_path / "cmyk.jpg")
    assert abs(rgb.reshape(-1, 3).mean(0) - (255, 0, 0)).max() < 4 and alpha is None
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = picture(5, 7)
    rgb = data.decode(save(tmp_path / "turned.png", image, exif=exif)).rgb
    assert np.array_equal(rgb, np.rot90(image, -1))


def test_decode_refuses_what_is_no_picture(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole.png", picture(64, 64)).read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("truncated.png", "empty.png", "text.png", "missing.png", "."):
        with pytest.raises(ValueError) as caught:
            data.decode(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(data, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="64x64 pixels, above the limit"):
        data.decode(tmp_path / "whole.png")


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    data.write(target, b"old")
    assert target.read_bytes() == b"old"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a disk that is full after 1000 bytes
    try:
        with pytest.raises(OSError, match="a.bin"):
            data.write(target, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="a.bin .No space left"):
        data.write(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_write_refuses_bad_places(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match=f"cannot write {path}"):
            data.write(path, b"new")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    data.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"


def test_write_image(tmp_path):
    image, rgba = picture(9, 8), RANDOM.randint(0, 256, (9, 8, 4)).astype(np.uint8)
    for name, array in (("a.png", image), ("a.PNG", image[..., 0]), ("a.webp", image), ("a.tif", image)):
        data.write_image(tmp_path / name, array)
        assert np.array_equal(data.decode(tmp_path / name).rgb, np.dstack([array] * 3) if array.ndim == 2 else array)
    data.write_image(tmp_path / "b.png", rgba)
    assert np.array_equal(data.decode(tmp_path / "b.png").alpha, rgba[..., 3])
    for name, array in (("a.xyz", image), ("noextension", image), ("a.jpg", rgba), ("a.png", image.astype(float))):
        with pytest.raises(ValueError, match=name):
            data.write_image(tmp_path / name, array)


# ---- sets of pictures ------------------------------------------------------------------------------------------------

def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[s], b[s]) for s in a)


def test_any_folder(tmp_path):
    high = picture(18, 23)
    for name in ("b.PNG", "sub/a.bmp", "a.TIFF"):
        save(tmp_path / name, high)
    save(tmp_path / ".hidden.png", high)
    (tmp_path / "notes.txt").write_text("no picture")
    p = data.open_folder(tmp_path, (4, 1, 2))
    assert p.names == ["a.TIFF", "b.PNG", "sub/a.bmp"] and p.scales == (1, 2, 4) and len(p) == 3
    y = p[1]
    assert {s: x.shape for s, x in y.items()} == {1: (4, 5, 3), 2: (8, 10, 3), 4: (16, 20, 3)}
    assert np.array_equal(y[4], high[:16, :20]) and np.array_equal(y[2], data.imresize(high[:16, :20], 1 / 2))
    assert np.array_equal(y[1], data.imresize(high[:16, :20], 1 / 4))
    assert [same(a, y) for a in p] == [True] * 3


@pytest.mark.parametrize("high, low", [("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_train_LR_bicubic"),
                                       ("DF2K/DF2K_HR", "DF2K/DF2K_LR_bicubic"), ("HR", "LR_bicubic")])
def test_layouts_use_the_files_and_make_the_others(tmp_path, high, low):
    originals = {name: picture(18, 23, i) for i, name in enumerate(("0001", "0002"))}
    for name, image in originals.items():
        save(tmp_path / high / f"{name}.png", image)
    x4, x2 = picture(4, 5, 9), picture(9, 11, 9)  # 18 = 2·9, but 16 = 4·4: the ×2 file is larger than twice ×4
    save(tmp_path / low / "X4/0001x4.png", x4)
    save(tmp_path / low / "X2/0001x2.png", x2)
    p = data.open_folder(tmp_path, (1, 2, 4))
    assert p.names == ["0001.png", "0002.png"]
    assert same(p[0], {1: x4, 2: x2[:8, :10], 4: originals["0001"][:16, :20]})
    made = originals["0002"][:16, :20]
    assert same(p[1], {1: data.imresize(made, 1 / 4), 2: data.imresize(made, 1 / 2), 4: made})
    assert same(data.open_folder(tmp_path, (1, 2))[0], {1: x2, 2: originals["0001"][:18, :22]})


def test_df2k_goes_before_div2k(tmp_path):
    save(tmp_path / "DIV2K/DIV2K_train_HR/0001.png", picture(8, 8))
    save(tmp_path / "DF2K/DF2K_HR/f.png", picture(8, 8))
    assert data.open_folder(tmp_path, (1, 2)).names == ["f.png"]


@pytest.mark.parametrize("size", [(3, 5), (5, 5), (4, 4), (4, 6)])
def test_sizes_that_do_not_match(tmp_path, size):
    save(tmp_path / "HR/a.png", picture(18, 23))
    save(tmp_path / "LR_bicubic/X4/ax4.png", picture(*size))
    p = data.open_folder(tmp_path, (1, 4))
    with pytest.raises(ValueError) as caught:
        p[0]
    for part in ("HR/a.png", "23x18", "X4/ax4.png", f"{size[1]}x{size[0]}"):
        assert part in str(caught.value)


def test_open_folder_refuses(tmp_path):
    save(tmp_path / "benchmark/Set5/HR/a.png", picture(8, 8))
    save(tmp_path / "benchmark/Set5/LR_bicubic/X2/ax2.png", picture(4, 4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name, words in (("missing", "missing"), ("file", "a file"), ("empty", "no picture"), ("benchmark", "mixes")):
        with pytest.raises(ValueError, match=words):
            data.open_folder(tmp_path / name, (1, 2))
    for scales in [(2, 4), (1,), (1, 3, 4), ()]:
        with pytest.raises(ValueError, match="scales"):
            data.open_folder(tmp_path / "benchmark/Set5", scales)
    save(tmp_path / "small/a.png", picture(3, 9))
    with pytest.raises(ValueError, match="9x3"):
        data.open_folder(tmp_path / "small", (1, 4))[0]


def test_cache_limit_and_sharing(tmp_path, monkeypatch):
    for i in range(4):
        save(tmp_path / f"{i}.png", picture(8, 8, i))
    read, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path: read.append(path.stem) or decode(path))
    one = 3 * (64 + 16)  # bytes of one picture and its half
    p = data.open_folder(tmp_path, (1, 2), limit=2 * one + 10)
    assert read == []
    first = [p[i] for i in (0, 1, 2, 3)]
    part = p[1:4]
    assert len(part) == 3 and part.names == ["1.png", "2.png", "3.png"] and part.scales == (1, 2)
    assert all(same(a, b) for a, b in zip(first, p)) and same(part[-1], first[3]) and same(part[1:][0], first[2])
    assert "".join(read) == "0123" + "23" + "3" + "2"  # 0 and 1 stayed, the others were read again
    with pytest.raises(IndexError):
        part[3]


def test_blurred_set_is_matched_by_number(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / "gt" / f"img_{i}_gt.png", picture(17, 24, i))
        save(tmp_path / "lr_x4" / f"im_{i}.png", picture(4, 6, 100 + i))
    (tmp_path / "gt_k_x4").mkdir()
    p = data.open_folder(tmp_path, (1, 4))
    assert p.names == ["img_10_gt.png", "img_1_gt.png", "img_2_gt.png"]
    for y, i in zip(p, (10, 1, 2)):
        assert same(y, {1: picture(4, 6, 100 + i), 4: picture(17, 24, i)[:16]})
    with pytest.raises(ValueError, match="img_10_gt.png has no blurred picture .* in .*lr_x2: .* another scale"):
        data.open_folder(tmp_path, (1, 2))
    (tmp_path / "lr_x4" / "im_2.png").unlink()
    with pytest.raises(ValueError, match="img_2_gt.png has no blurred picture"):
        data.open_folder(tmp_path, (1, 4))


def test_photographs():
    p = data.photographs((1, 4))
    assert len(p) == 8 and p.names[0] == "astronaut" and "ihc" in p.names
    y = p[0]
    assert y[4].shape == (512, 512, 3) and same(y, {1: data.imresize(y[4], 1 / 4), 4: y[4]})
    assert all(x[4].shape[0] == 4 * x[1].shape[0] and x[4].std() > 20 for x in p[1:3])


def test_blurred_photographs_are_always_the_same(monkeypatch):
    drawn, blind_kernels = [], data.blind_kernels
    monkeypatch.setattr(data, "blind_kernels", lambda *args: drawn.append(blind_kernels(*args)) or drawn[-1])
    plain, a, b = data.photographs((1, 4)), data.photographs((1, 4), 31), data.photographs((1, 4), 31)
    for i in (1, 2):
        assert same(a[i], b[i]) and np.array_equal(a[i]["kernel"], b[i]["kernel"])
        assert a[i]["kernel"].shape == (31, 31) and a[i]["kernel"].dtype == np.float32
        assert np.array_equal(a[i][4], plain[i][4]) and a[i][1].shape == plain[i][1].shape
        detail, sharp = (np.abs(np.diff(p[i][1].astype(int), axis=0)).mean() for p in (a, plain))
        assert detail < 0.8 * sharp
    assert len(drawn) == 4 and torch.equal(drawn[0], drawn[1]) and (drawn[0] - drawn[2]).abs().max() > 0.001


# ---- synthetic pictures ----------------------------------------------------------------------------------------------

def test_dead_leaves_depend_on_the_seed_only():
    for side in (64, 50):  # 50 is no multiple of 4, the coarseness of the depth map
        image = data.dead_leaves(7, side)
        assert image.shape == (side, side, 3) and image.dtype == np.uint8 and image.std() > 10
        assert np.array_equal(image, data.dead_leaves(7, side)) and not np.array_equal(image, data.dead_leaves(8, side))


def test_radii_follow_their_density():
    radii = np.sort(data._radii(np.random.default_rng(0), 200_000, 3.0, 100))
    for low, high in [(3, 4), (4, 10), (10, 50), (50, 200)]:
        def mass(a, b):  # the integral of r^-3 (100 + 2r)^2
            return 5000 * (a ** -2 - b ** -2) + 400 * (1 / a - 1 / b) + 4 * math.log(b / a)
        share = ((radii >= low) & (radii < high)).mean()
        assert abs(share - mass(low, high) / mass(3, 200)) < 0.005


def test_cover_leaves_nothing_and_paints_each_pixel_once():
    painted = np.zeros((80, 80), int)

    def paint(box, seen, radius, dy, dx):
        painted[box] += seen
        assert seen.shape == (len(dy), len(dx)) or seen.shape == (dy.size, dx.size)
    free = data._cover(np.random.default_rng(0), 80, 3, paint)
    assert painted.max() == 1 and free.mean() <= data.UNCOVERED and np.array_equal(painted == 0, free)


def test_noise_has_its_spectrum():
    for slope in (0.5, 2.0):
        noise = data._noise(np.random.default_rng(0), 256, slope)
        power = np.abs(np.fft.fft2(noise)) ** 2
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
        rings = [power[(radius > f) & (radius < 1.2 * f)].mean() for f in (0.02, 0.2)]
        assert abs(noise.std() - 1) < 1e-4 and abs(noise.mean()) < 1e-4
        assert abs(math.log(rings[0] / rings[1], 10) / 2 - slope) < 0.1


def test_generate_is_the_same_in_any_number_of_processes():
    p = data.generate(3, 32, (1, 2), seed=5, workers=1)
    q = data.generate(3, 32, (1, 2), seed=5, workers=2)
    assert len(p) == 3 and all(same(a, b) for a, b in zip(p, q)) and same(p[1:][0], p[1])
    assert np.array_equal(p[2][2], data.dead_leaves((5, 2), 32))
    assert np.array_equal(p[2][1], data.imresize(p[2][2], 1 / 2)) and not same(p[0], p[1])
    for arguments in ((0, 32, (1, 2), 0), (1, 33, (1, 2), 0), (1, 32, (1, 2), -1)):
        with pytest.raises(ValueError, match="cannot generate"):
            data.generate(*arguments)


def test_generate_in_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import data, torch\ntorch.rand(300, 300) @ torch.rand(300, 300)\n"
                      "print(len(data.generate(4, 32, (1, 2), 0, workers=2)))\n")
    run = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:data", script], capture_output=True,
                         text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)})
    assert (run.returncode, run.stdout) == (0, "4\n"), run.stderr


# ---- training batches ------------------------------------------------------------------------------------------------

def coordinates(height, width):
    """A picture at scales 1, 2, 4 whose pixels say where they are: red row, green column, blue scale."""
    y = {}
    for s in (1, 2, 4):
        rows, columns = np.mgrid[:height * s, :width * s]
        y[s] = np.stack([rows, columns, np.full_like(rows, s)], -1).astype(np.uint8)
    return y


def located(count=3):
    return data.Pictures([f"p{i}" for i in range(count)], lambda i: coordinates(20 + i, 30 - i), (1, 2, 4))


def take(pictures, number, **options):
    return list(itertools.islice(data.batches(pictures, 32, 4, 1, **options), number))


def equal(a, b):
    return all(torch.equal(a[s], b[s]) for s in a)


def test_batches_are_aligned_and_use_all_symmetries():
    ways = set()
    for y in take(located(), 60):
        for s, x in y.items():
            assert x.shape == (4, 3, 8 * s, 8 * s) and x.dtype == torch.float32 and x.is_contiguous()
            assert (x[:, 2] * 255).round().eq(s).all()
        low, high = [(y[s][:, :2] * 255).round().long() for s in (1, 4)]
        assert y[1].max() <= 1 and torch.equal(high[:, :, ::4, ::4] // 4, low)  # each pixel's top left child
        for n in range(4):
            down, right = low[n, :, 1, 0] - low[n, :, 0, 0], low[n, :, 0, 1] - low[n, :, 0, 0]
            assert low[n, 0].max() - low[n, 0].min() == low[n, 1].max() - low[n, 1].min() == 7
            ways.add((*down.tolist(), *right.tolist()))
    assert len(ways) == 8


def test_crops_reach_every_corner():
    corners = torch.cat([(y[1][:, :2] * 255).round().long().amin((2, 3)) for y in take(located(1), 200)])
    assert corners[:, 0].unique().tolist() == list(range(20 - 8 + 1))
    assert corners[:, 1].unique().tolist() == list(range(30 - 8 + 1))


def test_batches_repeat_and_continue():
    all_steps = take(located(), 6)
    assert all(equal(a, b) for a, b in zip(all_steps, take(located(), 6)))
    assert all(equal(a, b) for a, b in zip(all_steps[4:], take(located(), 2, start=4)))
    assert not equal(all_steps[0], all_steps[1])
    other = next(data.batches(located(), 32, 4, 2))
    assert not equal(all_steps[0], other)


def test_batches_refuse():
    for arguments in ((located(), 30, 4, 0), (located(), 0, 4, 0), (located(), 32, 0, 0), (located(), 32, 4, -1),
                      (located()[:0], 32, 4, 0)):
        with pytest.raises(ValueError):
            data.batches(*arguments)
    with pytest.raises(ValueError, match=r"p\d .*smaller than the patch .84."):
        next(data.batches(located(), 84, 4, 0))


def test_the_thread_ends_and_its_errors_arrive():
    def threads():
        return [t for t in threading.enumerate() if t is not threading.main_thread()]
    before = len(threads())
    stream = data.batches(located(), 32, 4, 0)
    next(stream)
    assert len(threads()) == before + 1
    stream.close()
    assert len(threads()) == before
    stream = data.batches(located(), 32, 4, 0)
    next(stream)
    del stream
    assert len(threads()) == before

    def broken(i):
        raise ValueError("damaged")
    with pytest.raises(ValueError, match="damaged"):
        next(data.batches(data.Pictures(["x"], broken, (1, 2)), 32, 4, 0))
    assert len(threads()) == before


def test_no_hang_at_exit():
    code = ("import data, numpy as np\n"
            "p = data.Pictures(['x'], lambda i: {s: np.zeros((9 * s, 9 * s, 3), np.uint8) for s in (1, 2)}, (1, 2))\n"
            "stream = data.batches(p, 8, 4, 0); next(stream); print('done'); ")
    for ending, expected in (("", 0), ("keep = [stream]; keep.append(keep); 1 / 0", 1)):
        run = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, timeout=60,
                             env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)})
        assert (run.returncode, run.stdout) == (expected, "done\n"), run.stderr


# ---- blind batches ---------------------------------------------------------------------------------------------------

def brute_kernels(count, size, seed):
    """Setting 2 from its covariance matrices, one weight at a time, in float64, with the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(count, 1, 1, 1, generator=generator).flatten().double().tolist() for _ in range(3)]
    noise = torch.rand(count, 1, size, size, generator=generator)[:, 0].double().numpy()
    kernels = np.zeros((count, size, size))
    for n, (a, b, turn) in enumerate(zip(*draws)):
        angle = -math.pi + 2 * math.pi * turn
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        covariance = rotation @ np.diag([(0.6 + 4.4 * a) ** 2, (0.6 + 4.4 * b) ** 2]) @ rotation.T
        for i, j in itertools.product(range(size), repeat=2):
            p = np.array([j - size // 2, i - size // 2])
            kernels[n, i, j] = math.exp(-p @ np.linalg.inv(covariance) @ p / 2) * (1 + 0.25 * noise[n, i, j])
        kernels[n] /= kernels[n].sum()
    return kernels


def brute_blur(channel, kernel):
    half, (height, width) = len(kernel) // 2, channel.shape
    padded, out = np.pad(channel, half, "reflect"), np.zeros_like(channel)
    for i, j in itertools.product(range(len(kernel)), repeat=2):  # the image at x - p, weighted by the kernel at p
        out += kernel[i, j] * padded[2 * half - i:2 * half - i + height, 2 * half - j:2 * half - j + width]
    return out


def brute_correction(blurred, clean, size, epsilon):
    """blurred, clean: (3, h, w) float64."""
    colours = []
    for b, c in zip(blurred, clean):
        spectrum = np.fft.fft2(c)
        r = np.fft.ifft2(np.conj(spectrum) * np.fft.fft2(b) / (np.abs(spectrum) ** 2 + epsilon)).real
        colours.append(np.array([[r[(i - size // 2) % len(r), (j - size // 2) % r.shape[1]] for j in range(size)]
                                 for i in range(size)]))
    k = sum(colours) / 3
    k[colours[0] * colours[1] * colours[2] <= 0] = 0
    k = np.clip(k - 0.75 * sorted(k.flatten())[-41], 0, 1)
    return k / k.sum()


def photograph_patches(count, side):
    import skimage.data
    image = skimage.data.astronaut()
    patches = [image[60 + 90 * i:60 + 90 * i + side, 150:150 + side] for i in range(count)]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("scale, size, side", [(4, 31, 132), (2, 11, 30)])
def test_degradation_equals_brute_force(scale, size, side):
    high, epsilon = photograph_patches(2, side), 1e-4
    made = data.degrade(high, scale, size, torch.Generator().manual_seed(3), epsilon)
    exact = data.degrade(high.double(), scale, size, torch.Generator().manual_seed(3), epsilon)
    assert list(made) == [1, scale, "kernel"] and made[scale] is high and made["kernel"].dtype == torch.float32
    kernels = brute_kernels(2, size, 3)
    assert np.abs(data.blind_kernels(2, size, torch.Generator().manual_seed(3))[:, 0].numpy() - kernels).max() < 1e-7
    for n in range(2):
        clean = high[n].double().numpy()
        blurred = np.stack([brute_blur(channel, kernels[n]) for channel in clean])
        ours = data.blur(high[n:n + 1].double(), torch.from_numpy(kernels[n])[None, None])[0].numpy()
        assert np.abs(ours - blurred).max() < 1e-14
        low_blurred, low_clean = (brute_axis(brute_axis(x, 1, 1 / scale, "clamp"), 2, 1 / scale, "clamp")
                                  for x in (blurred, clean))
        low = np.floor(np.clip(low_blurred, 0, 1) * 255 + 0.5) / 255
        assert np.abs(exact[1][n].numpy() - low).max() < 1e-12
        assert (np.abs(made[1][n].numpy() - low) > 1e-6).mean() < 0.001          # float32 may round a tie differently
        k = brute_correction(low_blurred, low_clean, size, epsilon)
        assert np.abs(exact["kernel"][n, 0].numpy() - k).max() < 2e-6 and k.max() > 0.03   # HR kernels are float32
        assert np.abs(made["kernel"][n, 0].numpy() - k).mean() < 0.01 * k.mean()


def test_corrected_kernel_finds_the_kernel_of_a_periodic_blur():
    clean = torch.rand(2, 3, 40, 36, dtype=torch.float64)
    true = torch.zeros(2, 1, 31, 31, dtype=torch.float64)
    true[:, 0, 13:18, 12:19] = 0.5 + torch.rand(2, 5, 7, dtype=torch.float64)              # 35 weights: the 41st is 0
    true /= true.sum((2, 3), keepdim=True)
    shift = [(i - 15, j - 15) for i, j in itertools.product(range(31), repeat=2)]
    blurred = sum(w.view(2, 1, 1, 1) * clean.roll(s, (2, 3)) for w, s in zip(true.flatten(1).T, shift))
    assert (data.corrected_kernel(blurred, clean, 31, 1e-20) - true).abs().max() < 1e-9
    assert (data.corrected_kernel(blurred, clean, 31, 1e-4) - true).abs().max() < 1e-4


def test_corrected_kernels_of_photographs_are_useful():
    """They peak in the middle, and there they are near the HR kernel summed over the 4x4 pixels of an LR pixel."""
    high = torch.cat([photograph_patches(4, 128)] * 10)
    k = data.degrade(high, 4, 31, torch.Generator().manual_seed(0))["kernel"]
    true = data.blind_kernels(40, 31, torch.Generator().manual_seed(0))
    assert torch.allclose(k.sum((1, 2, 3)), torch.ones(40)) and (k >= 0).all()
    assert (k.flatten(1).argmax(1) == 15 * 31 + 15).all()
    summed = F.conv2d(true, torch.ones(1, 1, 4, 4), padding=2)[..., 8:25:4, 8:25:4]                   # (40, 1, 5, 5)
    pairs = zip(k[..., 13:18, 13:18].flatten(1), summed.flatten(1))
    assert np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs]) > 0.9
    assert np.corrcoef(k[:, 0, 15, 15], summed[:, 0, 2, 2])[0, 1] > 0.95


@pytest.mark.parametrize("height, width, words", [
    (120, 128, "128x120 .* multiples of 4 and at least 124"), (126, 128, "128x126")])
def test_degradation_refuses(height, width, words):
    with pytest.raises(ValueError, match=words):
        data.degrade(torch.rand(1, 3, height, width), 4, 31, torch.Generator())


def test_blind_batches_continue_and_close():
    p, closed = data.generate(3, 128, (1, 2), 0, workers=1), []

    def stream(start):
        try:
            yield from data.batches(p, 48, 2, 5, start)
        finally:
            closed.append(start)

    inner = stream(0)
    source = data.blind(inner, 11, 5)
    first = [next(source) for _ in range(4)]
    source.close()
    assert closed == [0]
    again = data.blind(stream(2), 11, 5, start=2)
    for expected in first[2:]:
        assert all(torch.equal(expected[key], value) for key, value in next(again).items())
    assert first[0][1].shape == (2, 3, 24, 24) and not torch.equal(first[0]["kernel"], first[1]["kernel"])
    assert torch.equal(first[0][2], next(data.batches(p, 48, 2, 5))[2])                     # the originals stay
    other = next(data.blind(data.batches(p, 48, 2, 5), 11, 6))
    assert not torch.equal(other["kernel"], first[0]["kernel"])
