"""Depthwise convolutions of the encoders on a GPU, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hflfnerv.ops._depthwise_conv2d import depthwise_conv2d

from ..device import Machine, require_close, without_autotuning
from ..registry import Contender, Point

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
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(shape, device=machine.device) * scale).bfloat16()
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, dy = (random(batch, channels, height, width) for _ in range(2))
    weight, bias = random(channels, 1, _KERNEL, _KERNEL, scale=1 / _KERNEL), random(channels)
    padding = (_KERNEL // 2, _KERNEL // 2)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, weight, bias, padding=padding, impl=machine.implementation)

    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding=padding, groups=channels)

    def step(function: Callable[..., torch.Tensor], to: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(to))]

    functions: dict[str, Callable[..., torch.Tensor]] = {machine.implementation: ours, "eager": eager}

    def check() -> None:
        with without_autotuning():
            expected = step(eager, torch.float64)
        same = step(eager)
        taps, pixels = _KERNEL**2, batch * height * width
        terms = [taps, taps, pixels, pixels]
        for function_name, function in functions.items():
            with machine.trying(function_name):
                for part, three in enumerate(zip(step(function), expected, same, strict=True)):
                    require_close(f"{name}, {function_name}, {part}", *three, terms=terms[part])

    def forward(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return function(x, weight, bias)

    # x and y; and then dy and dx, and x and dy for the gradient of the weight.
    image = x.numel() * x.element_size()
    runs: list[tuple[str, Callable[..., Any], int]] = [("forward", forward, 2), ("forward_backward", step, 6)]
    for what, run, images in runs:
        point = Point(
            what=f"depthwise_conv2d.{what}",
            data=name,
            dtype="bfloat16",
            shape=x.shape,
            unit="GB/s",
            scale=1e9,
            contenders=[
                Contender(function_name, functools.partial(run, function), images * image)
                for function_name, function in functions.items()
            ],
            baseline="eager",
            check=check,
        )
        yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
