"""``stream_loss``: activations, sum of the streams and squared error, without an image in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .._impl import Implementation, ImplementationTable
from ..reference import stream_loss as reference
from . import _cpp
from ._check import check_like, check_tensor
from ._library import register, register_gradient
from ._triton import rejects_tensor, unavailable

__all__ = ["STREAM_LOSS", "stream_loss"]

_INT32_MAX = 2**31 - 1


def _run_kernels(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, *, impl: str) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.stream_loss(low, target, high, impl)
    return out


def _triton_rejects(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None) -> str | None:
    image = max(t.shape[1] * t.shape[2] * t.shape[3] for t in (low, high) if t is not None)
    if image > _INT32_MAX:
        return f"one image has {image} elements, more than {_INT32_MAX}"
    return rejects_tensor(low.device, low.dtype)


def _cpp_rejects(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None) -> str | None:
    return _cpp.rejects_tensor(low.device, low.dtype)


STREAM_LOSS = ImplementationTable(
    "stream_loss",
    [
        Implementation("triton", functools.partial(_run_kernels, impl="triton"), unavailable, _triton_rejects),
        Implementation("cpp", functools.partial(_run_kernels, impl="cpp"), _cpp.unavailable, _cpp_rejects),
        Implementation("reference", reference.stream_loss),
    ],
)


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    """Return an image in the memory order of the target."""
    return image.contiguous(memory_format=torch.channels_last)


def _call_cpp(
    function: str,
    low: torch.Tensor,
    target: torch.Tensor,
    high: torch.Tensor | None,
    losses: torch.Tensor,
    dlow: torch.Tensor | None = None,
    dhigh: torch.Tensor | None = None,
) -> None:
    """Call ``stream_loss_fwd`` or ``stream_loss_bwd`` with channels-last images; ``losses`` are the result or dloss."""
    if low.shape[0] == 0:
        return
    dtype, target = low.dtype, target.contiguous()

    def image(x: torch.Tensor | None, dx: torch.Tensor | None) -> tuple[int, int, int, int]:
        rows, columns = (0, 0) if x is None else x.shape[2:]
        x_address, dx_address = (_cpp.address(t, dtype, torch.channels_last) for t in (x, dx))
        return x_address, rows, columns, dx_address

    getattr(_cpp.load(), function)(
        list(target.shape[:3]),
        _cpp.dtype_name(dtype),
        image(low, dlow),
        image(high, dhigh),
        _cpp.address(target, torch.uint8),
        _cpp.address(losses, torch.float32),
        torch.get_num_threads(),
    )


def _forward(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, impl: str) -> torch.Tensor:
    if impl == "reference":
        return reference.stream_loss(low, target, high)
    if impl == "cpp":
        losses = _forward_fake(low, target, high, impl)
        _call_cpp(
            "stream_loss_fwd", _channels_last(low), target, None if high is None else _channels_last(high), losses
        )
        return losses
    from ..triton_kernels.stream_loss import stream_loss_fwd

    loss: torch.Tensor = stream_loss_fwd(
        _channels_last(low), target.contiguous(), None if high is None else _channels_last(high)
    )
    return loss


def _forward_fake(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, impl: str) -> torch.Tensor:
    return low.new_empty(low.shape[0], dtype=torch.float64 if low.dtype == torch.float64 else torch.float32)


def _backward(
    dloss: torch.Tensor, low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = _channels_last(low), None if high is None else _channels_last(high)
    if impl == "reference":
        dlow, dhigh = reference.stream_loss_backward(dloss, low, target, high)
    elif impl == "cpp":
        dlow, dhigh = torch.empty_like(low), None if high is None else torch.empty_like(high)
        _call_cpp("stream_loss_bwd", low, target, high, dloss.contiguous(), dlow, dhigh)
    else:
        from ..triton_kernels.stream_loss import stream_loss_bwd

        dlow, dhigh = stream_loss_bwd(dloss.contiguous(), low, target.contiguous(), high)
    return dlow, low.new_empty(0) if dhigh is None else dhigh


def _backward_fake(
    dloss: torch.Tensor, low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dlow, dhigh = (
        low.new_empty(0) if t is None else t.new_empty(t.shape).contiguous(memory_format=torch.channels_last)
        for t in (low, high)
    )
    return dlow, dhigh


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    low, target, high = ctx.saved_tensors
    dlow, dhigh = torch.ops.hflfnerv.stream_loss_backward(dloss, low, target, high, ctx.impl)
    return dlow, None, None if high is None else dhigh, None


register(
    "stream_loss(Tensor low, Tensor target, Tensor? high, str impl) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    "stream_loss_backward(Tensor dloss, Tensor low, Tensor target, Tensor? high, str impl) -> (Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


def _check_image(name: str, image: torch.Tensor, target: torch.Tensor) -> None:
    check_tensor(name, image)
    batch, height, width = target.shape[:3]
    if image.dim() != 4 or image.shape[:2] != (batch, 3) or image.shape[2] < height or image.shape[3] < width:
        raise ValueError(
            f"{name} must be [{batch}, 3, H', W'] with H' at least the target's {height} and W' at least its {width}, "
            f"got shape {tuple(image.shape)}"
        )
    if target.device != image.device:
        raise ValueError(f"target must be on the device of {name}, {image.device}, got {target.device}")


def stream_loss(
    low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Apply the streams' activations, add the streams, and return each frame's mean squared error.

    ``loss[b] = Σ_{c, h, w} (image[b, c, h, w] - target[b, h, w, c] / 255)² / (3 H W)`` with
    ``image = tanh(low) / 2 + 1/2 + tanh(high)``: the loss of the dual-stream network (arXiv 2409.18497), and without
    ``high`` that of HNeRV (arXiv 2304.02633) and NeRV (arXiv 2110.13903).

    Equivalent PyTorch: ``F.mse_loss(image, target.permute(0, 3, 1, 2) / 255, reduction="none").mean((1, 2, 3))``.

    Args:
        low: ``[B, 3, H', W']``, floating point, any strides (channels-last is read as it is): the last convolution's
            result. Its top left ``H x W`` is the frame.
        target: ``[B, H, W, 3]``, uint8, on the same device, with ``H <= H'`` and ``W <= W'``.
        high: as ``low``, with rows and columns of its own, in its dtype (under autocast it is cast to it); or None.
        impl: ``"auto"``, ``"triton"`` (CUDA; float32, float16, bfloat16), ``"cpp"`` (CPU with AVX2 or AVX-512; the same
            dtypes) or ``"reference"`` (PyTorch, anywhere).

    Returns:
        ``[B]``, float64 for float64 images and float32 otherwise.

    Raises:
        TypeError: an image is not a floating-point tensor, their dtypes differ, or the target is not uint8.
        ValueError: a shape, device or name is not as above, or a frame is empty.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Everything is float32 (float64 for float64 images), whatever the dtype of the images; gradients are rounded to
        it once, after they were multiplied by the gradient of the loss. ``"triton"`` and ``"cpp"`` keep nothing for the
        backward pass but their inputs, and make their gradients in one pass over them: a gradient made with the loss
        would be read and written once more to be scaled, and in float16 be too small before. They sum in a fixed order,
        so they are deterministic; their tanh is within 2e-7. ``impl="reference"`` alone has second derivatives.

    Example:
        >>> low, target = torch.zeros(2, 3, 4, 6), torch.full((2, 4, 6, 3), 255, dtype=torch.uint8)
        >>> stream_loss(low, target)
        tensor([0.2500, 0.2500])
    """
    if not isinstance(target, torch.Tensor) or target.dtype != torch.uint8:
        found = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"target must be a uint8 tensor, got {found}")
    if target.dim() != 4 or target.shape[3] != 3 or 0 in target.shape[1:]:
        raise ValueError(f"target must be [B, H, W, 3] with H and W at least 1, got shape {tuple(target.shape)}")
    _check_image("low", low, target)
    if high is not None:
        _check_image("high", high, target)
        check_like("high", high, low, "low")
        high = high.to(low.dtype)
    entry = STREAM_LOSS.select(impl, low, target, high)
    out: torch.Tensor = entry.run(low, target, high)
    return out
