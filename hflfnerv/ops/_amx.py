"""Convolutions on a CPU with AMX: calling the kernels."""

from __future__ import annotations

import torch

from . import _cpp
from ._check import memory_format_of

__all__ = ["forward", "gradients"]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    activation: str,
    *,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y, channels-last, and z with its channels in the order (i, j, c) where it is to be kept, in bfloat16.

    ``activation`` is ``"gelu"``, ``"gelu_tanh"``, or without z ``"identity"``.
    """
    sizes, n = _sizes(x, weight, r, padding), weight.shape[0]
    height, width = (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2] + 1 for i in range(2))
    y = _cpp.empty_image(torch.bfloat16, x.shape[0], n // (r * r), height * r, width * r)
    z = _cpp.empty_image(torch.bfloat16, x.shape[0], n, height, width) if keep_z else None
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    biases = _cpp.float_bias(bias)
    _cpp.load().conv_pixel_shuffle_gelu_fwd(
        sizes,
        activation,
        _address(x),
        _address(weight),
        _cpp.address(biases, torch.float32),
        _address(y),
        _address(z),
        threads=torch.get_num_threads(),
    )
    return y, z


def gradients(
    dz: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: int, padding: tuple[int, int], wanted: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x and weight, as far as they are wanted, for dz in the order (i, j, c)."""
    module, sizes, threads = _cpp.load(), _sizes(x, weight, r, padding), torch.get_num_threads()
    x_format, given = memory_format_of(x), weight
    dz, x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (dz, x, weight))
    dx = dweight = None
    if wanted[0]:
        dx = _cpp.empty_image(torch.bfloat16, *x.shape)
        module.conv_pixel_shuffle_gelu_dgrad(sizes, _address(dz), _address(weight), _address(dx), threads=threads)
        dx = dx.contiguous(memory_format=x_format)
    if wanted[1]:
        dweight = _cpp.empty_image(torch.bfloat16, *weight.shape)
        module.conv_pixel_shuffle_gelu_wgrad(sizes, _address(x), _address(dz), _address(dweight), threads=threads)
        if given is not weight:
            dweight = torch.empty_like(given).copy_(dweight)
    return dx, dweight


def _sizes(x: torch.Tensor, weight: torch.Tensor, r: int, padding: tuple[int, int]) -> list[int]:
    return [*x.shape, weight.shape[0] // (r * r), r, *weight.shape[2:], *padding]


def _address(t: torch.Tensor | None) -> int:
    return _cpp.address(t, torch.bfloat16, torch.channels_last)
