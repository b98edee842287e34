"""Fuse the blocks of a NeRV decoder written in plain PyTorch, train it a little, and put everything back.

python examples/fuse_hnerv.py --height 320
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import hflfnerv


class Block(nn.Module):
    """As such code often has it: a convolution with its shuffle, a norm that may be off, an activation."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv2d(c_in, c_out * stride**2, kernel, padding=kernel // 2)
        self.conv = nn.Sequential(conv, nn.PixelShuffle(stride))
        self.norm = nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(16, 40, 5, 1), Block(40, 33, 2, 3), Block(33, 28, 2, 5)])
        self.head = nn.Conv2d(28, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.head(x)) * 0.5 + 0.5


def milliseconds(model: nn.Module, x: torch.Tensor, runs: int) -> float:
    def synchronise() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    with torch.inference_mode():
        for _ in range(runs + 1):  # the first run warms up
            start = synchronise()
            model(x)
            times.append(synchronise() - start)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=320, help="of a frame, a multiple of 20; it is twice as wide")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder().to(device)
    embedding = torch.randn(1, 16, arguments.height // 20, arguments.height // 10, device=device)
    plain = milliseconds(model, embedding, arguments.runs)
    image = model(embedding).detach()
    keys = list(model.state_dict())

    print(hflfnerv.fuse(model))  # in place: what it fused, and why not the rest
    print(f"plain {plain:.2f} ms, fused {milliseconds(model, embedding, arguments.runs):.2f} ms on {device}")
    print(f"largest difference {(model(embedding) - image).abs().max().item():.1e}")

    optimiser = torch.optim.Adam(model.parameters())
    (model(embedding) - torch.rand_like(image)).square().mean().backward()
    optimiser.step()

    hflfnerv.unfuse(model)
    assert list(model.state_dict()) == keys  # any checkpoint fits, fused or not


if __name__ == "__main__":
    main()
