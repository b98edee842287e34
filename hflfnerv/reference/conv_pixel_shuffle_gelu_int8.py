"""Definitions of ``quantize_int8`` and ``conv_pixel_shuffle_gelu_int8``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["conv_pixel_shuffle_gelu_int8", "quantize_int8"]


def quantize_int8(x: torch.Tensor, inverse_scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Quantise channels to 8 bits: ``q = clamp(round(x * inverse_scale + zero_point), -128, 127)``, halves to even.

    Args:
        x: ``[B, C, H, W]``, floating point.
        inverse_scale: float32 ``[C]``.
        zero_point: int8 ``[C]``, what 0 becomes.

    Returns:
        int8 ``[B, C, H, W]``.
    """
    steps = x.float() * inverse_scale[:, None, None] + zero_point[:, None, None].float()
    return steps.clamp(-128, 127).round().to(torch.int8)


def conv_pixel_shuffle_gelu_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, r: int, *, approximate: str = "none"
) -> torch.Tensor:
    """Convolution of int8 values without padding, a scale and a bias per channel, PixelShuffle, GELU.

    ``y = GELU(PixelShuffle_r(scale * (weight * x) + bias))``; the sums are exact integers, the rest is float32.

    Args:
        x: int8 ``[B, C_in, H + K_h - 1, W + K_w - 1]``.
        weight: int8 ``[C_out r², C_in, K_h, K_w]``.
        scale: float32 ``[C_out r²]``.
        bias: float32 ``[C_out r²]``.
        r: upscale factor, at least 1.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.

    Returns:
        float32 ``[B, C_out, H r, W r]``.
    """
    largest = 128 * int(weight.long().abs().sum(dim=(1, 2, 3)).max()) if weight.numel() else 0
    # Integers up to 2^24 are float32 numbers: no sum is rounded, unless by a method that multiplies transforms of them,
    # which cuDNN may choose.
    exact = torch.float32 if largest <= 2**24 and x.device.type == "cpu" else torch.float64
    sums = F.conv2d(x.to(exact), weight.to(exact)).float()
    z = sums * scale[:, None, None] + bias[:, None, None]
    return F.gelu(F.pixel_shuffle(z, r), approximate=approximate)
