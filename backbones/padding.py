"""Hidden widths padded with zeros to the sizes that GPUs like. Exact, for inference on a GPU.

Tensor cores and 16-byte loads want channels in multiples of 8, and the window attention heads of 16
or 32 channels (kernels/heads.py). Pruning leaves 37 or 23. So the weights get zeros: a producer
rows, whose outputs are then 0, and the consumer as many columns of zeros. What stands between them,
ReLU or GELU, works on each channel alone, and whatever it makes of a 0 is multiplied by 0.

Not padded is a pair with a LayerNorm between its layers, which divides by the number of channels:
the norm is one of the producers, and padded are only linear layers and convolutions.
Not here: when it is done, see `models.inference`.
"""
import torch
from torch import Tensor, nn

from kernels.heads import head_width, pad_groups

MULTIPLE = 8                         # channels of a convolution or linear layer


def pad_pairs(model: nn.Module) -> None:
    """Pads every pair of a backbone for which that is exact, in place."""
    for pair in model.pairs():
        ends = []
        for dim, layers in enumerate((pair.producers, pair.consumers)):
            ends += [(model.get_submodule(name), dim, index) for name, index in layers]
        if all(in_groups(*end) for end in ends):
            width = -pair.width // MULTIPLE * -MULTIPLE
            if pair.heads > 1:
                width = max(width, head_width(pair.width))
            for layer, dim, index in ends:
                pad_layer(layer, dim, index.shape[1], width)


def in_groups(layer: nn.Module, dim: int, index: Tensor) -> bool:
    """Whether the channels of a pair are all rows (dim 0) or columns (dim 1) of a layer, in groups
    of one number for each channel, in their order.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) != 1:
        return False
    in_order = torch.arange(layer.weight.shape[dim])
    return torch.equal(index.t().flatten(), in_order)


def pad_layer(layer: nn.Module, dim: int, groups: int, width: int) -> None:
    """Pads each group of rows (dim 0, with the bias) or of columns (dim 1) to `width`, in place."""
    layer.weight = nn.Parameter(pad_groups(layer.weight.detach(), dim, groups, width))
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(pad_groups(layer.bias.detach(), 0, groups, width))
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(layer, f"{'in' if dim else 'out'}_{kind}", layer.weight.shape[dim])
