"""The casts that autocast makes of a network's weights, all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._lists import cast

__all__ = ["MasterWeights"]


class _Cast(torch.autograd.Function):
    """Casts tensors, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        cast(weights, casts)
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # In the order in memory of the weight: the optimisers take such a gradient as it is.
        results = [
            None if gradient is None else torch.empty_like(weight)
            for weight, gradient in zip(ctx.weights, gradients, strict=True)
        ]
        cast([g for g in gradients if g is not None], [result for result in results if result is not None])
        return None, *results


class MasterWeights:
    """The float32 weights of a network's convolutions and linear layers, and casts of all of them for one step.

    Autocast casts each of them by itself, and its gradient back: two small kernels for each of a hundred weights and
    biases, half of the kernels of a step. The values are the same here. What autocast leaves in float32, such as the
    gains of a LayerNorm, is not among them.

    Args:
        model: the network.
        dtype: of the casts.
        apart: how the names of weights begin whose gradients are taken by themselves, if there are such.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, apart: str | None = None) -> None:
        self._dtype = dtype
        self._parts: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for prefix, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for name, weight in module.named_parameters(prefix=prefix, recurse=False):
                    self._parts[apart is not None and name.startswith(apart)][name] = weight

    def cast(self) -> dict[str, Tensor]:
        """Return casts of the weights as they are now, by name, for :func:`torch.func.functional_call`."""
        casts: dict[str, Tensor] = {}
        for part in filter(None, self._parts):
            made: tuple[Tensor, ...] = _Cast.apply(self._dtype, *part.values())  # type: ignore[no-untyped-call]
            casts |= zip(part, made, strict=True)
        return casts
