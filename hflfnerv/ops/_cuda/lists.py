"""Operations on the tensors of lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _ext
from .._check import lie_alike
from .device import DTYPES, checks

__all__ = ["list_cast", "list_momentum", "list_subtract", "rejects_list"]

_LIST_DTYPES = {torch.float32: "float32", **DTYPES}
_LIST_ELEMENTS = 2**31 - 4096
_, _rejects_listed = checks(_LIST_DTYPES)


def rejects_list(*lists: Sequence[torch.Tensor]) -> str | None:
    """Return why the kernels for lists cannot take these, whose elements meet in the order of memory, or None."""
    for tensors in zip(*lists, strict=True):
        first = tensors[0]
        if any(x.device != first.device or not lie_alike(x, first) for x in tensors):
            return "the tensors of two lists differ in shape, in memory or in their device"
        for x in tensors:
            reason = _rejects_listed(x.device, x.dtype)
            if reason is not None:
                return reason
        dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
        if not dense or not 0 < first.numel() < _LIST_ELEMENTS:
            return f"a tensor of shape {tuple(first.shape)} is empty, too large, or has gaps in memory"
    return None


def _listed(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], c: Sequence[torch.Tensor] = (), factors: Sequence[float] = ()
) -> list[tuple[int, int, int, float, int]]:
    addresses = [x.data_ptr() for x in c] or [0] * len(a)
    numbers = factors or [1.0] * len(a)
    return [
        (x.data_ptr(), y.data_ptr(), z, factor, x.numel())
        for x, y, z, factor in zip(a, b, addresses, numbers, strict=True)
    ]


def list_cast(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Write each source, rounded, into its target; sources have one dtype, and targets, of float32 and 16 bits."""
    first = sources[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        names = _LIST_DTYPES[first.dtype], _LIST_DTYPES[targets[0].dtype]
        _ext.load().list_cast(_listed(sources, targets), *names, first.device.index, stream)


def list_momentum(
    gradients: Sequence[torch.Tensor], averages: Sequence[torch.Tensor], results: Sequence[torch.Tensor], mu: float
) -> None:
    """Move averages towards gradients by ``1 - mu``; results are gradients, moved towards the averages by ``mu``."""
    first = gradients[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        _ext.load().list_momentum(_listed(gradients, averages, results), mu, first.device.index, stream)


def list_subtract(
    parameters: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    factors: Sequence[float],
    rate: torch.Tensor,
    decay: float,
) -> None:
    """Subtract updates, times their factors, and the decay's part of parameters, all times the rate.

    The rate is float32 ``[]`` on the device.
    """
    first = parameters[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        listed = _listed(updates, parameters, factors=factors)
        _ext.load().list_subtract(listed, rate.data_ptr(), decay, first.device.index, stream)
