"""The head widths that the kernels have, 16 and 32 channels, and how a head is brought to one.

A head of d = 30 channels is 60 bytes in bfloat16, and its place in memory a multiple of 4: it is
read 4 bytes at a time, each with an address and a mask of its own. Padded with two zeros it is read
in four pieces of 16 bytes. A zero channel changes nothing: it adds 0 to each product of a query and
a key, and its own output is 0. So the padding is exact, and a pruned network, whose heads may have
any width, needs no more than two compiled versions of a kernel.

The cheapest place for the zeros is the weights of the layers around the attention (swinir.py and
dat.py in backbones/): 3·A² numbers once instead of 3A numbers for each token. What comes with
another width nevertheless is padded by the launches in triton_attention.py.
"""
import torch.nn.functional as F
from torch import Tensor

from kernels import switch


def head_width(d: int) -> int:
    """16 or 32, whichever is the next; a head of more than 32 channels stays as it is."""
    for width in (16, 32):
        if d <= width:
            return width
    return d


def wanted_width(d: int, x: Tensor) -> int:
    """The width at which a head of d channels is best computed where x lies.

    On a CPU that is d itself: there zeros cost time (RESULTS.md has the figures).
    """
    return head_width(d) if x.is_cuda or switch.runs_triton(x) else d


def pad_groups(x: Tensor, dim: int, groups: int, width: int) -> Tensor:
    """Zeros behind each of `groups` equal groups along a dimension: groups·d -> groups·width."""
    dim %= x.ndim
    d = x.shape[dim] // groups
    if d == width:
        return x
    behind = (0, 0) * (x.ndim - dim - 1) + (0, width - d)
    return F.pad(x.unflatten(dim, (groups, d)), behind).flatten(dim, dim + 1)


def cut_groups(x: Tensor, groups: int, d: int) -> Tensor:
    """Takes the zeros away again, along the last dimension: groups·width -> groups·d."""
    if x.shape[-1] == groups * d:
        return x
    return x.unflatten(-1, (groups, -1))[..., :d].flatten(-2)
