"""Dual regression: small networks that map a super-resolved image back, and the losses with them.

Super-resolution has no unique answer: many high-resolution images shrink to the same
low-resolution image x. Dual regression adds a constraint that every right answer meets. While the
primal network P learns x -> y, small dual networks D learn the way back, and the loss asks that
what P predicts comes back to x (DRN eq. 3, DRC eq. 2):

    L_DR = Σ_s |P(x)_s − y_s|  +  λ Σ_D |D(P(x)_src) − y_dst|,      λ = 0.1

    x, y_s        the low-resolution input, and the true image at scale s; y_1 is x itself
    P(x)_s        the prediction at scale s: DRN predicts at 1, 2 and 4, the others at 4 alone
    D             maps a prediction of scale src to scale dst; DRN has 4 → 2 and 2 → 1, others 4 → 1
    |·|           the mean absolute difference over all elements

Of two predictions with the same distance to the truth, the one that shrinks back to x wins. What D
is given is always a prediction, never a true image. D is learned and not simply the bicubic
reduction, because in real data nobody knows how the small image was made. (P and D cannot agree on
some code by which x hides in P(x): the first term holds P to the true image, and D is only a few
small convolutions.)

Unpaired adaptation (DRN Section 4.2). A photograph of your camera has no y, but the second term
does without it: of such an x the loss is λ Σ |D(P(x)) − x| alone, and pairs in the same batch keep
P to true images. So P may not lose what these photographs show, and D learns something of how they
came about. It can fail, because the way back alone admits more than one answer: a P(x) as blurred
as x, with a D that reduces by bicubic, meets it as well as a sharp P(x) with a D that blurs, and a
network trained on bicubic pairs starts at the first. Its loss may then be small from the start, and
fall, while the pictures stay as they were. Look at them, and see bench/unpaired.py.

Images are keyed by scale, so the losses do not know which backbone they train. Not here: the
backbones (backbones/base.py, to be read next), and what the losses are used for (prune.py,
train.py).
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dual(nn.Module):
    """D: (N, 3, H·src, W·src) -> (N, 3, H·dst, W·dst) by strided 3×3 convolutions.

    There are no biases, so D(c·x) = c·D(x) for c > 0: the same dual serves images in 0..1 and in
    0..255. The state-dict names are the official ones.
    """
    def __init__(self, src: int, dst: int, channels: int):
        super().__init__()
        self.src = src
        self.dst = dst
        stages = (src // dst).bit_length() - 1       # log2: a stage halves the size
        stride, padding = 2, 1
        if src == 3 * dst:                           # one stage, centres at 1, 4, 7, ... (ours: the
            stages = 1                               # release halves here, and the sizes differ)
            stride, padding = 3, 0
        layers, inputs = [], 3
        for _ in range(stages):
            layer = nn.Conv2d(inputs, channels, 3, stride, padding, bias=False)
            layers.append(nn.Sequential(layer, nn.LeakyReLU(0.2)))
            inputs = channels
        layers.append(nn.Conv2d(channels, 3, 3, 1, 1, bias=False))
        self.dual_module = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.dual_module(x)


def make_duals(model: nn.Module) -> nn.ModuleList:
    """The duals of a backbone with random weights, as its `dual_spec` asks. ValueError: none."""
    if not model.dual_spec:
        raise ValueError(f"{type(model).__name__} has no dual_spec: set it, usually to "
                         f"((scale, 1, 16),), or there is no way back to learn")
    return nn.ModuleList(Dual(*spec) for spec in model.dual_spec)


@torch.no_grad()
def start_from_averages(duals: nn.ModuleList) -> None:
    """Changes random weights so that a dual begins as the mean of the pixels that lie in one of x.

    That is within 0.1 grey levels of bicubic reduction, where duals with random weights are 20 away
    after a thousand steps. An unpaired x learns from D alone, so there D must work at once. (Ours.)
    """
    for d in duals:
        *stages, last = d.dual_module
        for layer, _ in stages:                      # each passes the colours on in 3 channels
            side = layer.stride[0]                   # of 3×3 weights the last 2×2, or all
            layer.weight[:3] = 0
            for c in range(3):
                layer.weight[c, c, -side:, -side:] = 1 / side ** 2
        last.weight.zero_()
        for c in range(3):
            last.weight[c, c, 1, 1] = 1


def restore_duals(model: nn.Module, states: list[dict]) -> nn.ModuleList:
    """The duals of a backbone with saved weights. RuntimeError or ValueError: they do not fit."""
    duals = make_duals(model)
    for d, state in zip(duals, states, strict=True):
        d.load_state_dict(state)
    return duals


def dr_loss(images: dict[int, Tensor], y: dict[int, Tensor], duals: nn.ModuleList,
            weight: float = 0.1) -> Tensor:
    """L_DR above, a scalar in the range of the images. weight: λ.

    images: predictions {scale: (N, 3, H·scale, W·scale)}; y: the true images, at least at the
    scales of the predictions and at every dual's dst.
    """
    primal = sum(F.l1_loss(images[s], y[s]) for s in images)
    back = sum(F.l1_loss(d(images[d.src]), y[d.dst]) for d in duals)
    return primal + weight * back


def way_back(image: Tensor, scale: int, duals: nn.ModuleList) -> Tensor:
    """An image (N, 3, H·scale, W·scale) mapped to scale 1, through one dual after the other."""
    steps = {d.src: d for d in duals}
    while scale > 1:
        image = steps[scale](image)
        scale = steps[scale].dst
    return image


def unpaired_loss(images: dict[int, Tensor], low: Tensor, duals: nn.ModuleList) -> Tensor:
    """Σ_D |D(P(x)) − x| for inputs x = low (N, 3, H, W) without originals, in the images' range.

    There is no true image at the scales between, so a dual that ends there (DRN's 4 → 2) is
    followed by those that lead on to x.
    """
    return sum(F.l1_loss(way_back(d(images[d.src]), d.dst, duals), low) for d in duals)


def mixed_loss(images: dict[int, Tensor], y: dict[int, Tensor], duals: nn.ModuleList,
               weight: float = 0.1) -> Tensor:
    """The mean over a batch of L_DR where an input has an original, of λ Σ |D(P(x)) − x| else.

    Of the N inputs y[1] the first n have originals: the other images of y are (n, 3, ...). Without
    such a difference it is `dr_loss`.
    """
    count = len(y[1])
    paired = min(len(image) for image in y.values())
    if paired == count:
        return dr_loss(images, y, duals, weight)
    alone = {s: x[paired:] for s, x in images.items()}
    loss = (count - paired) / count * weight * unpaired_loss(alone, y[1][paired:], duals)
    if paired:
        images = {s: x[:paired] for s, x in images.items()}
        y = {s: x[:paired] for s, x in y.items()}
        loss = loss + paired / count * dr_loss(images, y, duals, weight)
    return loss


def blind_loss(kernel: Tensor, true: Tensor) -> Tensor:
    """The mean of |kernel − true|, both (N, 1, side, side): trains a blur estimator (DCLS)."""
    return F.l1_loss(kernel, true)


def native_loss(out, batch, duals: nn.ModuleList, weight: float, rgb_range: float) -> Tensor:
    """The training loss of a backbone: L_DR in the network's own ("native") range, 0..rgb_range.

    The paper's learning rates belong to that range: DRN's losses are 255 times those of a network
    in 0..1. A blind backbone adds `blind_loss`. out: what the backbone returned; batch: what it
    should have returned (both are `SR`, see backbones/base.py: `images` by scale, and `kernel`),
    as far as it is known, see `mixed_loss`.
    """
    loss = rgb_range * mixed_loss(out.images, batch.images, duals, weight)
    if out.kernel is None:
        return loss
    return loss + blind_loss(out.kernel, batch.kernel)


# ---- distillation: a small network learns from a larger one (DRC Section 4.3) -------------------
def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE between two feature maps (N, any, H, W), each averaged over its channels, so that a
    teacher of another width fits.
    """
    return F.mse_loss(student.mean(1), teacher.mean(1))


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError: the student's features are not to be found in this teacher."""
    if student.feature and teacher.feature != student.feature:
        raise ValueError(f"{student.arch} is compared with its teacher by the input of "
                         f"{student.feature}, which {teacher.arch} has not: give a network of the "
                         f"same kind")


@contextmanager
def distillation(student: nn.Module, teacher: nn.Module):
    """Yields distance(low, out): how far the student's output `out` for low is from the teacher's.

    A backbone that names a `feature` (DRN) is compared by the input of that module, in the
    student's latest forward pass; so call it right after that. The others are compared by the L1
    distance of the images, times rgb_range. (SwinIR so in the release; DAT and DCLS are ours.)
    """
    features = {}

    def keep(name):
        def hook(module, inputs):
            features[name] = inputs[0]
        return hook

    hooks = []
    if student.feature:
        for name, network in (("student", student), ("teacher", teacher)):
            layer = network.get_submodule(student.feature)
            hooks.append(layer.register_forward_pre_hook(keep(name)))

    def distance(low: Tensor, out) -> Tensor:
        with torch.no_grad():
            wanted = teacher(low)
        if student.feature:
            return feature_loss(features["student"], features["teacher"])
        scale = student.scale
        return student.rgb_range * F.l1_loss(out.images[scale], wanted.images[scale])

    try:
        yield distance
    finally:
        for hook in hooks:
            hook.remove()
