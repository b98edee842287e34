"""The output stage: heads, tanh, the streams' sum, and its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _ext
from .device import DTYPES

__all__ = ["output_stage_fwd", "pack_head"]


def pack_head(weight: torch.Tensor) -> torch.Tensor:
    """Return a head's weight ``[3, C, 3, 3]`` as the kernel of the output stage reads it, see csrc/cuda/output_stage.h.

    Depends on the weight alone, so a caller whose weights stay as they are can keep it.
    """
    channels = weight.shape[1]
    steps = -(-channels // 16)
    matrices = weight.new_zeros((3, 16, 16 * steps))  # kernel's rows; its columns and colours by channels
    matrices[:, :9, :channels] = weight.permute(2, 3, 0, 1).reshape(3, 9, channels)
    # Halves and rows of eight; steps, halves, quads, elements.
    fragments = matrices.view(3, 2, 8, steps, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    return fragments.contiguous()


def output_stage_fwd(
    features: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    biases: torch.Tensor,
    groups: Sequence[int],
    scales: Sequence[float],
    offset: float,
    y: torch.Tensor,
) -> None:
    """Write frames into ``y`` ``[B, H, W, 3]``, uint8 or float32.

    Args:
        features: up to three ``[B, C, H', W']`` of one dtype, channels-last, their pixels apart or not, in the order of
            their groups.
        packed: their weights, from :func:`pack_head`.
        biases: float32 ``[groups, 3]``, contiguous.
        groups: the group of each feature.
        scales: a number for each group.
        offset: a number.
        y: contiguous.
    """
    first = features[0]
    with torch.cuda.device_of(first):
        _ext.load().output_stage_cuda_fwd(
            list(y.shape[:3]),
            first.device.index,
            DTYPES[first.dtype],
            [
                (x.data_ptr(), weight.data_ptr(), *x.shape[1:], x.stride(3), group)
                for x, weight, group in zip(features, packed, groups, strict=True)
            ],
            list(scales),
            offset,
            biases.data_ptr(),
            y.data_ptr(),
            y.dtype == torch.uint8,
            torch.cuda.current_stream().cuda_stream,
        )
