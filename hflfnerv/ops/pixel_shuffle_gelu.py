"""``pixel_shuffle_gelu``: bias, PixelShuffle and GELU in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch

from .._impl import Implementation, ImplementationTable
from ..errors import BackendUnavailable
from ..reference import pixel_shuffle_gelu as reference
from . import _cpp, _cuda
from ._check import check_approximate, check_like, check_tensor, check_upscale_factor, memory_format_of
from ._library import register, register_gradient
from ._triton import rejects_tensor, unavailable

__all__ = ["PIXEL_SHUFFLE_GELU", "image_is_small", "pixel_shuffle_gelu", "rejects_shape"]

_INT32_MAX = 2**31 - 1
_MAX_UPSCALE_FACTOR = 32
_SMALL_IMAGE = 2**15


def rejects_shape(r: int, channels: int, height: int, width: int) -> str | None:
    """Return why the kernels for GPUs cannot shuffle ``channels`` by ``height`` by ``width``, or None."""
    if r > _MAX_UPSCALE_FACTOR:
        return f"r = {r} is more than {_MAX_UPSCALE_FACTOR}, so that one pixel does not fit a tile"
    if channels * height * width > _INT32_MAX:
        return f"one image of x has {channels * height * width} elements, more than {_INT32_MAX}"
    return None


def _triton_rejects(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> str | None:
    return rejects_tensor(x.device, x.dtype) or rejects_shape(r, x.shape[1], x.shape[2], x.shape[3])


def _run_reference(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    return reference.pixel_shuffle_gelu(x, r, bias, approximate=approximate)


def _run_triton(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.pixel_shuffle_gelu(x, r, bias, approximate, "triton")
    return out


def _cuda_rejects(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> str | None:
    batch, channels, height, width = x.shape
    return (
        _cuda.rejects_tensor(x.device, x.dtype)
        or _rejects_layout(x)
        or rejects_shape(r, channels, height, width)
        or _cuda.rejects_shuffle(batch, channels // (r * r), r, height, width)
    )


def _rejects_layout(x: torch.Tensor) -> str | None:
    if x.numel() == 0 or memory_format_of(x) == torch.channels_last:
        return None
    return "x is not channels-last"  # no more than that: torch.compile comes through here, and formats no shapes


def _run_cuda(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.pixel_shuffle_gelu(x, r, bias, approximate, "cuda")
    return out


def image_is_small(channels: int, height: int, width: int) -> bool:
    """Return whether calling a kernel on the CPU takes longer than it saves.

    The size of one image decides, not that of the batch: an image gives the same bits alone and among others.
    """
    return channels * height * width < _SMALL_IMAGE


def _cpp_rejects(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> str | None:
    return _cpp.rejects_tensor(x.device, x.dtype)


def _run_cpp(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.pixel_shuffle_gelu(x, r, bias, approximate, "cpp")
    return out


PIXEL_SHUFFLE_GELU = ImplementationTable(
    "pixel_shuffle_gelu",
    [
        Implementation("cuda", _run_cuda, _cuda.unavailable, _cuda_rejects),
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("cpp", _run_cpp, _cpp.unavailable, _cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _cpp_arguments(x: torch.Tensor, r: int, approximate: str) -> tuple[Any, ...]:
    batch, channels, height, width = x.shape
    channels_last = memory_format_of(x) == torch.channels_last
    dtype = _cpp.dtype_name(x.dtype)
    return [batch, channels // (r * r), r, height, width], channels_last, dtype, approximate == "tanh"


def _cpp_forward(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    y = _forward_fake(x, r, bias, approximate, "cpp")
    if y.numel() > 0:
        layout, biases = memory_format_of(x), _cpp.float_bias(bias)
        _cpp.load().pixel_shuffle_gelu_fwd(
            *_cpp_arguments(x, r, approximate),
            _cpp.address(x, x.dtype, layout),
            _cpp.address(biases, torch.float32),
            _cpp.address(y, x.dtype, layout),
            threads=torch.get_num_threads(),
        )
    return y


def _cpp_backward(
    dy: torch.Tensor, x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layout = memory_format_of(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    dbias = None if bias is None else torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    if dx.numel() > 0:
        biases = _cpp.float_bias(bias)
        _cpp.load().pixel_shuffle_gelu_bwd(
            *_cpp_arguments(x, r, approximate),
            _cpp.address(dy, x.dtype, layout),
            _cpp.address(x, x.dtype, layout),
            _cpp.address(biases, torch.float32),
            _cpp.address(dx, x.dtype, layout),
            _cpp.address(dbias, torch.float32),
            threads=torch.get_num_threads(),
        )
    return dx, None if dbias is None else dbias.to(x.dtype)


def _require_layout(x: torch.Tensor) -> None:
    reason = _rejects_layout(x)
    if reason is not None:
        raise BackendUnavailable(f"pixel_shuffle_gelu: impl='cuda' cannot run: {reason}")


def _cuda_forward(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    _require_layout(x)
    y = _forward_fake(x, r, bias, approximate, "cuda")
    if y.numel() > 0:
        _cuda.pixel_shuffle_gelu_fwd(x, r, bias, approximate, y)
    return y


def _cuda_backward(
    dy: torch.Tensor, x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _require_layout(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    if dx.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    dbias = None if bias is None else torch.empty_like(bias)
    _cuda.pixel_shuffle_gelu_bwd(dy, x, r, bias, approximate, dx, dbias)
    return dx, dbias


def _forward(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, impl: str) -> torch.Tensor:
    layout = memory_format_of(x)
    x, bias = x.contiguous(memory_format=layout), None if bias is None else bias.contiguous()
    if impl == "reference":
        return reference.pixel_shuffle_gelu(x, r, bias, approximate=approximate).contiguous(memory_format=layout)
    if impl == "cpp":
        return _cpp_forward(x, r, bias, approximate)
    if impl == "cuda":
        return _cuda_forward(x, r, bias, approximate)
    from ..triton_kernels.pixel_shuffle_gelu import pixel_shuffle_gelu_fwd

    y: torch.Tensor = pixel_shuffle_gelu_fwd(x, r, bias, approximate)
    return y


def _forward_fake(x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, impl: str) -> torch.Tensor:
    batch, channels, height, width = x.shape
    return torch.empty(
        (batch, channels // (r * r), height * r, width * r),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format_of(x),
    )


def _backward(
    dy: torch.Tensor, x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = memory_format_of(x)
    dy, x = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    bias = None if bias is None else bias.contiguous()
    if impl == "reference":
        dx, dbias = reference.pixel_shuffle_gelu_backward(dy, x, r, bias, approximate=approximate)
        dx = dx.contiguous(memory_format=layout)
    elif impl == "cpp":
        dx, dbias = _cpp_backward(dy, x, r, bias, approximate)
    elif impl == "cuda":
        dx, dbias = _cuda_backward(dy, x, r, bias, approximate)
    else:
        from ..triton_kernels.pixel_shuffle_gelu import pixel_shuffle_gelu_bwd

        dx, dbias = pixel_shuffle_gelu_bwd(dy, x, r, bias, approximate)
    return dx, x.new_empty(0) if dbias is None else dbias


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return dx, x.new_empty(0 if bias is None else x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.r, bias, ctx.approximate, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy, x, ctx.r, bias, ctx.approximate, ctx.impl)
    return dx, None, None if bias is None else dbias, None, None


register(
    "pixel_shuffle_gelu(Tensor x, int r, Tensor? bias, str approximate, str impl) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    "pixel_shuffle_gelu_backward(Tensor dy, Tensor x, int r, Tensor? bias, str approximate, str impl)"
    " -> (Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


def pixel_shuffle_gelu(
    x: torch.Tensor, r: int, bias: torch.Tensor | None = None, *, approximate: str = "none", impl: str = "auto"
) -> torch.Tensor:
    """Add a bias, shuffle channels into space, apply GELU.

    ``y[b, c, h r + i, w r + j] = GELU(x[b, c r² + i r + j, h, w] + bias[c r² + i r + j])``, the second half of the
    upsampling block of HNeRV (arXiv 2304.02633) and NeRV (arXiv 2110.13903).

    Equivalent PyTorch: ``F.gelu(F.pixel_shuffle(x + bias[:, None, None], r), approximate=approximate)``.

    Args:
        x: ``[B, C r², H, W]``, floating point, any strides. Channels-last stays channels-last.
        r: upscale factor, at least 1.
        bias: ``[C r²]`` in x's dtype (under autocast it is cast to it), or None.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.
        impl: ``"auto"``, ``"cuda"`` (Hopper; float16 and bfloat16, channels-last), ``"triton"`` (CUDA; float32,
            float16, bfloat16), ``"cpp"`` (CPU with AVX2 or AVX-512; the same dtypes, on as many threads as PyTorch
            uses) or ``"reference"`` (PyTorch, anywhere; on the CPU also what ``"auto"`` means for images of less than
            2**15 values).

    Returns:
        ``[B, C, H r, W r]`` in x's dtype.

    Raises:
        TypeError: x or bias is not a floating-point tensor, their dtypes differ, or r is not an int.
        ValueError: a shape, device, r or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        The kernels compute in float32 and round once; the reference rounds after each operation. The gradient of the
        bias is summed in float32 in a fixed order: every implementation is deterministic, and ``"cpp"`` gives the same
        bits on any number of threads. Its GELU is within ``1e-7 + 1.2e-7 |y|`` of the exact value before it is rounded,
        its derivative within ``2e-7``. In float16 and bfloat16 that of ``"triton"`` and ``"cuda"`` is
        ``x (1 + tanh(u)) / 2`` with a fitted u and the hardware's tanh: within 3e-5 of the exact one, its derivative
        within 6e-5, plus the error of that tanh, 5e-4 of its value. ``impl="reference"`` alone has second derivatives.

    Example:
        >>> x = torch.zeros(1, 12, 2, 2)
        >>> pixel_shuffle_gelu(x, 2).shape
        torch.Size([1, 3, 4, 4])
    """
    check_tensor("x", x)
    check_upscale_factor(r)
    check_approximate(approximate)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C r², H, W], got shape {tuple(x.shape)}")
    if x.shape[1] % (r * r) != 0:
        raise ValueError(f"x must have a multiple of r² = {r * r} channels, got {x.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, x)
        if bias.shape != (x.shape[1],):
            raise ValueError(
                f"bias must have shape ({x.shape[1]},), one value per channel of x, got {tuple(bias.shape)}"
            )
        bias = bias.to(x.dtype)
    if impl == "auto" and x.device.type == "cpu" and image_is_small(x.shape[1], x.shape[2], x.shape[3]):
        impl = "reference"
    entry = PIXEL_SHUFFLE_GELU.select(impl, x, r, bias, approximate)
    out: torch.Tensor = entry.run(x, r, bias, approximate)
    return out
