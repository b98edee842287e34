"""Images in memory as the kernels of convolutions read them: channels-last, each pixel a multiple of 16 bytes."""

from __future__ import annotations

import torch

__all__ = ["GROUP", "default_strides", "padded", "padded_pixels", "prepare"]

#: Elements of 16 bytes, as which the kernels read channels.
GROUP = 8


def padded(channels: int) -> int:
    return -(-channels // GROUP) * GROUP


def padded_pixels(like: torch.Tensor, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return like.new_empty((batch, height, width, padded(channels)))[..., :channels].permute(0, 3, 1, 2)


def _strides(t: torch.Tensor) -> list[int] | None:
    """Return the strides between images, rows and pixels as the kernel takes them, None where it cannot."""
    batch, channels, height, width = t.shape
    image, channel, row, pixel = t.stride()
    # An axis of size 1 may have any stride; the kernel's copies want one that makes sense.
    pixel = pixel if width > 1 else padded(channels)
    row = row if height > 1 else width * pixel
    image = image if batch > 1 else height * row
    whole = all(stride % GROUP == 0 for stride in (image, row, pixel)) and t.data_ptr() % 16 == 0
    apart = pixel >= channels and row >= width * pixel and image >= height * row
    return [image, row, pixel] if whole and apart and (channel == 1 or channels == 1) else None


def default_strides(x: torch.Tensor) -> list[int]:
    _, channels, height, width = x.shape
    pixel = padded(channels)
    return [height * width * pixel, width * pixel, pixel]


def prepare(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return x in memory as the kernel reads it, itself where possible, and its strides."""
    strides = _strides(x)
    if strides is not None:
        return x, strides
    # What lies behind the channels is never read.
    return padded_pixels(x, *x.shape).copy_(x), default_strides(x)
