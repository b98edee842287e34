"""Networks of no published code that fuse() must find its way through as well."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


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
