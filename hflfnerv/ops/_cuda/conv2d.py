"""The convolution of a head, and its gradients."""

from __future__ import annotations

from typing import Any

import torch

from ... import _ext
from .device import DTYPES

__all__ = ["conv2d_bwd", "conv2d_fwd"]


def _conv2d_sizes(x: torch.Tensor, weight: torch.Tensor) -> list[int]:
    return [*x.shape, weight.shape[0], x.stride(3)]


def conv2d_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write a 3x3 convolution with padding 1 into ``y`` ``[B, N, H, W]``, channels-last.

    Args:
        x: ``[B, C, H, W]``, C at most 64, channels-last, its pixels ``x.stride(3)`` elements apart.
        weight: ``[N, C, 3, 3]``, N at most 3, any strides.
        bias: ``[N]``, contiguous, or None.
        y: its pixels N elements apart.
    """
    with torch.cuda.device_of(x):
        _ext.load().conv2d_cuda_fwd(
            _conv2d_sizes(x, weight),
            x.device.index,
            DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            list(weight.stride()),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


def conv2d_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Write those gradients of a 3x3 convolution with padding 1 that are not None.

    Args:
        dy: ``[B, N, H, W]``, any strides.
        x: as of :func:`conv2d_fwd`.
        weight: likewise.
        dx: memory of x's shape, channels-last, its pixels ``dx.stride(3)`` elements apart, the gaps its own: what a
            multiple of 16 bytes takes of them becomes zero.
        dweight: of weight's shape, any strides.
        dbias: ``[N]``, contiguous.
    """
    module: Any = _ext.load()
    sizes, device = _conv2d_sizes(x, weight), x.device.index
    with torch.cuda.device_of(x):
        partial = None
        if dweight is not None or dbias is not None:
            partial = x.new_empty(module.conv2d_cuda_partial_floats(sizes, device), dtype=torch.float32)
        module.conv2d_cuda_bwd(
            sizes,
            device,
            DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            list(weight.stride()),
            dy.data_ptr(),
            list(dy.stride()),
            0 if dx is None else dx.data_ptr(),
            0 if dx is None else dx.stride(3),
            0 if dweight is None else dweight.data_ptr(),
            [0] * 4 if dweight is None else list(dweight.stride()),
            0 if dbias is None else dbias.data_ptr(),
            0 if partial is None else partial.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
