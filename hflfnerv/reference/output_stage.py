"""Definition of ``output_stage``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["output_stage"]


def output_stage(
    features: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: torch.Tensor,
    *,
    groups: Sequence[int],
    scales: Sequence[float],
    offset: float,
    crop: tuple[int, int],
    as_bytes: bool = True,
) -> torch.Tensor:
    """Head convolutions, tanh, sum of the streams, crop, and 8 bits: how a video network ends.

    ``frame = offset + Σ_g scales[g] tanh(Σ_{i: groups[i] = g} weights[i] * features[i] + biases[g])``

    Args:
        features: ``[B, C_i, H_i, W_i]``, floating point.
        weights: ``[3, C_i, 3, 3]``; the convolutions pad with one zero on each side.
        biases: ``[G, 3]``.
        groups: the group of each feature, 0 … G - 1 in ascending order.
        scales: of the groups.
        offset: what is added.
        crop: height and width of the frame, the top left of each feature's image.
        as_bytes: clamp to [0, 1], multiply by 255 and round half to even.

    Returns:
        ``[B, H, W, 3]``, uint8 or in the features' dtype.
    """
    rows, columns = crop
    sums: list[torch.Tensor | None] = [None] * len(scales)
    for feature, weight, group in zip(features, weights, groups, strict=True):
        image = F.conv2d(feature, weight, padding=1)[..., :rows, :columns]
        before = sums[group]
        sums[group] = image if before is None else before + image
    frame: torch.Tensor | float = offset
    for total, bias, scale in zip(sums, biases, scales, strict=True):
        assert total is not None
        frame = frame + scale * torch.tanh(total + bias[:, None, None])
    assert isinstance(frame, torch.Tensor)
    frame = frame.permute(0, 2, 3, 1)
    if not as_bytes:
        return frame.contiguous()
    return frame.clamp(0, 1).mul(255).round().to(torch.uint8).contiguous()
