"""How a small image is made of a large one, when not by bicubic alone.

`reduce` makes it in one of three fixed ways, KINDS, on the grid of `bicubic.py`: pixel i of an axis
of the original covers [i, i + 1), pixel j of the reduction covers [s·j, s·j + s), and the middle of
that is an edge between two pixels where s is even. What takes one pixel out of s takes

    i(j) = s·j + floor(s / 2)

the pixel in the middle, of two middle ones the second; so do MATLAB, Pillow, and PyTorch's
"nearest-exact". The small image then lies half a pixel of the original off the grid where s is
even: a part of what a network must learn about these reductions.

    bicubic     MATLAB's imresize, the way of the benchmarks
    nearest     low_j = high_i(j): everything finer than the small grid comes back as aliasing
    blur-down   low_j = Σ_k g_k · high_(i(j) + k), k = −3 .. 3 along both axes, g a Gaussian of
                σ = 1.6 with sum 1, the border repeated outside; rounded once, at the end

The rest of this file is blind degradation: batches blurred by kernels that the network is not told.

A camera does not reduce by bicubic: its image is blurred by a lens, by motion, by being out of
focus. A blind network (backbones/dcls.py) sees a low-resolution image, estimates the kernel that
blurred it, and sharpens accordingly. To train one, originals are blurred by random kernels before
they are reduced ("Setting 2" of DCLS, Luo et al., CVPR 2022):

    low = reduced(kernel ∗ high), rounded to 8 bits

But the network works on small images, where `kernel` is of no use: it belongs to the pixels of the
original. What it is trained to find is a kernel k* of the small image (DCLS calls this the
reformulated degradation) with

    reduced(kernel ∗ high) = k* ∗ reduced(high)

A convolution is a product of spectra, so k* is the quotient of the spectra of the two reductions;
`corrected_kernel` says what keeps it from being noise.

DIV2KRK (KernelGAN, arXiv 1909.06581, Section 5.2) is a set of blurred test pictures that come with
their kernels (`read_kernel`), but it takes a corner of every square of s × s pixels (`correlated`):

    low_j = Σ_u kernel_u · high_(s·j + u − floor(side / 2)), the image mirrored, border repeated

Whether its files hold the kernel or the kernel turned by 180° is told nowhere: `blurred_by` takes
what comes nearer to the picture. Their k* follows from the same equation, with this low in place of
reduced(kernel ∗ high).

Not here: the network that estimates kernels (backbones/dcls.py, to be read next), its loss.
"""
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat
from torch import Generator, Tensor

from backbones.base import SR
from bicubic import imresize, resize

EPSILON = 1e-4  # see corrected_kernel
KINDS = ("bicubic", "nearest", "blur-down")
SIGMA = 1.6  # of blur-down, in pixels of the original; its kernel has
REACH = 3  # so many weights on either side of the middle one


# ---- three fixed ways ----------------------------------------------------------------------------
def reduce(image: np.ndarray, scale: int, kind: str = "bicubic") -> np.ndarray:
    """Reduces a picture, uint8 (H, W, 3) or (H, W) -> uint8 (H/scale, W/scale, ...).

    kind: one of KINDS, defined at the top of this file.
    Raises ValueError for another kind or array, and sides that are no multiples of the scale.
    """
    check_reduction(image.shape[:2], scale, kind)
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"reduce got {image.dtype} of shape {image.shape}: give uint8 (H, W, 3) "
                         f"or (H, W)")
    if kind == "bicubic":
        return imresize(image, 1 / scale)
    colours_first = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1).double()
    low = reduce_images(colours_first[None], scale, kind)[0]
    low = (low + 0.5).floor().clamp(0, 255).byte()  # as imresize rounds: halves upwards
    return low.permute(1, 2, 0).contiguous().numpy().reshape(*low.shape[1:], *image.shape[2:])


def reduce_images(x: Tensor, scale: int, kind: str = "bicubic") -> Tensor:
    """Likewise, for float images (N, C, H, W) of any range: not rounded, and differentiable."""
    check_reduction(x.shape[2:], scale, kind)
    if kind == "bicubic":
        return resize(x, 1 / scale)
    middle = scale // 2
    if kind == "nearest":
        return x[..., middle::scale, middle::scale]
    distance = torch.arange(-REACH, REACH + 1).to(x)
    weights = torch.exp(-(distance / SIGMA) ** 2 / 2)
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights).expand(x.shape[1], 1, -1, -1)  # one for each channel
    padded = F.pad(x, (REACH,) * 4, mode="replicate")
    return F.conv2d(padded[..., middle:, middle:], kernel, stride=scale, groups=x.shape[1])


def check_reduction(sides: Sequence[int], scale: int, kind: str) -> None:
    """Raises ValueError for what cannot be reduced."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of reduction {kind!r}: choose one of {', '.join(KINDS)}")
    if scale < 1 or min(sides) < 1 or any(side % scale for side in sides):
        height, width = sides
        raise ValueError(f"cannot reduce {width}x{height} pixels to 1/{scale}: crop the sides to "
                         f"multiples of {scale}")


# ---- blind ---------------------------------------------------------------------------------------
def blind(batches: Iterator[SR], size: int, seed: int, start: int = 0,
          epsilon: float = EPSILON) -> Iterator[SR]:
    """Replaces the low-resolution images of every batch, and add the kernel that is to be found.

    batches: a stream of `SR`, in 0..1, which is at step `start`; it is closed with this one.
    size, epsilon: see `degrade`. Step k depends on (seed, k, batch) alone. The work is done on the
    device of the batches; the random numbers are drawn on the CPU, the same for every device.
    """
    with closing(batches):
        for k, batch in enumerate(batches, start):
            scale = max(batch.images)
            mixed = np.random.default_rng((seed, k)).integers(1 << 32)  # torch's seeds have 32 bits
            generator = Generator().manual_seed(int(mixed))
            yield degrade(batch.images[scale], scale, size, generator, epsilon)


@torch.no_grad()
def degrade(high: Tensor, scale: int, size: int, generator: Generator,
            epsilon: float = EPSILON) -> SR:
    """Makes a blind batch of originals: {1: low, scale: high} with the kernels k* to be found.

    high: (N, 3, H, W) in 0..1, float, on any device; H and W multiples of the scale.
    size: the side of the kernels, of those that blur (in pixels of the original) and of k* (in
      pixels of low) alike. DCLS uses 31 for ×4 and 11 for ×2.
    Returns low (N, 3, H/scale, W/scale), multiples of 1/255 in 0..1, and k* (N, 1, size, size).
    Raises ValueError where low would be smaller than its kernel, or H or W is no multiple.
    """
    height, width = high.shape[2:]
    if min(height, width) < size * scale or height % scale or width % scale:
        raise ValueError(f"cannot blur an image of {width}x{height} pixels for a blind x{scale}: "
                         f"its sides must be multiples of {scale} and at least {size * scale} "
                         f"({size} LR pixels, the kernel)")
    drawn = blind_kernels(len(high), size, generator).to(high)
    blurred = resize(blur_images(high, drawn), 1 / scale)
    clean = resize(high, 1 / scale)
    low = (blurred.clamp(0, 1) * 255).round() / 255
    return SR({1: low, scale: high}, corrected_kernel(blurred, clean, size, epsilon))


def degrade_picture(high: np.ndarray, scale: int, size: int,
                    seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Degrades a whole picture, uint8 (H, W, 3), by the random kernel of this seed.

    Returns low, uint8 (H/scale, W/scale, 3), and k*, float32 (size, size). Else as `degrade`.
    """
    made = degrade(to_tensor(high), scale, size, Generator().manual_seed(seed))
    low = (made.images[1][0] * 255).round().byte()
    low = low.permute(1, 2, 0).contiguous()
    return low.numpy(), made.kernel[0, 0].numpy()


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) in 0..255 -> float32 (1, 3, H, W) in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def blind_kernels(count: int, size: int, generator: Generator) -> Tensor:
    """Draws Gaussian kernels, float32 (count, 1, size, size) on the generator's device, each sum 1.

    Their deviations along two axes at right angles are U(0.6, 5) pixels of the original, the axes
    are turned by U(-π, π), and every weight is multiplied by 1 + U(0, 0.25).
    """
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=generator, device=generator.device)
        return low + (high - low) * drawn

    deviation_a = uniform(0.6, 5, 1, 1, 1)
    deviation_b = uniform(0.6, 5, 1, 1, 1)
    angle = uniform(-math.pi, math.pi, 1, 1, 1)
    x = torch.arange(size, device=generator.device) - size // 2
    y = x[:, None]
    a = angle.cos() * x + angle.sin() * y  # (count, 1, size, size): distances along the two axes
    b = angle.cos() * y - angle.sin() * x
    gaussian = torch.exp(-((a / deviation_a) ** 2 + (b / deviation_b) ** 2) / 2)
    weights = gaussian * uniform(1, 1.25, 1, size, size)
    return weights / weights.sum((2, 3), keepdim=True)


def blur_images(x: Tensor, weights: Tensor) -> Tensor:
    """Convolves every image with its own kernel, (N, C, H, W) with (N, 1, k, k) -> (N, C, H, W).

    Outside, the image is mirrored and its border not repeated, so H and W must exceed k // 2.
    """
    padded = F.pad(x, (weights.shape[-1] // 2,) * 4, mode="reflect")
    weights = weights.flip(2, 3)  # conv2d is a correlation, a convolution flips the kernel
    images_as_channels = padded.transpose(0, 1)  # (C, N, H, W): one group each
    return F.conv2d(images_as_channels, weights, groups=len(x)).transpose(0, 1)


def corrected_kernel(blurred: Tensor, clean: Tensor, size: int, epsilon: float = EPSILON) -> Tensor:
    """Finds the kernel k* with blurred = k* ∗ clean: (N, 1, size, size), not negative, sum 1.

    blurred, clean: reduced images (N, 3, h, w), float, not rounded, h and w >= size; they are taken
      as periodic. Each colour gives a quotient of spectra. A weight of k* is their mean where the
      three agree, that is, have a positive product, else 0. The noise that is left is removed by
      subtracting 3/4 of the 41st largest weight: about 40 pixels hold the kernels of either scale.
    epsilon: keeps the quotient finite, B / C = conj(C) · B / (|C|² + epsilon). The release's 1e-20
      yields a useless kernel for one photograph in a hundred.
    """
    spectrum = torch.fft.rfft2(clean)
    power = torch.view_as_real(spectrum).square().sum(-1)
    quotient = spectrum.conj() * torch.fft.rfft2(blurred) / (power + epsilon)
    colours = torch.fft.irfft2(quotient, clean.shape[2:])  # (N, 3, h, w), the centre at 0, 0
    colours = colours.roll((size // 2, size // 2), (2, 3))[..., :size, :size]
    agree = colours.prod(1, keepdim=True) > 0
    k = torch.where(agree, colours.mean(1, keepdim=True), 0)
    threshold = 0.75 * k.flatten(1).topk(41).values[:, -1]
    k = (k - threshold.view(-1, 1, 1, 1)).clamp(0, 1)
    return k / (k.sum((2, 3), keepdim=True) + 1e-20)


# ---- blurred pictures whose kernels are known ----------------------------------------------------
def read_kernel(file: str | os.PathLike) -> np.ndarray:
    """Reads the blur kernel of a picture of DIV2KRK, gt_k_x4/kernel_1.mat: its matrix "Kernel".

    Returns float64 (k, k) with sum 1, k odd, in pixels of the original.
    Raises ValueError, naming the file, where it holds no such matrix.
    """
    try:
        kernel = np.asarray(loadmat(file, variable_names="Kernel")["Kernel"], dtype=float)
    except Exception as error:  # damaged files raise nearly anything in scipy
        raise ValueError(f"{file} is not a MATLAB file with a matrix \"Kernel\": get the set "
                         f"again") from error
    sides = set(kernel.shape)
    if kernel.ndim != 2 or len(sides) != 1 or not sides.pop() % 2:
        raise ValueError(f"{file} holds a kernel of shape {kernel.shape}, not k x k with an odd k: "
                         f"get the set again")
    if not np.isfinite(kernel).all() or kernel.sum() <= 0:
        raise ValueError(f"{file} holds a kernel whose weights add up to {kernel.sum()}: get the "
                         f"set again")
    return kernel / kernel.sum()


def correlated(high: np.ndarray, kernel: np.ndarray, scale: int) -> np.ndarray:
    """Makes a small picture as DIV2KRK does, see the top of this file; not rounded.

    high: uint8 (H, W, 3), the sides multiples of the scale. kernel: (k, k).
    Returns float64 (H/scale, W/scale, 3) in 0..255.
    """
    reach = len(kernel) // 2
    padded = np.pad(high, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    colours = torch.from_numpy(padded).permute(2, 0, 1)[:, None].double()  # one image each
    weights = torch.from_numpy(kernel.copy())[None, None]
    return F.conv2d(colours, weights, stride=scale)[:, 0].permute(1, 2, 0).numpy()


def blurred_by(high: np.ndarray, kernel: np.ndarray,
               given: np.ndarray) -> tuple[np.ndarray, float]:
    """Makes the small picture again, by the kernel or the kernel turned by 180°.

    high: uint8 (H, W, 3). given: the small picture of the set, uint8 (H/scale, W/scale, 3).
    Returns the nearer one, not rounded, and how far it is off when rounded, in grey levels (mean).
    """
    scale = len(high) // len(given)
    tries = []
    for each in (kernel, kernel[::-1, ::-1]):
        low = correlated(high, each, scale)
        tries.append((low, float(np.abs(low.round().clip(0, 255) - given).mean())))
    return min(tries, key=lambda made: made[1])


def kernel_of_blurred(high: np.ndarray, low: np.ndarray, scale: int, size: int) -> np.ndarray:
    """Finds k* of a picture, float32 (size, size), see `corrected_kernel`.

    high: uint8 (H, W, 3). low: its blurred reduction, float (H/scale, W/scale, 3) in 0..255.
    """
    clean = resize(to_tensor(high), 1 / scale)
    return corrected_kernel(to_tensor(low), clean, size)[0, 0].numpy()
