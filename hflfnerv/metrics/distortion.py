"""Peak signal-to-noise ratio, and the rate it is plotted against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .frames import Frames, per_frame

__all__ = ["bits_per_pixel", "psnr"]


def psnr(a: Frames, b: Frames, *, reduction: str = "none") -> Tensor:
    """Peak signal-to-noise ratio per frame.

    ``PSNR = 10 log10(1 / MSE)`` with samples in [0, 1], the mean squared error over all RGB samples of one frame. The
    PSNR of a video is, as in the NeRV papers, the mean of this over its frames, not the PSNR of the mean error.

    Args:
        a: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1]; array or tensor.
        b: of the same kind, shape and device.
        reduction: ``"none"`` for one value per frame, ``"mean"`` for their mean.

    Returns:
        dB, float64 on the CPU: ``[T]``, or a scalar. Identical frames have ``inf``; so has then the mean.

    Raises:
        TypeError: the frames are neither uint8 nor floating point, or not both the same.
        ValueError: the shapes are not as stated or differ, or there is no frame.

    Numerics:
        Exact sums for uint8; float64 for floating point.

    Example:
        >>> black = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
        >>> psnr(black, black + 51)
        tensor([13.9794, 13.9794], dtype=torch.float64)
    """
    return per_frame(a, b, _psnr, reduction)


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        error = (x.double() - y.double()).square_().mean()
    else:
        squares = (x.int() - y.int()).square_()
        error = squares.sum(dtype=torch.int64).double() / (255.0**2 * squares.numel())
    return -10 * torch.log10(error)


def bits_per_pixel(num_bytes: int, shape: Sequence[int]) -> float:
    """Rate of a coded video: ``8 * num_bytes / (T * H * W)``.

    Args:
        num_bytes: bytes of the whole file.
        shape: ``(T, H, W)`` or ``(T, H, W, 3)`` of the video.

    Returns:
        Bits per pixel.

    Raises:
        ValueError: the number is negative, or the shape is not of this form.

    Example:
        >>> bits_per_pixel(1500, (10, 30, 40))
        1.0
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes must be at least 0, got {num_bytes}")
    if len(shape) not in (3, 4) or min(shape) < 1 or (len(shape) == 4 and shape[3] != 3):
        raise ValueError(f"shape must be (T, H, W) or (T, H, W, 3), all at least 1, got {tuple(shape)}")
    count, height, width = shape[:3]
    return 8 * num_bytes / (count * height * width)
