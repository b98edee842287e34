"""Depthwise convolutions of the encoders on a GPU, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F

from hflfnerv.ops._depthwise_conv2d import depthwise_conv2d

from ..device import Machine
from ._convolutions import measure, random_tensor

_KERNEL = 7
# The finest stage of an encoder, of one frame and of a batch, and that of the one for details.
_SHAPES = [(1, 64, 128, 256), (8, 64, 128, 256), (1, 32, 40, 80)]


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure stages of the encoders, as a share of the bandwidth of a copy."""
    for batch, channels, height, width in _SHAPES:
        name = f"{channels} channels, k = {_KERNEL}, batch {batch}, bfloat16, {height}x{width}"
        if machine.wants(name, seconds=20):
            with machine.room(name):
                yield from _measure(machine, name, channels, *machine.shape((batch, height, width), (2, 5, 8)))


def _measure(
    machine: Machine, name: str, channels: int, batch: int, height: int, width: int
) -> Iterator[dict[str, Any]]:
    random = functools.partial(random_tensor, machine)
    x, dy = (random(batch, channels, height, width) for _ in range(2))
    weight, bias = random(channels, 1, _KERNEL, _KERNEL, scale=1 / _KERNEL), random(channels)
    padding = (_KERNEL // 2, _KERNEL // 2)
    ours = functools.partial(depthwise_conv2d, padding=padding, impl=machine.implementation)
    eager = functools.partial(F.conv2d, padding=padding, groups=channels)
    taps, pixels = _KERNEL**2, batch * height * width
    # x and y; and then dy and dx, and x and dy for the gradient of the weight.
    image = x.numel() * x.element_size()
    moved, terms = (2 * image, 6 * image), [taps, taps, pixels, pixels]
    functions = {machine.implementation: ours, "eager": eager}
    yield from measure(machine, "depthwise_conv2d", name, functions, (x, weight, bias, dy), terms, moved)
