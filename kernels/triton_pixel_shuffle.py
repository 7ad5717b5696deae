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
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_tiles import arithmetic, conv_kernel, options, shallow, tiles_for

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
        PRECISION: tl.constexpr,     # of float32 products, see triton_tiles.py
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


# ---- launch --------------------------------------------------------------------------------------
def compile_time(C: int, outputs: int, r: int, bias: bool) -> dict:
    """What the kernel is compiled for, beside its tiles."""
    return dict(C=C, OUT=outputs, R=r, BIAS=bias)


def readable(x: Tensor) -> Tensor:
    """x in channels-last memory, at an address that 16-byte loads can have."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, r: int, variant: str) -> Tensor:
    """Launches the kernel; `pixel_shuffle.check` has seen the arguments.

    x: (N, C, H, W), weight: (O·r², C, 3, 3), bias: (O·r²) or None, in any memory layout.
    Returns (N, O, H·r, W·r) in channels-last memory.
    """
    N, C, H, W = x.shape
    columns = len(weight)
    outputs = columns // r**2
    dtype = x.dtype
    if INTERPRETED and dtype == torch.bfloat16:       # it multiplies bfloat16 matrices wrongly
        x = x.float()
        weight = weight.float()
    x = readable(x)
    weight = readable(weight)
    out = torch.empty(
        (N, outputs, H * r, W * r),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last)
    if out.numel() == 0:
        return out.to(dtype)
    numbers = arithmetic(dtype, "conv")
    tiles = shallow(tiles_for(conv_kernel(columns), numbers, x.device, variant), C)
    constants = compile_time(C, outputs, r, bias is not None) | tiles.constants
    bias = weight if bias is None else bias.contiguous()         # some pointer there must be
    pixel_tiles = triton.cdiv(N * H * W, tiles.blocks["BLOCK_M"])
    column_tiles = triton.cdiv(columns, tiles.blocks["BLOCK_N"])
    with torch.cuda.device_of(x):
        conv_shuffle_kernel[(pixel_tiles * column_tiles,)](
            x, weight, bias, out, H, W, N * H * W, **constants, **options(tiles))
    return out.to(dtype)
