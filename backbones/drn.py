"""DRN: the dual regression network (Guo et al., CVPR 2020, arXiv 2003.07018, Fig. 2).

A bicubic enlargement goes down to the low resolution and up again, and an image leaves at every
size. At ×4, with F features and B residual blocks (RCABs) per up block:

    layers                              channels    size    an image leaves by
    bicubic ×4, sub_mean, head             F         ×4
    down 0                                2F         ×2
    down 1                                4F         ×1     tail 0, at scale 1
    up_blocks 0:  B RCABs                 4F         ×1
                  up                      2F         ×2
    ... and a copy of down 0's output     4F         ×2     tail 1, at scale 2
    up_blocks 1:  B RCABs                 4F         ×2
                  up                       F         ×4
    ... and a copy of head's output       2F         ×4     tail 2, at scale 4

    down: conv 3×3 of stride 2, conv 3×3      up: conv 3×3, PixelShuffle(2), conv 1×1

Prunable: the width inside every down block, inside every RCAB, and between the 3×3 and the 1×1 of
every up. Read train.py next; the next backbone is swinir.py.
"""
import torch
from torch import Tensor, nn

from backbones.base import (
    SR,
    Backbone,
    ChannelAttention,
    Pair,
    Upsample,
    conv,
    exact,
    pass_on,
    plain_pair,
)


class MeanShift(nn.Conv2d):
    """x + sign·255·mean as a trainable 1×1 convolution: the release stores its 12 numbers."""
    def __init__(self, sign: int):
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * 255 * torch.tensor([0.4488, 0.4371, 0.4040])


class DownBlock(nn.Module):
    """Halves the size by a strided convolution; the prunable width is between its two layers."""
    def __init__(self, channels: int, hidden: int, outputs: int):
        super().__init__()
        first = conv(channels, hidden, stride=2, bias=False)
        second = conv(hidden, outputs, bias=False)
        # The release nests and names them so: "dual_module.0.0", "dual_module.1". No dual is meant.
        self.dual_module = nn.Sequential(nn.Sequential(first, nn.LeakyReLU(0.2)), second)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, outputs, ceil(H/2), ceil(W/2))."""
        return self.dual_module(x)


class RCAB(nn.Module):
    """Residual channel attention block; the prunable width is between its two convolutions."""
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(channels, hidden),
            nn.ReLU(inplace=True),
            conv(hidden, channels),
            ChannelAttention(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) stays."""
        conv1, relu, conv2, attention = self.body
        y = conv2(relu(conv1(x)))
        return torch.addcmul(x, y, attention(y))     # x + y · attention(y), one pass over memory


class DRN(Backbone):
    """The whole network of the figure above; models.PRESETS holds the published sizes."""
    rgb_range = 255.0
    madds_count_bias = True

    def __init__(
            self,
            arch: str,
            scale: int,
            feats: int,              # channels at full size, doubled at every halving
            blocks: int,             # RCABs per up block
            widths: dict[str, int] | list[int] | None = None):
        super().__init__(dict(arch=arch, scale=scale, feats=feats, blocks=blocks), widths)
        levels = halvings(scale)
        up_sizes = self.up_sizes(scale, feats)
        self.enlarge = nn.Upsample(scale_factor=scale, mode="bicubic")
        self.sub_mean = MeanShift(-1)
        self.head = conv(3, feats)
        self.down = nn.ModuleList()
        for p in range(levels):
            channels = feats * 2**p
            self.down.append(DownBlock(channels, self.widths[f"down{p}"], 2 * channels))
        self.up_blocks = nn.ModuleList()
        for i, (channels, outputs) in enumerate(up_sizes):
            rcabs = [RCAB(channels, self.widths[f"up{i}.rcab{b}"]) for b in range(blocks)]
            hidden = self.widths[f"up{i}.shuffle"]
            self.up_blocks.append(nn.Sequential(
                *rcabs,
                Upsample((channels, hidden, 2)),
                conv(hidden, outputs, 1)))
        self.tail = nn.ModuleList([conv(feats * 2**levels, 3)])
        for _, outputs in up_sizes:
            self.tail.append(conv(2 * outputs, 3))
        self.add_mean = MeanShift(+1)
        self.float32 = ("sub_mean", "tail", "add_mean")
        self.feature = f"tail.{levels}"
        self.dual_spec = tuple((2 * 2**i, 2**i, feats) for i in range(levels))

    @staticmethod
    def up_sizes(scale: int, feats: int) -> list[tuple[int, int]]:
        """(channels of the RCABs, channels after the 1×1) of each up block.

        From the second block on, half of the RCABs' channels are the copy from the way down.
        """
        levels = halvings(scale)
        sizes = [(feats * 2**levels, feats * 2**(levels - 1))]
        for p in range(levels - 1, 0, -1):
            sizes.append((2 * feats * 2**p, feats * 2**(p - 1)))
        return sizes

    @classmethod
    def hidden_widths(cls, arch: str, scale: int, feats: int, blocks: int) -> dict[str, int]:
        full = {f"down{p}": feats * 2**p for p in range(halvings(scale))}
        for i, (channels, _) in enumerate(cls.up_sizes(scale, feats)):
            for b in range(blocks):
                full[f"up{i}.rcab{b}"] = channels
            full[f"up{i}.shuffle"] = channels
        return full

    def pairs(self) -> list[Pair]:
        result = []
        for p in range(len(self.down)):
            name = f"down{p}"
            block = f"down.{p}"
            result.append(plain_pair(name, block, self.widths[name],
                                     f"{block}.dual_module.0.0", f"{block}.dual_module.1"))
        for i in range(len(self.up_blocks)):
            for b in range(self.config["blocks"]):
                name = f"up{i}.rcab{b}"
                block = f"up_blocks.{i}.{b}"
                result.append(plain_pair(name, block, self.widths[name],
                                         f"{block}.body.0", f"{block}.body.2"))
            result.append(self.shuffle_pair(i))
        return result

    def shuffle_pair(self, i: int) -> Pair:
        """conv 3×3, PixelShuffle(2), conv 1×1: a channel of the 1×1 is four rows of the 3×3.

        Both are members of the up block's Sequential, so that is the block of the pair. The RCABs
        in it are blocks of their own, finished by then, and replayed.
        """
        name = f"up{i}.shuffle"
        block = f"up_blocks.{i}"
        width = self.widths[name]
        rows = torch.arange(4 * width).view(width, 4)
        columns = torch.arange(width).view(width, 1)
        position = self.config["blocks"]             # of the 3×3 in the block, behind the RCABs
        producer = (f"{block}.{position}.0", rows)
        consumer = (f"{block}.{position + 1}", columns)
        return Pair(name, block, width, (producer,), (consumer,))

    def forward(self, low: Tensor) -> SR:
        x = exact(self.sub_mean, self.enlarge(255 * low))
        x = exact(self.head, x)
        copies = []
        for down in self.down:
            copies.append(x)
            x = down(x)
        images = {1: self.to_image(0, x)}
        for i, up in enumerate(self.up_blocks):
            x = torch.cat((up(x), copies.pop()), 1)
            images[2 * 2**i] = self.to_image(i + 1, x)
        return SR(images)

    def to_image(self, i: int, x: Tensor) -> Tensor:
        """Features at scale 2**i -> the image (N, 3, H, W), about 0..1."""
        return exact(self.add_mean, exact(self.tail[i], x)) / 255

    @torch.no_grad()
    def start_from_interpolation(self) -> None:
        """The head passes the bicubic enlargement on in its first three channels; the last tail
        finds them in the copy and picks them; all its other weights are divided by 10. (Ours.)
        """
        tail = self.tail[-1]
        copied = self.config["feats"]        # where the copy of the head's output begins
        pass_on(self.head)
        tail.weight.mul_(0.1)
        tail.bias.zero_()
        for colour in range(3):
            tail.weight[colour, copied + colour] = 0
            tail.weight[colour, copied + colour, 1, 1] = 1

    def fold(self) -> None:
        """conv 3×3 (n → 4h), PixelShuffle(2) and conv 1×1 (h → o) are one linear map.

        A shuffled pixel sees the rows (c, i, j) of the 3×3 at fixed (i, j), for all channels c, and
        the 1×1 mixes these by M (o, h): W'[(o, i, j)] = Σ_c M[o, c] W[(c, i, j)], likewise the
        bias, plus the 1×1's own. What is left is conv 3×3 (n → 4·o) and the shuffle.
        """
        for up in self.up_blocks:
            wide, point = up[-2][0], up[-1]
            mix = point.weight[:, :, 0, 0].double()                                # (o, h)
            weight = wide.weight.double().unflatten(0, (-1, 4))                    # (h, 4, n, 3, 3)
            bias = mix @ wide.bias.double().view(-1, 4)                            # (o, 4)
            bias = bias + point.bias.double()[:, None]
            folded = conv(wide.in_channels, 4 * len(mix)).to(wide.weight)
            folded.weight.data.copy_(torch.tensordot(mix, weight, 1).flatten(0, 1))
            folded.bias.data.copy_(bias.flatten())
            up[-2][0] = folded
            up[-1] = nn.Identity()


def halvings(scale: int) -> int:
    """log2 of the scale: 2 at ×4, 3 at ×8."""
    return scale.bit_length() - 1
