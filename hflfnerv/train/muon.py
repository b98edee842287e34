"""Muon: momentum whose matrices are orthogonalised before they are added to the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import _lists
from ..ops._orthogonalise import SMALL_ROWS, multiplies_bfloat16, orthogonalise_all

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, each seen as a matrix ``[out, in * k * k]``.

    ``m <- mu m + (1 - mu) g``, ``w <- (1 - lr wd) w - lr sqrt(max(1, M / N)) orthogonalise((1 - mu) g + mu m)``
    (Jordan et al.; the momentum is Nesterov's). Every direction of a weight then moves by the same length, whatever its
    gradient: a network for one video learns its weak directions, the detail, from the first epochs on. The step does
    not depend on the scale of the loss. ``torch.optim.Muon`` takes matrices alone, and no learning rate on the device.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; a float, or a tensor of one element where a captured CUDA graph is to read it.
        momentum: mu, in [0, 1).
        weight_decay: wd, at least 0. Updates are as long however large a weight is, so that it grows for as long as it
            is trained; with a decay no direction grows beyond about ``sqrt(max(1, M / N)) / wd``.

    Raises:
        ValueError: a parameter has fewer than two dimensions, or a setting is out of its range.

    Numerics:
        The orthogonalisation runs in the dtype of the weights, but for matrices with more than 128 values on both sides
        where bfloat16 has matrix units, on a GPU or a CPU with AMX: in bfloat16, whose error is far below that of the
        quintic itself.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._prepared: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"params must have two or more dimensions, got one of shape {tuple(parameter.shape)}: "
                        "leave biases and gains to Adam"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._prepare([parameter for parameter in parameters if parameter not in self._prepared], group["momentum"])
            if parameters:
                updates = [self._prepared.pop(parameter) for parameter in parameters]
                factors = [_factor(parameter) for parameter in parameters]
                _lists.subtract(parameters, updates, factors, group["lr"], group["weight_decay"])
        return loss

    @torch.no_grad()
    def prepare(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Do of the next step what does not touch the parameters, for some of them.

        That is nearly all of it, and may run while the gradients of others are still being taken.

        Args:
            parameters: such as have their gradients; others of this optimiser, and such as are not its, are left.

        Returns:
            What is orthogonal of each, which the step will subtract times some factors; the optimiser keeps it.
        """
        wanted = set(parameters)
        found: list[Tensor] = []
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter in wanted and parameter.grad is not None]
            found += self._prepare(members, group["momentum"])
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what was prepared of them."""
        self._prepared.clear()
        super().zero_grad(set_to_none)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = {}

    def _prepare(self, parameters: Sequence[Tensor], momentum: float) -> list[Tensor]:
        """Update the momenta, and orthogonalise."""
        if not parameters:
            return []
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        accelerated = _lists.momentum(gradients, averages, momentum)
        matrices = [_as_matrix(x, parameter) for x, parameter in zip(accelerated, parameters, strict=True)]
        matrices = [x.bfloat16() if min(x.shape) > SMALL_ROWS and multiplies_bfloat16(x) else x for x in matrices]
        updates = [
            # A tall matrix may come as the transpose of a wide one.
            _as_weight(x.to(parameter.dtype, memory_format=torch.contiguous_format).contiguous(), parameter)
            for x, parameter in zip(orthogonalise_all(matrices), parameters, strict=True)
        ]
        self._prepared.update(zip(parameters, updates, strict=True))
        return updates


def _factor(parameter: Tensor) -> float:
    """Return what an update is multiplied by for the shape of its matrix."""
    rows = parameter.shape[0]
    return math.sqrt(max(1.0, rows * rows / parameter.numel()))


# The order of a matrix's columns changes nothing: that of a weight in memory needs no copy.


def _in_pixels(weight: Tensor) -> bool:
    """Return whether a weight has its input channels last in memory."""
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return what has the shape of a weight as ``[out, in k k]``, in the weight's order in memory."""
    return (x.permute(0, 2, 3, 1) if _in_pixels(weight) else x).flatten(1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """Undo :func:`_as_matrix`."""
    if _in_pixels(weight):
        out, channels, rows, columns = weight.shape
        y = matrix.view(out, rows, columns, channels).permute(0, 3, 1, 2)
    else:
        y = matrix.view_as(weight)
    # The stride of an axis of size 1 means nothing, but one that differs would make of an operation on the tensors of
    # two lists as many as there are tensors.
    axes = zip(weight.shape, y.stride(), weight.stride(), strict=True)
    return y.as_strided(y.shape, weight.stride()) if all(n == 1 or a == b for n, a, b in axes) else y
