"""The Triton half of pixel_shuffle.py: one kernel, its configurations, its launch. Imported only when used.

The convolution as a matrix product without the matrix (implicit GEMM): a row per pixel of x, a column per output
channel; the sums run over the nine taps and, within a tap, the channels. Memory is channels-last on all sides. Columns
are taken in the order (i, j, o), not PyTorch's (o, i, j): what a pixel writes to row i of its r×r block is then one run
of r·O numbers, and its right neighbour's run follows. So the shuffle is where the store goes, the bias added before.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["H", "W", "pixels"])
def conv_shuffle_kernel(
        x,                       # (B, H, W, C)
        weight,                  # (O·R², 3, 3, C), rows in the order (o, i, j)
        bias,                    # (O·R²), or anything unless BIAS
        out,                     # (B, H·R, W·R, O)
        H, W, pixels,            # pixels = B·H·W
        C: tl.constexpr, O: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
        PIXELS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Grid: tiles of columns fastest (they read the same pixels), tiles of pixels."""
    BLOCKS: tl.constexpr = (C + DEPTH - 1) // DEPTH                        # channel blocks of a tap
    TILES: tl.constexpr = (O * R * R + COLUMNS - 1) // COLUMNS
    pixel = tl.program_id(0) // TILES * PIXELS + tl.arange(0, PIXELS)
    image_row, px = pixel // W, pixel % W
    py = image_row % H
    column = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    i, run = column // (R * O), column % (R * O)                           # run = j·O + o
    channel_row = (run % O * R + i) * R + run // O                         # of weight and bias
    exists = column < O * R * R
    channel = tl.arange(0, DEPTH)
    sums = tl.zeros([PIXELS, COLUMNS], tl.float32)
    for step in range(0, 9 * BLOCKS):                                      # one flat loop: the loads are pipelined
        tap, c = step // BLOCKS, step % BLOCKS * DEPTH + channel
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (pixel < pixels) & (py + dy >= 0) & (py + dy < H) & (px + dx >= 0) & (px + dx < W)
        a = tl.load(x + (pixel + dy * W + dx).to(tl.int64)[:, None] * C + c[None, :],
                    mask=inside[:, None] & (c < C)[None, :], other=0.0)
        b = tl.load(weight + ((channel_row * 9 + tap) * C)[None, :] + c[:, None],
                    mask=exists[None, :] & (c < C)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + channel_row, mask=exists, other=0.0).to(tl.float32)[None, :]
    place = image_row.to(tl.int64) * (R * W * R * O) + px * (R * O)
    tl.store(out + place[:, None] + (i * (W * R * O) + run)[None, :], sums.to(out.dtype.element_ty),
             mask=(pixel < pixels)[:, None] & exists[None, :])


# ---- configurations
class Tiles(NamedTuple):
    pixels: int
    columns: int
    depth: int                   # channels of a step
    warps: int
    stages: int                  # of the pipelined loads


CONFIGS = {                      # (many columns, bytes of an element)
    (True, 2): Tiles(128, 128, 64, 8, 3),
    (False, 2): Tiles(128, 64, 64, 8, 3),
    (True, 4): Tiles(128, 128, 32, 8, 3),
    (False, 4): Tiles(64, 64, 32, 8, 2),
}


def configuration(C: int, columns: int, size: int) -> Tiles:
    """64 columns or fewer (RGB at any r) take the narrow tile, few channels a shallower one."""
    tiles = CONFIGS[columns > 64, size]
    return tiles._replace(depth=min(tiles.depth, max(16, triton.next_power_of_2(C))))


def options(tiles: Tiles) -> dict:
    """Triton's; a·b + c may be one rounding, whatever this Triton's default."""
    return dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)


def constants(C: int, O: int, r: int, bias: bool, precision: str, tiles: Tiles) -> dict:
    return dict(C=C, O=O, R=r, BIAS=bias, PIXELS=tiles.pixels, COLUMNS=tiles.columns, DEPTH=tiles.depth,
                PRECISION=precision)


# ---- launch
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """(N, C, H, W), (O·r², C, 3, 3), (O·r²) or None -> (N, O, H·r, W·r), channels-last."""
    (N, C, H, W), O, dtype = x.shape, len(weight) // r**2, x.dtype
    full = dtype == torch.float32 and not torch.backends.cudnn.allow_tf32                     # PyTorch's own switch
    if INTERPRETED:                                                  # it multiplies bfloat16 matrices wrongly
        x, weight = x.float(), weight.float()
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    out = torch.empty((N, O, H * r, W * r), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = configuration(C, O * r**2, x.element_size())
    programs = triton.cdiv(N * H * W, tiles.pixels) * triton.cdiv(O * r**2, tiles.columns)
    if programs:
        with torch.cuda.device_of(x):
            conv_shuffle_kernel[programs,](
                x, weight, weight if bias is None else bias.contiguous(), out, H, W, N * H * W,
                **constants(C, O, r, bias is not None, "ieee" if full else "tf32", tiles),
                **options(tiles))
    return out.to(dtype)
