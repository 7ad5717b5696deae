"""Windowed attention with shift, relative position bias and region mask, as SwinIR and DAT use it.

    S = scale · q kᵀ + bias[query − key] − 100·[regions differ],     out = softmax(S) v,   within each window and head

The map is rolled by −shift before it is cut into windows and rolled back afterwards; a rolled window may hold tokens
of up to four regions that do not touch in the picture; the mask keeps them apart (Swin, arXiv 2103.14030, Section 3.2).
The qkv Linear works per token and commutes with all of this: it is applied to the unshifted map, outside.

Memory traffic for A channels in all heads: the fused kernels read 3A and write A per token, backward reads 4A and
writes 3A; written out in PyTorch the n×n scores, the bias, the mask and five copies of the map come on top, about ten
times as much at A = 180, window 8×8. Three implementations, in this file: `reference`, the text above in PyTorch;
`torch_path`, the same for any device; and the Triton kernels of triton_window_attention.py (read it next) as PyTorch
operations with a gradient. Not here: the Linears before and after, the network that makes DAT's bias table.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


def window_attention(qkv: Tensor, bias_table: Tensor, *, heads: int, window: tuple[int, int],
                     shift: tuple[int, int] = (0, 0), scale: float, crossed: bool = False) -> Tensor:
    """qkv: (B, H, W, 3·A), q then k then v, each heads-major, A = heads·d -> (B, H, W, A), the same layout.

    The map is thought zero-padded, right and bottom, to multiples of the window; the padding takes part as keys.
    bias_table: ((2h−1)(2w−1), heads), entry (Δy + h−1)(2w−1) + (Δx + w−1) for Δ = query − key; window (h, w); shift
    (y, x) with 0 <= shift < window, both zero or neither; scale of q kᵀ (not from d: a pruned head keeps its old one).
    crossed: the second half of the heads uses window and shift turned by 90° (DAT), and the padding is to multiples of
    the longer side. The Triton kernels take windows of 64 or 256 tokens, heads up to 32 wide, bfloat16 or float32; the
    PyTorch path takes the rest. ValueError: shapes that do not fit, a dtype other than bfloat16, float32, float64."""
    check(qkv, bias_table, heads, window, shift, crossed)
    if kernels.runs_triton(qkv) and fits(qkv, heads, window):
        save = torch.is_grad_enabled() and (qkv.requires_grad or bias_table.requires_grad)
        return window_attention_op(qkv, bias_table, heads, list(window), list(shift), scale, crossed, save)[0]
    return torch_path(qkv, bias_table, heads, window, shift, scale, crossed)


def check(qkv, bias_table, heads, window, shift, crossed) -> None:
    (h, w), entries = window, (2 * window[0] - 1) * (2 * window[1] - 1)
    problems = {
        f"qkv has shape {tuple(qkv.shape)}, it must be (B, H, W, 3·heads·d) with {heads} heads":
            qkv.ndim != 4 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * heads) != 0,
        f"bias_table has shape {tuple(bias_table.shape)}, window {h}x{w} and {heads} heads need ({entries}, {heads})":
            tuple(bias_table.shape) != (entries, heads),
        f"shift {shift} must be (0, 0) or within 1..{h - 1}, 1..{w - 1}":
            tuple(shift) != (0, 0) and not (0 < shift[0] < h and 0 < shift[1] < w),
        f"crossed needs an even number of heads, not {heads}": crossed and heads % 2,
        f"qkv is {qkv.dtype}: use bfloat16 or float32 (float16 overflows in these networks and gives black images)":
            qkv.dtype not in (torch.bfloat16, torch.float32, torch.float64),
    }
    for sentence in (text for text, wrong in problems.items() if wrong):
        raise ValueError(f"window_attention: {sentence}")


def branches(qkv: Tensor, bias_table: Tensor, heads: int, window, shift, crossed: bool):
    """(q k v of some heads (B, H, W, 3, heads, d), their table, window, shift) for each orientation."""
    parts = qkv.unflatten(3, (3, heads, -1))                                                  # (B, H, W, 3, heads, d)
    if not crossed:
        return [(parts, bias_table, window, shift)]
    half = heads // 2
    return [(parts[..., :half, :], bias_table[:, :half], window, shift),
            (parts[..., half:, :], bias_table[:, half:], window[::-1], shift[::-1])]


def padding(size: tuple[int, int], window: tuple[int, int], crossed: bool) -> tuple[int, int]:
    """Rows and columns that are missing to multiples of the window."""
    unit = (max(window),) * 2 if crossed else window
    return -size[0] % unit[0], -size[1] % unit[1]


# ---- reference: the operation written out, step by step, for any dtype; slow
def reference(qkv: Tensor, bias_table: Tensor, *, heads, window, shift=(0, 0), scale, crossed=False) -> Tensor:
    """The same as window_attention, as the papers describe it: pad, roll, partition, softmax, reverse, roll, crop."""
    B, H, W, _ = qkv.shape
    down, right = padding((H, W), window, crossed)
    result = []
    for part, table, (h, w), (dy, dx) in branches(qkv, bias_table, heads, window, shift, crossed):
        x = F.pad(part.flatten(3), (0, 0, 0, right, 0, down)).roll((-dy, -dx), (1, 2))        # (B, H', W', 3·heads·d)
        rows, columns, n = x.shape[1] // h, x.shape[2] // w, h * w
        x = x.view(B, rows, h, columns, w, -1).transpose(2, 3).reshape(-1, n, 3, part.shape[4], part.shape[5])
        q, k, v = x.permute(2, 0, 3, 1, 4)                                                    # (windows, heads, n, d)
        scores = q @ k.transpose(2, 3) * scale + table[offsets(h, w, qkv.device)].permute(2, 0, 1)
        if dy:
            region = torch.zeros(x.shape[0] // B * n, device=qkv.device).view(rows * h, columns * w)
            region[-h:] += 1
            region[-dy:] += 1
            region[:, -w:] += 3
            region[:, -dx:] += 3
            region = region.view(rows, h, columns, w).transpose(1, 2).reshape(-1, 1, n)       # (windows of a map, 1, n)
            mask = -100.0 * (region != region.transpose(1, 2)).to(scores.dtype)
            scores = scores + mask.repeat(B, 1, 1)[:, None]
        out = (scores.softmax(-1) @ v).transpose(1, 2)                                        # (windows, n, heads, d)
        out = out.reshape(B, rows, columns, h, w, -1).transpose(2, 3).reshape(B, rows * h, columns * w, -1)
        result.append(out.roll((dy, dx), (1, 2))[:, :H, :W])
    return torch.cat(result, 3)


@lru_cache
def offsets(h: int, w: int, device: torch.device) -> Tensor:
    """(h·w, h·w) row of the bias table for every query and key of a window."""
    with torch.inference_mode(False):                            # kept for training, too, whoever comes first
        y, x = torch.arange(h * w, device=device) // w, torch.arange(h * w, device=device) % w
        return (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)


# ---- PyTorch path: any device, differentiable
def torch_path(qkv: Tensor, bias_table: Tensor, heads, window, shift, scale, crossed) -> Tensor:
    """As the reference, faster. Only the last row and column of windows need a mask, and it is the same for every map
    size: four rectangles of windows, each with one (heads, n, n) bias that its windows share."""
    B, H, W, _ = qkv.shape
    down, right = padding((H, W), window, crossed)
    result = []
    for part, table, (h, w), (dy, dx) in branches(qkv, bias_table, heads, window, shift, crossed):
        x = part.flatten(3)                                                                   # (B, H, W, 3·heads·d)
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        bias = table.t()[:, offsets(h, w, qkv.device)].to(qkv.dtype)                          # (heads, n, n)
        if dy:
            low, side = (mask.to(bias) for mask in masks(h, w, dy, dx, qkv.device))           # (n, n) each
            x = x.roll((-dy, -dx), (1, 2))
            upper, lower = x.split((x.shape[1] - h, h), 1)
            biases = (bias, bias + side), (bias + low, bias + torch.minimum(low, side))
            x = torch.cat([torch.cat([attend(piece, b, h, w, scale) for piece, b in
                                      zip(band.split((x.shape[2] - w, w), 2), pair)], 2)
                           for band, pair in zip((upper, lower), biases)], 1)
            x = x.roll((dy, dx), (1, 2))
        else:
            x = attend(x, bias, h, w, scale)
        result.append(x[:, :H, :W])
    return torch.cat(result, 3) if crossed else result[0]


def attend(x: Tensor, bias: Tensor, h: int, w: int, scale: float) -> Tensor:
    """(B, rows·h, columns·w, 3·heads·d), (heads, n, n) -> (B, rows·h, columns·w, heads·d)."""
    B, rows, columns, width = x.shape[0], x.shape[1] // h, x.shape[2] // w, x.shape[3] // 3
    x = x.unflatten(2, (columns, w)).unflatten(1, (rows, h)).transpose(2, 3)             # (B, rows, columns, h, w, ...)
    x = x.reshape(B * rows * columns, h * w, 3, len(bias), width // len(bias))
    q, k, v = x.permute(2, 0, 3, 1, 4)                                                        # (windows, heads, n, d)
    if bias.requires_grad or x.is_meta:                                    # the fused one gives no gradient of the bias
        x = ((q * scale) @ k.transpose(2, 3) + bias).softmax(-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale)
    x = x.transpose(1, 2).reshape(B, rows, columns, h, w, width).transpose(2, 3)
    return x.reshape(B, rows * h, columns * w, width)


@lru_cache
def masks(h: int, w: int, dy: int, dx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, n) masks, 0 or −100, of the last row of windows and of the last column: the last dy rows (dx columns) of such
    a window come from the other end of the map. In the last window of all, a pair is apart if either says so."""
    with torch.inference_mode(False):
        y, x = torch.arange(h * w, device=device) // w >= h - dy, torch.arange(h * w, device=device) % w >= w - dx
        return -100.0 * (y[:, None] != y), -100.0 * (x[:, None] != x)


# ---- Triton path: the kernels as PyTorch operations, opaque to torch.compile, with their gradient
def fits(qkv: Tensor, heads: int, window) -> bool:
    return (window[0] * window[1] in (64, 256) and qkv.shape[3] <= 3 * 32 * heads
            and qkv.dtype in (torch.bfloat16, torch.float32))


@torch.library.custom_op("drc::window_attention", mutates_args=())
def window_attention_op(qkv: Tensor, bias_table: Tensor, heads: int, window: list[int], shift: list[int], scale: float,
                        crossed: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(out, what backward needs besides: the logarithms of the sums of exponentials; empty unless `save`)."""
    from kernels import triton_window_attention as triton
    return triton.forward(qkv, bias_table, heads, window, shift, scale, crossed, save)


@torch.library.custom_op("drc::window_attention_backward", mutates_args=())
def window_attention_backward_op(qkv: Tensor, bias_table: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int,
                                 window: list[int], shift: list[int], scale: float,
                                 crossed: bool) -> tuple[Tensor, Tensor]:
    """(dqkv, dtable) of the gradient `dout` of `out`."""
    from kernels import triton_window_attention as triton
    return triton.backward(qkv, bias_table, out, lse, dout, heads, window, shift, scale, crossed)


@window_attention_op.register_fake
def _(qkv, bias_table, heads, window, shift, scale, crossed, save):
    B, H, W, width = qkv.shape
    down, right = padding((H, W), tuple(window), crossed)
    tokens, orientations = B * (H + down) * (W + right), 2 if crossed else 1
    lse = (orientations, tokens * heads // orientations) if save else (0,)
    return qkv.new_empty(B, H, W, width // 3), qkv.new_empty(lse, dtype=torch.float32)


@window_attention_backward_op.register_fake
def _(qkv, bias_table, out, lse, dout, heads, window, shift, scale, crossed):
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape)


def remember(ctx, inputs, output) -> None:
    qkv, bias_table, *ctx.settings, _ = inputs
    ctx.save_for_backward(qkv, bias_table, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradients(ctx, dout: Tensor | None, _):
    nothing = (None,) * 6
    if dout is None:
        return None, None, *nothing
    qkv, bias_table, out, lse = ctx.saved_tensors
    return *window_attention_backward_op(qkv, bias_table, out, lse, dout, *ctx.settings), *nothing


window_attention_op.register_autograd(gradients, setup_context=remember)
