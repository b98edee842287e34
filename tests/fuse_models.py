"""Networks with the structure of published NeRV code: which module holds which, and who calls whom."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def activation(name: str) -> nn.Module:
    return {"gelu": nn.GELU, "tanh-gelu": lambda: nn.GELU("tanh"), "silu": nn.SiLU}[name]()


def norm_layer(name: str, channels: int) -> nn.Module:
    return {"none": nn.Identity, "bn": lambda: nn.BatchNorm2d(channels)}[name]()


class UpConv(nn.Module):
    """HNeRV: the convolution and the shuffle (of stride 1: an Identity) are a Sequential."""

    def __init__(self, c_in, c_out, stride, kernel, bias=True):
        super().__init__()
        shuffle = nn.Identity() if stride == 1 else nn.PixelShuffle(stride)
        conv = nn.Conv2d(c_in, c_out * stride**2, kernel, 1, math.ceil((kernel - 1) // 2), bias=bias)
        self.upconv = nn.Sequential(conv, shuffle)

    def forward(self, x):
        return self.upconv(x)


class DownConv(nn.Module):
    """HNeRV: what its first decoder layer is, with kernel 0 and stride 1, that is 1x1."""

    def __init__(self, c_in, c_out, stride, kernel):
        super().__init__()
        self.downconv = nn.Conv2d(c_in, c_out, kernel + stride, stride, math.ceil(kernel / 2))

    def forward(self, x):
        return self.downconv(x)


class Block(nn.Module):
    """HNeRV, NVR-RRCP, NeRV and E-NeRV: a convolution module, a norm that is mostly off, an activation."""

    def __init__(self, conv, channels, act="gelu", norm="none"):
        super().__init__()
        self.conv = conv
        self.norm = norm_layer(norm, channels)
        self.act = activation(act)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def up_blocks(widths, strides, kernels, act="gelu", bias=True):
    return [
        Block(UpConv(c_in, c_out, stride, kernel, bias), c_out, act)
        for c_in, c_out, stride, kernel in zip(widths[:-1], widths[1:], strides, kernels, strict=True)
    ]


class HNeRV(nn.Module):
    """HNeRV: a ModuleList of blocks, the first of which spreads channels over an fc_h x fc_w grid."""

    def __init__(self, act="gelu", bias=True):
        super().__init__()
        self.fc_h = self.fc_w = 2
        stem = Block(DownConv(4, 6 * 4, stride=1, kernel=0), 6 * 4, act)
        self.decoder = nn.ModuleList([stem, *up_blocks([6, 5, 4, 4], [2, 3, 1], [1, 3, 5], act, bias)])
        self.head_layer = nn.Conv2d(4, 3, 3, 1, 1)

    def forward(self, x, embedding=None):
        outputs = [x if embedding is None else embedding]
        y = self.decoder[0](outputs[0])
        n, _, h, w = y.shape
        y = y.view(n, -1, self.fc_h, self.fc_w, h, w).permute(0, 1, 4, 2, 5, 3)
        y = y.reshape(n, -1, self.fc_h * h, self.fc_w * w)
        for layer in self.decoder[1:]:
            y = layer(y)
            outputs.append(y)
        return torch.tanh(self.head_layer(y)) * 0.5 + 0.5, outputs


class NVRRRCP(nn.Module):
    """NVR-RRCP: HNeRV's decoder, and two on time encodings with a stem of Linear and GELU; images are added."""

    def __init__(self):
        super().__init__()
        self.high = HNeRV()
        self.low1 = nn.ModuleList([self.stem(3), *up_blocks([5, 4, 3], [2, 3], [3, 5])])
        self.low2 = nn.ModuleList([self.stem(5), *up_blocks([5, 4, 3], [2, 3], [3, 5])])
        self.head1, self.head2 = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1)

    def stem(self, features):
        act = nn.GELU()
        return nn.Sequential(nn.Linear(features, 6), act, nn.Linear(6, 5 * 2 * 2), act)

    def low(self, layers, head, t):
        y = layers[0](t)
        y = y.view(y.size(0), 5, 2, 2)
        for layer in layers[1:]:
            y = layer(y)
        return head(y)

    def forward(self, x):
        t = x.mean(dim=(2, 3)).repeat(1, 2)
        low = self.low(self.low1, self.head1, t[:, :3]) + self.low(self.low2, self.head2, t[:, 3:])
        return torch.tanh(self.high(x)[0]) + torch.tanh(low) * 0.5 + 0.5


class CustomConv(nn.Module):
    """NeRV and E-NeRV: attributes called one after another; their names stay, whatever they are."""

    def __init__(self, c_in, c_out, stride, kind="conv", bias=True):
        super().__init__()
        if kind == "conv":
            self.conv = nn.Conv2d(c_in, c_out * stride**2, 3, 1, 1, bias=bias)
            self.up_scale = nn.PixelShuffle(stride)
        elif kind == "deconv":
            self.conv = nn.ConvTranspose2d(c_in, c_out, stride, stride)
            self.up_scale = nn.Identity()
        else:
            self.conv = nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=True)
            self.up_scale = nn.Conv2d(c_in, c_out, 2 * stride + 1, 1, stride, bias=bias)

    def forward(self, x):
        out = self.conv(x)
        return self.up_scale(out)


class NeRV(nn.Module):
    """NeRV: blocks and heads in ModuleLists, a head only where there is one."""

    def __init__(self, kind="conv", bias=True):
        super().__init__()
        act = nn.GELU()
        self.stem = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 5 * 2 * 3), act)
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out, stride in [(5, 4, 2), (4, 4, 1), (4, 3, 3)]:
            self.layers.append(Block(CustomConv(c_in, c_out, stride, kind, bias), c_out))
            self.heads.append(None)
        self.heads[-1] = nn.Conv2d(3, 3, 1, 1)

    def forward(self, x):
        y = self.stem(x.mean(dim=(2, 3)))
        y = y.view(y.size(0), 5, 2, 3)
        images = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            y = layer(y)
            if head is not None:
                images.append((torch.tanh(head(y)) + 1) * 0.5)
        return images


class ConvUpBlock(nn.Module):
    """E-NeRV: two convolutions, of which the narrower one shuffles."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        if c_in <= c_out:
            self.conv1 = CustomConv(c_in, c_in // 4, stride)
            self.conv2 = nn.Conv2d(c_in // 4, c_out, 3, 1, 1)
        else:
            self.conv1 = nn.Conv2d(c_in, c_out, 3, 1, 1)
            self.conv2 = CustomConv(c_out, c_out, stride)
        self.norm = nn.Identity()
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.norm(self.conv2(self.conv1(x))))


class ENeRV(nn.Module):
    """E-NeRV: a first block of either form, then NeRV's; each gets a normalised map scaled by the time."""

    def __init__(self, narrow_first=False):
        super().__init__()
        self.layers = nn.ModuleList(
            [ConvUpBlock(4, 8 if narrow_first else 3, 2), Block(CustomConv(8 if narrow_first else 3, 3, 2), 3)]
        )
        self.norm_layers = nn.ModuleList([nn.InstanceNorm2d(4), nn.InstanceNorm2d(8 if narrow_first else 3)])

    def forward(self, data):
        y = data["map"]
        for layer, norm in zip(self.layers, self.norm_layers, strict=True):
            y = layer(norm(y) * data["scale"])
        return {"output": y}


def sequential(approximate="none", bias=True):
    return nn.Sequential(
        nn.Conv2d(4, 12, (3, 1), padding=(1, 0), bias=bias),
        nn.PixelShuffle(2),
        nn.GELU(approximate),
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 27, 3, padding="same", bias=bias), nn.PixelShuffle(3))),
        nn.Identity(),
        nn.Sequential(nn.GELU(approximate), nn.Conv2d(3, 2, 1)),
    )


class Attributes(nn.Module):
    """Lists of each kind of part, and a residual that keeps the block's output."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 16, 5, padding="valid") for _ in range(2))
        self.shuffles = nn.ModuleDict({name: nn.PixelShuffle(2) for name in ("a", "b")})
        self.acts = nn.ModuleList(nn.GELU() for _ in range(2))

    def forward(self, x):
        for i, name in enumerate(self.shuffles):
            y = F.pad(x, (2, 2, 2, 2))
            y = self.acts[i](input=self.shuffles[name](self.convs[i](input=y)))
            x = y + F.interpolate(x, scale_factor=2.0)
        return x
