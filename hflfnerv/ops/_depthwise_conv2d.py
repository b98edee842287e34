"""PyTorch's depthwise convolution with a weight gradient that is fast on the CPU: for the encoders here.

It is none of the public operations: there is nothing to choose, and PyTorch's convolution is its definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ._check import check_like, check_tensor, compute_dtype

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


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: tuple[int, int]
) -> torch.Tensor:
    """Convolve each channel with a kernel of its own, stride 1.

    Equivalent PyTorch: ``F.conv2d(x, weight, bias, padding=padding, groups=C)``, and that is what it calls. On the CPU
    the gradient of the weights is taken from a convolution with dense groups of 16 channels, of whose products all but
    one in 16 are thrown away; it takes a fraction of the time of PyTorch's own, which has no vector form.

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
        The gradient of the weights sums the products of PyTorch's in another order; everything else is PyTorch's.

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
    if x.device.type != "cpu" or channels % _GROUP or x.dtype == torch.float64:
        return F.conv2d(x, weight, bias, padding=padding, groups=channels)
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    out: torch.Tensor = _DepthwiseConv2d.apply(x, weight, bias, list(padding))  # type: ignore[no-untyped-call]
    return out
