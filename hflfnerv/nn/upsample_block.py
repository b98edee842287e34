"""The upsampling block of NeRV and HNeRV."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import conv_pixel_shuffle_gelu

__all__ = ["UpsampleBlock"]


class UpsampleBlock(nn.Module):
    """Convolution, bias, PixelShuffle, GELU: one block of a NeRV or HNeRV decoder.

    ``y = GELU(PixelShuffle_r(conv(x)))``, equivalent to::

        nn.Sequential(
            nn.Conv2d(in_channels, out_channels * r**2, kernel_size, padding=(kernel_size - 1) // 2, bias=bias),
            nn.PixelShuffle(r),
            nn.GELU(approximate),
        )

    with the parameters ``conv.weight`` and ``conv.bias``, initialised as ``nn.Conv2d`` does.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        upscale_factor: r, by which rows and columns grow.
        kernel_size: odd, so that rows and columns grow by exactly r.
        bias: whether the convolution has a bias.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.
        impl: implementation of :func:`hflfnerv.ops.conv_pixel_shuffle_gelu`.

    Raises:
        ValueError: kernel_size is not a positive odd number, or upscale_factor is under 1.

    Example:
        >>> UpsampleBlock(33, 28, 2, 5)(torch.zeros(1, 33, 4, 6)).shape
        torch.Size([1, 28, 8, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        upscale_factor: int,
        kernel_size: int,
        *,
        bias: bool = True,
        approximate: str = "none",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if upscale_factor < 1:
            raise ValueError(f"upscale_factor must be at least 1, got {upscale_factor}")
        self.upscale_factor = upscale_factor
        self.approximate = approximate
        self.impl = impl
        self.conv = nn.Conv2d(
            in_channels, out_channels * upscale_factor**2, kernel_size, padding=(kernel_size - 1) // 2, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, out_channels, H r, W r]`` for ``x`` of ``[B, in_channels, H, W]``."""
        return conv_pixel_shuffle_gelu(
            x,
            self.conv.weight,
            self.conv.bias,
            self.upscale_factor,
            padding=(self.conv.kernel_size[0] - 1) // 2,
            approximate=self.approximate,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Return the settings that the convolution does not show."""
        return f"upscale_factor={self.upscale_factor}, approximate={self.approximate!r}, impl={self.impl!r}"
