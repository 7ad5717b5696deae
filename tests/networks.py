"""Networks as people have them, small: plain nn.Modules that know nothing of this project. They
follow the papers, and differ in what pruning must cope with:

    EDSR       a mean that is taken off by a convolution that does not learn, images in 0..255;
               with scale=4,feats=64,blocks=16 the published baseline of 1.5 million parameters
    RCAN       channel attention, groups of groups
    RRDB       dense blocks (ESRGAN): a layer sees all earlier ones side by side
    IMDN       a split into fixed numbers of channels
    SRResNet   BatchNorm between convolution and activation, PReLU, PixelShuffle
"""
import torch
from torch import nn


def conv(inputs, outputs, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class ResBlock(nn.Module):
    def __init__(self, feats):
        super().__init__()
        self.body = nn.Sequential(conv(feats, feats), nn.ReLU(inplace=True), conv(feats, feats))

    def forward(self, x):
        return x + self.body(x)


class MeanShift(nn.Conv2d):
    def __init__(self, sign):
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * 255 * torch.tensor([0.45, 0.44, 0.4])
        self.requires_grad_(False)


class EDSR(nn.Module):
    def __init__(self, scale, feats=16, blocks=2):
        super().__init__()
        self.sub_mean = MeanShift(-1)
        self.head = conv(3, feats)
        self.body = nn.Sequential(*(ResBlock(feats) for _ in range(blocks)), conv(feats, feats))
        stages = []
        for _ in range(scale // 2):          # of x2 each: scale is 2 or 4
            stages += [conv(feats, 4 * feats), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*stages, conv(feats, 3))
        self.add_mean = MeanShift(1)

    def forward(self, x):
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(x + self.body(x)))


class Attention(nn.Module):
    def __init__(self, feats, reduction):
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(feats, feats // reduction, 1), nn.ReLU(),
            conv(feats // reduction, feats, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.squeeze(x)


class RCAB(nn.Sequential):
    def __init__(self, feats):
        super().__init__(conv(feats, feats), nn.ReLU(), conv(feats, feats), Attention(feats, 2))

    def forward(self, x):
        return x + super().forward(x)


class RCAN(nn.Module):
    def __init__(self, scale=2, feats=16, groups=2, blocks=2):
        super().__init__()
        self.head = conv(3, feats)
        self.groups = nn.ModuleList()
        for _ in range(groups):
            self.groups.append(nn.Sequential(*(RCAB(feats) for _ in range(blocks)),
                                             conv(feats, feats)))
        self.last = conv(feats, feats)
        self.up = nn.Sequential(conv(feats, scale**2 * 3), nn.PixelShuffle(scale))

    def forward(self, x):
        x = self.head(x)
        y = x
        for group in self.groups:
            y = y + group(y)
        return self.up(x + self.last(y))


class DenseBlock(nn.Module):
    def __init__(self, feats, growth):
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", conv(feats + i * growth, growth if i < 3 else feats))
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        seen = [x]
        for i in range(3):
            seen.append(self.act(getattr(self, f"conv{i}")(torch.cat(seen, 1))))
        return x + 0.2 * self.conv3(torch.cat(seen, 1))


class RRDB(nn.Module):
    def __init__(self, scale=2, feats=16, growth=8, blocks=2):
        super().__init__()
        self.scale = scale
        self.first = conv(3, feats)
        self.body = nn.Sequential(*(DenseBlock(feats, growth) for _ in range(blocks)))
        self.up = conv(feats, feats)
        self.last = conv(feats, 3)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        x = self.first(x)
        x = nn.functional.interpolate(x + self.body(x), scale_factor=self.scale)
        return self.last(self.act(self.up(x)))


class Distillation(nn.Module):
    def __init__(self, feats):
        super().__init__()
        self.split = feats // 4, feats - feats // 4
        self.conv1 = conv(feats, feats)
        self.conv2 = conv(self.split[1], feats)
        self.conv3 = conv(self.split[1], self.split[0])
        self.act = nn.LeakyReLU(0.05)
        self.mix = conv(3 * self.split[0], feats, 1)

    def forward(self, x):
        one, y = torch.split(self.act(self.conv1(x)), self.split, 1)
        two, y = torch.split(self.act(self.conv2(y)), self.split, 1)
        return x + self.mix(torch.cat((one, two, self.act(self.conv3(y))), 1))


class IMDN(nn.Module):
    def __init__(self, scale=2, feats=32, blocks=2):
        super().__init__()
        self.head = conv(3, feats)
        self.blocks = nn.ModuleList(Distillation(feats) for _ in range(blocks))
        self.gather = nn.Sequential(conv(blocks * feats, feats, 1), nn.LeakyReLU(0.05))
        self.smooth = conv(feats, feats)
        self.up = nn.Sequential(conv(feats, scale**2 * 3), nn.PixelShuffle(scale))

    def forward(self, x):
        x = self.head(x)
        y, seen = x, []
        for block in self.blocks:
            y = block(y)
            seen.append(y)
        return self.up(x + self.smooth(self.gather(torch.cat(seen, 1))))


class SRResNet(nn.Module):
    def __init__(self, scale=2, feats=16, blocks=2):
        super().__init__()
        self.head = nn.Sequential(conv(3, feats), nn.PReLU())
        self.body = nn.ModuleList()
        for _ in range(blocks):
            self.body.append(nn.Sequential(
                conv(feats, feats), nn.BatchNorm2d(feats), nn.PReLU(feats),
                conv(feats, feats), nn.BatchNorm2d(feats)))
        self.up = nn.Sequential(
            conv(feats, scale**2 * feats), nn.BatchNorm2d(scale**2 * feats),
            nn.PixelShuffle(scale), nn.PReLU())
        self.last = conv(feats, 3)

    def forward(self, x):
        x = self.head(x)
        y = x
        for block in self.body:
            y = y + block(y)
        return self.last(self.up(x + y))
