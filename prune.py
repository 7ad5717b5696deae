"""Dual regression compression (DRC, arXiv 2207.07929): how many channels each layer keeps, which ones, and the cut.

    search   channel number search: a differentiable mixture of six widths per layer, trained by a two-level descent
    select   channel pruning: the channels whose weights the dual regression loss pulls at hardest, one layer at a time
    cut      removes what was not selected, physically

The unit is a `Pair` (models.py): a hidden width with its producer and its consumer. Width in the trunk never changes.
A backbone is known here only by `pairs()`, `steps()`, `begin`, `finish` and `with_widths`; the loss is handed in as
`loss_fn(out, y)`, a scalar in the network's native range (255·L_DR for DRN), which is what the rates below refer to.

Not here: the loss (dual.py), where batches come from (data.py), fine-tuning (train.py, which is to be read next).
"""
import copy
from contextlib import contextmanager
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)         # of the width that the ratio leaves: the six candidates (Section 4.1)


# ---- 1 search ------------------------------------------------------------------------------------------------------
def candidates(width: int, ratio: float, multiple: int = 4) -> list[int]:
    """The six widths a layer of `width` channels may get: (1 − ratio)·width·p for p in FRACTIONS, truncated, rounded to
    a multiple of 4 (a remainder of 2 goes down), within 4..width. The largest is the ratio itself: the search only ever
    removes more. Equal candidates stay separate options, as in the release. multiple: 8 suits GPUs better (ours)."""
    return [min(max(multiple * ((int(width * (1 - ratio) * p) + (multiple - 1) // 2) // multiple), multiple), width)
            for p in FRACTIONS]


def importance(model: nn.Module, pair) -> Tensor:
    """(width,) L1 norm of each channel's slice of the consumers' weights."""
    total = 0
    for layer, columns in pair.consumers:
        weight = model.get_submodule(layer).weight.detach().abs()              # (out, in, ...)
        total = total + weight.transpose(0, 1).flatten(1).sum(1)[columns.to(weight.device)].sum(1)
    return total


class Search:
    """Channel number search (Section 4.1, Algorithm 1) in resumable steps.

    Relaxation: channel j of pair l is scaled by m_j = Σ_k softmax(α_l)_k [rank(j) < n_k], rank by descending L1 norm,
    which equals the softmax mixture of the layer truncated to each of its candidate widths n_k.

    One step, with a batch of each half of the training images (eq. 5 to 8):
      1  w' = w − ξ (∇_w L(T; w, α) + ρ w);   ∇_α = ∇_α L(V; w', α) − ξ (∇_α L(T; w⁺, α) − ∇_α L(T; w⁻, α)) / (2ε),
         w± = w ± ε v,  v = ∇_w' L(V; w', α),  ε = 0.01/‖v‖     (the release multiplies by ε here, which loses the term)
      2  α ← Adam(3e-4, weight decay 1e-3)            3  w ← Adam(ξ) on L(T; w, α), gradient norm clipped

    model and the parameters in `extra` (the duals of loss_fn) are trained along and are useless afterwards: hand copies.
    """
    def __init__(self, model: nn.Module, loss_fn: Callable, ratio: float, extra=(), rate: float = 1e-4, decay: float = 3e-4,
                 clip: float = 5.0, second_order: bool = True, multiple: int = 4):
        self.model, self.loss_fn, self.rate, self.decay, self.clip = model, loss_fn, rate, decay, clip
        self.second_order, self.pairs = second_order, model.pairs()
        model.eval()                                       # all five passes see the same network: no stochastic depth
        self.weights = [*model.parameters(), *extra]
        device = self.weights[0].device
        self.candidates = [candidates(pair.width, ratio, multiple) for pair in self.pairs]
        self.alphas = [(1e-3 * torch.randn(len(FRACTIONS))).to(device).requires_grad_() for _ in self.pairs]
        self.alpha_optimiser = torch.optim.Adam(self.alphas, 3e-4, weight_decay=1e-3)
        self.optimiser = torch.optim.Adam(self.weights, rate)
        self.best = (float("inf"), [a.detach().clone() for a in self.alphas])

    def scaled_weights(self) -> dict[str, Tensor]:
        """{name: consumer weight with its input channels scaled by m}, differentiable in w and α."""
        result = {}
        for pair, alpha, widths in zip(self.pairs, self.alphas, self.candidates):
            order = importance(self.model, pair).argsort(descending=True, stable=True)
            rank = order.argsort()                                                            # (width,)
            inside = rank[:, None] < torch.tensor(widths, device=rank.device)                  # (width, 6)
            m = inside.to(alpha.dtype) @ alpha.softmax(0)                                      # (width,)
            for layer, columns in pair.consumers:
                weight = self.model.get_submodule(layer).weight
                scale = m.new_ones(weight.shape[1]).index_copy(
                    0, columns.flatten().to(m.device), m.repeat_interleave(columns.shape[1]))
                result[f"{layer}.weight"] = weight * scale.view(1, -1, *[1] * (weight.ndim - 2))
        return result

    def loss(self, y: dict[int, Tensor]) -> Tensor:
        return self.loss_fn(torch.func.functional_call(self.model, self.scaled_weights(), (y[1],)), y)

    def gradient(self, y, tensors) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.loss(y)
        return loss.detach(), torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)

    @contextmanager
    def moved(self, directions, step):
        """Within the block every weight w is w + step·direction; afterwards it is w again, to the last bit."""
        kept = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            torch._foreach_add_(self.weights, [step * d for d in directions])
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.weights, kept)

    def alpha_gradient(self, train, valid) -> tuple[Tensor, list[Tensor]]:
        """(loss on `valid` after the virtual step, gradient of each α)."""
        _, g = self.gradient(train, self.weights)
        with self.moved([d + self.decay * w.detach() for d, w in zip(g, self.weights)], -self.rate):
            loss, both = self.gradient(valid, [*self.alphas, *self.weights])
        direct, v = both[:len(self.alphas)], both[len(self.alphas):]
        if not self.second_order:
            return loss, list(direct)
        epsilon = 0.01 / torch.stack(torch._foreach_norm(v)).norm()
        with self.moved(v, epsilon):
            _, plus = self.gradient(train, self.alphas)
        with self.moved(v, -epsilon):
            _, minus = self.gradient(train, self.alphas)
        return loss, [d - self.rate * (p - m) / (2 * epsilon) for d, p, m in zip(direct, plus, minus)]

    def step(self, train: dict[int, Tensor], valid: dict[int, Tensor]) -> tuple[float, float]:
        """One alternation; returns the losses on `train` and on `valid`."""
        valid_loss, gradients = self.alpha_gradient(train, valid)
        for alpha, gradient in zip(self.alphas, gradients):
            alpha.grad = gradient
        self.alpha_optimiser.step()
        train_loss, gradients = self.gradient(train, self.weights)
        for weight, gradient in zip(self.weights, gradients):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.optimiser.step()
        return train_loss.item(), valid_loss.item()

    @torch.no_grad()
    def hold(self, held_out: list[dict[int, Tensor]]) -> float:
        """Remembers α if the relaxed network is the best so far on held-out training images (never on a test set)."""
        loss = sum(self.loss(y).item() for y in held_out) / len(held_out)
        if loss < self.best[0]:
            self.best = (loss, [a.detach().clone() for a in self.alphas])
        return loss

    def widths(self, budget: "Budget | None" = None) -> dict[str, int]:
        """{pair name: channels to keep}: argmax α of the best held-out epoch, or the best choice within a budget."""
        scores = torch.stack(self.best[1]).log_softmax(1).cpu().double().numpy()               # (pairs, 6)
        names = [pair.name for pair in self.pairs]
        sizes = [[pair.count * n for n in options] for pair, options in zip(self.pairs, self.candidates)]
        picks = fit_budget(scores, sizes, names, budget) if budget else scores.argmax(1)
        return {name: options[k] for name, options, k in zip(names, sizes, picks)}

    def state_dict(self) -> dict:
        return dict(weights=[w.detach() for w in self.weights], alphas=[a.detach() for a in self.alphas], best=self.best,
                    optimiser=self.optimiser.state_dict(), alpha_optimiser=self.alpha_optimiser.state_dict())

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.weights, state["weights"])
        torch._foreach_copy_(self.alphas, state["alphas"])
        self.best = (state["best"][0], list(state["best"][1]))
        self.optimiser.load_state_dict(state["optimiser"])
        self.alpha_optimiser.load_state_dict(state["alpha_optimiser"])


def search(model: nn.Module, train, valid, held_out: list, loss_fn: Callable, ratio: float, steps: int, epoch: int = 25,
           budget: "Budget | None" = None, **settings) -> dict[str, int]:
    """{pair name: channels to keep} after `steps` steps on batches from the iterators `train` and `valid`; every `epoch`
    steps α is compared on the batches of `held_out`. settings: see Search. model itself is left as it is."""
    state = Search(copy.deepcopy(model), loss_fn, ratio, **settings)
    for k in range(1, steps + 1):
        state.step(next(train), next(valid))
        if k % epoch == 0 or k == steps:
            state.hold(held_out)
    return state.widths(budget)


class Budget(NamedTuple):
    cost: Callable[[dict[str, int]], int]     # of the whole network with these widths; linear in every width
    limit: float                              # the most it may be


def budget_ratio(target: float) -> float:
    """The pruning ratio whose candidates surround a budget of `target` (0..1) of the whole network's cost."""
    return max(0.0, 1 - target / 0.75)


def fit_budget(scores: np.ndarray, sizes: list[list[int]], names: list[str], budget: Budget, bins: int = 20_000) -> list[int]:
    """Our addition to the paper: the choice k_l of a candidate per pair that maximises Σ_l scores[l, k_l] among those
    whose cost lies within 1 % below the limit: a knapsack, solved exactly up to the grid of `bins` costs.
    scores: (pairs, 6). ValueError when no choice of candidates costs that much or that little."""
    smallest = {name: min(options) for name, options in zip(names, sizes)}
    floor, grid = budget.cost(smallest), budget.limit / bins
    extra = []                                                                                 # (pairs, 6), grid steps
    for name, options in zip(tqdm(names, "budget", leave=False, delay=2), sizes):
        low, high = min(options), max(options)
        channel = (budget.cost({**smallest, name: high}) - floor) / max(1, high - low)         # cost of one channel
        extra.append([int(np.ceil((n - low) * channel / grid)) for n in options])
    room = int((budget.limit - floor) / grid)
    most = budget.cost({name: max(options) for name, options in zip(names, sizes)})
    if room < 0 or most < 0.99 * budget.limit:
        raise ValueError(f"the budget of {budget.limit:,.0f} cannot be met: the candidate widths give {floor:,} to {most:,}; "
                         f"choose another --budget or --prune")
    best = np.full(room + 1, -np.inf)
    best[0], picks = 0.0, []
    for row, steps in zip(scores, extra):
        options = np.full((len(steps), room + 1), -np.inf)
        for k, step in enumerate(steps):
            if step <= room:
                options[k, step:] = row[k] + best[:room + 1 - step]
        picks.append(options.argmax(0))
        best = options.max(0)
    lowest = max(0, room - bins // 100)
    at = lowest + int(best[lowest:].argmax())
    if not np.isfinite(best[at]):
        raise ValueError(f"no choice of the candidate widths comes within 1 % of the budget of {budget.limit:,.0f}: "
                         f"choose another --budget or --prune")
    chosen = []
    for pick, steps in zip(reversed(picks), reversed(extra)):
        chosen.append(int(pick[at]))
        at -= steps[chosen[-1]]
    return chosen[::-1]


# ---- 2 select ------------------------------------------------------------------------------------------------------
@contextmanager
def outputs_of(model: nn.Module, pair):
    """A list that collects, while the block runs, the outputs of the pair's consumers: the features f of Section 4.2."""
    collected = []
    hooks = [model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: collected.append(output))
             for layer, _ in pair.consumers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def channel_scores(gradients: list[Tensor], pair) -> Tensor:
    """score_j = Σ_o ‖∂L/∂(W⊙d)[o, j]‖₂, an l2,1 norm, over all consumers: (width,). (Section 4.2, as in DCP)"""
    return sum(g.flatten(2).norm(dim=2).sum(0)[columns.to(g.device)].sum(1) if g.ndim > 2 else
               g.abs().sum(0)[columns.to(g.device)].sum(1) for g, (_, columns) in zip(gradients, pair.consumers))


def select_pair(model, pair, n: int, batch_losses: list[Callable], rate: float, per_round: int, reuse: bool):
    """Greedy selection of n channels of one pair (Algorithm 2). The consumer starts from zero; each round scores the
    unselected channels by the gradient of L, gives the best their pretrained weights back and tunes all selected ones
    by one pass of SGD. batch_losses: L of each calibration batch. Returns (indices in order, loss of each scoring)."""
    layers = [model.get_submodule(layer) for layer, _ in pair.consumers]
    weights, biases = [m.weight for m in layers], [m.bias for m in layers if m.bias is not None]
    tuned = [p.requires_grad_() for p in (*weights, *biases)]
    pretrained = [w.detach().clone() for w in weights]
    masks = [torch.zeros_like(w) for w in weights]
    with torch.no_grad():
        torch._foreach_zero_(weights)

    def one_pass(optimiser=None):
        """Summed gradient of the consumers' weights, dense, and the mean loss; with an optimiser one step per batch."""
        total, losses = [torch.zeros_like(w) for w in weights], []
        for batch_loss in batch_losses:
            loss = batch_loss()
            gradients = torch.autograd.grad(loss, tuned)
            torch._foreach_add_(total, gradients[:len(weights)])
            losses.append(loss.detach())
            if optimiser:
                for p, g, mask in zip(tuned, gradients, masks + [1] * len(biases)):
                    p.grad = g * mask
                optimiser.step()
        return total, torch.stack(losses).mean().item()

    order, record, scored = [], [], None
    while len(order) < n:
        total, loss = scored if scored and reuse else one_pass()
        record.append(loss)
        score = channel_scores(total, pair)
        score[order] = -1
        chosen = score.topk(min(per_round, n - len(order))).indices
        for weight, source, mask, (_, columns) in zip(weights, pretrained, masks, pair.consumers):
            at = columns[chosen.cpu()].flatten().to(weight.device)
            weight.data[:, at], mask[:, at] = source[:, at], 1
        order += chosen.tolist()
        scored = one_pass(torch.optim.SGD(tuned, rate, momentum=0.9, nesterov=True))
    for p in tuned:
        p.requires_grad_(False).grad = None
    return order, record


def select(model: nn.Module, calibration: list[dict[int, Tensor]], loss_fn: Callable, widths: dict[str, int], *,
           rate: float, per_round: int = 1, reuse: bool = False, cache: bool = True, original: nn.Module | None = None,
           done: dict[str, list[int]] | None = None, on_pair: Callable | None = None) -> dict[str, list[int]]:
    """Channel pruning (Section 4.2, Algorithm 2): which `widths[name]` channels each pair keeps.

    For each pair in order, L = Σ MSE(f_original, f) + loss_fn, f the consumers' outputs; earlier pairs are already masked
    and tuned, later ones still dense. `model` ends masked and tuned, in evaluation mode: hand it to `cut` with the result.

    rate       of the SGD that tunes the selected slices (native-range loss: DRN 5e-5, SwinIR 1e-4, DCLS 1e-5)
    per_round  channels taken per scoring; 1 is the paper
    reuse      score with the gradients that the last tuning pass already made; False is the paper
    cache      run only the network behind the pair, on stored inputs: the same selection, bit for bit; False reruns both
               networks from the image for every pass, as the release does
    original   the network before any pruning (default: a copy of `model` as it is now)
    done       {name: order} of pairs that `model` has behind it already: continues an interrupted selection
    on_pair    called with (pair, order, losses of its scorings) after each pair
    Returns {pair name: kept channels, in the order of selection}.
    """
    original = original or copy.deepcopy(model)
    model.eval(), original.eval()                           # every pass sees the same network: no stochastic depth
    kept, steps, original_steps = dict(done or {}), model.steps(), original.steps()
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    with torch.no_grad():
        before = [model.begin(y[1]) for y in calibration]
        dense = [original_steps[0](original.begin(y[1])) for y in calibration]   # states at the input of pair 0's consumer

    for i, pair in enumerate(model.pairs()):
        targets = []
        with torch.no_grad():
            masked = [steps[i](state) for state in before]                       # at the input of this pair's consumer
        for b, state in enumerate(dense):
            with torch.no_grad(), outputs_of(original, pair) as features:
                dense[b] = original_steps[i + 1](state)
            targets.append(features)

        def run_rest(b: int):
            with outputs_of(model, pair) as features:
                state = masked[b]
                for step in steps[i + 1:]:
                    state = step(state)
            return model.finish(state), features, targets[b]

        def run_all(b: int):
            x = calibration[b][1]
            with torch.no_grad(), outputs_of(original, pair) as wanted:
                original(x)
            with outputs_of(model, pair) as features:
                out = model(x)
            return out, features, wanted

        def batch_loss(b: int) -> Tensor:
            out, features, wanted = run_rest(b) if cache else run_all(b)
            return sum(F.mse_loss(f, g) for f, g in zip(features, wanted)) + loss_fn(out, calibration[b])

        if pair.name not in kept:
            losses = [lambda b=b: batch_loss(b) for b in range(len(calibration))]
            n = widths[pair.name] // pair.count
            kept[pair.name], record = select_pair(model, pair, n, losses, rate, per_round, reuse)
            silence(model, pair, kept[pair.name])
            if on_pair:
                on_pair(pair, kept, record)
        with torch.no_grad():
            before = [steps[i](state) for state in before]                       # again: silenced q and k change attention
    for p in trainable:
        p.requires_grad_()
    return kept


@torch.no_grad()
def silence(model, pair, kept: list[int]) -> None:
    """Zeroes what makes the channels not kept, so that from here on the network is the one that `cut` will leave. In
    attention this takes their part out of q kᵀ, which was active while proj's inputs were chosen. Where a LayerNorm of
    the pair needs all channels, they stay until the cut."""
    if pair.norm:
        return
    gone = sorted(set(range(pair.width)) - set(kept))
    for layer, rows in pair.producers:
        module, at = model.get_submodule(layer), rows[gone].flatten()
        for tensor in (module.weight, module.bias):
            if tensor is not None:
                tensor[at.to(tensor.device)] = 0


# ---- 3 cut ---------------------------------------------------------------------------------------------------------
def cut(model: nn.Module, kept: dict[str, list[int]], calibration: list[dict[int, Tensor]] | None = None) -> nn.Module:
    """A network without the channels that are not in `kept` ({pair name: indices, any order}; a pair not named keeps
    all). It computes what `model` computes with those channels masked, to float tolerance; except where a LayerNorm lies
    within a pair (DAT's MLP): with fewer channels it normalises differently, and its scale and shift are fitted again on
    the first batch of `calibration`. Without calibration they stay as they are, which costs some dB."""
    state, index = model.state_dict(), {}
    for pair in model.pairs():
        index[pair.name] = chosen = torch.tensor(sorted(kept.get(pair.name, range(pair.width))))
        for layer, rows in pair.producers:
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in state:
                    state[name] = state[name][rows[chosen].flatten().sort().values.to(state[name].device)]
        for layer, columns in pair.consumers:
            name = f"{layer}.weight"
            state[name] = state[name][:, columns[chosen].flatten().sort().values.to(state[name].device)]
    if calibration:
        state |= refitted_norms(model, index, calibration[0][1])
    smaller = model.with_widths({pair.name: pair.count * len(index[pair.name]) for pair in model.pairs()})
    smaller.to(next(model.parameters())).load_state_dict(state)
    return smaller


@torch.no_grad()
def refitted_norms(model: nn.Module, index: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """{weight or bias name: new value} of the LayerNorms within pairs: by least squares, channel by channel, the kept
    channels normalised among themselves give what the uncut network's LayerNorm gives there for the images x. (ours)"""
    found, hooks = {}, []
    for pair in model.pairs():
        if pair.norm and len(index[pair.name]) < pair.width:
            def fit(module, inputs, output, pair=pair):
                chosen = index[pair.name].to(output.device)
                wanted = output[..., chosen].flatten(0, -2).double()                            # (tokens, kept)
                z = F.layer_norm(inputs[0][..., chosen].double(), (len(chosen),), eps=module.eps).flatten(0, -2)
                mean_z, mean = z.mean(0), wanted.mean(0)
                slope = ((z - mean_z) * (wanted - mean)).mean(0) / (z - mean_z).square().mean(0).clamp_min(1e-12)
                found[f"{pair.norm}.weight"] = slope.to(output.dtype)
                found[f"{pair.norm}.bias"] = (mean - slope * mean_z).to(output.dtype)
            hooks.append(model.get_submodule(pair.norm).register_forward_hook(fit))
    if hooks:
        was_training = model.training
        model.eval()(x)
        model.train(was_training)
    for hook in hooks:
        hook.remove()
    return found
