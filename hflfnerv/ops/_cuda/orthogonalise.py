"""Orthogonalisation of many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import _ext

__all__ = ["orthogonalise_matrices"]


def orthogonalise_matrices(
    matrices: Sequence[torch.Tensor], quintic: tuple[float, float, float], steps: int
) -> list[torch.Tensor]:
    """Return ``steps`` steps ``X <- a X + (b X Xᵀ + c (X Xᵀ)²) X`` of each matrix, from ``X = x / |x|``.

    Args:
        matrices: float32 ``[rows, columns]``, contiguous, on one device, the smaller of both from 1 to 128.
        quintic: a, b, c.
        steps: their number, at least 1.
    """
    module: Any = _ext.load()
    with torch.cuda.device_of(matrices[0]):
        sizes = [x.numel() for x in matrices]
        memory = matrices[0].new_empty(sum(sizes)).split(sizes)
        results = [y.view(x.shape) for x, y in zip(matrices, memory, strict=True)]
        tasks = [(*x.shape, x.data_ptr(), y.data_ptr()) for x, y in zip(matrices, results, strict=True)]
        most: int = module.orthogonalise_cuda_matrices
        for some in (tasks[i : i + most] for i in range(0, len(tasks), most)):
            scratch = matrices[0].new_empty(module.orthogonalise_cuda_scratch(some))
            stream = torch.cuda.current_stream().cuda_stream
            module.orthogonalise_cuda(some, quintic, steps, scratch.data_ptr(), matrices[0].device.index, stream)
    return results
