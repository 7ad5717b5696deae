"""The super-resolution backbones behind one contract, and the table of their published sizes.

    model = build("drn_s", scale=4)              # 4,804,065 parameters, official state-dict names
    out = model(low)                             # SR: images keyed by scale, everything in 0..1

Four backbones, a page each, in the order DRN, (what the transformers share,) SwinIR, DAT, DCLS; presets and loading at
the end. What each offers, whatever its class (prune.py, dual.py, train.py and evaluate.py use nothing else):

    forward(x) -> SR         x (N, 3, H, W) in 0..1
    pairs()    -> [Pair]     the hidden widths that may be cut, in the order of the authors' channel files
    steps()    -> [f, ...]   the forward pass as len(pairs) + 1 functions state -> state; step i + 1 starts with the
                             consumer of pair i, so that pruning can run only the rest of the network
    begin(x) -> state, finish(state) -> SR
    with_widths(widths)      a fresh network of the same kind with other hidden widths
    start_from_interpolation()    a better start than the usual random one
    fold()                   merges, in place and exactly, what is linear at inference
    estimate(x) -> kernel    blind backbones only; their forward takes a kernel to use instead
    arch, scale, widths, rgb_range, dual_spec, feature, float32, madds_count_bias, kernel_size      facts, see `Backbone`

Not here: losses, pruning, files, devices. Window attention and the upsampling convolution are in kernels/. Read dual.py
next.
"""
import copy
from functools import partial
from itertools import islice
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


class SR(NamedTuple):
    """What every backbone returns, and what a batch holds."""
    images: dict[int, Tensor]          # {scale: (N, 3, H·scale, W·scale)}, 0..1, not clamped; scale 1 is the LR size
    kernel: Tensor | None = None       # (N, 1, k, k), sums to 1: blind backbones only


class Pair(NamedTuple):
    """A hidden width: the layers that make it and the layers that consume it. Channel j of the pair is the rows
    `producers[i][1][j]` of layer `producers[i][0]` and the input columns `consumers[i][1][j]` of `consumers[i][0]`."""
    name: str                                  # stable and human: "up0.rcab12"
    width: int                                 # channels that can be chosen among; in attention those of one head
    producers: tuple[tuple[str, Tensor], ...]  # (module name, rows (width, r)) of weight and bias
    consumers: tuple[tuple[str, Tensor], ...]  # (module name, columns (width, c)) of weight
    count: int = 1                             # a channel counts so often in `widths`: once for every head
    norm: str = ""                             # LayerNorm over the channels on the way to the consumer, if there is one


class Backbone(nn.Module):
    """What the four backbones share; a subclass sets the attributes named in `__init__` and yields its `program`."""
    rgb_range = 1.0                  # range of the network's own numbers; losses are measured in it (METHOD: native range)
    madds_count_bias = False         # whether the published MAdds count one addition per bias
    float32: tuple[str, ...] = ()    # submodules that stay float32 when the rest runs in bfloat16
    kernel_size = 0                  # side of the blur kernel that a blind network estimates; 0: it is not blind
    feature = ""                     # submodule whose input distillation compares (Section "fine-tuning")
    dual_spec: tuple[tuple[int, int, int], ...] = ()      # duals: (from scale, to scale, hidden channels)

    def __init__(self, config: dict, widths: dict | list | None):
        super().__init__()
        self.arch, self.scale, self.config = config["arch"], config["scale"], config
        self.widths = named_widths(self.hidden_widths(**config), widths)

    def with_widths(self, widths: dict | list | None) -> "Backbone":
        """A fresh, randomly initialised network of the same kind with the hidden widths given ({pair: n} or a list)."""
        return type(self)(widths=widths, **self.config)

    def start_from_interpolation(self) -> None:
        """Changes the random initialisation, where a backbone can, so that training begins near an interpolation."""

    def fold(self) -> None:
        """Merges what is linear at inference (evaluation mode), in place and exactly, where there is something."""

    def steps(self) -> list[Callable]:
        """The forward pass as len(pairs) + 1 functions state -> state, cut before the consumer of each pair."""
        segments = [[]]
        for operation in self.program():
            if operation is CUT:
                segments.append([])
            else:
                segments[-1].append(operation)
        return [partial(compose, segment) for segment in segments]

    def forward(self, x: Tensor) -> SR:
        """x: (N, 3, H, W) in 0..1, any H, W >= 1."""
        return self.finish(compose(self.steps(), self.begin(x)))


CUT = None                           # in a program: here the input of the next pair's consumer is ready


def compose(functions: list[Callable], state):
    for function in functions:
        state = function(state)
    return state


def then(layer: Callable, state: dict) -> dict:
    return {**state, "x": layer(state["x"])}


def named_widths(dense: dict[str, int], widths: dict | list | None) -> dict[str, int]:
    """{pair: kept channels} for all pairs, from None (dense), a list in config order, or a dict of some of them."""
    if widths is None:
        return dict(dense)
    if not isinstance(widths, dict):
        if len(widths) != len(dense):
            raise ValueError(f"{len(widths)} channel numbers were given, this network has {len(dense)} prunable widths: "
                             f"give one number per width, in the order of pairs()")
        widths = dict(zip(dense, (int(n) for n in widths)))
    for name, n in widths.items():
        if name not in dense:
            raise ValueError(f"no prunable width is called {name!r}; the first are {', '.join(list(dense)[:3])}")
        if not 1 <= n <= dense[name]:
            raise ValueError(f"{name} keeps {n} channels, it must keep 1 to {dense[name]}")
    return {**dense, **widths}


# ---------------------------------------------------------------------------------------------------------------------
# DRN: a bicubic enlargement goes down to the LR size and up again; an image leaves at every size. (CVPR 2020, Fig. 2)
#
#   low -bicubic-> x -sub_mean-> head -> down 0 -> ... -> bottleneck -> tail 0 -> image at scale 1
#                                  |copy    |copy              up 0 (RCABs, conv, shuffle, 1x1) ++ copy -> tail 1 -> scale 2
#                                  '---------'----------------------->  up 1 ...                        -> tail 2 -> scale 4
# ---------------------------------------------------------------------------------------------------------------------
def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


class MeanShift(nn.Conv2d):
    """x + sign·255·mean as a trainable 1×1 convolution: the release counts and stores its 12 numbers."""
    def __init__(self, sign: int):
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * 255 * torch.tensor([0.4488, 0.4371, 0.4040])


class DownBlock(nn.Module):
    """Halves the size: (N, c, H, W) -> (N, outputs, ceil(H/2), ceil(W/2)), no biases."""
    def __init__(self, channels: int, hidden: int, outputs: int):
        super().__init__()
        self.dual_module = nn.Sequential(
            nn.Sequential(conv(channels, hidden, stride=2, bias=False), nn.LeakyReLU(0.2)),
            conv(hidden, outputs, bias=False))


class ChannelAttention(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.conv_du = nn.Sequential(conv(channels, channels // reduction, 1), nn.ReLU(),
                                     conv(channels // reduction, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, 1, 1): the factor of every channel."""
        return self.conv_du(x.mean((2, 3), keepdim=True))


class RCAB(nn.Module):
    """Residual channel attention block; the prunable width is between its two 3×3 convolutions."""
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(conv(channels, hidden), nn.ReLU(inplace=True), conv(hidden, channels),
                                  ChannelAttention(channels))

    def second_half(self, state: dict) -> dict:
        """From the input of the second convolution to the output: skip + x · attention(x), in one pass over memory."""
        x = self.body[2](state["x"])
        return {**state, "x": torch.addcmul(state["skip"], x, self.body[3](x)), "skip": None}


class DRN(Backbone):
    """Sizes: `feats` channels at full size, doubling at each of log2(scale) halvings; `blocks` RCABs per up block."""
    rgb_range = 255.0
    madds_count_bias = True

    def __init__(self, arch: str, scale: int, feats: int, blocks: int, widths: dict | list | None = None):
        super().__init__(dict(arch=arch, scale=scale, feats=feats, blocks=blocks), widths)
        phase = scale.bit_length() - 1                                  # halvings; 2**phase == scale
        w = self.widths
        self.sub_mean = MeanShift(-1)
        self.head = conv(3, feats)
        self.down = nn.ModuleList(DownBlock(feats << p, w[f"down{p}"], feats << p + 1) for p in range(phase))
        self.up_blocks = nn.ModuleList()
        for i, (n, outputs) in enumerate(self.up_widths(phase, feats)):
            hidden = w[f"up{i}.shuffle"]
            self.up_blocks.append(nn.Sequential(
                *(RCAB(n, w[f"up{i}.rcab{b}"]) for b in range(blocks)),
                Upsample((n, hidden, 2)),                                # no activation up to the 1×1: see fold
                conv(hidden, outputs, 1)))
        self.tail = nn.ModuleList([conv(feats << phase, 3)])
        self.tail.extend(conv(2 * outputs, 3) for _, outputs in self.up_widths(phase, feats))
        self.add_mean = MeanShift(+1)
        self.float32 = ("sub_mean", "tail", "add_mean")
        self.feature = f"tail.{phase}"
        self.dual_spec = tuple((2 << i, 1 << i, feats) for i in range(phase))

    @staticmethod
    def up_widths(phase: int, feats: int) -> list[tuple[int, int]]:
        """(width of the RCABs, width after the 1×1) of each up block; the other half of the width is the copy."""
        return [(feats << phase, feats << phase - 1)] + [(2 * feats << p, feats << p - 1) for p in range(phase - 1, 0, -1)]

    @classmethod
    def hidden_widths(cls, arch: str, scale: int, feats: int, blocks: int) -> dict[str, int]:
        phase = scale.bit_length() - 1
        dense = {f"down{p}": feats << p for p in range(phase)}
        for i, (n, _) in enumerate(cls.up_widths(phase, feats)):
            dense |= {f"up{i}.rcab{b}": n for b in range(blocks)} | {f"up{i}.shuffle": n}
        return dense

    def pairs(self) -> list[Pair]:
        blocks, result = self.config["blocks"], []
        for name, width in self.widths.items():
            where, _, part = name.partition(".")
            i, repeat = int(where.lstrip("downup")), 1
            if not part:
                producer, consumer = f"down.{i}.dual_module.0.0", f"down.{i}.dual_module.1"
            elif part == "shuffle":                                    # PixelShuffle(2) makes a channel of 4 rows
                producer, consumer, repeat = f"up_blocks.{i}.{blocks}.0", f"up_blocks.{i}.{blocks + 1}", 4
            else:
                block = f"up_blocks.{i}.{part.removeprefix('rcab')}.body"
                producer, consumer = f"{block}.0", f"{block}.2"
            rows, columns = torch.arange(width * repeat).view(width, repeat), torch.arange(width).view(width, 1)
            result.append(Pair(name, width, ((producer, rows),), ((consumer, columns),)))
        return result

    # ---- the forward pass. state: x; copies, a tuple of the maps on the way down; skip, of the current RCAB; images
    def begin(self, x: Tensor) -> dict:
        return dict(x=x, copies=(), skip=None, images={})

    def program(self):
        yield self.enter
        for down in self.down:
            yield lambda s: {**s, "copies": s["copies"] + (s["x"],)}
            yield partial(then, down.dual_module[0])
            yield CUT
            yield partial(then, down.dual_module[1])
        yield partial(self.leave, 0)
        for i, up in enumerate(self.up_blocks):
            for block in up[:-2]:
                yield lambda s: {**s, "skip": s["x"]}
                yield partial(then, block.body[:2])
                yield CUT
                yield block.second_half
            yield partial(then, up[-2])
            yield CUT
            yield partial(then, up[-1])
            yield lambda s: {**s, "x": torch.cat((s["x"], s["copies"][-1]), 1), "copies": s["copies"][:-1]}
            yield partial(self.leave, i + 1)

    def enter(self, state: dict) -> dict:
        x = F.interpolate(255 * state["x"], scale_factor=self.scale, mode="bicubic", align_corners=False)
        return {**state, "x": self.head(self.sub_mean(x).to(self.head.weight.dtype))}

    def leave(self, i: int, state: dict) -> dict:
        tail = self.tail[i]
        image = self.add_mean(tail(state["x"].to(tail.weight.dtype))) / 255
        return {**state, "images": {**state["images"], 1 << i: image}}

    def finish(self, state: dict) -> SR:
        return SR(state["images"])

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The head passes the enlarged image on in its first three channels, and the last tail picks them out of the
        copy while all else counts a tenth: the largest image starts near bicubic, not as noise. (ours)"""
        head, tail, copy_of_head = self.head, self.tail[-1], self.config["feats"]
        head.weight[:3], head.bias[:3] = 0, 0
        tail.weight.mul_(0.1)
        tail.bias.zero_()
        for colour in range(3):
            head.weight[colour, colour, 1, 1] = 1
            tail.weight[colour, copy_of_head + colour] = 0
            tail.weight[colour, copy_of_head + colour, 1, 1] = 1

    def fold(self) -> None:
        """conv 3×3 (n → 4h), PixelShuffle(2) and conv 1×1 (h → o) are one linear map: conv 3×3 (n → 4·o), shuffle."""
        for up in self.up_blocks:
            wide, point = up[-2][0], up[-1]
            mix = point.weight[:, :, 0, 0].double()                                          # (o, h)
            weight = wide.weight.double().unflatten(0, (-1, 4))                              # (h, 4, n, 3, 3)
            bias = mix @ wide.bias.double().view(-1, 4) + point.bias.double()[:, None]       # (o, 4)
            up[-2][0] = folded = conv(wide.in_channels, 4 * len(mix)).to(wide.weight)
            folded.weight.data.copy_(torch.tensordot(mix, weight, 1).flatten(0, 1))
            folded.bias.data.copy_(bias.flatten())
            up[-1] = nn.Identity()


# ---------------------------------------------------------------------------------------------------------------------
# What SwinIR and DAT share: a trunk of tokens (B, H, W, C) at the LR size, enlarged at the very end.
#
#   low -mean-> conv_first -> norm -> groups of blocks -> norm -> conv_after_body -(+)-> upsampler -+mean-> image at `scale`
#                    '----------------------------------------------------------------'
# A block is x + attention(norm x), then x + mlp(norm x); on both branches stochastic depth in training.
# ---------------------------------------------------------------------------------------------------------------------
class Upsample(nn.Sequential):
    """conv 3×3, PixelShuffle(r), and so on: (N, c, H, W) -> (N, outputs, H·factor, W·factor), one kernel per pair."""
    def __init__(self, *stages: tuple[int, int, int]):
        """stages: (inputs, outputs, r) each."""
        super().__init__(*(layer for a, b, r in stages for layer in (conv(a, r * r * b), nn.PixelShuffle(r))))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self), 2):
            x = kernels.conv3x3_pixel_shuffle(x, self[i].weight, self[i].bias, self[i + 1].upscale_factor)
        return x


def tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)                                                 # (B, C, H, W) -> (B, H, W, C), no copy


def image(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)                                                 # and back: a channels-last image


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): with probability `rate` a sample goes without this branch. x: (B, H, W, C)."""
    if not rate:
        return x
    return x * (torch.rand(len(x), 1, 1, 1, device=x.device) >= rate).to(x.dtype) / (1 - rate)


class Transformer(Backbone):
    """Base of SwinIR and DAT. A subclass adds its groups (`layers`) and their part of the program."""
    drop_path = 0.1                        # of the last block in training; rises linearly from 0 (both releases)

    def __init__(self, config: dict, widths, dim: int, direct: bool):
        super().__init__(config, widths)
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1), persistent=False)
        self.conv_first, self.norm = conv(3, dim), nn.LayerNorm(dim)
        if direct:                                                               # "pixelshuffledirect": the light networks
            self.upsample = Upsample((dim, 3, self.scale))
        else:
            self.conv_before_upsample = nn.Sequential(conv(dim, 64), nn.LeakyReLU(0.01))
            self.upsample = Upsample(*([(64, 64, 3)] if self.scale == 3 else [(64, 64, 2)] * (self.scale.bit_length() - 1)))
            self.conv_last = conv(64, 3)
        self.float32 = ("upsample",) if direct else ("conv_last",)
        self.dual_spec = ((self.scale, 1, 16),)

    def initialise(self) -> None:
        """Linear layers and bias tables: normal of deviation 0.02, truncated at 2; the rest is PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    # ---- the forward pass. state: x; skip, of the current branch; group, of the current group; first; size; drop
    def begin(self, x: Tensor) -> dict:
        return dict(x=x, size=x.shape[2:], skip=None, group=None, first=None, drop=self.drop_path * self.training)

    def enter(self, state: dict, norm: nn.LayerNorm) -> dict:
        first = self.conv_first((state["x"] - self.mean).to(self.conv_first.weight.dtype))
        return {**state, "x": norm(tokens(first)), "first": first}

    def leave(self, state: dict) -> dict:
        x = self.conv_after_body(image(self.norm(state["x"]))) + state["first"]
        if hasattr(self, "conv_last"):
            x = self.upsample(self.conv_before_upsample(x))
            x = self.conv_last(x.to(self.conv_last.weight.dtype))
        else:
            x = self.upsample(x.to(self.upsample[0].weight.dtype))
        return {**state, "x": x + self.mean}

    def finish(self, state: dict) -> SR:
        height, width = (self.scale * n for n in state["size"])
        return SR({self.scale: state["x"][:, :, :height, :width]})

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The first three features carry the image to the upsampler, which interpolates it; what else enters there is
        made small. (ours)"""
        deep = [m for m in self.conv_after_body.modules() if isinstance(m, nn.Conv2d)][-1]
        for layer, part in (deep, 0.01), *((layer, 0.1) for layer in list(self.upsample)[::2]):
            layer.weight.mul_(part)
            layer.bias.zero_()
        pass_on(self.conv_first)
        if hasattr(self, "conv_last"):                      # LeakyReLU(x) − LeakyReLU(−x) = 1.01·x: carry both signs
            pass_on(self.conv_before_upsample[0], 3)
            self.conv_before_upsample[0].weight[3:6] = -self.conv_before_upsample[0].weight[:3]
            self.conv_before_upsample[0].bias[3:6] = 0
            self.conv_last.weight.mul_(0.1)
            pass_on(self.conv_last)
        for k, layer in enumerate(list(self.upsample)[::2]):
            rows = interpolate(layer, self.upsample[1].upscale_factor)
            if k == 0 and hasattr(self, "conv_last"):
                layer.weight[rows] /= 1.01
                layer.weight[rows, 3:6] = -layer.weight[rows, :3]


def pass_on(layer: nn.Conv2d, colours: int = 3) -> None:
    """Makes the first outputs of a 3×3 convolution copies of its first inputs."""
    layer.weight[:colours], layer.bias[:colours] = 0, 0
    for colour in range(colours):
        layer.weight[colour, colour, 1, 1] = 1


def interpolate(layer: nn.Conv2d, r: int) -> slice:
    """Makes the first outputs of a 3×3 convolution in front of PixelShuffle(r) its first three inputs, interpolated: the
    parabola through three neighbours, at the r×r places of the pixels that replace the middle one. Returns which rows."""
    t = (torch.arange(r) + 0.5) / r - 0.5
    taps = torch.stack((t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2), 1)         # (r, 3)
    kernel = torch.einsum("iy,jx->ijyx", taps, taps).flatten(0, 1)               # (r·r, 3, 3)
    rows = slice(3 * r * r)
    layer.weight[rows], layer.bias[rows] = 0, 0
    for colour in range(3):
        layer.weight[colour * r * r:(colour + 1) * r * r, colour] = kernel
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# SwinIR (ICCVW 2021, arXiv 2108.10257, Fig. 2): attention within 8×8 windows, every other block with shifted ones.
#
#   group: 6 blocks -> conv 3×3, + input.      block: norm1, attention (qkv, windows, proj); norm2, fc1, GELU, fc2
# ---------------------------------------------------------------------------------------------------------------------
class WindowAttention(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, window: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5                   # of the unpruned head, also when pruned
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.qkv, self.proj = nn.Linear(dim, 3 * hidden), nn.Linear(hidden, dim)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)


class SwinBlock(nn.Module):
    """Two prunable widths: what attention hands to proj, and the hidden width of the MLP."""
    window = 8

    def __init__(self, dim: int, heads: int, attention: int, mlp: int, shift: int, depth: float):
        super().__init__()
        self.shift, self.depth = shift, depth                                    # depth: 0 in the first block, 1 in the last
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, heads, attention, self.window), Mlp(dim, mlp)

    def to_proj(self, state: dict) -> dict:
        attn = self.attn
        x = kernels.window_attention(attn.qkv(self.norm1(state["x"])), attn.relative_position_bias_table, heads=attn.heads,
                                     window=(self.window, self.window), shift=(self.shift, self.shift), scale=attn.scale)
        return {**state, "x": x, "skip": state["x"]}

    def proj_to_fc2(self, state: dict) -> dict:
        skip = state["skip"] + drop_path(self.attn.proj(state["x"]), self.depth * state["drop"])
        return {**state, "x": F.gelu(self.mlp.fc1(self.norm2(skip))), "skip": skip}

    def from_fc2(self, state: dict) -> dict:
        return {**state, "x": state["skip"] + drop_path(self.mlp.fc2(state["x"]), self.depth * state["drop"]), "skip": None}


class SwinIR(Transformer):
    """Sizes: `dim` channels, `depths` blocks in each group, `heads` heads; direct: the light upsampler."""
    def __init__(self, arch: str, scale: int, dim: int, depths: tuple[int, ...], heads: int, direct: bool, widths=None):
        super().__init__(dict(arch=arch, scale=scale, dim=dim, depths=depths, heads=heads, direct=direct), widths, dim, direct)
        for name, n in self.widths.items():
            if name.endswith("attn") and n % heads:
                raise ValueError(f"{name} keeps {n} channels, its {heads} heads must keep the same number each: give a "
                                 f"multiple of {heads}")
        self.patch_embed = nn.ModuleDict(dict(norm=nn.LayerNorm(dim)))
        self.layers, last = nn.ModuleList(), max(1, sum(depths) - 1)
        for g, depth in enumerate(depths):
            blocks = nn.ModuleList(
                SwinBlock(dim, heads, self.widths[f"group{g}.block{b}.attn"], self.widths[f"group{g}.block{b}.mlp"],
                          SwinBlock.window // 2 * (b % 2), (sum(depths[:g]) + b) / last) for b in range(depth))
            self.layers.append(nn.ModuleDict(dict(residual_group=nn.ModuleDict(dict(blocks=blocks)), conv=conv(dim, dim))))
        self.conv_after_body = conv(dim, dim)
        self.initialise()

    @classmethod
    def hidden_widths(cls, dim: int, depths: tuple[int, ...], **_) -> dict[str, int]:
        return {f"group{g}.block{b}.{part}": n for g, depth in enumerate(depths) for b in range(depth)
                for part, n in (("attn", dim), ("mlp", 2 * dim))}

    def pairs(self) -> list[Pair]:
        heads, result = self.config["heads"], []
        for name, width in self.widths.items():
            g, b, part = (n.lstrip("groupblck") for n in name.split("."))
            block = f"layers.{g}.residual_group.blocks.{b}"
            if part == "mlp":
                one = torch.arange(width).view(width, 1)
                result.append(Pair(name, width, ((f"{block}.mlp.fc1", one),), ((f"{block}.mlp.fc2", one),)))
            else:                                          # the same place in every head, of q, k and v -> of proj's input
                of_heads = torch.arange(width).view(heads, -1).t()                             # (width of a head, heads)
                of_qkv = torch.cat([of_heads + k * width for k in range(3)], 1)
                result.append(Pair(name, width // heads, ((f"{block}.attn.qkv", of_qkv),),
                                   ((f"{block}.attn.proj", of_heads),), count=heads))
        return result

    def program(self):
        yield lambda s: {**s, "x": pad_to_multiple(s["x"], SwinBlock.window)}
        yield partial(self.enter, norm=self.patch_embed["norm"])
        for layer in self.layers:
            yield lambda s: {**s, "group": s["x"]}
            for block in layer["residual_group"]["blocks"]:
                yield block.to_proj
                yield CUT
                yield block.proj_to_fc2
                yield CUT
                yield block.from_fc2
            yield lambda s, conv=layer["conv"]: {**s, "x": tokens(conv(image(s["x"]))) + s["group"]}
        yield self.leave


def pad_to_multiple(x: Tensor, unit: int) -> Tensor:
    """Reflects (N, 3, H, W) at its right and lower end; a side too short for that repeats its last pixel."""
    for axis, side in ((3, x.shape[3]), (2, x.shape[2])):
        missing = -side % unit
        if missing:
            pad = (0, missing, 0, 0) if axis == 3 else (0, 0, 0, missing)
            x = F.pad(x, pad, mode="reflect" if missing < side else "replicate")
    return x


# ---------------------------------------------------------------------------------------------------------------------
# DAT (ICCV 2023, arXiv 2308.03364, Fig. 2): blocks that look along space and blocks that look along channels take turns.
#
#   spatial attention:  half of the heads in 8×32 windows, half in 32×8, some blocks shifted; bias from a small MLP
#   channel attention:  (channels × channels) per head, q and k of unit length along the tokens
#   both:               beside attention a depthwise convolution of v; each branch gates the other (adaptive interaction)
#   spatial-gate MLP:   fc1 -> GELU -> x1, x2;  fc2(x1 · depthwise(norm x2))
# ---------------------------------------------------------------------------------------------------------------------
class PositionBias(nn.Module):
    """The bias table of one half of the heads, from a small MLP of the offsets: -> ((2h−1)(2w−1), heads)."""
    def __init__(self, dim: int, heads: int, window: tuple[int, int]):
        super().__init__()
        self.window = window
        self.pos_proj = nn.Linear(2, dim)
        self.pos1, self.pos2, self.pos3 = (nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, outputs))
                                           for outputs in (dim, dim, heads))

    def forward(self) -> Tensor:
        (h, w), weight = self.window, self.pos_proj.weight
        y, x = torch.arange(1 - h, h, device=weight.device), torch.arange(1 - w, w, device=weight.device)
        offsets = torch.cartesian_prod(y, x).to(weight.dtype)                    # ((2h−1)(2w−1), 2): Δy, Δx
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class AdaptiveAttention(nn.Module):
    """What both attentions of DAT share: qkv, the convolution of v, the two gates, proj."""
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.dwconv = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim), nn.BatchNorm2d(dim), nn.GELU())
        self.channel_interaction = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(dim, dim // 8, 1), nn.BatchNorm2d(dim // 8),
                                                 nn.GELU(), conv(dim // 8, dim, 1))
        self.spatial_interaction = nn.Sequential(conv(dim, dim // 16, 1), nn.BatchNorm2d(dim // 16), nn.GELU(),
                                                 conv(dim // 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        qkv = self.qkv(x)                                                        # (B, H, W, 3C)
        convolved = self.dwconv(image(qkv[..., 2 * x.shape[3]:]))                # (B, C, H, W)
        attended = image(self.attend(qkv))                                       # (B, C, H, W)
        along_channels, along_space = self.gated(attended, convolved)            # which one each gate is made from
        by_channel = self.channel_interaction(along_channels).sigmoid()          # (B, C, 1, 1)
        by_place = self.spatial_interaction(along_space).sigmoid()               # (B, 1, H, W)
        return self.proj(tokens(along_space * by_channel + along_channels * by_place))


class AdaptiveSpatialAttention(AdaptiveAttention):
    window = (8, 32)

    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__(dim, heads)
        h, w = self.window
        self.shift, self.scale = (h // 2, w // 2) if shifted else (0, 0), (dim // heads) ** -0.5
        self.attns = nn.ModuleList(nn.ModuleDict(dict(pos=PositionBias(dim // 2 // 4 // 4, heads // 2, window)))
                                   for window in ((h, w), (w, h)))

    def attend(self, qkv: Tensor) -> Tensor:
        table = torch.cat([half["pos"]() for half in self.attns], 1)             # (945, heads)
        return kernels.window_attention(qkv, table, heads=self.heads, window=self.window, shift=self.shift,
                                        scale=self.scale, crossed=True)

    def gated(self, attended, convolved):
        return convolved, attended


class AdaptiveChannelAttention(AdaptiveAttention):
    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def attend(self, qkv: Tensor) -> Tensor:
        """Cosines of the channels of q with those of k, over all tokens, then a mixture of the channels of v."""
        q, k, v = qkv.flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # (B, heads, d, H·W)
        lengths = [x.float().norm(dim=3).clamp_min(1e-12).to(x.dtype) for x in (q, k)]        # (B, heads, d)
        cosine = (q @ k.transpose(2, 3)) / (lengths[0][..., :, None] * lengths[1][..., None, :])
        mixed = (cosine * self.temperature).softmax(-1) @ v                      # (B, heads, d, H·W)
        return mixed.flatten(1, 2).transpose(1, 2).unflatten(1, qkv.shape[1:3])  # (B, H, W, C)

    def gated(self, attended, convolved):
        return attended, convolved


class SpatialGate(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(hidden), nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)


class SGFN(nn.Module):
    """The prunable width is that of x1 and x2 alike."""
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.sg, self.fc2 = nn.Linear(dim, 2 * hidden), SpatialGate(hidden), nn.Linear(hidden, dim)


class DATBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, attention: AdaptiveAttention, depth: float):
        super().__init__()
        self.depth = depth
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.ffn = attention, SGFN(dim, hidden)

    def to_fc2(self, state: dict) -> dict:
        x = state["x"]
        skip = x + drop_path(self.attn(self.norm1(x)), self.depth * state["drop"])
        x1, x2 = F.gelu(self.ffn.fc1(self.norm2(skip))).chunk(2, 3)              # (B, H, W, hidden) each
        gate = self.ffn.sg
        return {**state, "x": x1 * tokens(gate.conv(image(gate.norm(x2)))), "skip": skip}

    def from_fc2(self, state: dict) -> dict:
        return {**state, "x": state["skip"] + drop_path(self.ffn.fc2(state["x"]), self.depth * state["drop"]), "skip": None}


class DAT(Transformer):
    """Sizes: `groups` of `blocks` blocks, `dim` channels, `heads` heads; the MLP is `expansion`·dim wide, half of it
    prunable; direct: the light upsampler and the light ("3conv") convolutions after a group."""
    def __init__(self, arch: str, scale: int, dim: int, groups: int, blocks: int, heads: int, expansion: int, direct: bool,
                 widths=None):
        super().__init__(dict(arch=arch, scale=scale, dim=dim, groups=groups, blocks=blocks, heads=heads,
                              expansion=expansion, direct=direct), widths, dim, direct)

        def after_group() -> nn.Module:
            thin, slope = dim // 4, partial(nn.LeakyReLU, 0.2)
            return nn.Sequential(conv(dim, thin), slope(), conv(thin, thin, 1), slope(), conv(thin, dim)) if direct \
                else conv(dim, dim)

        def attention(g: int, b: int) -> AdaptiveAttention:
            if b % 2:
                return AdaptiveChannelAttention(dim, heads)
            return AdaptiveSpatialAttention(dim, heads, b % 4 == 0 if g % 2 else b > 0 and (b - 2) % 4 == 0)

        self.before_RG = nn.Sequential(nn.Identity(), nn.LayerNorm(dim))
        last = max(1, groups * blocks - 1)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            blocks=nn.ModuleList(DATBlock(dim, heads, self.widths[f"group{g}.block{b}.ffn"], attention(g, b),
                                          (g * blocks + b) / last) for b in range(blocks)),
            conv=after_group())) for g in range(groups))
        self.conv_after_body = after_group()
        self.initialise()

    @classmethod
    def hidden_widths(cls, dim: int, groups: int, blocks: int, expansion: int, **_) -> dict[str, int]:
        return {f"group{g}.block{b}.ffn": expansion * dim // 2 for g in range(groups) for b in range(blocks)}

    def pairs(self) -> list[Pair]:
        result = []
        for name, width in self.widths.items():
            g, b, _ = (n.lstrip("groupblck") for n in name.split("."))
            ffn, one = f"layers.{g}.blocks.{b}.ffn", torch.arange(width).view(width, 1)
            result.append(Pair(name, width, ((f"{ffn}.fc1", torch.cat((one, one + width), 1)), (f"{ffn}.sg.norm", one),
                                             (f"{ffn}.sg.conv", one)), ((f"{ffn}.fc2", one),), norm=f"{ffn}.sg.norm"))
        return result

    def program(self):
        yield partial(self.enter, norm=self.before_RG[1])
        for layer in self.layers:
            yield lambda s: {**s, "group": s["x"]}
            for block in layer["blocks"]:
                yield block.to_fc2
                yield CUT
                yield block.from_fc2
            yield lambda s, conv=layer["conv"]: {**s, "x": tokens(conv(image(s["x"]))) + s["group"]}
        yield self.leave

    def fold(self) -> None:
        """A convolution and the BatchNorm behind it are one linear map."""
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                for i in range(1, len(module)):
                    if isinstance(module[i], nn.BatchNorm2d):
                        module[i - 1] = nn.utils.fuse_conv_bn_eval(module[i - 1], module[i])
                        module[i] = nn.Identity()


# ---------------------------------------------------------------------------------------------------------------------
# DCLS: the blur kernel is estimated, undone in feature space, and the result refined. (Luo et al., CVPR 2022, Fig. 2)
#
#   low -> Estimator: head, 3 residual blocks, tail -> latent -> 5 Linears -> 5 small convs on a dot -> kernel k
#    |                                                                                                 | detached
#    '-> conv_first -> 3 residual blocks -> head2: deconvolution with k -> f2 (64 channels) -> 5 x (10 DPCABs,
#             |                      '----> head1: 3x3 conv             -> f1 (16 channels) ->      doubled) -.
#             '------------------------ + <--------------------------------- fusion (f1 ++ f2) <--------------'
#                                       '-> upscale -> image
# ---------------------------------------------------------------------------------------------------------------------
def leaky(layer: nn.Module, x: Tensor) -> Tensor:
    return F.leaky_relu(layer(x), 0.1)


class ResidualBlock(nn.Module):
    """x + conv2(LeakyReLU(conv1(x))); the prunable width is between the convolutions."""
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, hidden), conv(hidden, channels)

    def program(self):
        yield lambda s: {**s, "skip": s["x"], "x": leaky(self.conv1, s["x"])}
        yield CUT
        yield lambda s: {**s, "skip": None, "x": s["skip"] + self.conv2(s["x"])}


class Estimator(nn.Module):
    """The image decides on a small linear network (KernelGAN's), and that network's impulse response is the kernel."""
    def __init__(self, feats: int, filters: tuple[int, ...], blocks: list[int], latent: int):
        super().__init__()
        self.filters, last = filters, len(filters) - 1
        self.size = 1 + sum(size - 1 for size in filters)
        self.channels = [3] + [16] * last + [3]
        self.head = nn.Sequential(conv(3, feats, 7))
        self.body = nn.Sequential(nn.Sequential(*(ResidualBlock(feats, hidden) for hidden in blocks)))
        self.tail = nn.Sequential(nn.Conv2d(feats, feats, 3), nn.LeakyReLU(0.1), nn.Conv2d(feats, feats, 3),
                                  nn.AdaptiveAvgPool2d(1), conv(feats, latent, 1), nn.Flatten())
        self.dec = nn.ModuleList(nn.Linear(latent, 16 * 3 * size ** 2 if i in (0, last) else 16 * 16 * size ** 2)
                                 for i, size in enumerate(filters))

    def program(self):
        yield lambda s: {**s, "x": self.head(s["low"].to(self.head[0].weight.dtype))}
        yield lambda s: {**s, "first": s["x"]}
        for block in self.body[0]:
            yield from block.program()
        yield lambda s: {**s, "first": None, "x": self.tail(s["first"] + s["x"])}       # (N, latent)
        yield CUT
        yield lambda s: {**s, "kernel": self.kernel(s["x"])}

    def kernel(self, latent: Tensor) -> Tensor:
        """(N, latent) -> (N, 1, k, k), sums to 1. Every image has its own weights: convolutions of N groups."""
        n, k = len(latent), self.size
        x = latent.new_ones(1, 3 * n, 1, 1)
        for i, (size, dec) in enumerate(zip(self.filters, self.dec)):
            weight = dec(latent).view(n * self.channels[i + 1], self.channels[i], size, size)
            x = F.conv2d(x, weight, padding=0 if i else k - 1, groups=n)       # (1, N·16, 51, 51), 43, 37, 33; (1, N·3, k, k)
        x = x.view(n, 3, k, k).flip(2, 3).mean(1, keepdim=True)     # flipped: conv2d correlates, the kernel convolves
        return x / x.sum((2, 3), keepdim=True)


def deconvolve(x: Tensor, kernel: Tensor, prior: Tensor) -> Tensor:
    """The z that minimises ‖kernel ∗ z − x‖² + ‖prior ∗ z‖² on the torus, for every channel: conj(K)·X / (|K|² + |P|²).

    x: (N, C, H, W); kernel: (N, 1, k, k), centre k // 2; prior: (N, C, p, p), p <= k. Returns (N, C, H, W), dtype and
    device of x. (The paper's deep constrained least squares; the release loops over channels.)"""
    (_, _, h, w), (k, p) = x.shape, (kernel.shape[-1], prior.shape[-1])
    x = F.pad(x, (k, k, k, k), "replicate")                                    # what the torus joins is cut off below
    height, width = x.shape[2:]
    small = torch.cat((kernel, F.pad(prior, (0, k - p, 0, k - p))), 1)                   # (N, 1 + C, k, k)
    small = torch.fft.fft(torch.fft.rfft(small, n=width), n=height, dim=-2)    # rfft2 to size, without the empty rows
    kernel, penalty = small[:, :1], small[:, 1:].abs().square()
    z = torch.fft.irfft2(kernel.conj() * torch.fft.rfft2(x) / (kernel.abs().square() + penalty), (height, width))
    start = k - k // 2             # the kernel's corner lies at the origin, not its centre: z comes k // 2 pixels early
    return z[:, :, start:start + h, start:start + w]


class CLS(nn.Module):
    """Constrained least squares deconvolution of features, in a quarter of the channels; (N, c, H, W) stays."""
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce_feature = conv(channels, reduced, 1)
        self.grad_filter = nn.Sequential(
            nn.Conv2d(reduced, reduced, 3), nn.LeakyReLU(0.1), nn.Conv2d(reduced, reduced, 3), nn.LeakyReLU(0.1),
            nn.Conv2d(reduced, reduced, 3), nn.AdaptiveAvgPool2d(3), conv(reduced, reduced, 1))
        self.expand_feature = conv(reduced, channels, 1)

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        x = self.reduce_feature(x.to(self.reduce_feature.weight.dtype))
        prior = self.grad_filter(x).exp()                                                # (N, c/4, 3, 3)
        prior = prior - prior.mean((2, 3), keepdim=True)                                 # no prior against flat areas
        return self.expand_feature(deconvolve(x, kernel, prior))


class DPCAB(nn.Module):
    """Dual-path channel attention block on (f2, f1); the prunable width is inside body1."""
    def __init__(self, channels: int, reduced: int, hidden: int):
        super().__init__()
        self.body1 = nn.Sequential(conv(channels, hidden), nn.LeakyReLU(0.1), conv(hidden, channels))
        self.body2 = nn.Sequential(conv(reduced, reduced), nn.LeakyReLU(0.1), conv(reduced, reduced))
        self.CA_body1 = nn.Sequential(nn.LeakyReLU(0.1), conv(channels + reduced, channels),
                                      ChannelAttention(channels, 4))
        self.CA_body2 = ChannelAttention(reduced, 4)

    def program(self):
        yield lambda s: {**s, "skip": s["x"], "x": self.body1[:2](s["x"])}
        yield CUT
        yield self.second_half

    def second_half(self, state: dict) -> dict:
        f1, b = state["f1"], self.body2(state["f1"])
        a = self.CA_body1[:2](torch.cat((self.body1[2](state["x"]), b), 1))
        return {**state, "x": torch.addcmul(state["skip"], a, self.CA_body1[2](a)), "skip": None,
                "f1": torch.addcmul(f1, b, self.CA_body2(b))}


class Restorer(nn.Module):
    def __init__(self, feats: int, scale: int, features: list[int], groups: list[list[int]]):
        super().__init__()
        reduced, stages = feats // 4, scale.bit_length() - 1
        self.conv_first = conv(3, feats)
        self.feature_block = nn.Sequential(*(ResidualBlock(feats, hidden) for hidden in features))
        self.head1, self.head2 = conv(feats, reduced), CLS(feats, reduced)
        blocks = (nn.ModuleList(DPCAB(feats, reduced, hidden) for hidden in group) for group in groups)
        self.body = nn.ModuleList(nn.ModuleDict({"body": group}) for group in blocks)
        self.fusion = conv(feats + reduced, feats)
        enlarge = [layer for _ in range(stages) for layer in (conv(feats, 4 * feats), nn.PixelShuffle(2))]
        self.upscale = nn.Sequential(*enlarge, conv(feats, 3))

    def program(self):
        yield lambda s: {**s, "x": self.conv_first(s["low"].to(self.conv_first.weight.dtype))}
        yield lambda s: {**s, "first": s["x"]}
        for block in self.feature_block:
            yield from block.program()
        yield self.divide
        for group in self.body:
            for block in group["body"]:
                yield from block.program()
            # The release means to add the group's input here; but it keeps both maps in one list, whose entries the
            # blocks have replaced by then, and so adds the output to itself. The released weights rely on it.
            yield lambda s: {**s, "x": 2 * s["x"], "f1": 2 * s["f1"]}
        yield lambda s: {**s, "first": None, "f1": None, "x": self.fusion(torch.cat((s["f1"], s["x"]), 1)) + s["first"]}
        for i in range(0, len(self.upscale) - 1, 2):
            yield partial(self.enlarge, self.upscale[i])
        yield lambda s: {**s, "x": self.upscale[-1](s["x"].to(self.upscale[-1].weight.dtype))}

    def enlarge(self, layer: nn.Conv2d, state: dict) -> dict:
        return {**state, "x": kernels.conv3x3_pixel_shuffle(state["x"], layer.weight, layer.bias, 2)}

    def divide(self, state: dict) -> dict:
        """The kernel is given, not learned, from here on: |k − k*| alone trains the Estimator (release)."""
        x, kernel = state["x"], state["kernel"].detach()
        return {**state, "f1": self.head1(x), "x": self.head2(x, kernel).to(x.dtype)}


class DCLS(Backbone):
    """Blind. Sizes: `feats` channels, `groups` groups of `blocks` DPCABs, a `latent` vector that makes `filters`, the
    sizes of the convolutions that make the kernel. LR images are at least 7×7 (the prior's three 3×3 without padding).
    Images come clamped to 0..1, as in the release."""
    def __init__(self, arch: str, scale: int, filters: tuple[int, ...], feats: int = 64, groups: int = 5,
                 blocks: int = 10, latent: int = 256, widths: dict | list | None = None):
        super().__init__(dict(arch=arch, scale=scale, filters=filters, feats=feats, groups=groups, blocks=blocks,
                              latent=latent), widths)
        hidden = iter(self.widths.values())
        self.Estimator = Estimator(feats, filters, list(islice(hidden, 3)), next(hidden))
        self.Restorer = Restorer(feats, scale, list(islice(hidden, 3)),
                                 [list(islice(hidden, blocks)) for _ in range(groups)])
        self.kernel_size = self.Estimator.size
        self.float32 = ("Estimator", "Restorer.head2", f"Restorer.upscale.{len(self.Restorer.upscale) - 1}")
        self.dual_spec = ((scale, 1, 16),)

    @classmethod
    def hidden_widths(cls, feats: int, latent: int, **config) -> dict[str, int]:
        return {name: latent if name == "estimator.latent" else feats for name in cls.places(**config)}

    @staticmethod
    def places(filters: tuple[int, ...], groups: int, blocks: int, **_) -> dict[str, tuple[str, ...]]:
        """{pair: (producer, consumers ...)}, in config order."""
        estimator = {f"estimator.block{i}": f"Estimator.body.0.{i}.conv" for i in range(3)}
        features = {f"feature{i}": f"Restorer.feature_block.{i}.conv" for i in range(3)}
        bodies = {f"group{g}.block{b}": f"Restorer.body.{g}.body.{b}.body1."
                  for g in range(groups) for b in range(blocks)}
        return {**{name: (f"{at}1", f"{at}2") for name, at in estimator.items()},
                "estimator.latent": ("Estimator.tail.4", *(f"Estimator.dec.{i}" for i in range(len(filters)))),
                **{name: (f"{at}1", f"{at}2") for name, at in features.items()},
                **{name: (f"{at}0", f"{at}2") for name, at in bodies.items()}}

    def pairs(self) -> list[Pair]:
        result = []
        for name, (producer, *consumers) in self.places(**self.config).items():
            channels = torch.arange(self.widths[name])[:, None]                          # one row, one column each
            result.append(Pair(name, len(channels), ((producer, channels),), tuple((at, channels) for at in consumers)))
        return result

    # ---- the forward pass. state: low; kernel; x, f1; skip, of the current block; first, for the long skip
    def begin(self, x: Tensor) -> dict:
        if min(x.shape[2:]) < 7:
            raise ValueError(f"DCLS got an image of {x.shape[3]}x{x.shape[2]} pixels: give at least 7x7")
        return dict(low=x, kernel=None)

    def program(self):
        yield from self.Estimator.program()
        yield from self.Restorer.program()

    def finish(self, state: dict) -> SR:
        return SR({self.scale: state["x"].clamp(0, 1)}, state["kernel"])

    def forward(self, x: Tensor, kernel: Tensor | None = None) -> SR:
        """kernel: (N, 1, k, k), used instead of the estimated one: the tiles of a picture share theirs."""
        if kernel is None:
            return super().forward(x)
        state = {**self.begin(x), "kernel": kernel}
        return self.finish(compose([f for f in self.Restorer.program() if f is not CUT], state))

    def estimate(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..1 -> (N, 1, k, k), the blur kernel in LR pixels, sums to 1."""
        return compose([f for f in self.Estimator.program() if f is not CUT], self.begin(x))["kernel"]

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The first three features carry the image through conv_first and the enlargements, all else counts little, and
        the first kernel is a small dot. Without this, five linear layers whose random product is divided by its sum,
        near 0, and five doublings throw the training about. (ours)"""
        r = self.Restorer
        *enlarge, last = r.upscale[::2]
        doubled = 0.5 ** len(r.body)
        for layer, factor in ((r.head1, doubled), (r.head2.expand_feature, doubled), (r.fusion, 0.02)):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        pass_on(r.conv_first)
        pass_on(last)
        for layer in enlarge:
            interpolate(layer, 2)
        for dec, size in zip(self.Estimator.dec, self.Estimator.filters):
            line = torch.tensor([0.07, 0.86, 0.07]) if size > 1 else torch.ones(1)
            dot = F.pad(torch.outer(line, line), ((size - len(line)) // 2,) * 4)         # (size, size)
            dec.bias.copy_(4 * dot.flatten().repeat(len(dec.bias) // size ** 2))


# ---------------------------------------------------------------------------------------------------------------------
# Presets, building, loading
# ---------------------------------------------------------------------------------------------------------------------
PRESETS = {                                            # arch: (class, {scale: sizes})
    "drn_s": (DRN, {4: dict(feats=16, blocks=30),      # 4,804,065 parameters
                    8: dict(feats=8, blocks=30)}),     # 5,403,000
    "drn_l": (DRN, {4: dict(feats=20, blocks=40),      # 9,825,893
                    8: dict(feats=10, blocks=36)}),    # 10,004,018
    "swinir": (SwinIR, dict.fromkeys((2, 3, 4, 8), dict(dim=180, depths=(6,) * 6, heads=6, direct=False))),
    "swinir_light": (SwinIR, dict.fromkeys((2, 3, 4, 8), dict(dim=60, depths=(6,) * 4, heads=6, direct=True))),
    "dat": (DAT, dict.fromkeys((2, 3, 4), dict(dim=180, groups=6, blocks=6, heads=6, expansion=4, direct=False))),
    "dat_light": (DAT, dict.fromkeys((2, 3, 4), dict(dim=60, groups=1, blocks=18, heads=6, expansion=2, direct=True))),
    "dcls": (DCLS, {4: dict(filters=(11, 9, 7, 5, 3)),                               # 19,054,027
                    2: dict(filters=(7, 3, 3, 1))}),                                 # 8,905,931
}
ARCHS = tuple(PRESETS)


def build(arch: str, scale: int = 4, widths: dict | list | None = None) -> Backbone:
    """A randomly initialised backbone. widths: {pair name: kept channels}, or a list in the order of `pairs()` (the
    order of the authors' channel files); None is the dense network. ValueError names what is unknown or out of range."""
    if arch not in PRESETS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(ARCHS)}")
    cls, sizes = PRESETS[arch]
    if scale not in sizes:
        raise ValueError(f"{arch} has no scale {scale}: choose one of {', '.join(map(str, sizes))}")
    return cls(arch=arch, scale=scale, widths=widths, **sizes[scale])


DERIVED = ("attn_mask", "relative_position_index", "rpe_biases")       # buffers that released files carry, no weights


def load_state(module: nn.Module, state: dict) -> dict | None:
    """Loads an official or own state dict, strictly, and returns the state dict of a dual that came with it (official
    SwinIR, DAT and DCLS files: keys `dual_model.*`), else None. A dict under `params_ema` or `params` is unwrapped.
    ValueError names the first missing, unexpected or mis-shaped entry."""
    for key in ("params_ema", "params"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("this is no state dict of one network (a dict of tensors): give the file of the weights themselves")
    state = {k: v for k, v in state.items() if not any(part in k.rsplit(".", 1)[-1] for part in DERIVED)}
    dual = {k.removeprefix("dual_model."): state.pop(k) for k in list(state) if k.startswith("dual_model.")}
    mine = module.state_dict()
    for name in mine:
        if name not in state:
            raise ValueError(f"weight {name} is missing: this file is of another network (check the arch, scale and channels)")
        if mine[name].shape != state[name].shape:
            raise ValueError(f"weight {name} has shape {tuple(state[name].shape)}, this network needs "
                             f"{tuple(mine[name].shape)} (check the arch, scale and channels)")
    for name in state:
        if name not in mine:
            raise ValueError(f"weight {name} is unexpected: this file is of another network (check the arch, scale and "
                             f"channels)")
    module.load_state_dict(state)
    return dual or None


def inference(model: Backbone, precision: str = "float32") -> Backbone:
    """A copy for inference: folded (exact), channels-last, without gradients. `precision="bf16"` runs all but the
    layers that form the image (`model.float32`) in bfloat16; it pays on hardware with bfloat16 instructions."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.fold()
    if precision == "bf16":
        exact = {name: model.get_submodule(name).state_dict() for name in model.float32}      # before they are rounded
        model.to(torch.bfloat16)
        for name, state in exact.items():
            model.get_submodule(name).float().load_state_dict(state)
    elif precision != "float32":
        raise ValueError(f"unknown precision {precision!r}: choose float32 or bf16")
    return model.to(memory_format=torch.channels_last)
