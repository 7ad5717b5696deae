"""Convolution 3×3 and pixel shuffle, the upsampling step of all four backbones (sub-pixel convolution, arXiv 1609.05158).

    out[n, o, r·y + i, r·x + j] = bias[o·r² + i·r + j] + Σ weight[o·r² + i·r + j, c, dy, dx] · x[n, c, y + dy − 1, x + dx − 1]
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3_pixel_shuffle(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """x: (N, C, H, W); weight: (O·r², C, 3, 3); bias: (O·r²) or None; r = 2, 3 or 4 -> (N, O, H·r, W·r)."""
    return torch_path(x, weight, bias, r)


def torch_path(x: Tensor, weight: Tensor, bias: Tensor | None, r: int) -> Tensor:
    return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), r)
