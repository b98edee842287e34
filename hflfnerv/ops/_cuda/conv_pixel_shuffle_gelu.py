"""Convolution, PixelShuffle and GELU, and the gradient of x."""

from __future__ import annotations

from typing import Any

import torch

from ... import _ext
from .device import DTYPES
from .pixels import GROUP, default_strides, padded, padded_pixels, prepare

__all__ = [
    "apart_of",
    "columns",
    "conv_pixel_shuffle_gelu_dgrad",
    "conv_pixel_shuffle_gelu_fwd",
    "empty_gradient",
    "empty_result",
    "filled_channels",
    "implementation",
    "pack_weight",
]


def _result_pixel(n: int, r: int, apart: bool) -> int:
    """Return the elements from one pixel of y to the next.

    Where the r pixels from one of x are no multiple of 16 bytes, each is padded to one: the kernel then stores 16 bytes
    at a time, and reads such a tensor as it is where it is the next block's x. Where pixels may lie apart, all are.
    """
    channels = n // (r * r)
    return channels if not apart and r * channels % GROUP == 0 else padded(channels)


def filled_channels(n: int, r: int, apart: bool) -> int:
    """Return how many channels a result of ``n / r²`` is to have for wide stores, those behind them of no use.

    Where pixels are padded in memory the kernel stores what is left of eight channels by twos and ones. From four on
    that takes longer than to multiply and store eight of which some are zeros, as measured on an H200.
    """
    channels, pixel = n // (r * r), _result_pixel(n, r, apart)
    return pixel if channels % GROUP >= GROUP // 2 else channels


# What the registered operation calls the implementation, and whether its result's pixels may lie apart.
_APART_BY_NAME = {"cuda": False, "cuda, pixels apart": True}


def implementation(apart: bool) -> str:
    """Return what the registered operation calls it."""
    return next(name for name, value in _APART_BY_NAME.items() if value == apart)


def apart_of(name: str) -> bool | None:
    """Undo :func:`implementation`; None for what is another implementation."""
    return _APART_BY_NAME.get(name)


def empty_result(x: torch.Tensor, n: int, r: int, apart: bool) -> torch.Tensor:
    """Return memory for y ``[B, n / r², H r, W r]``, channels-last, its pixels padded as the kernel wants them."""
    batch, _, height, width = x.shape
    memory = x.new_empty((batch, height * r, width * r, _result_pixel(n, r, apart)))
    return memory[..., : n // (r * r)].permute(0, 3, 1, 2)


def empty_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return memory for the gradient of x, channels-last, its pixels padded to a multiple of 16 bytes."""
    return padded_pixels(x, *x.shape)


def _sizes(x: torch.Tensor, strides: list[int], weight: torch.Tensor, r: int, apart: bool) -> list[int]:
    n, _, rows, columns = weight.shape
    pixel = _result_pixel(n, r, apart)
    return [*x.shape, n // (r * r), r, rows, columns, rows // 2, columns // 2, *strides, pixel, 0]


def _gradient_sizes(dz: torch.Tensor, strides: list[int], weight: torch.Tensor, r: int, pixel: int) -> list[int]:
    n, channels, rows, columns = weight.shape
    batch, _, height, width = dz.shape
    return [batch, n, height, width, channels, 1, rows, columns, rows // 2, columns // 2, *strides, pixel, r]


def columns(x: torch.Tensor, weight: torch.Tensor, r: int, apart: bool) -> int:
    """Return the width of the kernel's tiles where its input has the shape of ``x``, one of a few."""
    sizes = _sizes(x, default_strides(x), weight, r, apart)
    with torch.cuda.device_of(weight):
        width: int = _ext.load().conv_pixel_shuffle_gelu_cuda_columns(sizes, weight.device.index)
    return width


def pack_weight(x: torch.Tensor, weight: torch.Tensor, r: int, apart: bool) -> torch.Tensor:
    """Return the weight as the kernel reads it where its input has the shape of ``x``.

    Depends on the weight, ``apart`` and :func:`columns` alone, so a caller whose weights stay as they are can keep it.
    """
    return _pack(_sizes(x, default_strides(x), weight, r, apart), weight)


def _pack(sizes: list[int], weight: torch.Tensor) -> torch.Tensor:
    module, device = _ext.load(), weight.device.index
    with torch.cuda.device_of(weight):
        packed = weight.new_empty(module.conv_pixel_shuffle_gelu_cuda_packed_elements(sizes, device))
        strides = _weight_strides(weight)
        if strides is None:
            weight = weight.contiguous()
            strides = [weight.stride(0), weight.stride(1), 1]
        stream = torch.cuda.current_stream().cuda_stream
        module.conv_pixel_shuffle_gelu_cuda_pack(sizes, device, weight.data_ptr(), strides, packed.data_ptr(), stream)
    return packed


def _weight_strides(weight: torch.Tensor) -> list[int] | None:
    """Return the strides of ``[n, C_in, taps]``, None where the taps are no one axis of a weight's memory."""
    _, _, rows, columns = weight.shape
    n, channel, row, column = weight.stride()
    if rows == 1 or columns == 1:
        return [n, channel, row if columns == 1 else column]
    return [n, channel, column] if row == columns * column else None


def conv_pixel_shuffle_gelu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    r: int,
    approximate: str,
    *,
    keep_z: bool,
    apart: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``(y, z)``: y as from :func:`empty_result`, z ``[B, n, H, W]``, channels-last, in the order (i, j, c).

    Args:
        x: ``[B, C_in, H, W]``; read as it is if channels are adjacent and pixels multiples of 16 bytes, else copied.
        weight: ``[n, C_in, K_h, K_w]``, odd; the padding is half of it.
        packed: the same, from :func:`pack_weight`, or None.
        bias: ``[n]`` in the order (c, i, j), or None.
        r: upscale factor.
        approximate: ``"none"`` (GELU by erf) or ``"tanh"`` (its tanh form).
        keep_z: whether to write z; it is None otherwise.
        apart: whether pixels of y may lie apart for the next block's sake.
    """
    module: Any = _ext.load()
    batch, _, height, width = x.shape
    n = weight.shape[0]
    with torch.cuda.device_of(x):
        y = empty_result(x, n, r, apart)
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
        z = torch.empty((batch, n, height, width), **options) if keep_z else None
        x, strides = prepare(x)
        packed = pack_weight(x, weight, r, apart) if packed is None else packed
        bias = None if bias is None else bias.contiguous()
        addresses = [0 if t is None else t.data_ptr() for t in (x, packed, bias, y, z)]
        module.conv_pixel_shuffle_gelu_cuda_fwd(
            _sizes(x, strides, weight, r, apart),
            x.device.index,
            DTYPES[x.dtype],
            "gelu_tanh" if approximate == "tanh" else "gelu",
            *addresses,
            torch.cuda.current_stream().cuda_stream,
        )
    return y, z


def conv_pixel_shuffle_gelu_dgrad(dz: torch.Tensor, weight: torch.Tensor, r: int) -> torch.Tensor:
    """Return dx ``[B, C_in, H, W]`` as :func:`empty_gradient` has it.

    Args:
        dz: ``[B, n, H, W]`` in the order (i, j, c), or with zero channels behind them.
        weight: ``[n, C_in, K_h, K_w]`` in the order (c, i, j), odd; the padding is half of it.
        r: upscale factor.
    """
    module: Any = _ext.load()
    batch, _, height, width = dz.shape
    with torch.cuda.device_of(dz):
        dx = padded_pixels(dz, batch, weight.shape[1], height, width)
        dz, strides = prepare(dz)
        sizes = _gradient_sizes(dz, strides, weight, r, dx.stride(3))
        packed = _pack(sizes, weight)
        module.conv_pixel_shuffle_gelu_cuda_fwd(
            sizes,
            dz.device.index,
            DTYPES[dz.dtype],
            "none",
            *[0 if t is None else t.data_ptr() for t in (dz, packed, None, dx, None)],
            torch.cuda.current_stream().cuda_stream,
        )
    return dx
