"""Dual regression: small networks D that map a super-resolved image back down, and the loss that uses them.

    L_DR = Σ_s |P(y_1)_s − y_s|₁  +  λ Σ_D |D(P(y_1)_src) − y_dst|₁ ,   λ = 0.1          (DRN eq. 3, DRC eq. 2)

The second term asks that the prediction, mapped down again, gives back what came in: of all images that fit y_S equally
well it prefers those that could have caused y_1, which narrows the space of answers. A dual sees the prediction, never
the ground truth. Everything is keyed by scale, so the loss does not know which backbone it trains.

Not here: the backbones (models.py), what the loss is used for (prune.py, train.py). Read prune.py next.
"""
import torch.nn.functional as F
from torch import Tensor, nn


class Dual(nn.Module):
    """Maps (N, 3, H·src, W·src) to (N, 3, H·dst, W·dst) by strided 3×3 convolutions without biases, so that
    D(c·x) = c·D(x) for c > 0: one dual serves images in 0..1 and in 0..255. Official state-dict names."""
    def __init__(self, src: int, dst: int, channels: int):
        super().__init__()
        self.src, self.dst = src, dst
        # one halving per factor 2; ×3 at once, with centres 1, 4, 7, ... (the release's ×3 dual halves: sizes differ)
        stride, padding, stages = (3, 0, 1) if src == 3 * dst else (2, 1, (src // dst).bit_length() - 1)
        sizes = [3] + [channels] * stages
        self.dual_module = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, stride, padding, bias=False), nn.LeakyReLU(0.2))
              for a, b in zip(sizes, sizes[1:])),
            nn.Conv2d(channels, 3, 3, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.dual_module(x)


def make_duals(model: nn.Module) -> nn.ModuleList:
    """The duals of a backbone, as its `dual_spec` asks: DRN one per ×2 step, the others one for the whole factor."""
    return nn.ModuleList(Dual(*spec) for spec in model.dual_spec)


def dr_loss(images: dict[int, Tensor], y: dict[int, Tensor], duals: nn.ModuleList, weight: float = 0.1) -> Tensor:
    """L_DR above, a scalar in the range of the images. images: predictions {scale: (N, 3, H·scale, W·scale)}; y: the
    true images at least at the same scales and at every dual's dst; weight: λ. |·|₁ is a mean over elements."""
    primal = sum(F.l1_loss(images[s], y[s]) for s in images)
    back = sum(F.l1_loss(d(images[d.src]), y[d.dst]) for d in duals)
    return primal + weight * back


def blind_loss(kernel: Tensor, true: Tensor) -> Tensor:
    """mean |k − k*| over the entries of two (N, 1, k, k): all that trains a kernel estimator (DCLS; weight 1)."""
    return F.l1_loss(kernel, true)


def distill_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE between the channel means of two feature maps (N, any, H, W): their widths may differ (release, fine-tuning)."""
    return F.mse_loss(student.mean(1), teacher.mean(1))
