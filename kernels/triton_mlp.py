"""The MLP of a transformer block in Triton: the kernel behind mlp.py, whose reference is there.

A program keeps some tokens on the chip from the norm to the sum. It goes over the hidden channels
in steps: each step computes some of them, applies gelu, and adds what fc2 makes of them to the
result, so the hidden channels are never all there.

A tile has a power of two of channels, and SwinIR has 180: one tile of 256 would be a third zeros.
So there are two, of 128 and 64; where one will do, REST is 0, and what belongs to it is left out.

For a token of SwinIR in bfloat16: 720 bytes and 259,200 FLOP, on these tiles 295,000. An H100 needs
about 300 FLOP a byte to be busy, so the tensor cores are what takes the time, then the 360 gelus,
and traffic is next. The weights, 259 KB, are read from the cache by every program.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mlp import EPS
from kernels.triton_tiles import Tiles, options, tiles_for

INTERPRETED = triton.knobs.runtime.interpret          # on the CPU, in Python: for the tests


# ---- parts of the kernel ------------------------------------------------------------------------
@triton.jit
def load_tile(matrix, row, column, rows, columns, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """Some rows and columns of a matrix, zero beyond its `rows` and `columns`.

    The next row is DOWN numbers away, the next column RIGHT.
    """
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * DOWN + column[None, :] * RIGHT
    return tl.load(matrix + place, mask=exists, other=0.0)


@triton.jit
def squares(values, mean, channel, C: tl.constexpr):
    """For each token the sum of (value − mean)² over some channels."""
    centred = tl.where((channel < C)[None, :], values - mean[:, None], 0.0)
    return tl.sum(centred * centred, 1)


@triton.jit
def normed(values, mean, deviation, weight, bias, channel, C: tl.constexpr):
    """LayerNorm on some channels."""
    factor = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    return (values - mean[:, None]) / deviation[:, None] * factor[None, :] + shift[None, :]


@triton.jit
def gelu(h):
    """h · Φ(h), off by 5e-7 at most, in half the instructions of one with tl.erf.

    Abramowitz and Stegun, formula 7.1.26, gives erf(x) with t = 1 / (1 + 0.3275911 x) for x >= 0.
    Here x = |h| / √2 and tail = Φ(−|h|) = (1 − erf(x)) / 2.
    """
    t = 1 / (1 + 0.2316418882 * tl.abs(h))
    tail = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
    tail = (tail * t + 0.254829592) * t * (0.5 * tl.exp2(-0.7213475204 * h * h))    # e^(−h²/2) / 2
    return h * tl.where(h < 0, tail, 1 - tail)


@triton.jit
def add_and_store(acc, x, out, bias, token, channel, tokens, C: tl.constexpr):
    """Writes x + acc + bias on some channels.

    x is read again, from the cache, and its place is worked out again, in other words than before:
    kept from the beginning, they would take registers all the way.
    """
    exists = (token < tokens)[:, None] & (channel < C)[None, :]
    place = token.to(tl.int64)[:, None] * C + channel[None, :]
    acc += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=exists)


# ---- the kernel ---------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["tokens"])
def mlp_kernel(
        x,                           # (tokens, C)
        norm_weight, norm_bias,      # (C)
        weight1, bias1,              # (HIDDEN, C), (HIDDEN)
        weight2, bias2,              # (C, HIDDEN), (C)
        out,                         # (tokens, C)
        tokens,
        C: tl.constexpr,
        HIDDEN: tl.constexpr,
        EPS: tl.constexpr,
        WIDE: tl.constexpr,          # channels of the first tile,
        REST: tl.constexpr,          # and of the second, or 0: together C or more
        BLOCK_M: tl.constexpr,       # tokens of a program
        BLOCK_N: tl.constexpr):      # hidden channels of a step
    """A program computes BLOCK_M tokens."""
    first = tl.program_id(0) * BLOCK_M
    here = x + first.to(tl.int64) * C
    token = tl.arange(0, BLOCK_M)
    wide = tl.arange(0, WIDE)
    values = load_tile(here, token, wide, tokens - first, C, C, 1).to(tl.float32)
    total = tl.sum(values, 1)
    if REST:
        rest = WIDE + tl.arange(0, REST)
        values_rest = load_tile(here, token, rest, tokens - first, C, C, 1).to(tl.float32)
        total += tl.sum(values_rest, 1)
    mean = total / C
    variance = squares(values, mean, wide, C) / C
    if REST:
        variance += squares(values_rest, mean, rest, C) / C
    deviation = tl.sqrt(variance + EPS)
    y = normed(values, mean, deviation, norm_weight, norm_bias, wide, C).to(x.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    if REST:
        y_rest = normed(values_rest, mean, deviation, norm_weight, norm_bias, rest, C)
        y_rest = y_rest.to(x.dtype.element_ty)
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    for start in range(0, HIDDEN, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        h = tl.dot(y, load_tile(weight1, wide, n, C, HIDDEN, 1, C))           # (BLOCK_M, BLOCK_N)
        if REST:
            h = tl.dot(y_rest, load_tile(weight1, rest, n, C, HIDDEN, 1, C), h)
        h += tl.load(bias1 + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[None, :]
        h = gelu(h).to(x.dtype.element_ty)
        acc = tl.dot(h, load_tile(weight2, n, wide, HIDDEN, C, 1, HIDDEN), acc)
        if REST:
            acc_rest = tl.dot(h, load_tile(weight2, n, rest, HIDDEN, C, 1, HIDDEN), acc_rest)
    add_and_store(acc, x, out, bias2, first + token, wide, tokens, C)
    if REST:
        add_and_store(acc_rest, x, out, bias2, first + token, rest, tokens, C)


# ---- launch -------------------------------------------------------------------------------------
def compile_time(C: int, hidden: int, tiles: Tiles) -> dict:
    """What the kernel is compiled for."""
    whole = max(16, triton.next_power_of_2(C))
    wide, rest = whole, 0
    if whole >= 64 and whole * 3 // 4 >= C:
        wide, rest = whole // 2, whole // 4
    return dict(C=C, HIDDEN=hidden, EPS=EPS, WIDE=wide, REST=rest, **tiles.blocks)


def forward(x: Tensor, weights: tuple[Tensor, ...], variant: str) -> Tensor:
    """Launches the kernel; `mlp.check` has seen the arguments, in the order of `residual_mlp`."""
    C = x.shape[-1]
    dtype = x.dtype
    tensors = [t.contiguous() for t in (x, *weights)]
    if INTERPRETED:                                   # it multiplies bfloat16 matrices wrongly
        tensors = [t.float() for t in tensors]
    out = torch.empty_like(tensors[0])
    tokens = out.numel() // C
    if tokens:
        tiles = tiles_for("mlp", "bf16", x.device, variant)
        fixed = compile_time(C, len(weights[2]), tiles)
        with torch.cuda.device_of(x):
            mlp_kernel[(triton.cdiv(tokens, fixed["BLOCK_M"]),)](
                *tensors, out, tokens, **fixed, **options(tiles))
    return out.to(dtype)
