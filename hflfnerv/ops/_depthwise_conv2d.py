"""PyTorch's depthwise convolution, fast on the CPU, and its gradients more so: for the encoders here.

It is none of the public operations: there is nothing to choose, and PyTorch's convolution is its definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import _cpp
from ._check import check_like, check_tensor, compute_dtype, memory_format_of

__all__ = ["depthwise_conv2d"]

_GROUP = 16  # channels that are multiplied with each other: a row of the matrix units


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        channels, _, rows, columns = weight.shape

        def gradients(weight: torch.Tensor, groups: int, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                dy, x, weight, [channels], [1, 1], ctx.padding, [1, 1], False, [0, 0], groups, mask
            )

        wanted = list(ctx.needs_input_grad[:3])
        dx = dweight = dbias = None
        if wanted[0]:
            dx = gradients(weight, channels, [True, False, False])[0]
        if wanted[1] or wanted[2]:
            # The gradient of dense groups: sixteen times the products, of which the diagonal is wanted.
            dense = weight.new_empty((channels, _GROUP, rows, columns))
            _, dense, dbias = gradients(dense, channels // _GROUP, [False, *wanted[1:]])
        if wanted[1]:
            dweight = dense.unflatten(0, (-1, _GROUP)).diagonal(0, 1, 2).permute(0, 3, 1, 2).reshape(weight.shape)
        return dx, dweight, dbias, None


class _DepthwiseKernels(torch.autograd.Function):
    """Kernels of odd sizes with half of them as padding, in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        images = x.contiguous(memory_format=torch.channels_last)
        weight, bias = weight.contiguous(), _cpp.float_bias(bias)
        y = torch.empty_like(images)
        _cpp.load().depthwise_conv2d_fwd(
            _sizes(x, weight), *map(_address, (images, weight, bias, y)), torch.get_num_threads()
        )
        return y.contiguous(memory_format=memory_format_of(x))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layout, wanted = memory_format_of(x), ctx.needs_input_grad
        dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (*grads, x))
        weight = weight.contiguous()
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.empty_like(weight) if wanted[1] else None
        dbias = x.new_empty(len(weight)) if wanted[2] else None
        _cpp.load().depthwise_conv2d_bwd(
            _sizes(x, weight), *map(_address, (dy, x, weight, dx, dweight, dbias)), torch.get_num_threads()
        )
        return None if dx is None else dx.contiguous(memory_format=layout), dweight, dbias


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> list[int]:
    return [*x.shape, *weight.shape[2:]]


def _address(t: torch.Tensor | None) -> int:
    """Return where an image, a weight with one input channel or a bias is."""
    image = t is not None and t.dim() == 4 and t.shape[1] > 1
    return _cpp.address(t, torch.float32, torch.channels_last if image else torch.contiguous_format)


def _kernels_run(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int], dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling() or _cpp.unavailable() is not None or dtype != torch.float32 or x.numel() == 0:
        return False
    return all(size % 2 and size // 2 == pad for size, pad in zip(weight.shape[2:], padding, strict=True))


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: tuple[int, int]
) -> torch.Tensor:
    """Convolve each channel with a kernel of its own, stride 1.

    Equivalent PyTorch: ``F.conv2d(x, weight, bias, padding=padding, groups=C)``. On the CPU, float32 images have
    kernels of their own here where the sizes of the weight are odd and the padding is their half (AVX2, AVX-512).
    Elsewhere it calls PyTorch's, but for the weights' gradient on the CPU: that is taken from a convolution with dense
    groups of 16 channels, of whose products all but one in 16 are thrown away, in a fraction of the time of PyTorch's
    own, which has no vector form.

    Args:
        x: ``[B, C, H, W]``, floating point.
        weight: ``[C, 1, K_h, K_w]`` in x's dtype (under autocast both are cast).
        bias: ``[C]``, or None.
        padding: zeros on each side of the rows and of the columns.

    Returns:
        ``[B, C, H + 2 padding_h - K_h + 1, W + 2 padding_w - K_w + 1]``.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape or device is not as above.

    Numerics:
        The products are PyTorch's, and may be summed in another order, that of a pixel the same wherever it lies.

    Example:
        >>> depthwise_conv2d(torch.zeros(1, 64, 8, 9), torch.zeros(64, 1, 7, 7), None, padding=(3, 3)).shape
        torch.Size([1, 64, 8, 9])
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    channels = x.shape[1]
    check_tensor("weight", weight)
    check_like("weight", weight, x)
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(f"weight must be [{channels}, 1, K_h, K_w], got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, x)
        if bias.shape != (channels,):
            raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    dtype = compute_dtype(x)
    kernels = x.device.type == "cpu" and _kernels_run(x, weight, padding, dtype)
    if not kernels and (x.device.type != "cpu" or channels % _GROUP or x.dtype == torch.float64):
        return F.conv2d(x, weight, bias, padding=padding, groups=channels)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out: torch.Tensor
    if kernels:
        out = _DepthwiseKernels.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    out = _DepthwiseConv2d.apply(x, weight, bias, list(padding))  # type: ignore[no-untyped-call]
    return out
