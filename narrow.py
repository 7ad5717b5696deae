"""Removes channels from the layers of a network, whatever class it is of.

A channel of a `Pair` (backbones/base.py) is rows of the layers that make it and columns of those
that take it in. The layers are made narrower in place: weights, biases, the statistics of a
BatchNorm, and the numbers by which a layer knows its own shape. Which channels go is decided in
prune.py. Read pairs.py next, which tries with it what may be removed.
"""
import torch
from torch import Tensor, nn

from backbones.base import Pair


def gone(pairs: list[Pair], kept: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({layer: rows}, {layer: columns}) that go if pair `name` keeps the channels kept[name].

    Of a dense block's convolution several pairs own columns, and others belong to none.
    """
    rows, columns = {}, {}
    for pair in pairs:
        out = torch.ones(pair.width, dtype=torch.bool)
        out[torch.as_tensor(kept[pair.name])] = False
        for tables, layers in ((pair.producers, rows), (pair.consumers, columns)):
            for layer, table in tables:
                layers.setdefault(layer, []).append(table[out].flatten())
    return ({layer: torch.cat(parts) for layer, parts in rows.items()},
            {layer: torch.cat(parts) for layer, parts in columns.items()})


def without(tensor: Tensor, at: Tensor, dim: int) -> Tensor:
    """The tensor without the indices `at` of a dimension."""
    return tensor.index_select(dim, remaining(tensor.shape[dim], at).to(tensor.device))


def remaining(size: int, at: Tensor) -> Tensor:
    """The indices 0 .. size − 1 without those in `at`."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[at.cpu()] = False
    return stays.nonzero().flatten()


SIZES = {0: ("out_channels", "out_features", "num_features", "num_parameters"),
         1: ("in_channels", "in_features")}          # what layers know of their own shape


def narrow(model: nn.Module, pairs: list[Pair], kept: dict) -> list[Pair]:
    """Removes all channels but kept[name] from the layers of a network, in place; returns the pairs
    of what is left, with channels and rows counted anew.
    """
    numbers = {}                             # {(layer, dim): old index -> new index}
    for dim, layers in enumerate(gone(pairs, kept)):
        for layer, at in layers.items():
            module = model.get_submodule(layer)
            stays = remaining(module_size(module, dim), at)
            resize(module, at, dim, len(stays))
            number = torch.full((stays.max() + 1,), -1)
            number[stays] = torch.arange(len(stays))
            numbers[layer, dim] = number
    result = []
    for pair in pairs:
        chosen = torch.as_tensor(kept[pair.name]).sort().values
        sides = []
        for dim, tables in enumerate((pair.producers, pair.consumers)):
            sides.append(tuple((layer, numbers[layer, dim][table[chosen]])
                               for layer, table in tables))
        result.append(pair._replace(width=len(chosen), producers=sides[0], consumers=sides[1]))
    return result


def module_size(module: nn.Module, dim: int) -> int:
    """How many rows (dim 0) or columns (1) a layer has."""
    tensor = module.weight
    if tensor is None:                       # a BatchNorm without scale and shift
        tensor = module.running_mean
    return tensor.shape[dim]


def resize(module: nn.Module, at: Tensor, dim: int, size: int) -> None:
    """Removes the rows (dim 0) or columns (1) `at` of one layer, in place."""
    for name, p in list(module.named_parameters(recurse=False)):
        if p.ndim > dim:
            smaller = nn.Parameter(without(p.detach(), at, dim), requires_grad=p.requires_grad)
            setattr(module, name, smaller)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim > dim:
            setattr(module, name, without(buffer, at, dim))
    depthwise = getattr(module, "groups", 1) > 1
    for known in SIZES[dim] + SIZES[1] + ("groups",) if depthwise else SIZES[dim]:
        if hasattr(module, known):
            setattr(module, known, size)
