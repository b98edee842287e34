"""A convolution on a GPU, forward and with its gradients, against PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..device import Machine, require_close, without_autotuning
from ..registry import Contender, Point

__all__ = ["measure", "random_tensor"]

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def random_tensor(machine: Machine, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return normal values in bfloat16, channels-last where there are four axes."""
    values = (torch.randn(shape, device=machine.device) * scale).bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def measure(
    machine: Machine,
    what: str,
    name: str,
    functions: Mapping[str, Function],
    tensors: Sequence[torch.Tensor],
    terms: Sequence[int],
    moved: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    """Compare with float64 and time forward, and forward and backward, as a share of the bandwidth of a copy.

    Args:
        machine: the device.
        what: of the rows.
        name: of the point.
        functions: ours by their names, and PyTorch's, "eager", of x, weight and bias.
        tensors: x, weight, bias and the gradient of the result.
        terms: of the sums in the result and in the gradients of x, weight and bias.
        moved: bytes forward, and forward and backward.
    """
    *operands, dy = tensors

    def step(function: Function, to: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in operands]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(to))]

    def check() -> None:
        with without_autotuning():
            expected = step(functions["eager"], torch.float64)
        same = step(functions["eager"])
        for function_name, function in functions.items():
            with machine.trying(function_name):
                for part, three in enumerate(zip(step(function), expected, same, strict=True)):
                    require_close(f"{name}, {function_name}, {part}", *three, terms=terms[part])

    def forward(function: Function) -> torch.Tensor:
        with torch.inference_mode():
            return function(*operands)

    runs: list[tuple[str, Callable[..., Any]]] = [("forward", forward), ("forward_backward", step)]
    for (direction, run), moved_bytes in zip(runs, moved, strict=True):
        point = Point(
            what=f"{what}.{direction}",
            data=name,
            dtype="bfloat16",
            shape=operands[0].shape,
            unit="GB/s",
            scale=1e9,
            contenders=[
                Contender(function_name, functools.partial(run, function), moved_bytes)
                for function_name, function in functions.items()
            ],
            baseline="eager",
            check=check,
        )
        yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
