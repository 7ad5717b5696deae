"""Convolution 3×3 and pixel shuffle, the upsampling step of all four backbones (arXiv 1609.05158, Section 3).

    out[n, o, r·y + i, r·x + j] = bias[m] + Σ weight[m, c, ky, kx] · x[n, c, y + ky − 1, x + kx − 1], m = o·r² + i·r + j

PyTorch adds the bias in one pass over the convolution's result and shuffles in another, each as much traffic as the
result itself; the Triton kernel of triton_pixel_shuffle.py (read it next) stores each sum, bias included, where it
belongs. Not here: a backward kernel. The shuffle is undone once and PyTorch's own convolution_backward does the rest.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


def conv3x3_pixel_shuffle(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """x: (N, C, H, W), best in channels-last memory; weight: (O·r², C, 3, 3); bias: (O·r²) or None; r: 2, 3, 4 or 8
    -> (N, O, H·r, W·r). The Triton kernel takes bfloat16 and float32, the PyTorch path the rest.
    ValueError: shapes that do not fit, another r."""
    check(x, weight, bias, r)
    if kernels.runs_triton(x):
        x, weight, bias = like_autocast(x, weight, bias)
        if x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float32):
            return conv_shuffle_op(x, weight, bias, r)
    return torch_path(x, weight, bias, r)


def check(x, weight, bias, r) -> None:
    problems = {
        f"r is {r}, it must be 2, 3, 4 or 8": r not in (2, 3, 4, 8),
        f"x has shape {tuple(x.shape)}, it must be (N, C, H, W)": x.ndim != 4,
        f"weight has shape {tuple(weight.shape)}, r = {r} and this x need (O·{r**2}, {x.shape[1:2].numel()}, 3, 3)":
            x.ndim == 4 and (weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or weight.shape[0] % r**2 != 0),
        f"bias has shape {None if bias is None else tuple(bias.shape)}, this weight needs ({len(weight)},)":
            bias is not None and bias.shape != weight.shape[:1],
    }
    for sentence in (text for text, wrong in problems.items() if wrong):
        raise ValueError(f"conv3x3_pixel_shuffle: {sentence}")


def torch_path(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """The reference, and the path for any device."""
    return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), r)


# ---- Triton path: the kernel as a PyTorch operation, opaque to torch.compile, with its gradient
def like_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Autocast knows conv2d, not our operation: the same casts."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors]


@torch.library.custom_op("drc::conv3x3_pixel_shuffle", mutates_args=())
def conv_shuffle_op(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    from kernels import triton_pixel_shuffle
    return triton_pixel_shuffle.forward(x, weight, bias, r)


@conv_shuffle_op.register_fake
def _(x, weight, bias, r):
    shape = (len(x), len(weight) // r**2, x.shape[2] * r, x.shape[3] * r)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def remember(ctx, inputs, output) -> None:
    x, weight, bias, ctx.r = inputs
    ctx.save_for_backward(x, weight)
    ctx.biases = None if bias is None else [len(bias)]


def gradients(ctx, dout: Tensor):
    x, weight = ctx.saved_tensors
    dout = dout.unflatten(3, (-1, ctx.r)).unflatten(2, (-1, ctx.r))                     # (N, O, H, r, W, r)
    dout = dout.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)                # (N, O·r², H, W), channels-last
    needed = [wanted and (ctx.biases is not None or i < 2) for i, wanted in enumerate(ctx.needs_input_grad[:3])]
    result = torch.ops.aten.convolution_backward(
        dout, x, weight, ctx.biases, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed)
    return *result, None


conv_shuffle_op.register_autograd(gradients, setup_context=remember)
