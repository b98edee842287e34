"""What optimisers and casts do to the tensors of a list: by one CUDA kernel where that runs, else by PyTorch's.

None of these is public: :mod:`hflfnerv.train` is what uses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _cuda
from ._check import lie_alike

__all__ = ["cast", "momentum", "subtract"]


def cast(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors to such of another dtype: in one kernel all those whose memory has the same order."""
    alike = [(s, t) for s, t in zip(sources, targets, strict=True) if lie_alike(s, t)]
    if alike:
        together, made = (list(tensors) for tensors in zip(*alike, strict=True))
        if _of_one_dtype(together) and _of_one_dtype(made) and _cuda.rejects_list(together, made) is None:
            _cuda.list_cast(together, made)
        else:
            torch._foreach_copy_(made, together)
    for source, target in zip(sources, targets, strict=True):
        if not lie_alike(source, target):
            target.copy_(source)


def momentum(gradients: Sequence[Tensor], averages: Sequence[Tensor], mu: float) -> list[Tensor]:
    """Update averages of gradients, ``m <- mu m + (1 - mu) g``, and return Nesterov's ``(1 - mu) g + mu m``."""
    gradients, averages = list(gradients), list(averages)
    if _are_float32(gradients, averages) and _cuda.rejects_list(gradients, averages) is None:
        results = [torch.empty_like(gradient) for gradient in gradients]
        _cuda.list_momentum(gradients, averages, results, mu)
        return results
    torch._foreach_lerp_(averages, gradients, 1 - mu)
    accelerated: list[Tensor] = list(torch._foreach_lerp(gradients, averages, mu))
    return accelerated


def subtract(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    factors: Sequence[float],
    rate: float | Tensor,
    decay: float,
) -> None:
    """Subtract from parameters their updates, each times its factor, and ``decay`` of themselves, all times the rate.

    The updates may change.
    """
    parameters, updates = list(parameters), list(updates)
    on_device = isinstance(rate, Tensor) and rate.dtype == torch.float32 and rate.device == parameters[0].device
    if on_device and _are_float32(parameters, updates) and _cuda.rejects_list(parameters, updates) is None:
        assert isinstance(rate, Tensor)
        _cuda.list_subtract(parameters, updates, factors, rate, decay)
    else:
        if decay:
            torch._foreach_mul_(parameters, 1 - decay * rate)
        torch._foreach_mul_(updates, list(factors))
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(parameters, updates)


def _of_one_dtype(tensors: Sequence[Tensor]) -> bool:
    return len({x.dtype for x in tensors}) == 1


def _are_float32(*lists: Sequence[Tensor]) -> bool:
    return all(x.dtype == torch.float32 for tensors in lists for x in tensors)
