"""DCLS (Luo et al., CVPR 2022, arXiv 2202.07508, Fig. 2): a blind network.

Nobody tells it how the image was blurred. It estimates the blur kernel, undoes the blur in feature
space ("deep constrained least squares"), and refines the result:

    low -> Estimator: head, 3 residual blocks, tail -> latent -> 5 Linears, 5 convs -> kernel
     |                                                                       (detached) |
     '-> conv_first -> 3 residual blocks -> head2: undo the blur -> f2 (64 channels) <--'
             |                      '-----> head1: conv 3×3      -> f1 (16 channels)
             |                                     f2, f1 -> 5 × (10 DPCABs, doubled) -> fusion -.
             '--------------------------------------------------------------------------> (+) <--'
                                                                              image <- upscale <-'
Prunable: the width inside every residual block, the latent vector, and the width inside the wide
path of every DPCAB. Images come clamped to 0..1, as in the release.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.base import (
    SR,
    Backbone,
    ChannelAttention,
    Pair,
    conv,
    enlarge,
    exact,
    interpolate,
    pass_on,
    plain_pair,
)

ESTIMATOR_BLOCKS = 3
FEATURE_BLOCKS = 3
MIN_SIDE = 7                 # the prior's three 3×3 convolutions without padding take 6 pixels


class ResidualBlock(nn.Module):
    """x + conv2(LeakyReLU(conv1(x))); the prunable width is between the convolutions."""
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = conv(channels, hidden)
        self.conv2 = conv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(x), 0.1))


# ---- the blur kernel is estimated ---------------------------------------------------------------
class Estimator(nn.Module):
    """The image chooses the weights of a small linear network (as in KernelGAN), and what that
    network makes of a single bright pixel is the blur kernel.
    """
    def __init__(self, feats: int, filters: tuple[int, ...], blocks: list[int], latent: int):
        """filters: sizes of the small network's convolutions; blocks: their hidden widths."""
        super().__init__()
        last = len(filters) - 1
        self.filters = filters
        self.size = 1 + sum(size - 1 for size in filters)                  # 31 for 11, 9, 7, 5, 3
        self.channels = [3] + [16] * last + [3]
        self.head = nn.Sequential(conv(3, feats, 7))
        self.body = nn.Sequential(
            nn.Sequential(*(ResidualBlock(feats, hidden) for hidden in blocks)))
        self.tail = nn.Sequential(
            nn.Conv2d(feats, feats, 3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(feats, feats, 3),
            nn.AdaptiveAvgPool2d(1),
            conv(feats, latent, 1),
            nn.Flatten())
        self.dec = nn.ModuleList()
        for i, size in enumerate(filters):
            weights = self.channels[i] * self.channels[i + 1] * size ** 2
            self.dec.append(nn.Linear(latent, weights))

    def forward(self, low: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1, k, k), sums to 1."""
        x = self.head(low)
        return self.kernel(self.tail(x + self.body(x)))

    def kernel(self, latent: Tensor) -> Tensor:
        """(N, latent) -> (N, 1, k, k), sums to 1.

        Every image has its own convolutions: the images become groups of one convolution.
        """
        n, k = len(latent), self.size
        x = latent.new_ones(1, 3 * n, 1, 1)                                # the bright pixels
        for i, (size, dec) in enumerate(zip(self.filters, self.dec)):
            weight = dec(latent).view(n * self.channels[i + 1], self.channels[i], size, size)
            padding = k - 1 if i == 0 else 0
            x = F.conv2d(x, weight, padding=padding, groups=n)       # sides 51, 43, 37, 33, 31
        x = x.view(n, 3, k, k)
        # Flipped, for conv2d correlates while a blur kernel convolves; the colours share a kernel.
        x = x.flip(2, 3).mean(1, keepdim=True)
        return x / x.sum((2, 3), keepdim=True)


# ---- the blur is undone in feature space --------------------------------------------------------
def deconvolve(x: Tensor, kernel: Tensor, prior: Tensor) -> Tensor:
    """Undoes a blur: the z that minimises ‖kernel ∗ z − x‖² + ‖prior ∗ z‖², for every channel.

    On a torus the solution is one division of spectra, conj(K)·X / (|K|² + |P|²).
    x: (N, C, H, W); kernel: (N, 1, k, k), its centre at k // 2; prior: (N, C, p, p), p <= k.
    Returns (N, C, H, W) with the dtype and device of x. (DCLS Section 3.3. One batched real
    transform; the release loops over channels with complex ones.)
    """
    h, w = x.shape[2:]
    k, p = kernel.shape[-1], prior.shape[-1]
    x = F.pad(x, (k, k, k, k), "replicate")          # the seam of the torus is cut off below
    height, width = x.shape[2:]
    small = torch.cat((kernel, F.pad(prior, (0, k - p, 0, k - p))), 1)     # (N, 1 + C, k, k)
    # This is rfft2 to the size (height, width), without transforming rows that hold only zeros.
    small = torch.fft.fft(torch.fft.rfft(small, n=width), n=height, dim=-2)
    blur = small[:, :1]
    penalty = small[:, 1:].abs().square()
    spectrum = blur.conj() * torch.fft.rfft2(x) / (blur.abs().square() + penalty)
    z = torch.fft.irfft2(spectrum, (height, width))
    # The kernel's corner lies at the origin, not its centre: z comes k // 2 pixels too early.
    start = k - k // 2
    return z[:, :, start:start + h, start:start + w]


def deconvolve_portably(x: Tensor, kernel: Tensor, prior: Tensor) -> Tensor:
    """`deconvolve` by products of real matrices, for ONNX: its transform does not make real numbers
    out of half a spectrum in onnxruntime, and not every other runtime has one.
    """
    h, w = x.shape[2:]
    k, p = kernel.shape[-1], prior.shape[-1]
    x = F.pad(x, (k, k, k, k), "replicate")
    height, width = x.shape[2:]
    waves = (*fourier(height, x), *fourier(width, x))
    small = torch.cat((kernel, F.pad(prior, (0, k - p, 0, k - p))), 1)     # (N, 1 + C, k, k)
    re, im = spectrum(small, *waves)
    power = re.square() + im.square()
    penalised = power[:, :1] + power[:, 1:]
    blur_re, blur_im = re[:, :1], im[:, :1]
    re, im = spectrum(x, *waves)
    z_re = (blur_re * re + blur_im * im) / penalised         # conj(K)·X / (|K|² + |P|²)
    z_im = (blur_re * im - blur_im * re) / penalised
    cos_y, sin_y, cos_x, sin_x = waves
    even = cos_y @ z_re - sin_y @ z_im                       # the real part of the way back
    odd = cos_y @ z_im + sin_y @ z_re
    z = (even @ cos_x - odd @ sin_x) / (height * width)
    start = k - k // 2
    return z[:, :, start:start + h, start:start + w]


def fourier(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (n, n) of 2π·j·k / n, in the type and on the device of `like`."""
    j = torch.arange(n, device=like.device)
    whole = j[-1] + 1                                        # n, as a tensor: the exporter asks so
    angle = (j[:, None] * j % whole).to(like.dtype) * (2 * math.pi / n)    # below 2π: exact enough
    return angle.cos(), angle.sin()


def spectrum(x: Tensor, cos_y: Tensor, sin_y: Tensor, cos_x: Tensor, sin_x: Tensor):
    """(real, imaginary) part of the transform of x (..., h, w), as if filled up with zeros."""
    h, w = x.shape[-2:]
    a, b = x @ cos_x[:w], x @ sin_x[:w]                      # the rows: a − bi
    cos_y, sin_y = cos_y[:, :h], sin_y[:, :h]
    return cos_y @ a - sin_y @ b, -(cos_y @ b + sin_y @ a)   # (cos − i·sin)(a − bi)


class PortableMeans(nn.Module):
    """`AdaptiveAvgPool2d(3)` for ONNX, which has it for one size of image only."""
    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, 3, 3)."""
        height, width = x.shape[2:]
        return self.thirds(height, x) @ x @ self.thirds(width, x).t()

    def thirds(self, n: int, like: Tensor) -> Tensor:
        """(3, n): row i takes the mean of the entries from ⌊i·n/3⌋ to ⌈(i + 1)·n/3⌉, exclusive."""
        j = torch.arange(n, device=like.device)
        starts = torch.arange(3, device=like.device)[:, None] * (j[-1] + 1)        # 3 times that
        inside = (3 * j + 3 > starts) & (3 * j < starts + j[-1] + 1)
        inside = inside.to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class CLS(nn.Module):
    """Deconvolution in a quarter of the channels; the prior comes from the features."""
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.deconvolve = deconvolve
        self.reduce_feature = conv(channels, reduced, 1)
        self.grad_filter = nn.Sequential(
            nn.Conv2d(reduced, reduced, 3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(reduced, reduced, 3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(reduced, reduced, 3),
            nn.AdaptiveAvgPool2d(3),
            conv(reduced, reduced, 1))
        self.expand_feature = conv(reduced, channels, 1)

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        """(N, c, H, W), (N, 1, k, k) -> (N, c, H, W)."""
        x = self.reduce_feature(x)
        prior = self.grad_filter(x).exp()                                  # (N, c/4, 3, 3)
        prior = prior - prior.mean((2, 3), keepdim=True)   # sums to 0: flat areas pay no penalty
        return self.expand_feature(self.deconvolve(x, kernel, prior))


# ---- and the result is refined ------------------------------------------------------------------
class DPCAB(nn.Module):
    """Dual-path channel attention block on the maps (f2, f1); body1 holds the prunable width."""
    def __init__(self, channels: int, reduced: int, hidden: int):
        super().__init__()
        self.body1 = nn.Sequential(
            conv(channels, hidden),
            nn.LeakyReLU(0.1),
            conv(hidden, channels))
        self.body2 = nn.Sequential(
            conv(reduced, reduced),
            nn.LeakyReLU(0.1),
            conv(reduced, reduced))
        self.CA_body1 = nn.Sequential(
            nn.LeakyReLU(0.1),
            conv(channels + reduced, channels),
            ChannelAttention(channels, 4))
        self.CA_body2 = ChannelAttention(reduced, 4)

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(N, c, H, W) and (N, c/4, H, W) stay. Both paths add a gated change to their input."""
        f2, f1 = maps
        b = self.body2(f1)
        relu, mix, attention = self.CA_body1
        a = mix(relu(torch.cat((self.body1(f2), b), 1)))
        return torch.addcmul(f2, a, attention(a)), torch.addcmul(f1, b, self.CA_body2(b))


class DPCAG(nn.Module):
    """A group of DPCABs, whose result is doubled.

    The release means to add the group's input here; but it keeps both maps in one list, whose
    entries the blocks have replaced by then, and so adds the result to itself. Released weights
    rely on it.
    """
    def __init__(self, blocks: list[DPCAB]):
        super().__init__()
        self.body = nn.Sequential(*blocks)

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        f2, f1 = self.body(maps)
        return 2 * f2, 2 * f1


class Restorer(nn.Module):
    """The image with a known blur kernel -> the large image."""
    def __init__(self, feats: int, scale: int, features: list[int], groups: list[list[int]]):
        """features, groups: the hidden widths of the residual blocks and of the DPCABs."""
        super().__init__()
        reduced = feats // 4
        self.conv_first = conv(3, feats)
        self.feature_block = nn.Sequential(*(ResidualBlock(feats, hidden) for hidden in features))
        self.head1 = conv(feats, reduced)
        self.head2 = CLS(feats, reduced)
        self.body = nn.Sequential()
        for group in groups:
            self.body.append(DPCAG([DPCAB(feats, reduced, hidden) for hidden in group]))
        self.fusion = conv(feats + reduced, feats)
        layers = []
        for _ in range(scale.bit_length() - 1):
            layers += [conv(feats, 4 * feats), nn.PixelShuffle(2)]
        self.upscale = nn.Sequential(*layers, conv(feats, 3))

    def forward(self, low: Tensor, kernel: Tensor) -> Tensor:
        """(N, 3, H, W), (N, 1, k, k) -> (N, 3, H·s, W·s)."""
        first = exact(self.conv_first, low)
        x = self.feature_block(first)
        # Detached: the image losses train the Estimator not at all, |k − k*| alone does (release).
        f2 = exact(self.head2, x, kernel.detach()).to(x.dtype)
        f1 = self.head1(x)
        f2, f1 = self.body((f2, f1))
        x = self.fusion(torch.cat((f1, f2), 1)) + first
        x = enlarge(x, self.upscale)
        return exact(self.upscale[-1], x)


class DCLS(Backbone):
    """Estimator and Restorer; models.PRESETS holds the sizes that differ with the scale."""
    def __init__(
            self,
            arch: str,
            scale: int,
            filters: tuple[int, ...],    # sizes of the convolutions that make the kernel
            feats: int = 64,             # channels
            groups: int = 5,             # groups of DPCABs
            blocks: int = 10,            # DPCABs in a group
            latent: int = 256,           # length of the vector that chooses the filters' weights
            widths: dict[str, int] | list[int] | None = None):
        config = dict(arch=arch, scale=scale, filters=filters, feats=feats, groups=groups,
                      blocks=blocks, latent=latent)
        super().__init__(config, widths)
        w = self.widths
        self.Estimator = Estimator(
            feats, filters, [w[f"estimator.block{i}"] for i in range(ESTIMATOR_BLOCKS)],
            w["estimator.latent"])
        self.Restorer = Restorer(
            feats, scale, [w[f"feature{i}"] for i in range(FEATURE_BLOCKS)],
            [[w[f"group{g}.block{b}"] for b in range(blocks)] for g in range(groups)])
        self.kernel_size = self.Estimator.size
        last = len(self.Restorer.upscale) - 1
        self.float32 = ("Estimator", "Restorer.head2", f"Restorer.upscale.{last}")
        self.dual_spec = ((scale, 1, 16),)

    @classmethod
    def hidden_widths(cls, feats: int, latent: int, groups: int, blocks: int, **_) -> dict:
        full = {f"estimator.block{i}": feats for i in range(ESTIMATOR_BLOCKS)}
        full["estimator.latent"] = latent
        for i in range(FEATURE_BLOCKS):
            full[f"feature{i}"] = feats
        for g in range(groups):
            for b in range(blocks):
                full[f"group{g}.block{b}"] = feats
        return full

    def pairs(self) -> list[Pair]:
        w = self.widths
        result = []
        for i in range(ESTIMATOR_BLOCKS):
            name = f"estimator.block{i}"
            block = f"Estimator.body.0.{i}"
            result.append(plain_pair(name, block, w[name], f"{block}.conv1", f"{block}.conv2"))
        consumers = [f"Estimator.dec.{i}" for i in range(len(self.Estimator.dec))]
        result.append(plain_pair("estimator.latent", "Estimator", w["estimator.latent"],
                                 "Estimator.tail.4", *consumers))
        for i in range(FEATURE_BLOCKS):
            name = f"feature{i}"
            block = f"Restorer.feature_block.{i}"
            result.append(plain_pair(name, block, w[name], f"{block}.conv1", f"{block}.conv2"))
        for g in range(self.config["groups"]):
            for b in range(self.config["blocks"]):
                name = f"group{g}.block{b}"
                block = f"Restorer.body.{g}.body.{b}"
                result.append(plain_pair(name, block, w[name],
                                         f"{block}.body1.0", f"{block}.body1.2"))
        return result

    def forward(self, low: Tensor, kernel: Tensor | None = None) -> SR:
        """kernel: (N, 1, k, k), used in place of the estimated one: the tiles of a picture share
        theirs. ValueError: an image of fewer than 7×7 pixels.
        """
        if kernel is None:
            kernel = self.estimate(low)
        check_size(low)
        return SR({self.scale: self.Restorer(low, kernel).clamp(0, 1)}, kernel)

    def estimate(self, low: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..1 -> (N, 1, k, k), the blur kernel in LR pixels, sums to 1."""
        check_size(low)
        return exact(self.Estimator, low)

    def make_portable(self) -> None:
        head = self.Restorer.head2
        head.deconvolve = deconvolve_portably
        head.grad_filter[5] = PortableMeans()

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The first three features carry the image through conv_first and the enlargements, all
        else counts little, and the first kernel is a small dot. (Ours.)

        Without this, five linear layers whose random product is divided by its sum, near 0, and
        five doublings make the first steps of a training explode.
        """
        r = self.Restorer
        *stages, last = [layer for layer in r.upscale if isinstance(layer, nn.Conv2d)]
        doubled = 0.5 ** len(r.body)
        for layer, factor in ((r.head1, doubled), (r.head2.expand_feature, doubled),
                              (r.fusion, 0.02)):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        pass_on(r.conv_first)
        pass_on(last)
        for layer in stages:
            interpolate(layer, 2)
        for dec, size in zip(self.Estimator.dec, self.Estimator.filters):
            line = torch.tensor([0.07, 0.86, 0.07]) if size > 1 else torch.ones(1)
            dot = F.pad(torch.outer(line, line), ((size - len(line)) // 2,) * 4)   # (size, size)
            dec.bias.copy_(4 * dot.flatten().repeat(len(dec.bias) // size ** 2))


def check_size(low: Tensor) -> None:
    """ValueError for an image that is too small for the prior's convolutions."""
    height, width = low.shape[2:]
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"DCLS got an image of {width}x{height} pixels: "
                         f"give at least {MIN_SIDE}x{MIN_SIDE}")
