"""Cropping and resizing of uint8 frames."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centre_crop", "centre_offset", "resize"]

_BATCH_BYTES = 64 << 20


def centre_offset(full: int, part: int) -> int:
    """First of ``part`` rows or columns in the middle of ``full``: half the rest, halves to the even number."""
    return round((full - part) / 2)


def centre_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Cut the centre out of frames, with the rounding of torchvision's ``center_crop``.

    The first row is ``round((H - height) / 2)`` and the first column likewise, halves to the even number.

    Args:
        frames: ``[..., H, W, C]``, any dtype.
        height: rows to keep, 1..H.
        width: columns to keep, 1..W.

    Returns:
        ``[..., height, width, C]``, a view of ``frames``.

    Raises:
        ValueError: the crop is empty or larger than the frames.
    """
    full_height, full_width = frames.shape[-3:-1]
    if not (1 <= height <= full_height and 1 <= width <= full_width):
        raise ValueError(
            f"crop must be at least 1x1 and fit into the frames of {full_height}x{full_width} (height x width), "
            f"got {height}x{width}"
        )
    top, left = centre_offset(full_height, height), centre_offset(full_width, width)
    return frames[..., top : top + height, left : left + width, :]


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize frames by antialiased bicubic interpolation.

    Args:
        frames: ``[T, H, W, 3]``, uint8.
        height: rows of the result, at least 1.
        width: columns of the result, at least 1.

    Returns:
        ``[T, height, width, 3]``, uint8, contiguous; ``frames`` itself where the size is the same already.

    Raises:
        TypeError: the frames are not uint8.
        ValueError: the frames are not ``[T, H, W, 3]``, or the size is empty.

    Numerics:
        Interpolated in float32, clamped to 0..255 and rounded to the nearest integer, a few frames at a time.
    """
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, got {frames.dtype}")
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be [T, H, W, 3], got {list(frames.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"resize must be at least 1x1, got {height}x{width}")
    count, full_height, full_width, _ = frames.shape
    if (full_height, full_width) == (height, width):
        return frames
    result = torch.empty((count, height, width, 3), dtype=torch.uint8, device=frames.device)
    step = max(1, _BATCH_BYTES // (12 * max(full_height * full_width, height * width)))
    for start in range(0, count, step):
        planes = frames[start : start + step].permute(0, 3, 1, 2).contiguous().float()
        planes = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
        result[start : start + step] = planes.clamp_(0, 255).round_().to(torch.uint8).permute(0, 2, 3, 1)
    return result
