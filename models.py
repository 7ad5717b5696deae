"""The super-resolution backbones behind one contract, and the table of their published sizes.

    model = build("drn_s", scale=4)              # 4,804,065 parameters, official state-dict names
    out = model(low)                             # SR: images keyed by scale, everything in 0..1

What a backbone offers, whatever its class (prune.py, dual.py, train.py and evaluate.py use nothing else):

    forward(x) -> SR         x (N, 3, H, W) in 0..1
    pairs()    -> [Pair]     the hidden widths that may be cut, in the order of the authors' channel files
    steps()    -> [f, ...]   the forward pass as len(pairs) + 1 functions state -> state; step i + 1 starts with the
                             consumer of pair i, so that pruning can run only the rest of the network
    begin(x) -> state, finish(state) -> SR
    with_widths(widths)      a fresh network of the same kind with other hidden widths
    start_from_bicubic()     a better start than PyTorch's random one, where the backbone has one
    fold()                   merges, in place and exactly, what is linear at inference
    arch, scale, widths, rgb_range, dual_spec, feature, float32, madds_count_bias     facts, see `Backbone`

Here: DRN (Guo et al., "Closed-loop Matters", CVPR 2020). Not here: losses, pruning, files, devices. Read dual.py next.
"""
import copy
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SR(NamedTuple):
    """What every backbone returns, and what a batch holds."""
    images: dict[int, Tensor]          # {scale: (N, 3, H·scale, W·scale)}, 0..1, not clamped; scale 1 is the LR size
    kernel: Tensor | None = None       # (N, 1, k, k), sums to 1: blind backbones only


class Pair(NamedTuple):
    """A hidden width: the layers that make it and the layers that consume it. Channel j of the pair is the rows
    `producers[i][1][j]` of layer `producers[i][0]` and the input columns `consumers[i][1][j]` of `consumers[i][0]`."""
    name: str                                  # stable and human: "up0.rcab12"
    width: int                                 # hidden channels now
    producers: tuple[tuple[str, Tensor], ...]  # (module name, rows (width, r)) of weight and bias
    consumers: tuple[tuple[str, Tensor], ...]  # (module name, columns (width, c)) of weight


class Backbone(nn.Module):
    """What the four backbones share; a subclass sets the attributes named in `__init__` and yields its `program`."""
    rgb_range = 1.0                  # range of the network's own numbers; losses are measured in it (METHOD: native range)
    madds_count_bias = False         # whether the published MAdds count one addition per bias
    float32: tuple[str, ...] = ()    # submodules that stay float32 when the rest runs in bfloat16
    feature = ""                     # submodule whose input distillation compares (Section "fine-tuning")
    dual_spec: tuple[tuple[int, int, int], ...] = ()      # duals: (from scale, to scale, hidden channels)

    def __init__(self, config: dict, widths: dict | list | None):
        super().__init__()
        self.arch, self.scale, self.config = config["arch"], config["scale"], config
        self.widths = named_widths(self.hidden_widths(**config), widths)

    def with_widths(self, widths: dict | list | None) -> "Backbone":
        """A fresh, randomly initialised network of the same kind with the hidden widths given ({pair: n} or a list)."""
        return type(self)(widths=widths, **self.config)

    def start_from_bicubic(self) -> None:
        """Changes the random initialisation, where a backbone can, so that training begins near bicubic enlargement."""

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
    def __init__(self, channels: int):
        super().__init__()
        self.conv_du = nn.Sequential(conv(channels, channels // 16, 1), nn.ReLU(),
                                     conv(channels // 16, channels, 1), nn.Sigmoid())

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
                nn.Sequential(conv(n, 4 * hidden), nn.PixelShuffle(2)),  # no activation up to the 1×1: see fold
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
    def start_from_bicubic(self) -> None:
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
# Presets, building, loading
# ---------------------------------------------------------------------------------------------------------------------
PRESETS = {                                            # arch: (class, {scale: sizes})
    "drn_s": (DRN, {4: dict(feats=16, blocks=30),      # 4,804,065 parameters
                    8: dict(feats=8, blocks=30)}),     # 5,403,000
    "drn_l": (DRN, {4: dict(feats=20, blocks=40),      # 9,825,893
                    8: dict(feats=10, blocks=36)}),    # 10,004,018
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
            raise ValueError(f"weight {name} is unexpected: this file is of another network (check the arch, scale and channels)")
    module.load_state_dict(state)
    return dual or None


def inference(model: Backbone, precision: str = "float32") -> Backbone:
    """A copy for inference: folded (exact), channels-last, without gradients. `precision="bf16"` runs all but the
    layers that form the image (`model.float32`) in bfloat16; it pays on hardware with bfloat16 instructions."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.fold()
    if precision == "bf16":
        model.to(torch.bfloat16)
        for name in model.float32:
            model.get_submodule(name).float()
    elif precision != "float32":
        raise ValueError(f"unknown precision {precision!r}: choose float32 or bf16")
    return model.to(memory_format=torch.channels_last)
