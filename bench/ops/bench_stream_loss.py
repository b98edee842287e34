"""The loss of training on a GPU, activations included: fused passes over the images against eager and compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import stream_loss as reference

from ..device import Machine, require_close
from ..registry import Contender, Point

COMPILED = "torch.compile max-autotune"


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure frames of 640x1280 with one stream and with two, as a share of the bandwidth of a copy."""
    for batch in (8, 2, 1):
        for both in (True, False):
            name = f"{2 if both else 1} streams, batch {batch}, bfloat16, 640x1280"
            if machine.wants(name, seconds=40):
                with machine.room(name):
                    yield from _measure(machine, name, both, *machine.shape((batch, 640, 1280), (2, 5, 8)))


def _measure(machine: Machine, name: str, both: bool, batch: int, height: int, width: int) -> Iterator[dict[str, Any]]:
    low, high = (
        torch.randn(batch, 3, height, width, device=machine.device)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    images = [low, high] if both else [low]
    target = torch.randint(0, 256, (batch, height, width, 3), device=machine.device, dtype=torch.uint8)

    def ours(low: torch.Tensor, high: torch.Tensor | None = None) -> torch.Tensor:
        return ops.stream_loss(low, target, high, impl=machine.implementation).mean()

    def eager(low: torch.Tensor, high: torch.Tensor | None = None) -> torch.Tensor:
        return reference.stream_loss(low, target, high).mean()

    def step(function: Callable[..., torch.Tensor], to: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in images]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    functions = {machine.implementation: ours, "eager": eager, COMPILED: machine.compile(eager)}

    def check() -> None:
        expected, same = step(eager, torch.float64), step(eager)
        for function_name, function in functions.items():
            with machine.trying(function_name):
                for actual, true, rounded in zip(step(function), expected, same, strict=True):
                    require_close(f"{name}, {function_name}", actual, true, rounded)

    # Forward: images and target once; backward: the same again, and the gradients.
    moved = 3 * sum(t.numel() * t.element_size() for t in images) + 2 * target.numel()
    note = "GB/s of the bytes of the two fused kernels"
    point = Point(
        what="stream_loss.forward_backward",
        data=name,
        dtype="bfloat16",
        shape=low.shape,
        unit="GB/s",
        scale=1e9,
        contenders=[
            Contender(function_name, lambda function=function: step(function), moved, note)  # type: ignore[misc]
            for function_name, function in functions.items()
        ],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
