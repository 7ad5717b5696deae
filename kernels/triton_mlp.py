"""The MLP of a transformer block in Triton: the kernel behind mlp.py, whose reference is there.

A program keeps some tokens on the chip from the norm to the sum. It goes over the hidden channels
in steps: each step computes some of them, applies gelu, and adds what fc2 makes of them to the
result, so the hidden channels are never all there.

For a token of SwinIR in bfloat16: 720 bytes and 259,200 FLOP, on tiles padded to 256 channels
393,000. An H100 needs about 300 FLOP a byte to be busy, so the tensor cores are what takes the
time, and traffic is next. The weights, 259 KB, are read from the cache by every program.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mlp import EPS
from kernels.triton_tiles import Tiles, options, tiles_for

INTERPRETED = triton.knobs.runtime.interpret          # on the CPU, in Python: for the tests


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
        BLOCK_M: tl.constexpr,       # tokens of a program
        BLOCK_C: tl.constexpr,       # C, or the next power of two
        BLOCK_N: tl.constexpr):      # hidden channels of a step
    """A program computes BLOCK_M tokens."""
    first = tl.program_id(0) * BLOCK_M
    x += first.to(tl.int64) * C
    out += first.to(tl.int64) * C
    token = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    in_channels = channel < C
    place = token[:, None] * C + channel[None, :]
    exists = (first + token < tokens)[:, None] & in_channels[None, :]
    given = tl.load(x + place, mask=exists, other=0.0)
    values = given.to(tl.float32)
    mean = tl.sum(values, 1) / C
    centred = tl.where(in_channels[None, :], values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    factor = tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, mask=in_channels, other=0.0).to(tl.float32)
    y = centred / deviation[:, None] * factor[None, :] + shift[None, :]
    y = y.to(given.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, HIDDEN, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_hidden = n < HIDDEN
        both = in_channels[:, None] & in_hidden[None, :]
        w1 = tl.load(weight1 + n[None, :] * C + channel[:, None], mask=both, other=0.0)
        h = tl.dot(y, w1)                     # (BLOCK_M, BLOCK_N)
        h += tl.load(bias1 + n, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
        h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))               # h / √2
        both = in_hidden[:, None] & in_channels[None, :]
        w2 = tl.load(weight2 + channel[None, :] * HIDDEN + n[:, None], mask=both, other=0.0)
        acc = tl.dot(h.to(given.dtype), w2, acc)
    acc += tl.load(bias2 + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    # x is read again, from the cache: kept, it would take registers all the way.
    acc += tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=exists)


# ---- launch -------------------------------------------------------------------------------------
def compile_time(C: int, hidden: int, tiles: Tiles) -> dict:
    """What the kernel is compiled for."""
    return dict(
        C=C,
        HIDDEN=hidden,
        EPS=EPS,
        BLOCK_C=max(16, triton.next_power_of_2(C)),
        **tiles.blocks)


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
