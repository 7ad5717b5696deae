"""Window attention in the ways that PyTorch offers, for the kernels to be compared with.

`written_out` does the part that is the same for all: it rolls the map, cuts it into windows, and
puts them back. Inside it one of three cores attends in all windows at once:

    authors             product, bias, mask, softmax, product, as in the papers' code
    memory_efficient    PyTorch's fused attention, with bias and mask added up beforehand
    flex                PyTorch's FlexAttention, with bias and mask computed inside

`authors_attention` has the signature of kernels.window_attention and can take its place in a whole
network. Used by bench/kernels.py and others; measures nothing itself.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from kernels import attention


# ---- the map as windows, and back ---------------------------------------------------------------
def windows_of(part: Tensor, window, shift, down: int, right: int) -> Tensor:
    """(B, H, W, 3, heads, d) -> q, k, v as (3, B, windows of a map, heads, n, d).

    down, right: how many rows and columns of zeros the map needs.
    """
    h, w = window
    x = part.flatten(3)
    if down or right:
        x = F.pad(x, (0, 0, 0, right, 0, down))
    if shift[0]:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))
    x = x.transpose(2, 3)                                        # (B, rows, columns, h, w, ·)
    x = x.reshape(len(x), -1, h * w, *part.shape[3:])            # (B, windows, n, 3, heads, d)
    return x.permute(3, 0, 1, 4, 2, 5)


def image_of(x: Tensor, size, padded, window, shift) -> Tensor:
    """(B, windows of a map, heads, n, d) -> (B, H, W, heads·d), without the padding."""
    h, w = window
    height, width = padded
    x = x.transpose(2, 3).reshape(len(x), height // h, width // w, h, w, -1)
    x = x.transpose(2, 3).reshape(len(x), height, width, -1)
    if shift[0]:
        x = x.roll(tuple(shift), (1, 2))
    return x[:, :size[0], :size[1]]


# ---- what is the same in every call -------------------------------------------------------------
class Ready(NamedTuple):
    """Made once for one orientation of the windows, as the authors do before training."""
    index: Tensor                # (n, n) entries of the bias table
    region: Tensor               # (windows of a map, n)
    mask: Tensor | None          # (windows of a map, 1, n, n), 0 or −100; None without a shift


def prepare(qkv: Tensor, window, shift, crossed: bool) -> list[Ready]:
    """One `Ready` for each orientation, for maps of the size of qkv (B, H, W, 3·A)."""
    H, W = qkv.shape[1:3]
    down, right = attention.padding((H, W), window, crossed)
    orientations = [(window, shift)]
    if crossed:
        orientations.append((window[::-1], shift[::-1]))
    result = []
    for (h, w), (dy, dx) in orientations:
        rows = (H + down) // h
        columns = (W + right) // w
        y = torch.arange(rows * h, device=qkv.device).view(rows, 1, h, 1)
        x = torch.arange(columns * w, device=qkv.device).view(1, columns, 1, w)
        below = y >= rows * h - dy
        beyond = x >= columns * w - dx
        region = (2 * below + beyond).view(rows * columns, h * w)
        mask = None
        if dy:
            apart = region[:, :, None] != region[:, None, :]
            mask = -100.0 * apart.to(qkv.dtype)[:, None]
        result.append(Ready(attention.offsets(h, w, qkv.device), region, mask))
    return result


# ---- attention around a core --------------------------------------------------------------------
def written_out(
        core: Callable,
        qkv: Tensor,
        bias_table: Tensor,
        *,
        heads: int,
        window,
        shift,
        scale: float,
        crossed: bool,
        ready: list[Ready] | None = None) -> Tensor:
    """kernels.window_attention by `core`(q, k, v, bias (heads, n, n), Ready, scale).

    ready: from `prepare`; without it index and mask are made anew.
    """
    if ready is None:
        ready = prepare(qkv, window, shift, crossed)
    H, W = qkv.shape[1:3]
    down, right = attention.padding((H, W), window, crossed)
    parts = attention.orientations(qkv, bias_table, heads, window, shift, crossed)
    results = []
    for (part, table, sides, turned), known in zip(parts, ready):
        q, k, v = windows_of(part, sides, turned, down, right)
        bias = table[known.index].permute(2, 0, 1).to(qkv.dtype)
        x = core(q, k, v, bias, known, scale)
        results.append(image_of(x, (H, W), (H + down, W + right), sides, turned))
    return torch.cat(results, 3) if crossed else results[0]


def authors_attention(
        qkv: Tensor,
        bias_table: Tensor,
        *,
        heads: int,
        window,
        shift=(0, 0),
        scale: float,
        crossed: bool = False) -> Tensor:
    """kernels.window_attention as the authors write it; the mask is made anew in every call."""
    return written_out(
        authors, qkv, bias_table, heads=heads, window=window, shift=shift, scale=scale,
        crossed=crossed)


# ---- the cores: q, k, v (B, windows of a map, heads, n, d) -> the same shape ---------------------
def authors(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ready: Ready, scale: float) -> Tensor:
    """One operation after the other."""
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    if ready.mask is not None:
        scores = scores + ready.mask
    return scores.softmax(-1) @ v


def widened(*tensors: Tensor) -> list[Tensor]:
    """Pads heads with zeros to 16 or 32 channels, which PyTorch's fused attentions want."""
    d = tensors[0].shape[-1]
    missing = (16 if d <= 16 else 32) - d
    return [F.pad(t, (0, missing)) for t in tensors]


def memory_efficient(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ready: Ready, scale: float) -> Tensor:
    """The fused attention that takes an added mask.

    Windows and heads become one dimension, so that bias and mask serve the whole batch by a stride
    of 0, without a copy for each picture.
    """
    B, windows, heads, _, d = q.shape
    added = bias.expand(windows, -1, -1, -1) if ready.mask is None else bias + ready.mask
    added = added.flatten(0, 1).expand(B, -1, -1, -1)
    q, k, v = (t.flatten(1, 2) for t in widened(q, k, v))        # (B, windows·heads, n, 16 or 32)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        x = F.scaled_dot_product_attention(q, k, v, added, scale=scale)
    return x[..., :d].unflatten(1, (windows, heads))


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ready: Ready, scale: float) -> Tensor:
    """FlexAttention compiles `with_bias` into its kernel."""
    B, windows = q.shape[:2]
    d = q.shape[-1]
    region = ready.region

    def with_bias(score, b, head, i, j):
        score = score + bias[head, i, j]
        if ready.mask is not None:
            same = region[b % windows, i] == region[b % windows, j]
            score = torch.where(same, score, score - 100.0)
        return score

    q, k, v = (t.flatten(0, 1) for t in widened(q, k, v))        # (B·windows, heads, n, 16 or 32)
    x = flex_attention(q, k, v, score_mod=with_bias, scale=scale)
    return x[..., :d].unflatten(0, (B, windows))
