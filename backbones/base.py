"""What every backbone owes to the rest of the project, and the layers that several of them share.

A backbone is a super-resolution network. The rest of the project (dual.py, prune.py, train.py,
upscale.py, evaluate.py) knows it only through the class `Backbone` below: it maps a low-resolution
image to an `SR`, and it names its `Pair`s, the hidden widths that may be pruned. The docstring of
`Backbone` lists the traps. (Your own network need not be one: own.py wraps any nn.Module, and
pairs.py finds what may be pruned. The backbones here say it themselves, as the paper chose it.)

Not here: losses, pruning, files, devices. Read search.py next.
"""
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from backbones.padding import pad_pairs


class SR(NamedTuple):
    """Images at several scales: what a backbone returns, and what a training batch holds.

    images: {scale: (N, 3, H·scale, W·scale)}, floating point. A batch has them in 0..1, with the
      low-resolution input under 1 and the original under the largest scale. A backbone returns
      one or more scales, about 0..1 but not clamped.
    kernel: (N, 1, k, k), sums to 1: the blur kernel that a blind backbone estimates, or in a batch
      the one it should find. None everywhere else.
    """
    images: dict[int, Tensor]
    kernel: Tensor | None = None


class Pair(NamedTuple):
    """A hidden width that may be pruned: the layers that make it and the layers that consume it.

    Take two convolutions in a row, a then b, with 64 channels between them. Removing channel j
    removes row j of a's weight (and entry j of its bias) and input column j of b's weight. Nothing
    else notices, if the channel goes nowhere but into b. That is the whole idea of a pair.

    Often a channel is more than one row: PixelShuffle(2) makes a channel out of four, attention
    has a row of q, of k and of v in every head. So `rows` and `columns` are index tables: channel j
    is the rows `rows[j]` of a producer and the input columns `columns[j]` of a consumer.
    """
    name: str                                  # for people and channel files: "up0.rcab12"
    block: str                                 # module that holds the pair: "up_blocks.0.12".
    #                                            What ran before that module never changes while
    #                                            the pair is being selected ("replay" in prune.py).
    width: int                                 # channels to choose among; in attention, per head
    producers: tuple[tuple[str, Tensor], ...]  # (module name, rows (width, r) of weight and bias)
    consumers: tuple[tuple[str, Tensor], ...]  # (module name, columns (width, c) of its weight)
    heads: int = 1                             # `Backbone.widths` counts a channel once per head
    norm: str = ""                             # a LayerNorm over the channels, between the two


def plain_pair(name: str, block: str, width: int, producer: str, *consumers: str) -> Pair:
    """The usual pair: channel j is row j of the producer and column j of every consumer."""
    channels = torch.arange(width).view(width, 1)
    return Pair(name, block, width, ((producer, channels),),
                tuple((consumer, channels) for consumer in consumers))


class Backbone(nn.Module, ABC):
    """The base of all backbones; drn.py is one to begin with, own.py the smallest.

    A subclass passes its sizes as `config` to this constructor, builds its layers with the hidden
    widths in `self.widths`, and defines `forward`, `pairs`, `hidden_widths` and `dual_spec`
    (usually ((scale, 1, 16),)). Its state dict has the names of the official release, so that
    released checkpoints load. tests/test_backbones.py checks all networks in its list; add yours.

    Traps, each of which cost somebody an afternoon:

    - Selection replays finished blocks (replay.py). So every `Pair.block` must be a module that
      `forward` calls, once in a pass, and the block must call the pair's consumers as modules, too.
      (The convolutions of `Upsample` are not called: they can produce, but not consume.)
    - Of an nn.Sequential, replay keeps only the last finished output. So until the block is
      finished, a member's output must not be used by anything but the next member; a skip around
      the whole is fine. (Blocks that read all earlier outputs belong in an nn.ModuleList.)
    - The order of `pairs()` is the order in which selection works. It must be the order in which
      the forward pass reaches the pairs, those of a block side by side, and `hidden_widths` must
      list the same names in the same order.
    - Images are in 0..1 outside every backbone. `rgb_range` says in which range the network
      computes (255 for DRN). Losses are multiplied by it, so learning rates belong to it: rates
      tuned for 255 are wrong for 1.
    - In bfloat16 all weights are bfloat16 but those of the layers named in `float32`, and the
      input stays float32. In training with autocast all weights are float32. So the first layer,
      and each that is named there, is called as `exact(layer, x)`: in the type of its weights.
    """
    rgb_range = 1.0                  # range of the network's own numbers, and so of its losses
    madds_count_bias = False         # whether the paper's MAdds count an addition for each bias
    float32: tuple[str, ...] = ()    # submodules that stay float32 when the rest is bfloat16
    kernel_size = 0                  # side of the blur kernel it estimates; 0: it is not blind
    source: dict | None = None       # what a network of the user's own is rebuilt from, see own.py
    replays = True                   # whether selection may replay finished blocks of it
    feature = ""                     # module whose input distillation compares (student and teacher
    #                                  may differ in width); "": it compares the images
    # The duals of this backbone, (from scale, to scale, hidden channels) each. Their width is the
    # release's: `feats` for DRN, 16 for the others.
    dual_spec: tuple[tuple[int, int, int], ...] = ()

    def __init__(self, config: dict, widths: dict[str, int] | list[int] | None):
        """config: all that the subclass's constructor takes besides `widths`, with arch and scale.

        widths: hidden channels to keep, {pair name: n} or a list in the order of `pairs()`; None
        keeps all. ValueError: a name, number or length that does not fit.
        """
        super().__init__()
        self.config = config
        self.arch = config["arch"]
        self.scale = config["scale"]
        self.widths = named_widths(self.hidden_widths(**config), widths)

    @abstractmethod
    def forward(self, low: Tensor) -> SR:
        """low: (N, 3, H, W) in 0..1, any H, W >= 1 -> the images at the scales it predicts."""

    def estimate(self, low: Tensor) -> Tensor:
        """The blur kernel (N, 1, k, k) of low, k = `kernel_size`; blind backbones define it.

        Their forward is forward(low, kernel=None): a kernel that is given replaces the estimate, so
        that all tiles of a picture can share one.
        """
        raise NotImplementedError(f"{self.arch} is not blind: it estimates no blur kernel")

    @classmethod
    @abstractmethod
    def hidden_widths(cls, **config) -> dict[str, int]:
        """{pair name: channels of the dense network} in the order of `pairs()`.

        It exists beside `pairs` because widths must be known before any layer can be built.
        """

    @abstractmethod
    def pairs(self) -> list[Pair]:
        """The prunable widths in forward order, which is the order of the authors' files."""

    def with_widths(self, widths: dict[str, int] | list[int] | None) -> "Backbone":
        """A new network of the same kind with other hidden widths and random weights.

        Cutting needs it: the smaller network is built first and then filled with what was kept.
        """
        return type(self)(widths=widths, **self.config)

    def start_from_interpolation(self) -> None:
        """Changes the random initialisation so that the network begins near an interpolation.

        Training then starts at the quality of bicubic, not at noise, which saves a short run most
        of its steps. (Ours. A backbone may leave it out.)
        """

    def fold(self) -> None:
        """Merges neighbouring linear layers for inference, in place; the output stays the same.

        `models.inference` calls it on a copy. A backbone overrides it if it has layers in a row
        with nothing nonlinear in between, such as two convolutions.
        """

    def pad(self) -> None:
        """Pads hidden widths with zeros for GPUs, in place, after `fold`; the output stays the
        same. `models.inference` calls it on a copy; padding.py says what is padded and why.
        """
        pad_pairs(self)

    def make_portable(self) -> None:
        """Replaces, in place, what ONNX has no operation for; the output stays the same.

        export.py calls it on a copy. Most backbones leave it out.
        """

    def set_drop_path(self, rate: float) -> None:
        """Sets the stochastic depth of the last block; it rises linearly from 0 in the first.

        It only acts in training, and only in backbones that have `DropPath` (SwinIR and DAT).
        """
        for module in self.modules():
            if isinstance(module, DropPath):
                module.rate = module.depth * rate


def named_widths(full: dict[str, int],
                 widths: dict[str, int] | list[int] | None) -> dict[str, int]:
    """{pair name: kept channels} for all pairs; `Backbone.__init__` says what `widths` may be."""
    if widths is None:
        return dict(full)
    if not isinstance(widths, dict):
        if len(widths) != len(full):
            raise ValueError(f"{len(widths)} channel numbers were given, this network has "
                             f"{len(full)} prunable widths: give one number per width, in the "
                             f"order of pairs()")
        widths = {name: int(n) for name, n in zip(full, widths)}
    for name, n in widths.items():
        if name not in full:
            first = ", ".join(list(full)[:3])
            raise ValueError(f"no prunable width is called {name!r}; the first are {first}")
        if not 1 <= n <= full[name]:
            raise ValueError(f"{name} keeps {n} channels, it must keep 1 to {full[name]}")
    return {**full, **widths}


# ---- layers that several backbones share --------------------------------------------------------
def exact(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """layer(*inputs), computed in the type of the layer's weights, also under autocast.

    For what forms the image, and for the first layer: its output begins the trunk, and what other
    layers add to that in bfloat16 is summed up in float32.
    """
    dtype = next(layer.parameters()).dtype
    inputs = [x.to(dtype) for x in inputs]
    if inputs[0].is_meta:            # MAdds are counted; there is no autocast for that device
        return layer(*inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return layer(*inputs)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the image size (at stride 1): padding is size // 2."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


class ChannelAttention(nn.Module):
    """A factor between 0 and 1 for every channel, computed from the means of the channels over the
    image (RCAN, arXiv 1807.02758).
    """
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        reduced = channels // reduction
        self.conv_du = nn.Sequential(
            conv(channels, reduced, 1),
            nn.ReLU(),
            conv(reduced, channels, 1),
            nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, 1, 1); the caller multiplies."""
        return self.conv_du(x.mean((2, 3), keepdim=True))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample skips this branch at random.

    `rate` is the probability. What remains is divided by 1 − rate, so that the mean stays.
    """
    def __init__(self, depth: float):
        """depth: where the block lies, 0 for the first and 1 for the last; see set_drop_path."""
        super().__init__()
        self.depth = depth
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ...), one decision per sample."""
        if not (self.training and self.rate):
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


class Upsample(nn.Sequential):
    """conv 3×3 then PixelShuffle(r), one or more times."""
    def __init__(self, *stages: tuple[int, int, int]):
        """stages: (input channels, output channels, r) each."""
        layers = []
        for inputs, outputs, r in stages:
            layers += [conv(inputs, r * r * outputs), nn.PixelShuffle(r)]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, outputs, H·factor, W·factor), factor the product of all r."""
        return enlarge(x, self)


def enlarge(x: Tensor, layers: nn.Sequential) -> Tensor:
    """Runs the (conv 3×3, PixelShuffle) couples that `layers` begins with, each as one operation.

    A single layer at the end of `layers` is left to the caller.
    """
    for i in range(0, len(layers) - 1, 2):
        layer, shuffle = layers[i], layers[i + 1]
        x = kernels.conv3x3_pixel_shuffle(x, layer.weight, layer.bias, shuffle.upscale_factor)
    return x


# ---- initialisations that make a network begin as an interpolation ------------------------------
def pass_on(layer: nn.Conv2d, channels: int = 3) -> None:
    """Makes the first outputs of a 3×3 convolution copies of its first inputs."""
    layer.weight[:channels] = 0
    layer.bias[:channels] = 0
    for c in range(channels):
        layer.weight[c, c, 1, 1] = 1


def interpolate(layer: nn.Conv2d, r: int) -> slice:
    """Makes conv 3×3 + PixelShuffle(r) an interpolation of the first three channels.

    A pixel becomes r×r pixels, whose centres lie at t = (i + ½)/r − ½ from its own, i = 0 .. r−1.
    The parabola through the neighbours at −1, 0, 1 has at t the weights t(t−1)/2, 1 − t², t(t+1)/2.
    Returns the rows of the weight that it set.
    """
    t = (torch.arange(r) + 0.5) / r - 0.5
    taps = torch.stack((t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2), 1)           # (r, 3)
    kernel = torch.einsum("iy,jx->ijyx", taps, taps).flatten(0, 1)                 # (r·r, 3, 3)
    rows = slice(3 * r * r)
    layer.weight[rows] = 0
    layer.bias[rows] = 0
    for colour in range(3):
        layer.weight[colour * r * r:(colour + 1) * r * r, colour] = kernel
    return rows
