"""Heads on a GPU: the 3x3 convolution to three channels, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hflfnerv import ops

from ..device import Machine, require_close, without_autotuning
from ..registry import Contender, Point


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
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(shape, device=machine.device) * scale).bfloat16()
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, dy = random(batch, channels, height, width), random(batch, 3, height, width)
    weight, bias = random(3, channels, 3, 3, scale=(9 * channels) ** -0.5), random(3)

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.conv2d(*tensors, impl=machine.implementation)

    def eager(*tensors: torch.Tensor) -> torch.Tensor:
        return F.conv2d(*tensors, padding=1)

    def step(function: Callable[..., torch.Tensor], to: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(to))]

    functions: dict[str, Callable[..., torch.Tensor]] = {machine.implementation: ours, "eager": eager}

    def check() -> None:
        with without_autotuning():
            expected = step(eager, torch.float64)
        same = step(eager)
        terms = [9 * channels, 27, batch * height * width, batch * height * width]
        for function_name, function in functions.items():
            with machine.trying(function_name):
                for part, three in enumerate(zip(step(function), expected, same, strict=True)):
                    require_close(f"{name}, {function_name}, {part}", *three, terms=terms[part])

    def forward(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return function(x, weight, bias)

    moved = (x.numel() + dy.numel()) * x.element_size()
    runs: list[tuple[str, Callable[..., Any], int]] = [("forward", forward, 1), ("forward_backward", step, 3)]
    for what, run, passes in runs:
        point = Point(
            what=f"conv2d_head.{what}",
            data=name,
            dtype="bfloat16",
            shape=x.shape,
            unit="GB/s",
            scale=1e9,
            contenders=[
                Contender(function_name, functools.partial(run, function), passes * moved)
                for function_name, function in functions.items()
            ],
            baseline="eager",
            check=check,
        )
        yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
