"""bicubic.py against numbers by hand, brute force and torch's own antialiased bicubic."""
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bicubic
from bicubic import imresize, resize, resize_axis
from pictures import picture


# ---- an oracle that follows the textbook, one tap at a time --------------------------------------
def cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x ** 3 - 2.5 * x ** 2 + 1
    return -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x <= 2 else 0.0


def inside(k, n, edge):
    """The sample (1 .. n) that stands for sample k, which may lie outside."""
    while not 1 <= k <= n:
        mirrored = 1 - k if k < 1 else 2 * n + 1 - k
        clamped = min(max(k, 1), n)
        k = clamped if edge == "clamp" else mirrored
    return k


def brute_line(line, scale, edge):
    """One line of samples resized in float64, with coordinates from 1 as in MATLAB."""
    shrink = min(scale, 1)
    out = []
    for x in range(1, math.ceil(len(line) * scale) + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        total = norm = 0.0
        for j in range(math.floor(u - 2 / shrink) - 1, math.ceil(u + 2 / shrink) + 2):
            weight = cubic((u - j) * shrink)
            total += weight * float(line[inside(j, len(line), edge) - 1])
            norm += weight
        out.append(total / norm)
    return out


def brute_axis(x, axis, scale, edge):
    return np.apply_along_axis(brute_line, axis, x.astype(np.float64), scale, edge)


# a border in reach from both sides; more rows than fill a band; one row
SHAPES = [(13, 37), (5, 2), (1, 4), (70, 3)]


@pytest.mark.parametrize("edge", ["clamp", "mirror"])
@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
def test_imresize_equals_brute_force(scale, edge):
    for shape in SHAPES:
        image = picture(*shape)
        expected = image
        for axis in (0, 1):
            rounded = np.floor(brute_axis(expected, axis, scale, edge) + 0.5)
            expected = np.clip(rounded, 0, 255).astype(np.uint8)
        assert np.array_equal(imresize(image, scale, edge), expected)
        assert np.array_equal(imresize(image[..., 1], scale, edge), expected[..., 1])


@pytest.mark.parametrize("edge", ["clamp", "mirror"])
@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
def test_resize_equals_brute_force(scale, edge):
    for shape in SHAPES:
        x = torch.from_numpy(picture(*shape)).permute(2, 0, 1)[None].double() / 7 - 20
        expected = brute_axis(brute_axis(x.numpy(), 2, scale, edge), 3, scale, edge)
        assert np.abs(resize(x, scale, edge).numpy() - expected).max() < 1e-11
        assert np.abs(resize(x.float(), scale, edge).numpy() - expected).max() < 1e-4


def test_imresize_rounds_as_float64_does():
    """Of many pixels, some come so near to where rounding changes that float32 would err."""
    image = picture(400, 400)
    x = torch.from_numpy(image).permute(2, 0, 1).double()
    for axis in (1, 2):
        x = (resize_axis(x, axis, 0.7, "clamp") + 0.5).floor().clamp(0, 255)
    assert np.array_equal(imresize(image, 0.7), x.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_resize_equals_torch_on_a_mirrored_input(factor):
    """torch has other rules for the border, so it gets three more pixels of the small image."""
    x = torch.rand(2, 3, 5 * factor, 7 * factor, dtype=torch.float64)
    sides = (3 * factor, 3 * factor)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), sides, sides), "symmetric"))
    expected = F.interpolate(padded, scale_factor=1 / factor, mode="bicubic", antialias=True)
    got = resize(x, 1 / factor, "mirror")
    assert got.shape == (2, 3, 5, 7)
    assert got.is_contiguous()
    assert (got - expected[..., 3:-3, 3:-3]).abs().max() < 1e-12


# ---- by hand -------------------------------------------------------------------------------------
def test_halving_a_bright_pixel_by_hand():
    """Pixel 4 of 0 .. 9. Output j lies at 2j + ½: at distances 3.5, 1.5, 0.5, 2.5, 4.5.

    Halved, as the kernel is stretched, that is 1.75, 0.75, 0.25, 1.25, 2.25, where the cubic is
    −3/128, 29/128, 111/128, −9/128, 0. The weights of an output sum to 2.
    """
    line = torch.zeros(1, 10, dtype=torch.float64)
    line[0, 4] = 1
    halved = resize(line.expand(10, 10), 1 / 2)
    expected = torch.tensor([-3, 29, 111, -9, 0]) / 256
    assert torch.allclose(halved, expected.double().expand(5, 5), atol=1e-15)


def test_enlarging_goes_through_the_pixels():
    """Enlarged three times, the middle of each three lies on a pixel of the source."""
    x = torch.rand(4, 5, dtype=torch.float64)
    assert torch.allclose(resize(x, 3)[1::3, 1::3], x, atol=1e-14)


def test_a_flat_image_stays_flat():
    for scale in (1 / 4, 0.3, 2, 3.7):
        assert (imresize(np.full((9, 11), 77, np.uint8), scale) == 77).all()


@pytest.mark.parametrize("edge, weight, pixel", [("clamp", 128, 128), ("mirror", 140, 139)])
def test_what_lies_outside_by_hand(edge, weight, pixel):
    """The first pixel is bright; both outputs see it and, left of it, what lies outside.

    Output 0 lies ½ from it and 1.5, 2.5, 3.5 from pixels −1, −2, −3: they weigh (see above) 111 and
    29, −9, −3, in 256ths. Clamped, all four are the bright pixel, 128. Mirrored, pixel −1 alone is,
    140. Output 1 lies 2.5 from it and 3.5 from pixel −1, which is bright either way: −12.
    """
    line = torch.tensor([[1, 0, 0, 0]]).double()
    expected = torch.tensor([[weight, -12]]).double() / 256
    assert torch.allclose(resize(line, 1 / 2, edge), expected, atol=1e-15)
    bright = np.array([[255, 0, 0, 0]], np.uint8)
    assert imresize(bright, 1 / 2, edge).tolist() == [[pixel, 0]]  # 127.5 is rounded upwards


def test_rounding_happens_after_each_axis():
    image = picture(40, 40)
    once = resize(torch.from_numpy(image).permute(2, 0, 1).double(), 1 / 4)
    once = (once + 0.5).floor().clamp(0, 255).permute(1, 2, 0).numpy()
    difference = np.abs(imresize(image, 1 / 4) - once)
    assert difference.max() == 1
    assert 0.02 < difference.mean() < 0.3


@pytest.mark.parametrize("scale", [4, 3, 5, 2.5, 1 / 2, 1 / 3, 0.37])
@pytest.mark.parametrize("edge", ["clamp", "mirror"])
def test_imresize_by_strips_and_rows_is_the_same(scale, edge, monkeypatch):
    """To the last bit, wherever the strips lie: a strip of one band, and all at once."""
    image = picture(203, 61)
    whole = imresize(image, scale, edge)
    monkeypatch.setattr(bicubic, "STRIP", 1)
    assert np.array_equal(imresize(image, scale, edge), whole)
    height = len(whole)
    for rows in ((0, 1), (height // 3, height), (height // 2, height // 2 + 33)):
        assert np.array_equal(imresize(image, scale, edge, rows), whole[slice(*rows)])


def test_imresize_keeps_what_was_verified():
    """The hash of the version that reproduced all 57 LR images of Set5 and Set14."""
    image = picture(96, 132)
    halves = b"".join(imresize(image, 1 / s).tobytes() for s in (2, 3, 4))
    digest = hashlib.sha256(halves).hexdigest()
    assert digest == "0cf365b0943b1e52835e10b2d2fd3bd39325fb2c4bc8d3d8ede06fb66dc148ac"


# ---- arguments -----------------------------------------------------------------------------------
@pytest.mark.parametrize("image, scale, edge, words", [
    (np.zeros((3, 3), np.float32), 2, "clamp", "float32 of shape .3, 3.: give uint8"),
    (np.zeros(3, np.uint8), 2, "clamp", "shape .3,.: give uint8"),
    (picture(3, 3), 0, "clamp", "scale=0: give a positive number"),
    (picture(3, 3), math.inf, "clamp", "scale=inf"),
    (picture(3, 3), 2, "wrap", "edge='wrap': use 'clamp'"),
    (picture(0, 3), 2, "clamp", "empty image of .0, 3. pixels")])
def test_imresize_refuses_bad_arguments(image, scale, edge, words):
    with pytest.raises(ValueError, match=words):
        imresize(image, scale, edge)


@pytest.mark.parametrize("x, words", [
    (torch.zeros(3, 3, dtype=torch.uint8), "torch.uint8 of shape .3, 3.: give a float32"),
    (torch.zeros(3), "float32 of shape .3,."),
    (torch.zeros(3, 0), "empty image")])
def test_resize_refuses_bad_arguments(x, words):
    with pytest.raises(ValueError, match=words):
        resize(x, 2)


def test_pillow_differs_by_the_order_of_the_axes_where_values_are_clipped():
    """Of black and white pixels, enlarged, Pillow makes others: 4 levels off on average. Both clip
    to 0..255 after each axis, MATLAB begins with the rows and Pillow with the columns.
    """
    image = 255 * (picture(32, 32)[..., 0] > 127).astype(np.uint8)
    pillow = np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC))
    inner = slice(8, -8), slice(8, -8)               # at the border Pillow has another rule
    ours = imresize(image, 4)
    assert np.abs(ours.astype(int) - pillow)[inner].mean() > 2
    turned = imresize(image.T, 4).T
    assert np.array_equal(turned[inner], pillow[inner])
