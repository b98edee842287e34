"""The high-pass filter as a module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import highpass

__all__ = ["HighPass"]


class HighPass(nn.Module):
    """Remove the low frequencies of each image (arXiv 2409.18497); no parameters.

    Equivalent to ``torch.fft.ifft2(torch.fft.fft2(x) * mask).real`` with the mask of :func:`hflfnerv.ops.highpass`.

    Args:
        removed: share of the bandwidth to remove on each axis, in [0, 1].
        impl: implementation of :func:`hflfnerv.ops.highpass`.

    Example:
        >>> HighPass()(torch.zeros(2, 3, 9, 16)).shape
        torch.Size([2, 3, 9, 16])
    """

    def __init__(self, removed: float = 0.8, *, impl: str = "auto") -> None:
        super().__init__()
        self.removed = removed
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the filtered images, in the shape and dtype of ``x`` (``[..., H, W]``)."""
        return highpass(x, self.removed, impl=self.impl)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"removed={self.removed}, impl={self.impl!r}"
