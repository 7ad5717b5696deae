"""SwinIR (Liang et al., ICCVW 2021, arXiv 2108.10257, Fig. 2): attention within small windows.

    low -pad, −mean-> conv_first -+-> patch_embed -> groups (RSTBs) -> norm -> conv_after_body -(+)
                                  |                                                              |
                                  '--------------------------------------------------------------+
                                                                                                 |
                                                       image <- +mean, crop <- upsampler <-------'
    patch_embed: only a LayerNorm (the name is the release's)
    group:  6 Swin blocks -> conv 3×3, + input
    block:  x + attention(norm1 x), then x + mlp(norm2 x);  every other block has shifted windows

`Transformer`, the trunk that SwinIR and DAT share, comes first. A feature map is an image
(N, C, H, W) for convolutions and tokens (N, H, W, C) for attention, linear layers and norms; going
from one to the other is a permutation that copies nothing.

Prunable: in every block, what attention hands to `proj` (the same indices in every head), and the
hidden width of the MLP. The window attention itself is in kernels/attention.py.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from backbones.base import (
    SR,
    Backbone,
    DropPath,
    Pair,
    Upsample,
    conv,
    exact,
    interpolate,
    pass_on,
    plain_pair,
)
from kernels.heads import pad_groups, wanted_width

WINDOW = 8                                   # side of a window in tokens (Section 4.1)


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


def to_map(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view in channels-last memory."""
    return x.permute(0, 3, 1, 2)


class Transformer(Backbone):
    """The trunk of SwinIR and DAT; a subclass adds its groups between the two ends."""
    def __init__(self, config: dict, widths, dim: int, direct: bool):
        """dim: channels; direct: the upsampler of the light networks ("pixelshuffledirect")."""
        super().__init__(config, widths)
        mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = conv(3, dim)
        self.norm = nn.LayerNorm(dim)
        self.direct = direct
        if direct:
            self.upsample = Upsample((dim, 3, self.scale))
            self.float32 = ("upsample",)
        else:
            stages = [(64, 64, 2)] * (self.scale.bit_length() - 1)
            if self.scale == 3:
                stages = [(64, 64, 3)]
            self.conv_before_upsample = nn.Sequential(conv(dim, 64), nn.LeakyReLU(0.01))
            self.upsample = Upsample(*stages)
            self.conv_last = conv(64, 3)
            self.float32 = ("conv_last",)
        self.dual_spec = ((self.scale, 1, 16),)

    def initialise(self) -> None:
        """Linear layers as in both releases: normal with deviation 0.02, truncated; bias zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def first_features(self, low: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W): the features that the long skip carries to the end."""
        return exact(self.conv_first, low - self.mean)

    def to_image(self, x: Tensor, first: Tensor, height: int, width: int) -> SR:
        """Tokens of the last group and the first features -> the image, cropped to the input's
        height × width times the scale.
        """
        x = self.conv_after_body(to_map(self.norm(x))) + first
        if self.direct:
            x = exact(self.upsample, x)
        else:
            x = self.upsample(self.conv_before_upsample(x))
            x = exact(self.conv_last, x)
        x = x + self.mean
        return SR({self.scale: x[:, :, :self.scale * height, :self.scale * width]})

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The first three features carry the image to the upsampler, which interpolates them;
        everything else that enters there is made small. (Ours.)
        """
        stages = [layer for layer in self.upsample if isinstance(layer, nn.Conv2d)]
        convs = [m for m in self.conv_after_body.modules() if isinstance(m, nn.Conv2d)]
        shrink(convs[-1], 0.01)
        for layer in stages:
            shrink(layer, 0.1)
        pass_on(self.conv_first)
        r = self.upsample[1].upscale_factor
        for layer in stages:
            interpolate(layer, r)
        if not self.direct:
            self.carry_both_signs(stages[0], slice(3 * r * r))

    def carry_both_signs(self, stage: nn.Conv2d, rows: slice) -> None:
        """A LeakyReLU lies on the way: LeakyReLU(x) − LeakyReLU(−x) = 1.01·x restores x."""
        before = self.conv_before_upsample[0]
        pass_on(before)
        before.weight[3:6] = -before.weight[:3]
        before.bias[3:6] = 0
        stage.weight[rows] /= 1.01
        stage.weight[rows, 3:6] = -stage.weight[rows, :3]
        self.conv_last.weight.mul_(0.1)
        pass_on(self.conv_last)


def shrink(layer: nn.Conv2d, factor: float) -> None:
    """Makes what a layer adds small: its weight times `factor`, no bias."""
    layer.weight.mul_(factor)
    layer.bias.zero_()


# ---- SwinIR -------------------------------------------------------------------------------------
class FromHeads(nn.Linear):
    """A linear layer whose input is made of heads; heads padded with zeros will do as well."""
    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // self.heads
        return F.linear(x, pad_groups(self.weight, 1, self.heads, width), self.bias)


def to_heads(layer: nn.Linear, x: Tensor, groups: int, width: int) -> Tensor:
    """layer(x), in `groups` groups (the heads of q, k and v) padded with zeros to `width` each."""
    weight = pad_groups(layer.weight, 0, groups, width)
    return F.linear(x, weight, pad_groups(layer.bias, 0, groups, width))


class WindowAttention(nn.Module):
    """Multi-head attention within windows. `hidden` channels of q, k and v each, over all heads.

    On a GPU the heads are padded to the widths that the kernels have, see kernels/heads.py.
    """
    def __init__(self, dim: int, heads: int, hidden: int, shift: int):
        super().__init__()
        self.heads = heads
        self.shift = shift
        self.scale = (dim // heads) ** -0.5          # of the unpruned head width, pruned or not
        table = torch.empty((2 * WINDOW - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.qkv = nn.Linear(dim, 3 * hidden)
        self.proj = FromHeads(heads, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay; H and W are multiples of the window."""
        width = wanted_width(self.proj.in_features // self.heads, x)
        qkv = to_heads(self.qkv, x, 3 * self.heads, width)
        x = kernels.window_attention(
            qkv, self.relative_position_bias_table, heads=self.heads,
            window=(WINDOW, WINDOW), shift=(self.shift, self.shift), scale=self.scale)
        return self.proj(x)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them, for every token alone."""
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class WholeMlp(nn.Module):
    """x + mlp(norm(x)) as one operation, for inference (kernels/mlp.py)."""
    def __init__(self, norm: nn.LayerNorm, mlp: Mlp):
        super().__init__()
        self.norm = norm
        self.fc1 = mlp.fc1
        self.fc2 = mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.norm, self.fc1, self.fc2)
        return kernels.residual_mlp(x, *(p for layer in layers for p in (layer.weight, layer.bias)))


class SwinBlock(nn.Module):
    """Attention, then the MLP, each with its norm before it and its input added after it."""
    def __init__(self, dim: int, heads: int, attention: int, mlp: int, shift: int, depth: float):
        """attention, mlp: their hidden widths; depth: 0 in the first block, 1 in the last."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, attention, shift)
        self.mlp = Mlp(dim, mlp)
        self.drop_path = DropPath(depth)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if isinstance(self.mlp, WholeMlp):
            return self.mlp(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class RSTB(nn.Module):
    """Residual Swin transformer block: a group of Swin blocks, a convolution, and the input."""
    def __init__(self, dim: int, blocks: list[SwinBlock]):
        super().__init__()
        # The release nests them so; its state-dict names are "residual_group.blocks.0...".
        self.residual_group = nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))
        self.conv = conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay."""
        return to_tokens(self.conv(to_map(self.residual_group(x)))) + x


class SwinIR(Transformer):
    """The whole network of the figure above; models.PRESETS holds the published sizes."""
    def __init__(
            self,
            arch: str,
            scale: int,
            dim: int,                # channels of the trunk
            depths: tuple[int, ...], # blocks in each group
            heads: int,
            direct: bool,            # the light upsampler, see Transformer
            widths: dict[str, int] | list[int] | None = None):
        config = dict(arch=arch, scale=scale, dim=dim, depths=depths, heads=heads, direct=direct)
        super().__init__(config, widths, dim, direct)
        self.patch_embed = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dim)))
        self.layers = nn.Sequential()
        last = max(1, sum(depths) - 1)
        for g, depth in enumerate(depths):
            blocks = []
            for b in range(depth):
                name = f"group{g}.block{b}"
                shift = WINDOW // 2 if b % 2 else 0
                n = self.widths[f"{name}.attn"]
                if n % heads:
                    raise ValueError(f"{name}.attn keeps {n} channels, its {heads} heads must keep "
                                     f"the same number each: give a multiple of {heads}")
                blocks.append(SwinBlock(
                    dim,
                    heads,
                    n,
                    self.widths[f"{name}.mlp"],
                    shift,
                    (sum(depths[:g]) + b) / last))
            self.layers.append(RSTB(dim, blocks))
        self.conv_after_body = conv(dim, dim)
        self.initialise()

    @classmethod
    def hidden_widths(cls, dim: int, depths: tuple[int, ...], **_) -> dict[str, int]:
        full = {}
        for g, depth in enumerate(depths):
            for b in range(depth):
                full[f"group{g}.block{b}.attn"] = dim
                full[f"group{g}.block{b}.mlp"] = 2 * dim
        return full

    def pairs(self) -> list[Pair]:
        result = []
        for g, depth in enumerate(self.config["depths"]):
            for b in range(depth):
                name = f"group{g}.block{b}"
                block = f"layers.{g}.residual_group.blocks.{b}"
                result.append(self.attention_pair(f"{name}.attn", block))
                result.append(plain_pair(f"{name}.mlp", block, self.widths[f"{name}.mlp"],
                                         f"{block}.mlp.fc1", f"{block}.mlp.fc2"))
        return result

    def attention_pair(self, name: str, block: str) -> Pair:
        """Index j of every head: its rows of q, of k and of v; its input columns of proj.

        They go together because one layer makes q, k and v, all of the same width in every head.
        Search and selection look at proj's columns only, that is, at what v_j is good for.
        """
        heads = self.config["heads"]
        width = self.widths[name]                                          # of all heads together
        columns = torch.arange(width).view(heads, -1).t()                  # (head width, heads)
        rows = torch.cat((columns, columns + width, columns + 2 * width), 1)     # of q, k, v
        producer = (f"{block}.attn.qkv", rows)
        consumer = (f"{block}.attn.proj", columns)
        return Pair(name, block, width // heads, (producer,), (consumer,), heads=heads)

    def fold(self) -> None:
        """The MLP of each block, its norm and its skip become one operation."""
        for block in self.modules():
            if isinstance(block, SwinBlock) and isinstance(block.mlp, Mlp):
                block.mlp = WholeMlp(block.norm2, block.mlp)
                block.norm2 = nn.Identity()

    def forward(self, low: Tensor) -> SR:
        height, width = low.shape[2:]
        first = self.first_features(pad_to_multiple(low, WINDOW))
        x = self.layers(self.patch_embed(to_tokens(first)))
        return self.to_image(x, first, height, width)


def pad_to_multiple(x: Tensor, unit: int) -> Tensor:
    """Pads (N, 3, H, W) on the right and at the bottom until both sides are multiples of `unit`.

    The picture is reflected; a side that is too short for that repeats its last pixel (there the
    release fails). By indices, so that an exported network does it for any size, too.
    """
    for axis in (2, 3):
        last = x.shape[axis] - 1
        padded = (last + unit) // unit * unit
        if padded == last + 1:
            continue
        index = torch.arange(padded, device=x.device)
        mirrored = last - (index - last).abs()       # ..., last - 1, last, last - 1, ...
        index = torch.where(mirrored[-1] < 0, index.clamp(max=last), mirrored)
        x = x.index_select(axis, index)
    return x
