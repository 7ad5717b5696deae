"""Channel number search (DRC, arXiv 2207.07929, Section 4.1): how many channels each layer keeps.

Every pair (two layers and the channels between them, see backbones/base.py) gets six candidate
widths and six numbers α. While the search runs, its second layer, the consumer, is the mixture of
its six versions, weighted by softmax(α), and α is trained along with the weights, on images of its
own. At the end each pair takes the candidate with the largest α.

To compare widths, a version of width n must have some n channels. Here these are the n of largest
L1 norm, which costs nothing to find. It is only a stand-in: which channels really stay is decided
afterwards, by the gradients of the loss (prune.py), and may well be others.

Nothing in the loss rewards a small network. It is the ratio that makes it small, through the
candidates; α tells how to share out what the ratio leaves. A narrower version wins where it serves
the loss as well as a wider one, and chance has a part in that. (In the authors' file for ×4 and a
ratio of 0.3, 29 of the 62 widths of 64 channels keep 44, the most they can, 24 keep 40, and 9 36.)

The layers are given as `Pair`s (backbones/base.py, to be read before this) and the loss as
`loss_fn(out, batch)`, with what the network returned and the true images. Not here: the candidates,
and budgets for the whole network (widths.py); which channels are kept. Read prune.py next.
"""
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from widths import FRACTIONS, Budget, candidates, fit_budget


def importance(model: nn.Module, pair) -> Tensor:
    """(width,): the L1 norm of each channel's slice of the consumers' weights."""
    total = 0
    for layer, columns in pair.consumers:
        weight = model.get_submodule(layer).weight.detach().abs()          # (out, in, ...)
        of_column = weight.transpose(0, 1).flatten(1).sum(1)               # (in,)
        total = total + of_column[columns.to(weight.device)].sum(1)
    return total


class Search:
    """Channel number search (Section 4.1, Algorithm 1): one object, one `step` after another.

    Relaxation. Each consumer has six candidate widths n_k and six numbers α; p = softmax(α).
    Truncated to width n, it keeps the n input channels with the largest L1 norms, rank(j) < n. It
    is linear in its inputs x_j, so the mixture of the six truncated layers is the layer itself with
    scaled inputs, and its bias stays, because Σ_k p_k = 1:

        Σ_k p_k Σ_{rank(j) < n_k} W_j x_j  =  Σ_j m_j W_j x_j,   m_j = Σ_k p_k [rank(j) < n_k]

    ([…] is 1 where it is true, else 0.) So m_j is the total chance of the widths that would keep
    channel j; nothing is drawn at random. The ranks are taken anew in every pass, as constants.

    Descent on two levels, as in DARTS (arXiv 1806.09055). The first half T of the training images
    trains the weights w of P and D, the second half V the α's, which should be good for the w that
    training would reach. One trial step of plain descent, to w', stands for that training (as in
    the release, though the real step, pass 5, is Adam's). The chain rule then gives a second term,
    because w' depends on α through g:

        w' = w − ξ·g,   g = ∇_w L(T; w, α) + ρ·w
        dL(V; w', α)/dα = ∇_α L(V; w', α) − ξ·∇²_{α,w} L(T; w, α)·v,   v = ∇_{w'} L(V; w', α)

        ξ     `rate`, the learning rate of w
        ρ     `decay`, which acts in the trial step only (as in the release)

    A second derivative times a vector is a difference of gradients, with ε = 0.01/‖v‖:

        ∇²_{α,w} L(T)·v ≈ (∇_α L(T; w + εv, α) − ∇_α L(T; w − εv, α)) / (2ε)

    (The release multiplies by ε where it should divide: there the term vanishes.) That makes five
    passes a step. Without the second-order term it is three. (DARTS' "first order" also takes α's
    gradient at w in place of w'; here it is still taken at w'.)
    """
    def __init__(self, model: nn.Module, loss_fn: Callable, ratio: float, extra=(),
                 rate: float = 1e-4, decay: float = 3e-4, clip: float = 5.0,
                 alpha_rate: float = 3e-4, alpha_decay: float = 1e-3,
                 second_order: bool = True, multiple: int = 4, reduce: Callable = list):
        """model and the parameters in `extra` (the duals of loss_fn) are trained along and are of
        no use afterwards: hand over copies. clip: largest norm of w's gradient. alpha_rate,
        alpha_decay: of the Adam that trains the α's. (The defaults are the release's for DRN.)
        reduce: every loss and its gradients, a list of tensors, pass through it; processes that
        share the batches average there (parallel.py).
        """
        model.eval()                         # every pass sees the same network
        self.model = model
        self.loss_fn = loss_fn
        self.rate = rate
        self.decay = decay
        self.clip = clip
        self.second_order = second_order
        self.reduce = reduce
        self.pairs = model.pairs()
        self.candidates = [candidates(pair.width, ratio, multiple) for pair in self.pairs]
        self.weights = [p for p in (*model.parameters(), *extra) if p.requires_grad]
        device = self.weights[0].device
        self.alphas = []
        for _ in self.pairs:
            alpha = 1e-3 * torch.randn(len(FRACTIONS))         # release: all equal but for noise
            self.alphas.append(alpha.to(device).requires_grad_())
        self.alpha_optimiser = torch.optim.Adam(self.alphas, alpha_rate, weight_decay=alpha_decay)
        self.optimiser = torch.optim.Adam(self.weights, rate)
        self.best = (float("inf"), [alpha.detach().clone() for alpha in self.alphas])

    def factors(self, pair, alpha: Tensor, options: list[int]) -> Tensor:
        """(width,): the factor m_j of every channel, differentiable in α. options: the n_k."""
        order = importance(self.model, pair).argsort(descending=True, stable=True)
        rank = order.argsort()               # the inverse permutation: rank[j], place of j in order
        inside = rank[:, None] < torch.tensor(options, device=rank.device)     # (width, 6)
        return inside.to(alpha.dtype) @ alpha.softmax(0)

    def scaled_weights(self) -> dict[str, Tensor]:
        """{name: consumer's weight, its inputs scaled by m}, differentiable in w and α."""
        result = {}
        for pair, alpha, options in zip(self.pairs, self.alphas, self.candidates):
            m = self.factors(pair, alpha, options)
            for layer, columns in pair.consumers:
                weight = self.model.get_submodule(layer).weight            # (out, in, ...)
                weight = result.get(f"{layer}.weight", weight)   # a dense block: several pairs' own
                of_column = m.repeat_interleave(columns.shape[1])    # attention: j of every head
                scale = m.new_ones(weight.shape[1])
                scale = scale.index_copy(0, columns.flatten().to(m.device), of_column)
                by_input = [1] * weight.ndim
                by_input[1] = -1             # (1, in) or (1, in, 1, 1): a factor for every column
                result[f"{layer}.weight"] = weight * scale.view(by_input)
        return result

    def loss(self, batch) -> Tensor:
        """L of the relaxed network, a scalar."""
        out = torch.func.functional_call(self.model, self.scaled_weights(), (batch.images[1],))
        return self.loss_fn(out, batch)

    def gradient(self, batch, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(loss, its gradient with respect to each tensor): one forward and one backward pass."""
        loss = self.loss(batch)
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        loss, *gradients = self.reduce([loss.detach(), *gradients])
        return loss, gradients

    @contextmanager
    def moved(self, directions, step: float):
        """Within it every weight w is w + step·direction; afterwards w again, to the last bit."""
        kept = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            torch._foreach_add_(self.weights, [step * d for d in directions])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, kept)

    def alpha_gradient(self, batch_t, batch_v) -> tuple[Tensor, list[Tensor]]:
        """(loss on V at w', the gradient of each α by the formulas above)."""
        # Pass 1: g, and the trial step to w'.
        _, gradients = self.gradient(batch_t, self.weights)
        g = [d + self.decay * w.detach() for d, w in zip(gradients, self.weights)]
        # Pass 2, at w': the direct part of α's gradient, and v.
        with self.moved(g, -self.rate):
            loss, gradients = self.gradient(batch_v, [*self.alphas, *self.weights])
        direct = gradients[:len(self.alphas)]
        v = gradients[len(self.alphas):]
        if not self.second_order:
            return loss, direct
        # Passes 3 and 4: α's gradient on both sides of w.
        epsilon = 0.01 / torch.stack(torch._foreach_norm(v)).norm()
        with self.moved(v, epsilon):
            _, plus = self.gradient(batch_t, self.alphas)
        with self.moved(v, -epsilon):
            _, minus = self.gradient(batch_t, self.alphas)
        result = []
        for first, above, below in zip(direct, plus, minus):
            result.append(first - self.rate * (above - below) / (2 * epsilon))
        return loss, result

    def step(self, batch_t, batch_v) -> tuple[float, float]:
        """One step of α and one of w, with a batch of T and one of V; returns the two losses."""
        loss_v, gradients = self.alpha_gradient(batch_t, batch_v)
        for alpha, gradient in zip(self.alphas, gradients):
            alpha.grad = gradient
        self.alpha_optimiser.step()
        # Pass 5: the weights, with the new α.
        loss_t, gradients = self.gradient(batch_t, self.weights)
        for weight, gradient in zip(self.weights, gradients):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.optimiser.step()
        return loss_t.item(), loss_v.item()

    @torch.no_grad()
    def hold(self, held_out: list) -> float:
        """Remembers the α's if they are the best so far on held-out training batches.

        (The release chooses by a test set.) Returns the loss.
        """
        losses = self.reduce([self.loss(batch) for batch in held_out])
        loss = sum(loss.item() for loss in losses) / len(held_out)
        if loss < self.best[0]:
            self.best = (loss, [alpha.detach().clone() for alpha in self.alphas])
        return loss

    def widths(self, budget: Budget | None = None) -> dict[str, int]:
        """{pair name: channels to keep}, all heads counted: each pair's largest α of the best state
        that `hold` has seen (before that: of the random start), or the best choice within a budget.
        """
        scores = torch.stack(self.best[1]).log_softmax(1).cpu().double().numpy()   # (pairs, 6)
        sizes = self.sizes()
        picks = scores.argmax(1)
        if budget:
            picks = fit_budget(scores, list(sizes.values()), list(sizes), budget)
        return {name: options[k] for (name, options), k in zip(sizes.items(), picks)}

    def sizes(self) -> dict[str, list[int]]:
        """{pair name: its six candidate widths}, all heads counted."""
        return {pair.name: [pair.heads * n for n in options]
                for pair, options in zip(self.pairs, self.candidates)}

    def chances(self) -> list[list[float]]:
        """softmax(α) of each pair as it is now, rounded to 4 digits: for the log."""
        return [[round(p, 4) for p in alpha.softmax(0).tolist()] for alpha in self.alphas]

    def state_dict(self) -> dict:
        return dict(weights=[w.detach() for w in self.weights],
                    alphas=[alpha.detach() for alpha in self.alphas], best=self.best,
                    optimiser=self.optimiser.state_dict(),
                    alpha_optimiser=self.alpha_optimiser.state_dict())

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.weights, state["weights"])
        torch._foreach_copy_(self.alphas, state["alphas"])
        self.best = (state["best"][0], list(state["best"][1]))
        self.optimiser.load_state_dict(state["optimiser"])
        self.alpha_optimiser.load_state_dict(state["alpha_optimiser"])


def decision(alphas: list[Tensor]) -> str:
    """A sentence that says how far the search has come from six equal chances."""
    largest = torch.stack(alphas).softmax(1).amax(1)
    sure = int((largest > 0.5).sum())
    return (f"the likeliest of six candidates has a chance of {largest.mean():.2f} on average "
            f"({1 / len(FRACTIONS):.2f}: undecided, 1: decided), in {sure} of {len(largest)} "
            f"layers more than one half")


def search(model: nn.Module, train: Iterator, valid: Iterator, held_out: list, loss_fn: Callable,
           ratio: float, steps: int, epoch: int = 25, budget: Budget | None = None,
           **options) -> dict[str, int]:
    """{pair name: channels to keep} after `steps` steps on batches of the two iterators.

    Every `epoch` steps the α's are compared on `held_out`. options: see Search. The model stays as
    it is. (train.py takes the steps itself, so that a run can be stopped between two.)
    """
    state = Search(copy.deepcopy(model), loss_fn, ratio, **options)
    for k in range(1, steps + 1):
        state.step(next(train), next(valid))
        if k % epoch == 0 or k == steps:
            state.hold(held_out)
    return state.widths(budget)
