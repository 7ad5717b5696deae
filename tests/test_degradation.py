"""degradation.py against brute force in float64, and its promises on streams of batches."""
import itertools
import math

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat

import data
import degradation
from bicubic import resize
from pictures import picture
from tiny import same


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def photograph_patches(count, side):
    """Squares of the photograph of an astronaut, float32 (count, 3, side, side) in 0..1."""
    image = skimage.data.astronaut()
    patches = [image[60 + 90 * i:60 + 90 * i + side, 150:150 + side] for i in range(count)]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2) / 255


# ---- oracles -------------------------------------------------------------------------------------
def brute_kernels(count, size, seed):
    """Setting 2 from covariance matrices, one weight at a time, with the same random numbers."""
    generator = seeded(seed)
    draws = []
    for _ in range(3):
        draws.append(torch.rand(count, 1, 1, 1, generator=generator).flatten().double().tolist())
    noise = torch.rand(count, 1, size, size, generator=generator)[:, 0].double().numpy()
    kernels = np.zeros((count, size, size))
    for n, (a, b, turn) in enumerate(zip(*draws)):
        angle = -math.pi + 2 * math.pi * turn
        cos = math.cos(angle)
        sin = math.sin(angle)
        rotation = np.array([[cos, -sin], [sin, cos]])
        squares = np.diag([(0.6 + 4.4 * a) ** 2, (0.6 + 4.4 * b) ** 2])
        inverse = np.linalg.inv(rotation @ squares @ rotation.T)
        for i, j in itertools.product(range(size), repeat=2):
            p = np.array([j - size // 2, i - size // 2])
            kernels[n, i, j] = math.exp(-p @ inverse @ p / 2) * (1 + 0.25 * noise[n, i, j])
        kernels[n] /= kernels[n].sum()
    return kernels


def brute_blur(channel, kernel):
    """The image at x − p, weighted by the kernel at p, for every p."""
    half = len(kernel) // 2
    height, width = channel.shape
    padded = np.pad(channel, half, "reflect")
    out = np.zeros_like(channel)
    for i, j in itertools.product(range(len(kernel)), repeat=2):
        rows = slice(2 * half - i, 2 * half - i + height)
        columns = slice(2 * half - j, 2 * half - j + width)
        out += kernel[i, j] * padded[rows, columns]
    return out


def brute_correction(blurred, clean, size, epsilon):
    """blurred, clean: (3, h, w) float64."""
    colours = []
    for b, c in zip(blurred, clean):
        spectrum = np.fft.fft2(c)
        quotient = np.conj(spectrum) * np.fft.fft2(b) / (np.abs(spectrum) ** 2 + epsilon)
        r = np.fft.ifft2(quotient).real
        colour = np.zeros((size, size))
        for i, j in itertools.product(range(size), repeat=2):
            colour[i, j] = r[(i - size // 2) % r.shape[0], (j - size // 2) % r.shape[1]]
        colours.append(colour)
    k = sum(colours) / 3
    k[colours[0] * colours[1] * colours[2] <= 0] = 0
    k = np.clip(k - 0.75 * sorted(k.flatten())[-41], 0, 1)
    return k / k.sum()


# ---- three fixed ways ----------------------------------------------------------------------------
def brute_reduce(image, scale, kind):
    """One value at a time, in float64, from the definition in degradation.py."""
    height, width, _ = image.shape
    out = np.zeros((height // scale, width // scale, 3))
    gaussian = [math.exp(-k * k / (2 * 1.6**2)) for k in range(-3, 4)]
    for i, j, c in itertools.product(*map(range, out.shape)):
        y = i * scale + scale // 2
        x = j * scale + scale // 2
        if kind == "nearest":
            out[i, j, c] = image[y, x, c]
            continue
        for a, b in itertools.product(range(-3, 4), repeat=2):
            value = image[min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1), c]
            out[i, j, c] += gaussian[a + 3] * gaussian[b + 3] * value / sum(gaussian)**2
    return np.floor(out + 0.5)


@pytest.mark.parametrize("kind", ["nearest", "blur-down"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_reductions_equal_brute_force(kind, scale):
    image = picture(3 * scale, 5 * scale)
    found = degradation.reduce(image, scale, kind)
    assert found.dtype == np.uint8
    assert np.array_equal(found, brute_reduce(image, scale, kind))
    assert np.array_equal(degradation.reduce(image[..., 0], scale, kind), found[..., 0])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_nearest_takes_the_pixels_that_others_take(scale):
    """Pillow's, and PyTorch's "nearest-exact"; "nearest" of PyTorch takes the upper left one."""
    image = picture(6 * scale, 4 * scale)
    found = degradation.reduce(image, scale, "nearest")
    pillow = Image.fromarray(image).resize((4, 6), Image.Resampling.NEAREST)
    assert np.array_equal(found, np.asarray(pillow))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    exact = F.interpolate(x, (6, 4), mode="nearest-exact")
    assert torch.equal(degradation.reduce_images(x, scale, "nearest"), exact)


def test_bicubic_is_the_benchmarks():
    image = picture(24, 16)
    assert np.array_equal(degradation.reduce(image, 4), data.imresize(image, 1 / 4))


@pytest.mark.parametrize("kind", degradation.KINDS)
def test_float_reductions_are_the_same_and_have_gradients(kind):
    image = picture(12, 20)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double().requires_grad_()
    found = degradation.reduce_images(x, 4, kind)
    low = torch.from_numpy(degradation.reduce(image, 4, kind)).permute(2, 0, 1)[None]
    assert (found.clamp(0, 255) - low).abs().max() <= (1.2 if kind == "bicubic" else 0.5)
    found.sum().backward()
    used = (x.grad != 0).double().mean()
    assert used == 1 / 16 if kind == "nearest" else used > 0.9


@pytest.mark.parametrize("shape, scale, kind, words", [
    ((8, 8, 3), 4, "linear", "'linear': choose one of bicubic, nearest, blur-down"),
    ((8, 10, 3), 4, "nearest", "10x8 pixels to 1/4: crop the sides to multiples of 4"),
    ((8, 0, 3), 4, "nearest", "0x8 pixels"),
    ((8, 8, 3), 0, "nearest", "1/0")])
def test_reduce_refuses(shape, scale, kind, words):
    with pytest.raises(ValueError, match=words):
        degradation.reduce(np.zeros(shape, np.uint8), scale, kind)
    with pytest.raises(ValueError, match="float64 of shape"):
        degradation.reduce(np.zeros((8, 8, 3)), 4, "nearest")


# ---- one batch -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [31, 11])
def test_kernels_equal_brute_force(size):
    kernels = degradation.blind_kernels(2, size, seeded(3))
    assert kernels.dtype == torch.float32
    assert np.abs(kernels[:, 0].numpy() - brute_kernels(2, size, 3)).max() < 1e-7


def test_every_image_is_blurred_by_its_own_kernel():
    images = photograph_patches(2, 40).double()
    kernels = brute_kernels(2, 11, 3)
    ours = degradation.blur_images(images, torch.from_numpy(kernels)[:, None])
    for n in range(2):
        for channel in range(3):
            expected = brute_blur(images[n, channel].numpy(), kernels[n])
            assert np.abs(ours[n, channel].numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("scale, size, side", [(4, 31, 132), (2, 11, 30)])
def test_degradation_equals_brute_force(scale, size, side):
    high = photograph_patches(2, side)
    made = degradation.degrade(high, scale, size, seeded(3), 1e-4)
    exact = degradation.degrade(high.double(), scale, size, seeded(3), 1e-4)
    assert list(made.images) == [1, scale]
    assert made.images[scale] is high
    assert made.kernel.dtype == torch.float32
    kernels = brute_kernels(2, size, 3)
    for n in range(2):
        clean = high[n].double()
        blurred = np.stack([brute_blur(channel, kernels[n]) for channel in clean.numpy()])
        low_blurred = resize(torch.from_numpy(blurred), 1 / scale, "clamp").numpy()
        low_clean = resize(clean, 1 / scale, "clamp").numpy()
        low = np.floor(np.clip(low_blurred, 0, 1) * 255 + 0.5) / 255
        assert np.abs(exact.images[1][n].numpy() - low).max() < 1e-12
        differs = np.abs(made.images[1][n].numpy() - low) > 1e-6
        assert differs.mean() < 0.001  # float32 may round a tie differently
        k = brute_correction(low_blurred, low_clean, size, 1e-4)
        assert k.max() > 0.03
        assert np.abs(exact.kernel[n, 0].numpy() - k).max() < 2e-6  # drawn kernels are float32
        assert np.abs(made.kernel[n, 0].numpy() - k).mean() < 0.01 * k.mean()


def test_a_whole_picture_is_degraded_as_a_batch_of_one():
    high = np.ascontiguousarray(skimage.data.astronaut()[:136, :128])
    low, kernel = degradation.degrade_picture(high, 4, 31, 7)
    x = torch.from_numpy(high).permute(2, 0, 1)[None] / 255
    batch = degradation.degrade(x, 4, 31, seeded(7))
    assert low.shape == (34, 32, 3)
    assert low.dtype == np.uint8
    levels = batch.images[1][0].permute(1, 2, 0) * 255
    assert np.abs(low - levels.numpy()).max() < 1e-4
    assert np.array_equal(kernel, batch.kernel[0, 0].numpy())


@pytest.mark.parametrize("height, width, words", [
    (120, 128, "128x120 .* multiples of 4 and at least 124"),
    (128, 120, "120x128"),
    (126, 128, "128x126"),
    (128, 126, "126x128")])
def test_degradation_refuses(height, width, words):
    with pytest.raises(ValueError, match=words):
        degradation.degrade(torch.rand(1, 3, height, width), 4, 31, torch.Generator())


# ---- the kernel that is to be found --------------------------------------------------------------
def test_corrected_kernel_finds_the_kernel_of_a_periodic_blur():
    clean = torch.rand(2, 3, 40, 36, dtype=torch.float64)
    true = torch.zeros(2, 1, 31, 31, dtype=torch.float64)
    true[:, 0, 13:18, 12:19] = 0.5 + torch.rand(2, 5, 7)  # 35 weights: the 41st is 0
    true /= true.sum((2, 3), keepdim=True)
    blurred = torch.zeros_like(clean)
    for i, j in itertools.product(range(31), repeat=2):
        weight = true[:, :, i:i + 1, j:j + 1]
        blurred += weight * clean.roll((i - 15, j - 15), (2, 3))
    found = degradation.corrected_kernel(blurred, clean, 31, 1e-20)
    assert (found - true).abs().max() < 1e-9
    found = degradation.corrected_kernel(blurred, clean, 31, 1e-4)
    assert (found - true).abs().max() < 1e-4


def test_corrected_kernels_of_photographs_are_useful():
    """They peak in the middle, and there they are near the drawn kernel, summed over the 4×4 pixels
    of the original that make a pixel of the small image."""
    high = torch.cat([photograph_patches(4, 128)] * 10)
    k = degradation.degrade(high, 4, 31, seeded(0)).kernel
    assert torch.allclose(k.sum((1, 2, 3)), torch.ones(40))
    assert (k >= 0).all()
    assert (k.flatten(1).argmax(1) == 15 * 31 + 15).all()
    drawn = degradation.blind_kernels(40, 31, seeded(0))
    summed = F.conv2d(drawn, torch.ones(1, 1, 4, 4), padding=2)[..., 8:25:4, 8:25:4]  # 5×5 of them
    middle = k[..., 13:18, 13:18]
    agreement = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(middle, summed)]
    assert np.median(agreement) > 0.9
    assert np.corrcoef(k[:, 0, 15, 15], summed[:, 0, 2, 2])[0, 1] > 0.95


# ---- streams -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pictures():
    return data.generate(3, 128, (1, 2), 0, workers=1)


def take(pictures, number, seed=5, start=0):
    source = degradation.blind(data.batches(pictures, 48, 2, 5, start), 11, seed, start)
    return list(itertools.islice(source, number))


def test_blind_batches_keep_the_originals_and_replace_the_input(pictures):
    first, second = take(pictures, 2)
    plain = next(data.batches(pictures, 48, 2, 5))
    assert torch.equal(first.images[2], plain.images[2])
    assert first.images[1].shape == plain.images[1].shape == (2, 3, 24, 24)
    assert not torch.equal(first.images[1], plain.images[1])
    assert first.kernel.shape == (2, 1, 11, 11)
    assert not torch.equal(first.kernel, second.kernel)


def test_blind_batches_continue(pictures):
    first = take(pictures, 4)
    again = take(pictures, 2, start=2)
    assert all(same(a, b) for a, b in zip(first[2:], again, strict=True))
    other = take(pictures, 1, seed=6)
    assert not torch.equal(other[0].kernel, first[0].kernel)


def test_every_step_has_its_own_blur(pictures):
    """The same batch three times."""
    batch = next(data.batches(pictures, 48, 2, 5))
    first, second, third = degradation.blind((b for b in [batch] * 3), 11, 5)
    assert not torch.equal(first.images[1], second.images[1])
    assert not torch.equal(second.images[1], third.images[1])


def test_a_blind_stream_closes_the_stream_below_it(pictures):
    closed = []

    def stream():
        try:
            yield from data.batches(pictures, 48, 2, 5)
        finally:
            closed.append(True)

    below = stream()  # held here, or it would be closed by being dropped
    source = degradation.blind(below, 11, 5)
    next(source)
    assert closed == []
    source.close()
    assert closed == [True]


# ---- blurred pictures whose kernels are known ----------------------------------------------------
def kernel_off_the_middle(size):
    """A lopsided kernel, so that a flip, a transpose or a shift shows."""
    y, x = np.mgrid[:size, :size] - size // 2
    kernel = np.exp(-((x - 1) ** 2 / 8 + (y + 2) ** 2 / 3 + x * y / 9))
    return kernel / kernel.sum()


@pytest.mark.parametrize("scale, size", [(2, 11), (4, 31), (4, 5)])
def test_a_corner_of_every_square_is_taken(scale, size):
    """One pixel at a time; the image repeats its border, mirrored, as often as is needed."""
    high = picture(5 * scale, 3 * scale)
    height, width = high.shape[:2]
    kernel = kernel_off_the_middle(size)
    expected = np.zeros((5, 3, 3))

    def inside(i, length):
        i %= 2 * length
        return min(i, 2 * length - 1 - i)

    for row, column in itertools.product(range(5), range(3)):
        for u, v in itertools.product(range(size), range(size)):
            y = inside(scale * row + u - size // 2, height)
            x = inside(scale * column + v - size // 2, width)
            expected[row, column] += kernel[u, v] * high[y, x]
    found = degradation.correlated(high, kernel, scale)
    assert np.abs(found - expected).max() < 1e-9


def test_the_kernel_of_a_blurred_picture_blurs_the_clean_one():
    """low = k* ∗ reduced(high), up to the noise that k* is freed of and the border."""
    high = skimage.data.astronaut()
    y, x = np.mgrid[:31, :31] - 16.5         # low is on the grid of the bicubic reduction
    kernel = np.exp(-(x ** 2 / 32 + y ** 2 / 8))
    low = degradation.correlated(high, kernel / kernel.sum(), 4)
    k = degradation.kernel_of_blurred(high, low, 4, 31)
    assert k.shape == (31, 31) and k.dtype == np.float32
    assert k.min() >= 0 and k.sum() == pytest.approx(1, abs=1e-5)
    image = torch.from_numpy(high).permute(2, 0, 1)[None].float()
    clean = resize(image, 1 / 4)
    again = degradation.blur_images(clean, torch.from_numpy(k)[None, None])[0].permute(1, 2, 0)
    inner = (slice(8, -8), slice(8, -8))

    def off(image):
        return np.abs(image[inner] - low[inner]).mean()

    assert off(again.numpy()) < 0.4 * off(clean[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("turned", [False, True])
def test_a_kernel_may_be_turned(turned):
    high = picture(64, 48)
    kernel = kernel_off_the_middle(11)
    low = degradation.correlated(high, kernel, 4)
    given = low.round().clip(0, 255).astype(np.uint8)
    found, off = degradation.blurred_by(high, kernel[::-1, ::-1] if turned else kernel, given)
    assert np.array_equal(found, low) and off == 0
    found, off = degradation.blurred_by(high, kernel.T, given)
    assert off == np.abs(found.round().clip(0, 255) - given).mean() > 0.5


def test_a_kernel_file_is_read(tmp_path):
    kernel = kernel_off_the_middle(11)
    savemat(tmp_path / "kernel_1.mat", {"Kernel": 3 * kernel})
    found = degradation.read_kernel(tmp_path / "kernel_1.mat")
    assert np.abs(found - kernel).max() < 1e-15


@pytest.mark.parametrize("content, words", [
    ({"kernel": np.ones((3, 3))}, 'is not a MATLAB file with a matrix "Kernel"'),
    ({"Kernel": np.array(["abc"])}, 'is not a MATLAB file with a matrix "Kernel"'),
    ({"Kernel": np.ones((3, 5))}, r"a kernel of shape \(3, 5\), not k x k"),
    ({"Kernel": np.ones((4, 4))}, r"a kernel of shape \(4, 4\), not k x k"),
    ({"Kernel": np.ones((3, 3, 3))}, r"a kernel of shape \(3, 3, 3\), not k x k"),
    ({"Kernel": np.zeros((3, 3))}, "whose weights add up to 0.0"),
    ({"Kernel": np.full((3, 3), np.nan)}, "whose weights add up to nan"),
    (b"", "is not a MATLAB file"), (b"MATLAB 5.0 MAT-file" * 20, "is not a MATLAB file"),
    (None, "is not a MATLAB file")])
def test_another_kernel_file_is_refused(content, words, tmp_path):
    file = tmp_path / "kernel_1.mat"
    if isinstance(content, dict):
        savemat(file, content)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"kernel_1.mat {words}|kernel_1.mat holds {words}|"
                                         f"kernel_1.mat holds a kernel {words}"):
        degradation.read_kernel(file)
