"""DAT (Chen et al., ICCV 2023, arXiv 2308.03364, Fig. 2): attention along space and along channels.

The trunk is SwinIR's (`Transformer` in swinir.py, to be read first). A block is, as there,
x + attention(norm1 x), then x + ffn(norm2 x); but blocks with two kinds of attention take turns:

    spatial   half of the heads in 8×32 windows, half in 32×8, some blocks shifted;
              the position bias comes from a small network of the offsets
    channel   per head a (channels × channels) matrix of cosines, over all tokens

Beside either runs a depthwise convolution of v, and each of the two branches gates the other
("adaptive interaction"). The MLP ("spatial-gate feed-forward network", SGFN) halves its hidden
channels into x1 and x2, and x2, normalised and convolved, multiplies x1.

Prunable: the hidden width of every SGFN. Attention stays whole: its channels go not only to proj
but also through the convolution and into both gates. The paper of DRC stops at dual regression for
DAT; the pairs are ours.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from backbones.base import SR, DropPath, Pair, conv
from backbones.padding import pad_layer
from backbones.swinir import Transformer, to_heads, to_map, to_tokens
from kernels.heads import cut_groups, head_width, wanted_width

WINDOW = (8, 32)                             # height, width; the other half of the heads: (32, 8)


class PositionBias(nn.Module):
    """The position bias of half of the heads, computed from the offsets by a small network."""
    def __init__(self, dim: int, heads: int, window: tuple[int, int]):
        super().__init__()
        self.window = window
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos2 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos3 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, heads))

    def forward(self) -> Tensor:
        """-> ((2h−1)·(2w−1), heads), a row for every offset (Δy, Δx) = query − key."""
        (h, w), weight = self.window, self.pos_proj.weight
        y = torch.arange(1 - h, h, device=weight.device)
        x = torch.arange(1 - w, w, device=weight.device)
        offsets = torch.cartesian_prod(y, x).to(weight.dtype)              # ((2h−1)(2w−1), 2)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class HalfOfHeads(nn.Module):
    """Holds the position bias under the release's name, `attns.0.pos` and `attns.1.pos`."""
    def __init__(self, dim: int, heads: int, window: tuple[int, int]):
        super().__init__()
        self.pos = PositionBias(dim, heads, window)

    def forward(self) -> Tensor:
        return self.pos()


class AdaptiveAttention(nn.Module):
    """What both attentions share: qkv, the convolution of v, the two gates, proj."""
    # whether attention is the `a` of `interact` and the convolution its `b`, or the other way round
    attention_is_a = False

    def head_width(self, d: int, x: Tensor) -> int:
        """How many channels a head of d gets for the attention itself; see kernels/heads.py."""
        return d

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwconv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim),
            nn.BatchNorm2d(dim),
            nn.GELU())
        self.channel_interaction = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            conv(dim, dim // 8, 1),
            nn.BatchNorm2d(dim // 8),
            nn.GELU(),
            conv(dim // 8, dim, 1))
        self.spatial_interaction = nn.Sequential(
            conv(dim, dim // 16, 1),
            nn.BatchNorm2d(dim // 16),
            nn.GELU(),
            conv(dim // 16, 1, 1))

    def attend(self, qkv: Tensor) -> Tensor:
        """(N, H, W, 3C) -> (N, H, W, C): the attention itself, which a subclass defines."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay. Each branch makes the gate of the other."""
        d = self.proj.in_features // self.heads
        width = self.head_width(d, x)
        qkv = to_heads(self.qkv, x, 3 * self.heads, width)         # (N, H, W, 3·heads·width)
        v = cut_groups(qkv[..., 2 * self.heads * width:], self.heads, d)   # (N, H, W, C)
        convolved = self.dwconv(to_map(v))                                 # (N, C, H, W)
        attended = to_map(cut_groups(self.attend(qkv), self.heads, d))     # (N, C, H, W)
        if self.attention_is_a:
            return self.interact(attended, convolved)
        return self.interact(convolved, attended)

    def interact(self, a: Tensor, b: Tensor) -> Tensor:
        """proj(b · of_channel(a) + a · of_place(b)): a gates the channels of b, b the pixels of a.

        Maps (N, C, H, W) -> tokens (N, H, W, C).
        """
        of_channel = self.channel_interaction(a).sigmoid()                 # (N, C, 1, 1)
        of_place = self.spatial_interaction(b).sigmoid()                   # (N, 1, H, W)
        return self.proj(to_tokens(b * of_channel + a * of_place))


class AdaptiveSpatialAttention(AdaptiveAttention):
    """Attention within 8×32 and 32×8 windows."""
    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__(dim, heads)
        h, w = WINDOW
        self.shift = (h // 2, w // 2) if shifted else (0, 0)
        self.scale = (dim // heads) ** -0.5
        bias_dim = dim // 2 // 4 // 4        # width of the small network, as in the release
        self.attns = nn.ModuleList(
            HalfOfHeads(bias_dim, heads // 2, window) for window in ((h, w), (w, h)))

    def head_width(self, d: int, x: Tensor) -> int:
        return wanted_width(d, x)

    def pad(self) -> None:
        """Pads the heads in all layers, in place, once the BatchNorms are folded: each channel runs
        alone from qkv to proj, or is summed up with weights.
        """
        heads = self.heads
        width = head_width(self.proj.in_features // heads)
        pad_layer(self.qkv, 0, 3 * heads, width)
        pad_layer(self.dwconv[0], 0, heads, width)
        self.dwconv[0].groups = self.dwconv[0].in_channels = heads * width
        pad_layer(self.channel_interaction[1], 1, heads, width)
        pad_layer(self.channel_interaction[4], 0, heads, width)
        pad_layer(self.spatial_interaction[0], 1, heads, width)
        pad_layer(self.proj, 1, heads, width)

    def attend(self, qkv: Tensor) -> Tensor:
        """(N, H, W, 3C) -> (N, H, W, C)."""
        table = torch.cat([half() for half in self.attns], 1)              # (945, heads)
        return kernels.window_attention(
            qkv, table, heads=self.heads, window=WINDOW, shift=self.shift, scale=self.scale,
            crossed=True)


class AdaptiveChannelAttention(AdaptiveAttention):
    """Attention among the channels of a head."""
    attention_is_a = True

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def attend(self, qkv: Tensor) -> Tensor:
        """(N, H, W, 3C) -> (N, H, W, C): the cosines of the channels of q with those of k, over
        all tokens; their softmax mixes the channels of v.
        """
        parts = qkv.flatten(1, 2).unflatten(2, (3, self.heads, -1))        # (N, H·W, 3, heads, d)
        q, k, v = parts.permute(2, 0, 3, 4, 1)                             # (N, heads, d, H·W)
        q_length = q.float().norm(dim=3).clamp_min(1e-12).to(q.dtype)      # (N, heads, d)
        k_length = k.float().norm(dim=3).clamp_min(1e-12).to(k.dtype)
        product = over_tokens(q, k, qkv.shape[1] if qkv.is_cuda else 1)
        cosine = product / (q_length[..., :, None] * k_length[..., None, :])
        mixed = (cosine * self.temperature).softmax(-1) @ v                # (N, heads, d, H·W)
        return mixed.flatten(1, 2).transpose(1, 2).unflatten(1, qkv.shape[1:3])


def over_tokens(q: Tensor, k: Tensor, parts: int) -> Tensor:
    """q kᵀ (N, heads, d, d) of q and k (N, heads, d, tokens), as a sum over parts of the tokens.

    A GPU is slow at few long sums, since each is the work of one multiprocessor.
    """
    q = q.unflatten(3, (parts, -1)).transpose(2, 3)                        # (N, heads, parts, d, ·)
    k = k.unflatten(3, (parts, -1)).transpose(2, 3)
    return (q @ k.transpose(3, 4)).sum(2)


class SpatialGate(nn.Module):
    """LayerNorm over the channels, then a depthwise convolution."""
    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, hidden) stay."""
        return to_tokens(self.conv(to_map(self.norm(x))))


class SGFN(nn.Module):
    """The MLP with a spatial gate. `hidden`, the prunable width, is that of x1 and of x2 alike."""
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.sg = SpatialGate(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay."""
        x1, x2 = F.gelu(self.fc1(x)).chunk(2, 3)                           # (N, H, W, hidden) each
        return self.fc2(x1 * self.sg(x2))


class DATBlock(nn.Module):
    """Attention, then the SGFN, each with its norm before it and its input added after it."""
    def __init__(self, dim: int, attention: AdaptiveAttention, hidden: int, depth: float):
        """hidden: width of the SGFN; depth: 0 in the first block, 1 in the last."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = attention
        self.ffn = SGFN(dim, hidden)
        self.drop_path = DropPath(depth)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class ResidualGroup(nn.Module):
    """Blocks, convolutions, and the input added."""
    def __init__(self, blocks: list[DATBlock], after: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = after

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, H, W, C) stay."""
        return to_tokens(self.conv(to_map(self.blocks(x)))) + x


class DAT(Transformer):
    """The whole network; models.PRESETS holds the published sizes."""
    def __init__(
            self,
            arch: str,
            scale: int,
            dim: int,                # channels of the trunk
            groups: int,
            blocks: int,             # in each group
            heads: int,
            expansion: int,          # an SGFN has expansion·dim channels, x1 and x2 together
            direct: bool,            # the light upsampler and the light convolutions
            widths: dict[str, int] | list[int] | None = None):
        config = dict(arch=arch, scale=scale, dim=dim, groups=groups, blocks=blocks, heads=heads,
                      expansion=expansion, direct=direct)
        super().__init__(config, widths, dim, direct)
        self.before_RG = nn.Sequential(nn.Identity(), nn.LayerNorm(dim))   # the release's name
        self.layers = nn.Sequential()
        last = max(1, groups * blocks - 1)
        for g in range(groups):
            made = []
            for b in range(blocks):
                made.append(DATBlock(
                    dim,
                    self.attention(g, b),
                    self.widths[f"group{g}.block{b}.ffn"],
                    (g * blocks + b) / last))
            self.layers.append(ResidualGroup(made, self.after_group()))
        self.conv_after_body = self.after_group()
        self.initialise()

    def attention(self, g: int, b: int) -> AdaptiveAttention:
        """The attention of block b in group g: odd blocks look along channels. Every other spatial
        block is shifted, beginning with the second in even groups and the first in odd ones.
        """
        dim, heads = self.config["dim"], self.config["heads"]
        if b % 2 == 1:
            return AdaptiveChannelAttention(dim, heads)
        first_shifted = 2 if g % 2 == 0 else 0
        return AdaptiveSpatialAttention(dim, heads, shifted=b % 4 == first_shifted)

    def after_group(self) -> nn.Module:
        """One convolution; in the light networks three, thin in the middle."""
        dim = self.config["dim"]
        if not self.config["direct"]:
            return conv(dim, dim)
        thin = dim // 4
        return nn.Sequential(
            conv(dim, thin),
            nn.LeakyReLU(0.2),
            conv(thin, thin, 1),
            nn.LeakyReLU(0.2),
            conv(thin, dim))

    @classmethod
    def hidden_widths(cls, dim: int, groups: int, blocks: int, expansion: int, **_) -> dict:
        hidden = expansion * dim // 2
        return {f"group{g}.block{b}.ffn": hidden for g in range(groups) for b in range(blocks)}

    def pairs(self) -> list[Pair]:
        result = []
        for g in range(self.config["groups"]):
            for b in range(self.config["blocks"]):
                result.append(self.gate_pair(f"group{g}.block{b}.ffn", f"layers.{g}.blocks.{b}"))
        return result

    def gate_pair(self, name: str, block: str) -> Pair:
        """Channel j is row j of x1 and row j of x2 in fc1, channel j of the gate, column j of fc2.

        The gate's LayerNorm looks at all channels at once: it is named as `norm`, see prune.cut.
        """
        width = self.widths[name]
        one = torch.arange(width).view(width, 1)
        of_fc1 = torch.cat((one, one + width), 1)                          # rows of x1 and of x2
        norm = f"{block}.ffn.sg.norm"
        producers = ((f"{block}.ffn.fc1", of_fc1), (norm, one), (f"{block}.ffn.sg.conv", one))
        consumer = (f"{block}.ffn.fc2", one)
        return Pair(name, block, width, producers, (consumer,), norm=norm)

    def forward(self, low: Tensor) -> SR:
        height, width = low.shape[2:]
        first = self.first_features(low)     # not padded: window_attention pads with zeros
        x = self.layers(self.before_RG(to_tokens(first)))
        return self.to_image(x, first, height, width)

    def fold(self) -> None:
        """In evaluation a BatchNorm is linear: it merges with the convolution before it."""
        for module in self.modules():
            if not isinstance(module, nn.Sequential):
                continue
            for i in range(1, len(module)):
                if isinstance(module[i], nn.BatchNorm2d):
                    module[i - 1] = nn.utils.fuse_conv_bn_eval(module[i - 1], module[i])
                    module[i] = nn.Identity()

    def pad(self) -> None:
        super().pad()
        for module in self.modules():
            if isinstance(module, AdaptiveSpatialAttention):
                module.pad()
