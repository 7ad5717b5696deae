"""Dual regression compression (DRC, arXiv 2207.07929, Section 4): the network made smaller.

    search   how many channels each layer keeps; in search.py and widths.py, and imported here, so
             that a caller needs only this file
    select   which ones: the channels whose weights get the largest gradients of the loss
    cut      removes the others from the weights

Why the gradient? While a channel is out, its weights in the layer that takes it in are zero. The
norm of their gradient says how strongly the loss asks for some weight there, in whatever direction:
the channel where it is largest is missed most. (It is a score and no forecast: what comes back is
the pretrained weight, and is then tuned.) The loss is that of training, plus the distance between
this layer's output and what it put out before any pruning, which tells what the layer lacks even
where the image hides it.

The unit is a `Pair` (backbones/base.py): a hidden width, the layers that make it, the layers that
consume it. The width of the trunk, where skip connections run, never changes. A network is known
here by `pairs()`, `forward` and `with_widths` only; the loss is handed in as `loss_fn(out, batch)`:
both are `SR`, what the network returned and what it should have. In DRC it is `dual.native_loss`,
in the network's own range (255·L_DR for DRN), and the learning rates below refer to that.

Not here: the loss, batches, fine-tuning (train.py), and how a pass over finished blocks is saved
(replay.py, the same numbers in half the time). tour.py shows all of it on a small network. Read
backbones/drn.py next.
"""
import copy
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrow import gone, without
from pairs import find_pairs
from replay import advance, ahead_of, by_module, called_once, collecting, replaying, run_to
from search import Search, decision, importance, search
from widths import (
    FRACTIONS,
    Budget,
    budget_ratio,
    candidates,
    fit_budget,
    uniform_widths,
    widen,
    widenings,
)

__all__ = ["FRACTIONS", "Budget", "Search", "budget_ratio", "candidates", "cut", "decision",
           "find_pairs", "fit_budget", "importance", "search", "select", "silence",
           "uniform_widths", "widen", "widenings"]


# ---- select: which channels ---------------------------------------------------------------------
def select(model: nn.Module, calibration: list, loss_fn: Callable, widths: dict[str, int], *,
           rate: float, per_round: int = 1, reuse: bool = False, replay: bool = True,
           original: nn.Module | None = None, done: dict[str, list[int]] | None = None,
           on_pair: Callable | None = None, reduce: Callable = list) -> dict[str, list[int]]:
    """Channel pruning (Section 4.2, Algorithm 2): which `widths[name]` channels each pair keeps.

    The pairs are worked on one after another; earlier ones are masked and tuned already, later ones
    still whole. For each, L = Σ MSE(f, f_original) + loss_fn, where f are the consumers' outputs.
    `model` ends masked and tuned, in evaluation mode: hand it to `cut` with the result.

    calibration  batches, the same in every pass (the release draws new ones)
    rate         of the SGD that tunes the selected weights (release: DRN 5e-5, SwinIR 1e-4); where
                 a layer would diverge at it, 1 / `curvature` (ours)
    per_round    channels taken per scoring; 1 is the paper
    reuse        score with the gradients of the last tuning pass; False is the paper
    replay       do not run finished blocks again: the same numbers to the last bit, see replay.py
    original     the network before any pruning (default: a copy of `model` as it is)
    done         {name: order} of pairs that `model` has behind it: continues a stopped selection
    on_pair      called after each pair with (pair, all that is kept so far, its rounds: for each
                 the loss before it and the scores of the channels that it took)
    reduce       every loss and its gradients, a list of tensors, pass through it; processes that
                 share the batches average there (parallel.py)
    Returns {pair name: kept channels, in the order of selection}.
    """
    original = original or copy.deepcopy(model)
    model.eval()
    original.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    kept = dict(done or {})
    cases = [Case(batch, {}, {}) for batch in calibration]
    once = called_once(original, calibration[0].images[1][:1]) if replay else set()
    for block, pairs in groupby(model.pairs(), lambda pair: pair.block):
        for pair in pairs:
            if pair.name in kept:
                continue
            with collecting(original, pair, curvature) as found:
                losses = [loss_of(case, model, original, pair, loss_fn, replay) for case in cases]
            [largest] = reduce([torch.stack(found[:len(pair.consumers)]).max()])   # first batch
            stable = 1 / max(largest.item(), 1e-30)
            n = widths[pair.name] // pair.heads
            kept[pair.name], rounds = select_pair(model, pair, n, losses, min(rate, stable),
                                                  per_round, reuse, reduce)
            silence(model, pair, kept[pair.name])
            if on_pair:
                on_pair(pair, kept, rounds)
        if replay:
            for case in cases:
                advance(model, block, case.batch, case.stored, once)
                advance(original, block, case.batch, case.stored_original, once)
    for parameter in trainable:
        parameter.requires_grad_()
    return kept


class Case(NamedTuple):
    """A calibration batch, and what finished blocks put out for it; see replay.py."""
    batch: NamedTuple                # an SR
    stored: dict                     # {module name: output} of the network being pruned
    stored_original: dict            # and of the original


def loss_of(case: Case, model: nn.Module, original: nn.Module, pair, loss_fn: Callable,
            replay: bool) -> Callable:
    """A function without arguments: L of this batch, with the pair's weights as they are then."""
    targets = features(original, pair, case.batch, case.stored_original)
    stored = case.stored
    if replay:
        stored = stored | ahead_of(model, pair, case.batch, stored)
    return partial(pair_loss, model, pair, case.batch, by_module(model, stored), targets, loss_fn)


def features(network: nn.Module, pair, batch, stored: dict) -> list[Tensor]:
    """f of one batch: what the pair's consumers put out."""
    with (torch.no_grad(), replaying(by_module(network, stored)),
          collecting(network, pair) as found):
        run_to(network, pair.block, batch.images[1])
    if len(found) != len(pair.consumers):
        raise ValueError(f"{type(network).__name__}: the block {pair.block} must call each "
                         f"consumer of {pair.name} once, as a module")
    return found


def curvature(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A bound for how steeply the distance of a consumer's features is curved in its weights.

    An output is f = Σ w·x over the inputs x that the consumer sees at a pixel. So its share of the
    MSE is a parabola in w, along every direction curved by at most 2/outputs · mean Σ x². SGD with
    the momentum below converges up to a rate of 1.36 / curvature, and grows without end beyond. It
    matters where a layer's inputs are large: at the end of a network for 0..255.
    """
    [x] = inputs
    outputs, channels = module.weight.shape[:2]
    taps = module.weight[0, 0].numel()                       # of a convolution 3×3 they are 9
    vectors = x.numel() / channels                           # pixels of all images, or tokens
    return 2 / outputs * taps * x.float().square().sum() / vectors


def pair_loss(model: nn.Module, pair, batch, stored: list[tuple], targets: list[Tensor],
              loss_fn: Callable) -> Tensor:
    """L of one batch: how far the features are from the original's, plus the loss of the output."""
    with replaying(stored), collecting(model, pair) as found:
        out = model(batch.images[1])
    return sum(F.mse_loss(f, target) for f, target in zip(found, targets)) + loss_fn(out, batch)


def select_pair(model: nn.Module, pair, n: int, batch_losses: list[Callable], rate: float,
                per_round: int, reuse: bool, reduce: Callable) -> tuple[list[int], list[tuple]]:
    """Greedy selection of n channels of one pair (Algorithm 2).

    The consumer's weight starts from zero. Each round scores the channels that are not selected,
    gives the best their pretrained weights back, and tunes all selected ones by one pass of SGD.
    batch_losses: L of each batch. Returns the indices in order of selection, and for each round
    (the loss before it, the scores of those it took).
    """
    layers = [model.get_submodule(layer) for layer, _ in pair.consumers]
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    tuned = [p.requires_grad_() for p in weights + biases]
    pretrained = [w.detach().clone() for w in weights]
    masks = [torch.zeros_like(p) for p in weights] + [torch.ones_like(p) for p in biases]
    for weight, (_, columns) in zip(weights, pair.consumers):
        weight.data[:, columns.flatten().to(weight.device)] = 0
    order = []
    rounds = []
    last_pass = None
    while len(order) < n:
        if last_pass is None or not reuse:
            last_pass = one_pass(batch_losses, tuned, reduce)
        gradients, loss = last_pass
        score = channel_scores(gradients, pair)
        score[order] = -1                    # they are in already
        best, chosen = score.topk(min(per_round, n - len(order)))
        rounds.append((loss, best.tolist()))
        for weight, source, mask, (_, columns) in zip(weights, pretrained, masks, pair.consumers):
            at = columns[chosen.cpu()].flatten().to(weight.device)
            weight.data[:, at] = source[:, at]
            mask[:, at] = 1
        order += chosen.tolist()
        # as in the release, a new optimiser: the momentum starts anew in each round
        optimiser = torch.optim.SGD(tuned, rate, momentum=0.9, nesterov=True)
        last_pass = one_pass(batch_losses, tuned, reduce, masks, optimiser)
    for p in tuned:
        p.requires_grad_(False)
        p.grad = None
    return order, rounds


def one_pass(batch_losses: list[Callable], tuned: list[Tensor], reduce: Callable,
             masks: list[Tensor] | None = None, optimiser=None) -> tuple[list[Tensor], float]:
    """(gradients summed over the batches, also where a channel is masked; the mean loss).

    With an optimiser, one step per batch of what the masks let through.
    """
    total = [torch.zeros_like(p) for p in tuned]
    losses = []
    for batch_loss in batch_losses:
        loss = batch_loss()
        gradients = torch.autograd.grad(loss, tuned)
        loss, *gradients = reduce([loss.detach(), *gradients])
        torch._foreach_add_(total, gradients)
        losses.append(loss)
        if optimiser:
            for p, gradient, mask in zip(tuned, gradients, masks):
                p.grad = gradient * mask
            optimiser.step()
    return total, torch.stack(losses).mean().item()


def channel_scores(gradients: list[Tensor], pair) -> Tensor:
    """(width,): score_j = Σ_o ‖∂L/∂W[o, j]‖₂ over the outputs o of all consumers, an ℓ2,1 norm.

    W[o, j] is the k×k kernel from channel j to output o (in a linear layer one number). DRC takes
    the greedy selection and this score from DCP (discrimination-aware pruning, arXiv 1810.11809).
    """
    total = 0
    # zip ends with the consumers' weights; the gradients of their biases follow, and do not count
    for gradient, (_, columns) in zip(gradients, pair.consumers):
        norms = gradient.reshape(*gradient.shape[:2], -1).norm(dim=2)      # (out, in)
        total = total + norms.sum(0)[columns.to(gradient.device)].sum(1)
    return total


@torch.no_grad()
def silence(model: nn.Module, pair, kept: list[int]) -> None:
    """Zeroes the producers' rows of the channels that were not kept.

    Selection has zeroed ("masked") their columns in the consumer. Does that equal cutting them?

    conv, MLP   yes: a channel reaches nothing but its column; zeroing its rows changes nothing
    attention   not yet: the masked column of `proj` takes away v_j alone, and q_j·k_j still counts
                in the softmax. Zeroing the rows of q, k and v here changes the output a little,
                and then masking equals cutting
    LayerNorm   no: zeroing a channel would change the mean and variance by which all the others are
                normalised. So nothing is zeroed here, and `cut` fits the norm again
    """
    if pair.norm:
        return
    gone = sorted(set(range(pair.width)) - set(kept))
    for layer, rows in pair.producers:
        module = model.get_submodule(layer)
        for p in module.parameters(recurse=False):               # weight and bias
            p[rows[gone].flatten().to(p.device)] = 0


# ---- cut: remove the others ---------------------------------------------------------------------
def cut(model: nn.Module, kept: dict[str, list[int]], calibration: list | None = None) -> nn.Module:
    """A smaller network with only the channels in `kept` ({pair name: indices in any order}; a pair
    that is not named keeps all). It computes what the selected `model` computes.

    One exception: a LayerNorm within a pair (DAT) normalises differently over fewer channels. Its
    scale and shift are fitted again on the first batch of `calibration`; without, it costs about
    4 dB (RESULTS.md, "DRC on DAT").
    """
    state = model.state_dict()
    index = {}
    for pair in model.pairs():
        index[pair.name] = torch.tensor(sorted(kept.get(pair.name, range(pair.width))))
    for dim, layers in enumerate(gone(model.pairs(), index)):
        for layer, at in layers.items():
            of_rows = ("weight", "bias", "running_mean", "running_var")
            for name in of_rows if dim == 0 else ("weight",):
                if f"{layer}.{name}" in state:
                    state[f"{layer}.{name}"] = without(state[f"{layer}.{name}"], at, dim)
    if calibration:
        state |= refitted_norms(model, index, calibration[0].images[1])
    widths = {pair.name: pair.heads * len(index[pair.name]) for pair in model.pairs()}
    smaller = model.with_widths(widths)
    smaller.to(next(model.parameters())).load_state_dict(state)    # its device and dtype
    return smaller


@torch.no_grad()
def refitted_norms(model: nn.Module, index: dict[str, Tensor], low: Tensor) -> dict[str, Tensor]:
    """{name: new weight or bias} of the LayerNorms within pairs, for the channels in `index`.

    Least squares, channel by channel: with z the kept channels normalised among themselves, find
    slope and shift so that slope·z + shift is close to what the uncut norm gives. (Ours.)
    """
    found, hooks = {}, []
    for pair in model.pairs():
        if pair.norm and len(index[pair.name]) < pair.width:
            norm = model.get_submodule(pair.norm)
            fit = partial(fit_norm, found, pair.norm, index[pair.name])
            hooks.append(norm.register_forward_hook(fit))
    if hooks:
        was_training = model.training
        model.eval()
        model(low)
        model.train(was_training)
    for hook in hooks:
        hook.remove()
    return found


def fit_norm(found: dict, name: str, chosen: Tensor, norm: nn.LayerNorm, inputs, output) -> None:
    """A forward hook of a LayerNorm over (..., channels): puts the fitted numbers into `found`."""
    chosen = chosen.to(output.device)
    wanted = output[..., chosen].flatten(0, -2).double()                   # (tokens, kept)
    x = inputs[0][..., chosen].double()
    z = F.layer_norm(x, (len(chosen),), eps=norm.eps).flatten(0, -2)       # (tokens, kept)
    mean_z = z.mean(0)
    mean = wanted.mean(0)
    covariance = ((z - mean_z) * (wanted - mean)).mean(0)
    variance = (z - mean_z).square().mean(0)
    slope = covariance / variance.clamp_min(1e-12)
    found[f"{name}.weight"] = slope.to(output.dtype)
    found[f"{name}.bias"] = (mean - slope * mean_z).to(output.dtype)
