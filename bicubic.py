"""MATLAB's bicubic resizing, to the last bit, because the benchmarks were made with it.

Published numbers of super-resolution start from images that MATLAB's `imresize` reduced. Pillow,
OpenCV and torch make other pixels under the same name "bicubic", so a network that has learned from
their reductions, or is measured on them, cannot be compared with the published ones.

How it works, for one axis. Pixel i covers the interval [i, i + 1), so its centre lies at i + ½.
Output pixel j covers [j, j + 1) / scale of the source and has its centre at (j + ½) / scale.
Counted in source pixels, whose centres we call 0, 1, 2, ..., this is u_j, and

    u_j = (j + ½) / scale − ½,       weight_ji = cubic((u_j − i) / stretch),
    out_j = Σ_i weight_ji · in_i  /  Σ_i weight_ji

- An enlargement has stretch 1: four pixels around u_j have a weight, and out_j is the height at u_j
  of a smooth curve through all pixels (cubic is 1 at 0, and 0 at all other integers).
- A reduction to a quarter would, with stretch 1, be made of two pixels out of every four and hardly
  notice the others: fine stripes would come back as wide ones that were never there (aliasing).
  With stretch = 1 / scale = 4, sixteen pixels have a weight. A kernel that is 4 times as wide
  passes frequencies only up to a quarter of what it passed before, and what it removes are
  those that the small image cannot hold.
- For 8-bit images MATLAB resizes the rows' axis, rounds to 8 bits, then the columns' axis, and
  rounds again. Rounding only at the end changes every tenth value by one level.

Not here: picture files and sets of them (data.py). Read degradation.py next.
"""
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BAND = 32  # output rows that are computed by one matrix product
STRIP = 1 << 21  # pixels of the result that `imresize` makes at a time, about


def imresize(image: np.ndarray, scale: float, edge: str = "clamp",
             rows: tuple[int, int] | None = None) -> np.ndarray:
    """Resizes an 8-bit image exactly as MATLAB's `imresize(image, scale)` does.

    image: uint8 (H, W) or (H, W, 3), values 0..255; returns uint8 of ceil(H·scale) × ceil(W·scale).
    edge: what lies outside the image. "clamp" repeats the pixels of the border, as the benchmarks'
      files have it (older MATLAB); "mirror" reflects the image (newer versions).
    rows: (first, end) of the result, where only some of its rows are wanted.
    It works strip by strip: besides image and result, the memory does not grow with their height.
    Raises ValueError for another dtype, shape or edge, a scale that is not positive or an empty
    image.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"imresize got {image.dtype} of shape {image.shape}: give uint8 of shape "
                         f"(H, W) or (H, W, 3)")
    check(image.shape[:2], scale, edge)
    # MATLAB computes in float64. float32 takes half the time, and at these scales it rounds to the
    # same 8 bits: at 1/2 and 1/4 the weights are multiples of 2^-12 and sums are exact, at 1/3 they
    # are multiples of 1/81 and no sum comes nearer than 1/162 to where rounding changes.
    dtype = torch.float32 if 1 / scale in (2, 3, 4) else torch.float64
    height, width = math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)
    top, bottom = rows or (0, height)
    matrix, source = bands(len(image), scale, edge)
    step = max(1, STRIP // (BAND * max(width, image.shape[1])))
    result = np.empty((bottom - top, width, *image.shape[2:]), np.uint8)
    for band in range(top // BAND, math.ceil(bottom / BAND), step):
        looks = source[band:band + step]
        first, last = int(looks.min()), int(looks.max())
        x = torch.from_numpy(np.ascontiguousarray(image[first:last + 1])).to(dtype)
        x = to_8_bit(multiply(matrix[band:band + step], looks - first, x))
        x = to_8_bit(resize_axis(x, 1, scale, edge)).to(torch.uint8).numpy()
        begin = band * BAND                                # the row of the result that x begins at
        start, end = max(top, begin), min(bottom, begin + len(x))
        result[start - top:end - top] = x[start - begin:end - begin]
    return result


def to_8_bit(x: Tensor) -> Tensor:
    """Rounds to 0..255 in place, halves upwards."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def resize(x: Tensor, scale: float, edge: str = "clamp") -> Tensor:
    """Resizes a float image as MATLAB does, which for such images means: without rounding.

    x: (..., H, W), float32 or float64 of any range, on any device. Returns the same dtype,
      (..., ceil(H·scale), ceil(W·scale)). The cubic kernel has negative weights, so values may go a
      little beyond those of the input.
    edge: see `imresize`.
    Raises ValueError for another dtype, shape or edge, a scale that is not positive or an empty
    image.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(f"resize got {x.dtype} of shape {tuple(x.shape)}: give a float32 or "
                         f"float64 (..., H, W)")
    check(x.shape[-2:], scale, edge)
    x = resize_axis(x, -2, scale, edge)
    x = resize_axis(x, -1, scale, edge)
    return x.contiguous()


def check(sides: Sequence[int], scale: float, edge: str) -> None:
    """Raises ValueError for what cannot be resized."""
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"cannot resize by scale={scale}: give a positive number")
    if edge not in ("clamp", "mirror"):
        raise ValueError(f"unknown edge={edge!r}: use 'clamp' (MATLAB's older rule) or 'mirror' "
                         f"(its newer one)")
    if min(sides) < 1:
        raise ValueError(f"cannot resize an empty image of {tuple(sides)} pixels: give at least "
                         f"one pixel")


def cubic(x: Tensor) -> Tensor:
    """Returns Keys' kernel with a = -½ (R. Keys, "Cubic convolution interpolation", 1981, eq. 15).

    Pieces of two cubic polynomials, for |x| up to 1 and up to 2, which join without a kink.
    """
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    outer = torch.where(x <= 2, outer, 0.0)
    return torch.where(x <= 1, inner, outer)


def taps(n: int, scale: float, edge: str) -> tuple[Tensor, Tensor]:
    """Returns which pixels of an axis of n make each output pixel, and their weights.

    Both are (out, taps): int64 indices in [0, n), and float64 weights whose rows sum to 1.
    """
    stretch = max(1.0, 1 / scale)
    out = math.ceil(n * scale)
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) / scale - 0.5  # u_j above
    first = (centre - 2 * stretch).floor().long()  # cubic is 0 beyond 2
    index = first[:, None] + torch.arange(math.ceil(4 * stretch) + 2)
    weight = cubic((centre[:, None] - index) / stretch)
    weight = weight / weight.sum(1, keepdim=True)
    if edge == "clamp":
        return index.clamp(0, n - 1), weight
    index = index.remainder(2 * n)  # ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ... repeats after 2n
    return torch.minimum(index, 2 * n - 1 - index), weight


def resize_axis(x: Tensor, axis: int, scale: float, edge: str) -> Tensor:
    """Resizes one axis of a float tensor, in its dtype."""
    x = x.movedim(axis, 0)
    matrix, source = bands(len(x), scale, edge)
    result = multiply(matrix, source, x)[:math.ceil(len(x) * scale)]
    return result.movedim(0, axis)


@lru_cache(16)  # every strip asks again, and so does every picture of a size
@torch.inference_mode(False)  # who computes gradients may get what inference made
def bands(n: int, scale: float, edge: str) -> tuple[Tensor, Tensor]:
    """Returns the resizing of an axis of n as small matrices.

    As a whole it is a matrix (out, n), but one with few entries, near the diagonal. So the output
    is cut into bands of 32 rows, each a small dense matrix times those rows that it looks at:
    float64 (bands, 32, width), and int64 (bands, width) in [0, n). The last row fills up the last
    band.
    """
    index, weight = taps(n, scale, edge)
    number = math.ceil(len(index) / BAND)
    row = torch.arange(number * BAND).clamp(max=len(index) - 1)
    index = index[row].view(number, BAND, -1)
    weight = weight[row].view(number, BAND, -1)
    first = index.amin((1, 2), keepdim=True)  # (bands, 1, 1): where each band begins to look
    index = index - first
    width = int(index.max()) + 1
    matrix = weight.new_zeros(number, BAND, width).scatter_add_(2, index, weight)
    source = first[:, 0] + torch.arange(width)
    return matrix, source.clamp(max=n - 1)


def multiply(matrix: Tensor, source: Tensor, x: Tensor) -> Tensor:
    """Applies bands: (n, ...) -> (32·bands, ...), in the dtype of x.

    They are one batched product: many small ones crawl where training's threads compete for the
    same cores.
    """
    rows = x.reshape(len(x), -1).index_select(0, source.flatten().to(x.device))
    rows = rows.view(*source.shape, -1)  # (bands, width, all else)
    result = matrix.to(x) @ rows
    return result.flatten(0, 1).view(-1, *x.shape[1:])
