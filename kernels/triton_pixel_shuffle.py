"""Convolution 3×3 and pixel shuffle in Triton: the kernel behind pixel_shuffle.py.

The reference is `torch_path` there. The convolution is computed as the product of two matrices that
are never written down (an "implicit GEMM"):

    (pixels, 9·C) · (9·C, O·r²) -> (pixels, O·r²)

A row of the left matrix holds the 3×3 neighbourhood of a pixel, all channels of each neighbour; a
column of the right one holds the weights of an output channel. Memory is channels-last everywhere.

The columns are taken in the order (i, j, o), not in PyTorch's (o, i, j). So what a pixel writes to
row i of its r×r block is one run of r·O numbers, and the run of its right neighbour follows in
memory. The shuffle is nothing but the address of the store, and the bias is added before it.

64 -> 256 channels, r = 2, on 320×180 in bfloat16: 37 MB and 17 GFLOP, 460 FLOP a byte; an H100
needs about 300 to be busy, so the tensor cores are what takes the time, and traffic is next.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import switch

INTERPRETED = triton.knobs.runtime.interpret          # on the CPU, in Python: for the tests


@triton.jit(do_not_specialize=["H", "W", "pixels"])
def conv_shuffle_kernel(
        x,                           # (N, H, W, C)
        weight,                      # (O·R², 3, 3, C), rows in the order (o, i, j)
        bias,                        # (O·R²), the same order; anything unless BIAS
        out,                         # (N, H·R, W·R, O)
        H, W,                        # size of x
        pixels,                      # of x in all: N·H·W
        C: tl.constexpr,
        OUT: tl.constexpr,           # O, the channels of out
        R: tl.constexpr,
        BIAS: tl.constexpr,          # whether there is a bias
        PRECISION: tl.constexpr,     # of float32 products: "tf32" or "ieee"
        BLOCK_M: tl.constexpr,       # pixels of a program
        BLOCK_N: tl.constexpr,       # columns of a program
        BLOCK_K: tl.constexpr):      # channels of a step
    """A program computes BLOCK_N columns of BLOCK_M pixels.

    Neighbouring programs take the same pixels and other columns: these pixels are in the cache.
    """
    COLUMNS: tl.constexpr = OUT * R * R
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K           # for each of the nine neighbours
    program = tl.program_id(0)
    pixel = program // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    in_pixels = pixel < pixels
    image_row = pixel // W                                       # n·H + y
    px = pixel % W
    py = image_row % H
    column = program % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < COLUMNS
    i = column // (R * OUT)
    run = column % (R * OUT)                                     # j·O + o, the place in the run
    o = run % OUT
    j = run // OUT
    channel_row = (o * R + i) * R + j                            # of weight and bias
    channel = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, 9 * STEPS):                             # one loop, so that loads run ahead
        neighbour = step // STEPS
        c = step % STEPS * BLOCK_K + channel
        in_channels = c < C
        ky = neighbour // 3 - 1
        kx = neighbour % 3 - 1
        inside = in_pixels & (py + ky >= 0) & (py + ky < H) & (px + kx >= 0) & (px + kx < W)
        source = (pixel + ky * W + kx).to(tl.int64) * C
        a = tl.load(x + source[:, None] + c[None, :],
                    mask=inside[:, None] & in_channels[None, :], other=0.0)
        weight_row = (channel_row * 9 + neighbour) * C
        b = tl.load(weight + weight_row[None, :] + c[:, None],
                    mask=in_columns[None, :] & in_channels[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + channel_row, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    ROW: tl.constexpr = R * OUT
    place = image_row.to(tl.int64) * (R * W * ROW) + px * ROW    # of the block's upper left corner
    place_in_block = i * (W * ROW) + run
    tl.store(out + place[:, None] + place_in_block[None, :], acc.to(out.dtype.element_ty),
             mask=in_pixels[:, None] & in_columns[None, :])


# ---- tile sizes ---------------------------------------------------------------------------------
class Tiles(NamedTuple):
    """How the kernel is compiled."""
    pixels: int                      # BLOCK_M
    columns: int                     # BLOCK_N
    depth: int                       # BLOCK_K
    warps: int                       # of 32 threads
    stages: int                      # steps whose loads are under way at the same time


# A tile of 128×128 makes 128 FLOP of each number that it loads, one of 128×64 makes 85 and one of
# 64×64 makes 64; larger ones do not fit into the registers (128×128 are 64 numbers a thread on 8
# warps). A step of 64 channels in bfloat16, or of 32 in float32, is 128 bytes of a pixel, a whole
# cache line. Loads run 3 steps ahead: 3·(128 + 128)·128 bytes = 98 KB of shared memory.
WIDE = {                             # more than 64 columns; by bytes of a number
    2: Tiles(128, 128, 64, warps=8, stages=3),
    4: Tiles(128, 128, 32, warps=8, stages=3),
}
NARROW = {                           # 64 columns or fewer: a picture with 3 channels at any r <= 4
    2: Tiles(128, 64, 64, warps=8, stages=3),
    4: Tiles(64, 64, 32, warps=8, stages=2),
}


def tiles_for(C: int, columns: int, size: int) -> Tiles:
    """The tiles for C channels, O·r² columns and numbers of `size` bytes."""
    tiles = WIDE[size] if columns > 64 else NARROW[size]
    return tiles._replace(depth=min(tiles.depth, max(16, triton.next_power_of_2(C))))


def options(tiles: Tiles) -> dict:
    """Triton's own options; a·b + c may be rounded once, whatever the default of this Triton is."""
    return dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)


def compile_time(C: int, outputs: int, r: int, bias: bool, numbers: str, tiles: Tiles) -> dict:
    """What the kernel is compiled for; numbers are "bf16", "tf32" or "ieee"."""
    return dict(
        C=C,
        OUT=outputs,
        R=r,
        BIAS=bias,
        PRECISION="ieee" if numbers == "ieee" else "tf32",            # bfloat16 has no choice
        BLOCK_M=tiles.pixels,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.depth)


# ---- launch -------------------------------------------------------------------------------------
def arithmetic(dtype: torch.dtype) -> str:
    """"bf16" for bfloat16; for float32 "tf32" (TensorFloat-32) or "ieee" (in full).

    Which of the two, PyTorch's own switch for convolutions says.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if switch.allows_tf32("conv") else "ieee"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """Launches the kernel; `pixel_shuffle.check` has seen the arguments.

    x: (N, C, H, W), weight: (O·r², C, 3, 3), bias: (O·r²) or None, in any memory layout.
    Returns (N, O, H·r, W·r) in channels-last memory.
    """
    N, C, H, W = x.shape
    columns = len(weight)
    outputs = columns // r**2
    dtype = x.dtype
    if INTERPRETED:                                   # it multiplies bfloat16 matrices wrongly
        x = x.float()
        weight = weight.float()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (N, outputs, H * r, W * r),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last)
    if out.numel() == 0:
        return out.to(dtype)
    tiles = tiles_for(C, columns, x.element_size())
    constants = compile_time(C, outputs, r, bias is not None, arithmetic(dtype), tiles)
    bias = weight if bias is None else bias.contiguous()         # some pointer there must be
    pixel_tiles = triton.cdiv(N * H * W, tiles.pixels)
    column_tiles = triton.cdiv(columns, tiles.columns)
    with torch.cuda.device_of(x):
        conv_shuffle_kernel[(pixel_tiles * column_tiles,)](
            x, weight, bias, out, H, W, N * H * W, **constants, **options(tiles))
    return out.to(dtype)
