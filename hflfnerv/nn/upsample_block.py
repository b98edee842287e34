"""The upsampling block of NeRV and HNeRV."""

from __future__ import annotations

import operator

import torch
from torch import nn

from ..errors import BackendUnavailable
from ..ops import conv_pixel_shuffle_gelu, pixel_shuffle_gelu
from ._attached import attached

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

    One operation reads both, and ``conv`` is not called. Where something hangs on its call, it is, and the rest of the
    block is an operation of its own: hooks (pruning, and weight and spectral norm of :mod:`torch.nn.utils`, are hooks),
    a ``forward`` set on the object, or a module of another class in its place. Parametrizations need no call.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        upscale_factor: r, by which rows and columns grow.
        kernel_size: odd, so that rows and columns grow by exactly r.
        bias: whether the convolution has a bias.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.
        impl: implementation of :func:`hflfnerv.ops.conv_pixel_shuffle_gelu`.
        pixels_apart: whether the pixels of the output may lie apart in memory, for a block that follows; see there.

    Raises:
        TypeError: kernel_size or upscale_factor is not an integer.
        ValueError: kernel_size is not a positive odd number, or upscale_factor is under 1.
        BackendUnavailable: on a call; the named implementation cannot run, or something hangs on the call of ``conv``
            and ``impl`` is neither ``"auto"`` nor ``"reference"``.

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
        pixels_apart: bool = False,
    ) -> None:
        super().__init__()
        kernel_size, upscale_factor = operator.index(kernel_size), operator.index(upscale_factor)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if upscale_factor < 1:
            raise ValueError(f"upscale_factor must be at least 1, got {upscale_factor}")
        self.upscale_factor = upscale_factor
        self.approximate = approximate
        self.impl = impl
        self.pixels_apart = pixels_apart
        self.conv = nn.Conv2d(
            in_channels, out_channels * upscale_factor**2, kernel_size, padding=(kernel_size - 1) // 2, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, out_channels, H r, W r]`` for ``x`` of ``[B, in_channels, H, W]``."""
        what = attached(self.conv)
        if what is None and type(self.conv).forward is not nn.Conv2d.forward:
            what = f"is a {type(self.conv).__name__}"
        if what is not None:
            if self.impl not in ("auto", "reference"):
                raise BackendUnavailable(
                    f"UpsampleBlock: impl={self.impl!r} cannot run: conv {what}, which needs a call of its own; "
                    "take it off, or use impl='auto'"
                )
            return pixel_shuffle_gelu(self.conv(x), self.upscale_factor, approximate=self.approximate, impl=self.impl)
        return conv_pixel_shuffle_gelu(
            x,
            self.conv.weight,
            self.conv.bias,
            self.upscale_factor,
            padding=(self.conv.kernel_size[0] - 1) // 2,
            approximate=self.approximate,
            impl=self.impl,
            pixels_apart=self.pixels_apart,
        )

    def extra_repr(self) -> str:
        """Return the settings that the convolution does not show."""
        return f"upscale_factor={self.upscale_factor}, approximate={self.approximate!r}, impl={self.impl!r}"
