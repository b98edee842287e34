"""Definition of ``conv_pixel_shuffle_gelu``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["conv_pixel_shuffle_gelu"]


def conv_pixel_shuffle_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    *,
    padding: int | tuple[int, int],
    approximate: str = "none",
) -> torch.Tensor:
    """Convolution (stride 1), bias, PixelShuffle, GELU: the upsampling block of NeRV and HNeRV.

    ``y = GELU(PixelShuffle_r(weight * x + bias))``

    Args:
        x: ``[B, C_in, H, W]``, floating point.
        weight: ``[C_out r², C_in, K_h, K_w]`` in x's dtype.
        bias: ``[C_out r²]`` in x's dtype, or None.
        r: upscale factor, at least 1.
        padding: zeros added on each side of the rows and the columns.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.

    Returns:
        ``[B, C_out, H' r, W' r]`` in x's dtype, with ``H' = H + 2 padding - K_h + 1`` and W' likewise.
    """
    return F.gelu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=padding), r), approximate=approximate)
