"""PixelShuffle and GELU, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import _ext
from .device import DTYPES
from .pixels import GROUP

__all__ = ["pixel_shuffle_gelu_bwd", "pixel_shuffle_gelu_fwd", "rejects_shuffle"]

_MOST_THREADS = 1024
_MOST_PIXELS = 2**30


def rejects_shuffle(batch: int, channels: int, r: int, height: int, width: int) -> str | None:
    """Return why the kernels cannot shuffle x ``[batch, channels r², height, width]``, or None."""
    pixels = batch * height * width
    if pixels > _MOST_PIXELS:
        return f"x has {pixels} pixels, more than {_MOST_PIXELS}"
    run = r * channels  # what becomes of a pixel in one row of y
    vector = _common_divisor(width * run, (GROUP, 2, 1))
    # After so many vectors channels repeat; each of them has a thread.
    threads = r * (run // min(vector, _common_divisor(run, (GROUP, 4, 2, 1))))
    if threads > _MOST_THREADS:
        rows = f"rows of y that are multiples of {2 * vector} bytes"
        return f"x has {channels * r * r} channels, which with {rows} take {threads} threads, more than {_MOST_THREADS}"
    return None


def _common_divisor(number: int, among: Sequence[int]) -> int:
    for divisor in among:
        if number % divisor == 0:
            return divisor
    return 1


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _shuffle_arguments(x: torch.Tensor, r: int) -> tuple[list[int], int | None, str]:
    batch, channels, height, width = x.shape
    return [batch, channels // (r * r), r, height, width], x.device.index, DTYPES[x.dtype]


def pixel_shuffle_gelu_fwd(
    x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, y: torch.Tensor
) -> None:
    """Write y ``[B, C, H r, W r]`` for x ``[B, C r², H, W]``, both channels-last, and a contiguous bias."""
    x = _aligned(x)
    with torch.cuda.device_of(x):
        _ext.load().pixel_shuffle_gelu_cuda_fwd(
            *_shuffle_arguments(x, r),
            approximate == "tanh",
            *[0 if t is None else t.data_ptr() for t in (x, bias, y)],
            torch.cuda.current_stream().cuda_stream,
        )


def pixel_shuffle_gelu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    r: int,
    bias: torch.Tensor | None,
    approximate: str,
    dx: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Write dx, and dbias where there is a bias; tensors as in :func:`pixel_shuffle_gelu_fwd`."""
    module: Any = _ext.load()
    dy, x = _aligned(dy), _aligned(x)
    arguments = _shuffle_arguments(x, r)
    with torch.cuda.device_of(x):
        sums = None
        if dbias is not None:
            count = module.pixel_shuffle_gelu_cuda_sums(*arguments, dy.data_ptr(), x.data_ptr(), dx.data_ptr())
            sums = torch.empty(count, dtype=torch.float32, device=x.device)
        module.pixel_shuffle_gelu_cuda_bwd(
            *arguments,
            approximate == "tanh",
            *[0 if t is None else t.data_ptr() for t in (dy, x, bias, dx, sums, dbias)],
            torch.cuda.current_stream().cuda_stream,
        )
