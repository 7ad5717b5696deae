"""Which channels, without the gradients of a loss: rules that the selection of DRC has to beat.

    by_l1_norm           the channels with the largest weights in the layer that reads them
    by_chance            any
    by_reconstruction    those that give back best what the layer put out, on calibration pictures:
                         by `greedy`, which is ThiNet's way (arXiv 1707.06342), or by `lasso`, that
                         of channel pruning ("CP", arXiv 1707.06168)

Used by bench/claims.py and others; measures nothing itself.
"""
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prune


def by_l1_norm(model: nn.Module, widths: dict[str, int]) -> dict[str, list[int]]:
    """The channels with the largest norms. widths: of all heads together, as everywhere."""
    kept = {}
    for pair in model.pairs():
        norms = prune.importance(model, pair)
        kept[pair.name] = norms.topk(widths[pair.name] // pair.heads).indices.tolist()
    return kept


def by_chance(model: nn.Module, widths: dict[str, int], seed: int) -> dict[str, list[int]]:
    """Channels drawn at random."""
    rng = np.random.default_rng(seed)
    kept = {}
    for pair in model.pairs():
        kept[pair.name] = rng.permutation(pair.width)[:widths[pair.name] // pair.heads].tolist()
    return kept


# ---- by reconstruction --------------------------------------------------------------------------
# A layer that is linear in its inputs puts out Σ_j z_j, where z_j is what channel j contributes.
# How far some of them, with factors, are from the sum of all depends on the inner products alone,
# G_ij = z_i·z_j.
@torch.no_grad()
def by_reconstruction(model: nn.Module, calibration: list, widths: dict[str, int],
                      rule: Callable) -> dict[str, list[int]]:
    """Channels chosen by rule(G, n), pair after pair, and each rescaled by least squares.

    `model` ends masked: hand it to `prune.cut` with the result. (CP refits all weights at the end;
    the one factor for each channel is ThiNet's.)
    """
    kept = {}
    for pair in model.pairs():
        G = sum(inner_products(model, *consumer, calibration) for consumer in pair.consumers)
        n = widths[pair.name] // pair.heads
        chosen = kept[pair.name] = rule(G, n)
        # the factors s of the chosen z_j for which Σ s_j z_j is closest to Σ z_j over all j
        factors = np.zeros(pair.width)
        factors[chosen] = np.linalg.lstsq(G[np.ix_(chosen, chosen)], G[chosen].sum(1))[0]
        for layer, columns in pair.consumers:
            weight = model.get_submodule(layer).weight
            scale = weight.new_tensor(factors).repeat_interleave(columns.shape[1])
            at = columns.flatten()
            weight[:, at] *= scale.view(1, -1, *[1] * (weight.ndim - 2))
        prune.silence(model, pair, chosen)
    return kept


def inner_products(model: nn.Module, name: str, columns: Tensor, calibration: list) -> np.ndarray:
    """G (width, width) of one consumer, over all positions of its output."""
    layer = model.get_submodule(name)
    size = layer.weight[0, 0].numel()                            # 9 in a 3×3 convolution, else 1
    seen = 0

    def keep(module, inputs):
        nonlocal seen
        x = inputs[0].flatten(0, -2).t()                         # (in, positions) of a linear layer
        if isinstance(module, nn.Conv2d):
            x = F.unfold(inputs[0], module.kernel_size, 1, module.padding, module.stride)
            x = x.transpose(0, 1).flatten(1)                     # (in·9, positions)
        seen = seen + (x @ x.t()).double()

    hook = layer.register_forward_pre_hook(keep)
    for batch in calibration:
        model(batch.images[1])
    hook.remove()
    weight = layer.weight.flatten(1).double()                    # (out, in·9)
    both = weight.t() @ weight * seen                            # (in·9, in·9)
    at = (columns[:, :, None] * size + torch.arange(size)).flatten(1)
    both = both[at.flatten()][:, at.flatten()]
    # summed over the entries of channel i and those of channel j
    return both.unflatten(0, at.shape).unflatten(2, at.shape).sum((1, 3)).numpy()


def greedy(G: np.ndarray, n: int) -> list[int]:
    """ThiNet: removes, one after another, the channel that makes the removed sum grow least."""
    left = list(range(len(G)))
    removed = np.zeros(len(G))                                   # 1 for each channel that is gone
    while len(left) > n:
        growth = G.diagonal() + 2 * G @ removed
        worst = min(left, key=lambda j: growth[j])
        removed[worst] = 1
        left.remove(worst)
    return left


def lasso(G: np.ndarray, n: int) -> list[int]:
    """CP: the channels with a factor β_j ≠ 0 in min ½|Σ z_j − Σ β_j z_j|² + λ Σ|β_j|, with λ as
    large as n of them allow. By coordinate descent, λ falling by a tenth at a time.
    """
    target = G.sum(1)
    size = G.diagonal() + 1e-12 * G.trace()
    beta = np.zeros(len(G))
    strength = np.zeros(len(G))                                  # |β_j z_j|
    penalty = np.abs(target).max()
    # what is below 1e-6 of the strongest is a rounding error
    while (strength > 1e-6 * strength.max()).sum() < n and penalty > 1e-9 * size.max():
        penalty *= 0.9
        for j in np.tile(np.arange(len(G)), 10):
            rest = target[j] - G[j] @ beta + G[j, j] * beta[j]
            beta[j] = np.sign(rest) * max(abs(rest) - penalty, 0) / size[j]
        strength = np.abs(beta) * np.sqrt(size)
    return np.argsort(-strength, kind="stable")[:n].tolist()
