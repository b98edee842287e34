"""``conv2d``: a convolution that keeps the size of the image, such as a network's head."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from . import _amx, _cpp, _cuda, _winograd
from ._check import (
    channels_last_pixels,
    check_like,
    check_tensor,
    compute_dtype,
    half_padding,
    memory_format_of,
)
from ._library import register_convolution
from ._triton import rejects_tensor, unavailable

__all__ = ["CONV2D", "conv2d"]

_INT32_MAX = 2**31 - 1
_TRITON_CHANNELS = 128
_CUDA_CHANNELS = 64
_MOST_APART = 2**24  # elements from a pixel to the next, of which 32 are counted in 32 bits
# The pixels of x may be apart, and those of its gradient are then as well.
_PIXELS_APART = ("cuda", "triton")
# From which on "direct" and "amx" are faster than PyTorch, gradients included, measured.
_DIRECT_PIXELS = 360
_AMX_CHANNELS, _AMX_PIXELS = 24, 2**15


def _run_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=half_padding(weight))


def _run_kernels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, impl: str) -> torch.Tensor:
    dtype = compute_dtype(x)
    out: torch.Tensor = torch.ops.hflfnerv.conv2d(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), impl
    )
    return _winograd.in_layout_of(x, weight, out)


def _direct_rejects(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = _cpp.rejects_operand(x)
    if reason is not None:
        return reason
    if weight.shape[0] != 3 or weight.shape[2:] != (3, 3):
        return f"weight of shape {tuple(weight.shape)} is not that of a 3x3 kernel with three output channels"
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is empty"
    return None


def _head_rejects(x: torch.Tensor, weight: torch.Tensor, channels: int) -> str | None:
    """Return why a GPU's kernels for heads of at most so many input channels do not take these, or None."""
    if weight.shape[0] > 3 or weight.shape[2:] != (3, 3) or not 1 <= weight.shape[1] <= channels:
        return (
            f"weight of shape {tuple(weight.shape)} is not that of a 3x3 kernel with at most three output channels and "
            f"at most {channels} input channels"
        )
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    return None


def _too_many_pixels(x: torch.Tensor) -> bool:
    batch, _, height, width = x.shape
    return batch * height * width > _INT32_MAX - 4096


def _too_large(x: torch.Tensor) -> str:
    return f"x of shape {tuple(x.shape)} has too many elements for offsets of 32 bits"


def _triton_rejects(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = rejects_tensor(x.device, compute_dtype(x))
    if reason is not None:
        return reason
    reason = _head_rejects(x, weight, _TRITON_CHANNELS)
    if reason is not None:
        return reason
    height, width = x.shape[2:]
    pixel = max(x.shape[1], x.stride(3))
    return _too_large(x) if height * width * pixel > _INT32_MAX or _too_many_pixels(x) else None


def _cuda_rejects(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = _cuda.rejects_tensor(x.device, compute_dtype(x)) or _head_rejects(x, weight, _CUDA_CHANNELS)
    if reason is None and (x.stride(3) > _MOST_APART or _too_many_pixels(x)):
        reason = _too_large(x)
    return reason


def _amx_rejects(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = _cpp.rejects_amx_operand(x)
    if reason is not None:
        return reason
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is empty"
    return f"weight has {weight.numel()} elements, more than {_INT32_MAX}" if weight.numel() > _INT32_MAX else None


def _winograd_rejects(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if x.device.type == "cpu" and compute_dtype(x) != torch.float32:
        return f"dtype {compute_dtype(x)} is not torch.float32"
    return _winograd.rejects(x, weight, half_padding(weight))


CONV2D = ImplementationTable(
    "conv2d",
    [
        Implementation("cuda", functools.partial(_run_kernels, impl="cuda"), _cuda.unavailable, _cuda_rejects),
        Implementation("triton", functools.partial(_run_kernels, impl="triton"), unavailable, _triton_rejects),
        Implementation("amx", functools.partial(_run_kernels, impl="amx"), _cpp.unavailable_amx, _amx_rejects),
        Implementation("direct", functools.partial(_run_kernels, impl="direct"), _cpp.unavailable, _direct_rejects),
        Implementation(
            "winograd", functools.partial(_run_kernels, impl="winograd"), _cpp.unavailable, _winograd_rejects
        ),
        Implementation("reference", _run_reference),
    ],
)


def _empty_like_pixels(x: torch.Tensor) -> torch.Tensor:
    """Return memory of the strides of x, which ``channels_last_pixels`` returned."""
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, x.stride(3)))[..., :channels].permute(0, 3, 1, 2)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    if impl == "reference":
        return _run_reference(x, weight, bias).contiguous(memory_format=torch.channels_last)
    if impl == "amx":
        return _amx.forward(x, weight, bias, 1, half_padding(weight), "identity", keep_z=False)[0]
    if impl == "direct":
        return _direct_forward(x, weight, bias)
    if impl == "cuda":
        y = _forward_fake(x, weight, bias, impl)
        _cuda.conv2d_fwd(channels_last_pixels(x), weight, None if bias is None else bias.contiguous(), y)
        return y
    if impl == "triton":
        from ..triton_kernels.conv2d import conv2d_fwd

        out: torch.Tensor = conv2d_fwd(channels_last_pixels(x), weight, None if bias is None else bias.contiguous())
        return out
    return _winograd.forward(x, weight, None, bias, 1, "identity", keep_z=False)[0]


def _direct_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x, channels_last, dtype = x.contiguous(memory_format=torch.channels_last), torch.channels_last, x.dtype
    y, floats, bias = _forward_fake(x, weight, bias, "direct"), weight.float().contiguous(), _cpp.float_bias(bias)
    _cpp.load().conv2d_head_fwd(
        list(x.shape),
        _cpp.dtype_name(dtype),
        _cpp.address(x, dtype, channels_last),
        _cpp.address(floats, torch.float32),
        _cpp.address(bias, torch.float32),
        _cpp.address(y, dtype, channels_last),
        torch.get_num_threads(),
    )
    return y


def _direct_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels_last, x_format, dtype = torch.channels_last, memory_format_of(x), x.dtype
    dy, x, floats = (*(t.contiguous(memory_format=channels_last) for t in (dy, x)), weight.float().contiguous())
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(floats) if wanted[1] else None
    dbias = floats.new_empty(3) if wanted[2] else None
    _cpp.load().conv2d_head_bwd(
        list(x.shape),
        _cpp.dtype_name(dtype),
        _cpp.address(dy, dtype, channels_last),
        _cpp.address(x, dtype, channels_last),
        _cpp.address(floats, torch.float32),
        _cpp.address(dx, dtype, channels_last),
        _cpp.address(dweight, torch.float32),
        _cpp.address(dbias, torch.float32),
        torch.get_num_threads(),
    )
    return (
        x.new_empty(0) if dx is None else dx.contiguous(memory_format=x_format),
        x.new_empty(0) if dweight is None else torch.empty_like(weight).copy_(dweight),
        x.new_empty(0) if dbias is None else dbias.to(dtype),
    )


def _triton_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ..triton_kernels.conv2d import conv2d_bwd

    dx, _, _ = _backward_fake(dy, x, weight, wanted, "triton")
    x = channels_last_pixels(x)
    target = None
    if wanted[0]:
        target = dx if dx.stride() == x.stride() else _empty_like_pixels(x)
    dy = dy.contiguous(memory_format=torch.channels_last)
    dweight, dbias = conv2d_bwd(dy, x, weight, target, sums=wanted[1] or wanted[2])
    if target is not None and target is not dx:
        dx.copy_(target)
    return dx, dweight if wanted[1] else x.new_empty(0), dbias if wanted[2] else x.new_empty(0)


def _cuda_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels = channels_last_pixels(x)
    target = _empty_like_pixels(pixels) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] else None
    dbias = weight.new_empty(weight.shape[0]) if wanted[2] else None
    if any(wanted):
        _cuda.conv2d_bwd(dy, pixels, weight, target, dweight, dbias)
    if target is not None and x.is_contiguous() and target.stride() != x.stride():
        target = x.new_empty(x.shape).copy_(target)
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in (target, dweight, dbias))
    return dx, dweight, dbias


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool], impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "direct":
        return _direct_backward(dy, x, weight, wanted)
    if impl == "cuda":
        return _cuda_backward(dy, x, weight, wanted)
    if impl == "triton":
        return _triton_backward(dy, x, weight, wanted)
    dbias = dy.sum(dim=(0, 2, 3)) if wanted[2] else x.new_empty(0)
    if impl == "reference":
        padding = list(half_padding(weight))
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [*wanted[:2], False]
        )
        dx = None if dx is None else dx.contiguous(memory_format=memory_format_of(x))
        dweight = None if dweight is None else torch.empty_like(weight).copy_(dweight)
    elif impl == "amx":
        dx, dweight = _amx.gradients(dy, x, weight, 1, half_padding(weight), wanted[:2])
    else:
        dx, dweight = _winograd.gradients(dy, x, weight, 1, wanted)
    dx, dweight = (x.new_empty(0) if gradient is None else gradient for gradient in (dx, dweight))
    return dx, dweight, dbias


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool], impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = memory_format_of(x)
    if not wanted[0]:
        dx = x.new_empty(0)
    elif impl in _PIXELS_APART and layout == torch.contiguous_format and not x.is_contiguous():
        dx = _empty_like_pixels(channels_last_pixels(x))
    else:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    dweight = torch.empty_like(weight) if wanted[1] else x.new_empty(0)
    return dx, dweight, x.new_empty(weight.shape[0] if wanted[2] else 0)


register_convolution("conv2d", run=_forward, fake=_forward_fake, backward=_backward, backward_fake=_backward_fake)


def _kernels_pay(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether a kernel of ours is faster than PyTorch's convolution.

    On a GPU a prediction for half precision: with three output channels in bfloat16 cuDNN takes ten times as long as
    reading x (``python -m bench.gpu --parts head`` compares them).
    """
    if x.device.type == "cpu":
        if _cpp.unavailable() is not None:
            return False
        if _cpp.on_matrix_units(x):
            large = x.shape[1] >= _AMX_CHANNELS and x.shape[2] * x.shape[3] >= _AMX_PIXELS
            return large and _amx_rejects(x, weight, bias) is None
        if _direct_rejects(x, weight, bias) is None:
            return x.shape[2] * x.shape[3] >= _DIRECT_PIXELS
        return _winograd_rejects(x, weight, bias) is None and _winograd.pays(x, weight, kept=False)
    return compute_dtype(x).itemsize == 2


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Convolve (stride 1) with half of the kernel as padding: the image keeps its size.

    Equivalent PyTorch: ``F.conv2d(x, weight, bias, padding=(K_h // 2, K_w // 2))``. The head of a NeRV network, in
    training: three output channels leave PyTorch's kernels for the CPU mostly idle.

    Args:
        x: ``[B, C_in, H, W]``, floating point, any strides.
        weight: ``[C_out, C_in, K_h, K_w]`` in x's dtype, with odd K_h and K_w.
        bias: ``[C_out]`` in x's dtype, or None.
        impl: ``"auto"``, ``"cuda"`` (float16 and bfloat16 on Hopper: a 3x3 kernel with at most three output channels
            and 64 input channels, gradients included; one pass over x and dy makes all of them), ``"triton"`` (the same
            on any CUDA device, for up to 128 input channels and in float32), ``"amx"`` (CPU with AMX: bfloat16, any odd
            kernel and channels, gradients included), ``"direct"`` (CPU with AVX2 or AVX-512: a
            3x3 kernel with three output channels, gradients included), ``"winograd"`` (the same for any channels and
            kernels of 3x3 and 5x5, in float32) or ``"reference"`` (PyTorch, anywhere; also what ``"auto"`` means for
            small images, for float32 on a GPU, and in float16 on a CPU with matrix units).

    Returns:
        ``[B, C_out, H, W]``; x's dtype, or autocast's.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        ``"cuda"`` and ``"triton"`` sum in float32, over pixels in an order that depends on the shape alone, with
        ``"cuda"`` on the device's multiprocessors as well; float32 products are rounded to TF32 where
        ``torch.backends.cudnn.conv.fp32_precision`` says so. ``"direct"`` sums products in float32, the gradients of
        weight and bias row by row in float32 and over rows in float64, and rounds results once; the bits depend neither
        on the threads nor, but for the sums over it, on the batch. A value of x that is not finite also reaches pixels
        to the left whose vectors of 16 floats at most end on it.
        ``"winograd"`` as in :func:`conv_pixel_shuffle_gelu`, and ``"amx"`` as its ``"cpp"``.

    Example:
        >>> conv2d(torch.zeros(1, 28, 5, 7), torch.zeros(3, 28, 3, 3)).shape
        torch.Size([1, 3, 5, 7])
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_like("weight", weight, x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C_in, H, W], got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(
            f"weight must be [C_out, C_in, K_h, K_w] with x's C_in = {x.shape[1]} and an odd kernel, "
            f"got shape {tuple(weight.shape)}"
        )
    if 0 in (*weight.shape, *x.shape[2:]):
        raise ValueError(
            f"x and weight must not be empty but in the batch, got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if impl == "auto" and not _kernels_pay(x, weight, bias):
        impl = "reference"
    entry = CONV2D.select(impl, x, weight, bias)
    out: torch.Tensor = entry.run(x, weight, bias)
    return out
