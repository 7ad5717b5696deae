"""Convolution 3×3 and pixel shuffle: the upsampling step of all four backbones.

Pixel shuffle (arXiv 1609.05158, Section 3) turns r² channels into an r×r block of pixels. With m
the channel of the convolution's result y, o that of the output, and (i, j) the place in the block:

    y[n, m, h, w] = bias[m] + Σ over c, ky, kx of weight[m, c, ky, kx] · x[n, c, h+ky−1, w+kx−1]
    out[n, o, r·h + i, r·w + j] = y[n, m, h, w]              m = o·r² + i·r + j

Outside of the picture x is 0. For r = 2 the channels 0, 1, 2, 3 of y at one pixel become the block

    0  1
    2  3

of channel 0 of out, the channels 4, 5, 6, 7 the block of channel 1, and so on.

What the fused kernel saves: memory traffic
-------------------------------------------
PyTorch adds the bias in one pass over the convolution's result and shuffles in another; each reads
and writes the whole result. The kernel stores each sum, bias included, where it belongs. For DRN's
step from 64 to 256 channels on 320×180 in bfloat16: 7 MB in, 29 MB out, so 37 MB instead of 155 MB.
The work is the same, 17 GFLOP.

In this file: `torch_path`, the reference and the path for any device; `conv3x3_pixel_shuffle`,
which the networks call; the Triton kernel wrapped as a PyTorch operation with a gradient. Not here:
a backward kernel. The gradient is shuffled back once, and PyTorch's own convolution_backward does
the rest. Read triton_pixel_shuffle.py next.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choice, switch, triton_tiles


def torch_path(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """The reference, and the path for any device."""
    return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), r)


def conv3x3_pixel_shuffle(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """A 3×3 convolution whose output channels become r×r blocks of pixels.

    x: (N, C, H, W), best in channels-last memory.
    weight: (O·r², C, 3, 3). bias: (O·r²), or None.
    r: 2, 3, 4 or 8.
    Returns (N, O, H·r, W·r).

    The Triton kernel takes bfloat16 and float32, where it is the fastest, the PyTorch path the
    rest. Raises ValueError for shapes that do not fit each other, and for another r.
    """
    check(x, weight, bias, r)
    if not switch.runs_triton(x):
        return torch_path(x, weight, bias, r)
    x, weight, bias = switch.like_autocast(x, weight, bias)
    if x.dtype != weight.dtype or x.dtype not in switch.NUMBERS:
        return torch_path(x, weight, bias, r)
    N, C, H, W = x.shape
    kind = (f"{C} to {len(weight)} channels, r {r}, {'' if bias is None else 'bias, '}"
            f"{switch.NUMBERS[x.dtype]}, 2^{choice.bucket(N * H * W)} pixels")
    compiled = (triton_tiles.conv_kernel(len(weight)),)
    ways = triton_tiles.ways(triton_path, compiled, x, "conv") | TORCH_WAYS
    return choice.call("conv3x3_pixel_shuffle", kind, ways, (x, weight, bias), dict(r=r))


def triton_path(x: Tensor, weight: Tensor, bias: Tensor | None, r: int, variant: str) -> Tensor:
    """`conv3x3_pixel_shuffle` by the Triton kernel; variant: one of triton_tiles.VARIANTS."""
    return conv_shuffle_op(x, weight, bias, r, variant)


def channels_last_path(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """`torch_path` in the memory layout in which cuDNN is fastest."""
    x = x.contiguous(memory_format=torch.channels_last)
    return torch_path(x, weight.contiguous(memory_format=torch.channels_last), bias, r)


TORCH_WAYS = {                       # of these and of the Triton kernel the fastest runs
    "cuDNN": torch_path,
    "cuDNN channels-last": channels_last_path,
}


def check(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> None:
    """Raises ValueError with a sentence that names what is wrong and its value."""
    name = "conv3x3_pixel_shuffle:"
    if r not in (2, 3, 4, 8):
        raise ValueError(f"{name} r is {r}, it must be 2, 3, 4 or 8")
    if x.ndim != 4:
        raise ValueError(f"{name} x has shape {tuple(x.shape)}, it must be (N, C, H, W)")
    C = x.shape[1]
    if weight.ndim != 4 or weight.shape[1:] != (C, 3, 3) or len(weight) % r**2 != 0:
        raise ValueError(f"{name} weight has shape {tuple(weight.shape)}, "
                         f"r = {r} and this x need (O·{r**2}, {C}, 3, 3)")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"{name} bias has shape {tuple(bias.shape)}, "
                         f"this weight needs ({len(weight)},)")


# ---- the Triton kernel as a PyTorch operation ---------------------------------------------------
# torch.compile sees it as one opaque step, whose output shape the "fake" version tells.
@torch.library.custom_op("drc::conv3x3_pixel_shuffle", mutates_args=())
def conv_shuffle_op(
        x: Tensor, weight: Tensor, bias: Tensor | None, r: int, variant: str) -> Tensor:
    """`conv3x3_pixel_shuffle` by the Triton kernel."""
    from kernels import triton_pixel_shuffle
    return triton_pixel_shuffle.forward(x, weight, bias, r, variant)


@conv_shuffle_op.register_fake
def fake_forward(x, weight, bias, r, variant):
    N, _, H, W = x.shape
    shape = (N, len(weight) // r**2, H * r, W * r)
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def remember(ctx, inputs, output) -> None:
    """Keeps what the backward pass needs."""
    x, weight, bias, r, _ = inputs
    ctx.r = r
    ctx.bias_shape = None if bias is None else [len(bias)]
    ctx.save_for_backward(x, weight)


def gradients(ctx, dout: Tensor):
    """One gradient for each input of `conv_shuffle_op`; None where none is asked for."""
    x, weight = ctx.saved_tensors
    dout = dout.unflatten(3, (-1, ctx.r)).unflatten(2, (-1, ctx.r))   # (N, O, H, r, W, r)
    dout = dout.permute(0, 2, 4, 1, 3, 5).flatten(3)                  # (N, H, W, O·r²)
    dout = dout.permute(0, 3, 1, 2)                                   # (N, O·r², H, W)
    for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
    needed = [for_x, for_weight, for_bias and ctx.bias_shape is not None]
    stride = padding = dilation = [1, 1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dout, x, weight, ctx.bias_shape, stride, padding, dilation, False, [0, 0], 1, needed)
    return dx, dweight, dbias, None, None


conv_shuffle_op.register_autograd(gradients, setup_context=remember)
