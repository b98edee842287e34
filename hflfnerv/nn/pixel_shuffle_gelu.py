"""PixelShuffle and GELU as a module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import pixel_shuffle_gelu

__all__ = ["PixelShuffleGELU"]


class PixelShuffleGELU(nn.Module):
    """Shuffle channels into space and apply GELU, in one pass; no parameters.

    ``y = GELU(PixelShuffle_r(x))``, equivalent to ``nn.Sequential(nn.PixelShuffle(r), nn.GELU(approximate))``.

    Args:
        upscale_factor: r, by which rows and columns grow.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.
        impl: implementation of :func:`hflfnerv.ops.pixel_shuffle_gelu`.

    Example:
        >>> PixelShuffleGELU(2)(torch.zeros(1, 12, 3, 5)).shape
        torch.Size([1, 3, 6, 10])
    """

    def __init__(self, upscale_factor: int, *, approximate: str = "none", impl: str = "auto") -> None:
        super().__init__()
        self.upscale_factor = upscale_factor
        self.approximate = approximate
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, C, H r, W r]`` for ``x`` of ``[B, C r², H, W]``."""
        return pixel_shuffle_gelu(x, self.upscale_factor, approximate=self.approximate, impl=self.impl)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.upscale_factor}, approximate={self.approximate!r}, impl={self.impl!r}"
