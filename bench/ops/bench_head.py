"""Heads on a GPU: the 3x3 convolution to three channels, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

from hflfnerv import ops

from ..device import Machine, cuda_kernels
from ._convolutions import measure, random_tensor


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure heads of 28, 10 and 5 channels at 640x1280, as a share of the bandwidth of a copy."""
    for batch in (8, 1):
        for channels in (28, 10, 5):
            name = f"{channels} channels, batch {batch}, bfloat16, 640x1280"
            if machine.wants(name, seconds=30):
                with machine.room(name):
                    yield from _measure(machine, name, channels, *machine.shape((batch, 640, 1280), (2, 5, 8)))


def _measure(
    machine: Machine, name: str, channels: int, batch: int, height: int, width: int
) -> Iterator[dict[str, Any]]:
    random = functools.partial(random_tensor, machine)
    x, dy = random(batch, channels, height, width), random(batch, 3, height, width)
    weight, bias = random(3, channels, 3, 3, scale=(9 * channels) ** -0.5), random(3)
    ours = ("reference",) if machine.dry else ("triton", *cuda_kernels())
    functions: dict[str, Any] = {impl: functools.partial(ops.conv2d, impl=impl) for impl in ours}
    functions["eager"] = functools.partial(F.conv2d, padding=1)
    pixels, moved = batch * height * width, (x.numel() + dy.numel()) * x.element_size()
    terms = [9 * channels, 27, pixels, pixels]
    yield from measure(machine, "conv2d_head", name, functions, (x, weight, bias, dy), terms, (moved, 3 * moved))
