"""Dual regression compression (DRC, arXiv 2207.07929, Section 4): the network made smaller.

    search   how many channels each layer keeps; in search.py, and offered here again
    select   which ones: the channels whose weights get the largest gradients of the loss
    cut      removes the others from the weights

The unit is a `Pair` (backbones/base.py): a hidden width, the layers that make it, the layers that
consume it. The width of the trunk, where skip connections run, never changes. A network is known
here by `pairs()`, `forward` and `with_widths` only; the loss is handed in as `loss_fn(out, batch)`,
with the network's `SR` and one that holds the true images. In DRC it is `dual.native_loss`, in the
network's own range (255·L_DR for DRN), and the learning rates below refer to that.

Not here: the loss, batches, fine-tuning (train.py). tour.py shows all of it on a small network.
Read backbones/drn.py next.
"""
import copy
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search import (
    FRACTIONS,
    Budget,
    Search,
    budget_ratio,
    candidates,
    decision,
    fit_budget,
    importance,
    search,
    uniform_widths,
    widen,
    widenings,
)

__all__ = ["FRACTIONS", "Budget", "Search", "budget_ratio", "candidates", "cut", "decision",
           "fit_budget", "importance", "search", "select", "silence", "uniform_widths", "widen",
           "widenings"]


# ---- select: which channels ---------------------------------------------------------------------
def select(model: nn.Module, calibration: list, loss_fn: Callable, widths: dict[str, int], *,
           rate: float, per_round: int = 1, reuse: bool = False, replay: bool = True,
           original: nn.Module | None = None, done: dict[str, list[int]] | None = None,
           on_pair: Callable | None = None) -> dict[str, list[int]]:
    """Channel pruning (Section 4.2, Algorithm 2): which `widths[name]` channels each pair keeps.

    The pairs are worked on one after another; earlier ones are masked and tuned already, later ones
    still whole. For each, L = Σ MSE(f, f_original) + loss_fn, where f are the consumers' outputs.
    `model` ends masked and tuned, in evaluation mode: hand it to `cut` with the result.

    calibration  batches, the same in every pass (the release draws new ones)
    rate         of the SGD that tunes the selected weights (release: DRN 5e-5, SwinIR 1e-4)
    per_round    channels taken per scoring; 1 is the paper
    reuse        score with the gradients of the last tuning pass; False is the paper
    replay       do not run finished blocks again: the same numbers to the last bit, see `replaying`
    original     the network before any pruning (default: a copy of `model` as it is)
    done         {name: order} of pairs that `model` has behind it: continues a stopped selection
    on_pair      called after each pair with (pair, all that is kept so far, its rounds: for each
                 the loss before it and the scores of the channels that it took)
    Returns {pair name: kept channels, in the order of selection}.
    """
    original = original or copy.deepcopy(model)
    model.eval()
    original.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    kept = dict(done or {})
    # {module: its output} of finished blocks, a dict for each batch: of the network being pruned,
    stored = [{} for _ in calibration]
    # and of the original network
    stored_original = [{} for _ in calibration]
    once = called_once(original, calibration[0].images[1][:1]) if replay else set()
    for block, pairs in groupby(model.pairs(), lambda pair: pair.block):
        for pair in pairs:
            if pair.name in kept:
                continue
            losses = []
            for batch, here, there in zip(calibration, stored, stored_original):
                targets = features(original, pair, batch, there)
                if replay:
                    here = here | ahead_of(model, pair, batch, here)
                losses.append(partial(pair_loss, model, pair, batch, by_module(model, here),
                                      targets, loss_fn))
            n = widths[pair.name] // pair.heads
            kept[pair.name], rounds = select_pair(model, pair, n, losses, rate, per_round, reuse)
            silence(model, pair, kept[pair.name])
            if on_pair:
                on_pair(pair, kept, rounds)
        if replay:
            for batch, here, there in zip(calibration, stored, stored_original):
                advance(model, block, batch, here, once)
                advance(original, block, batch, there, once)
    for parameter in trainable:
        parameter.requires_grad_()
    return kept


def features(network: nn.Module, pair, batch, stored: dict) -> list[Tensor]:
    """f of one batch: what the pair's consumers put out."""
    with (torch.no_grad(), replaying(by_module(network, stored)),
          collecting(network, pair) as found):
        run_to(network, pair.block, batch.images[1])
    return found


def pair_loss(model: nn.Module, pair, batch, stored: list[tuple], targets: list[Tensor],
              loss_fn: Callable) -> Tensor:
    """L of one batch: how far the features are from the original's, plus the loss of the output."""
    with replaying(stored), collecting(model, pair) as found:
        out = model(batch.images[1])
    return sum(F.mse_loss(f, target) for f, target in zip(found, targets)) + loss_fn(out, batch)


def select_pair(model: nn.Module, pair, n: int, batch_losses: list[Callable], rate: float,
                per_round: int, reuse: bool) -> tuple[list[int], list[tuple]]:
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
    for weight in weights:
        weight.data.zero_()
    order = []
    rounds = []
    last_pass = None
    while len(order) < n:
        if last_pass is None or not reuse:
            last_pass = one_pass(batch_losses, tuned)
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
        last_pass = one_pass(batch_losses, tuned, masks, optimiser)
    for p in tuned:
        p.requires_grad_(False)
        p.grad = None
    return order, rounds


def one_pass(batch_losses: list[Callable], tuned: list[Tensor], masks: list[Tensor] | None = None,
             optimiser=None) -> tuple[list[Tensor], float]:
    """(gradients summed over the batches, also where a channel is masked; the mean loss).

    With an optimiser, one step per batch of what the masks let through.
    """
    total = [torch.zeros_like(p) for p in tuned]
    losses = []
    for batch_loss in batch_losses:
        loss = batch_loss()
        gradients = torch.autograd.grad(loss, tuned)
        torch._foreach_add_(total, gradients)
        losses.append(loss.detach())
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

    Selection has zeroed ("masked") their columns in the consumer. That is already the network that
    `cut` will leave, with two exceptions:

    conv, MLP   no exception: a channel reaches nothing but its column
    attention   a column of `proj` masks v_j, but q_j·k_j still adds to every q·k of its head. It
                does so while the columns are chosen; zeroing the rows of q and k ends it
    LayerNorm   zeroing a channel would change the mean and variance by which all the others are
                normalised. So nothing is zeroed here, and `cut` fits the norm again
    """
    if pair.norm:
        return
    gone = sorted(set(range(pair.width)) - set(kept))
    for layer, rows in pair.producers:
        module = model.get_submodule(layer)
        at = rows[gone].flatten().to(module.weight.device)
        module.weight[at] = 0
        if module.bias is not None:
            module.bias[at] = 0


# ---- replay: what ran before the pair is not run again ------------------------------------------
# While a pair is selected, only weights of its block change, the calibration batches are fixed, and
# in evaluation mode nothing is random: whatever ran before gives the same output in every pass. So
# the output of every finished block is stored once per batch, and from then on the block returns it
# in place of running. Nothing is approximated: the same operations on the same numbers follow.
# What this asks of a network is the first of the traps in backbones/base.py.
@contextmanager
def replaying(stored: list[tuple[nn.Module, object]]):
    """Within it each of the modules returns the output beside it and does not run."""
    for module, output in stored:
        module.forward = partial(again, output)
    try:
        yield
    finally:
        for module, _ in stored:
            del module.forward               # the class's own forward is visible again


def by_module(network: nn.Module, stored: dict) -> list[tuple[nn.Module, object]]:
    """{name: output} for `replaying`; looking modules up by name in every pass would take time."""
    return [(network.get_submodule(name), output) for name, output in stored.items()]


def again(stored, *inputs):
    """The stored output; a copy, because what follows may change it in place, as nn.ReLU can."""
    if isinstance(stored, tuple):
        return tuple(again(part) for part in stored)
    return stored if stored is None else stored.clone()


@torch.no_grad()
def ahead_of(network: nn.Module, pair, batch, stored: dict) -> dict:
    """{name: output} of what precedes the pair's consumer in its nn.Sequential, if it is in one.

    Only the consumer's weights change while channels are chosen, so these are not run again either.
    Of a chain only the last output is read; the members before it get None, which nobody uses.
    """
    parent, _, position = pair.consumers[0][0].rpartition(".")
    if not isinstance(network.get_submodule(parent), nn.Sequential) or int(position) == 0:
        return {}
    names = [f"{parent}.{i}" for i in range(int(position))]
    with replaying(by_module(network, stored)):
        output = run_to(network, names[-1], batch.images[1])
    found = dict.fromkeys(names)
    found[names[-1]] = output
    return found


@contextmanager
def collecting(network: nn.Module, pair):
    """A list that collects what the pair's consumers put out while the block runs."""
    found = []

    def collect(module, inputs, output):
        found.append(output)

    hooks = [network.get_submodule(layer).register_forward_hook(collect)
             for layer, _ in pair.consumers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Reached(Exception):
    """Carries a module's output out of the forward pass, which ends there."""


def run_to(network: nn.Module, name: str, low: Tensor):
    """The output of the module `name` for the images `low`; what comes after it is not run."""
    def leave(module, inputs, output):
        raise Reached(output)

    hook = network.get_submodule(name).register_forward_hook(leave)
    try:
        network(low)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise ValueError(f"{type(network).__name__}.forward never calls its module {name!r}: selection "
                     f"needs every block of pairs() to be called as a module")


@torch.no_grad()
def called_once(network: nn.Module, low: Tensor) -> set[str]:
    """The names of the modules that a forward pass calls once: only these can be replayed."""
    calls = Counter()
    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    network(low)
    for hook in hooks:
        hook.remove()
    return {name for name, count in calls.items() if count == 1}


@torch.no_grad()
def advance(network: nn.Module, block: str, batch, stored: dict, once: set[str]) -> None:
    """Adds to `stored` what is finished when `block` is, and drops what no one will read again.

    Finished are, besides the block, modules that ran before it and are no blocks, such as a first
    convolution. Of nested modules the outermost one is stored. Dropped are outputs inside it, and
    those of earlier members of the same nn.Sequential. once: see `called_once`.
    """
    finished = {}

    def keep(name):
        def hook(module, inputs, output):
            finished[name] = output
        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name))
             for name in once - stored.keys()]
    with replaying(by_module(network, stored)):
        run_to(network, block, batch.images[1])
    for hook in hooks:
        hook.remove()
    for name, output in finished.items():
        parent = name.rpartition(".")[0]
        in_chain = isinstance(network.get_submodule(parent), nn.Sequential)
        for other in list(stored):
            if other.startswith(f"{name}."):
                del stored[other]
            elif in_chain and other.rpartition(".")[0] == parent:
                stored[other] = None         # it is still not to be run
        stored[name] = output


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
        chosen = torch.tensor(sorted(kept.get(pair.name, range(pair.width))))
        index[pair.name] = chosen
        # The tables are channel by channel; sorted, the rows come in the order of the layer again:
        # q, k, v one after another, and in each the heads.
        for layer, rows in pair.producers:
            at = rows[chosen].flatten().sort().values
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in state:
                    state[name] = state[name][at.to(state[name].device)]
        for layer, columns in pair.consumers:
            at = columns[chosen].flatten().sort().values
            name = f"{layer}.weight"
            state[name] = state[name][:, at.to(state[name].device)]
    if calibration:
        state |= refitted_norms(model, index, calibration[0].images[1])
    widths = {pair.name: pair.heads * len(index[pair.name]) for pair in model.pairs()}
    smaller = model.with_widths(widths)
    smaller.to(next(model.parameters())).load_state_dict(state)
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
