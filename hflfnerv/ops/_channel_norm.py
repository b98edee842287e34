"""LayerNorm over channels that lie next to each other in memory, and its gradients: for the encoders here.

It is none of the public operations: PyTorch's is its definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from ._check import check_like, check_tensor, compute_dtype
from ._library import register, register_gradient
from ._triton import rejects_rows, unavailable

__all__ = ["CHANNEL_NORM", "channel_norm"]


def _run_reference(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    y = F.layer_norm(x if shift is None else x + shift, gain.shape, gain, bias, eps)
    return y if out_dtype is None else y.to(out_dtype)


def _run_triton(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if out_dtype is None:
        out_dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    y: torch.Tensor = torch.ops.hflfnerv.channel_norm(x, gain, bias, shift, eps, out_dtype, "triton")
    return y


def _triton_rejects(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> str | None:
    return rejects_rows(x, gain.dtype, bias.dtype, x.dtype if shift is None else shift.dtype, out_dtype or x.dtype)


CHANNEL_NORM = ImplementationTable(
    "channel_norm",
    [
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    x, gain, bias = x.contiguous(), gain.contiguous(), bias.contiguous()
    y: torch.Tensor
    if impl == "reference":
        rows, gain, bias = _shifted(x, shift), gain.to(_sum_dtype(x)), bias.to(_sum_dtype(x))
        y = F.layer_norm(rows, gain.shape, gain, bias, eps).to(out_dtype)
    else:
        from ..triton_kernels.channel_norm import channel_norm_fwd

        y = channel_norm_fwd(x, gain, bias, None if shift is None else shift.contiguous(), eps, out_dtype)
    return y


def _shifted(x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    x = x.to(_sum_dtype(x))
    return x if shift is None else x + shift.to(x.dtype)


def _forward_fake(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    wanted: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, x, gain = dy.contiguous(), x.contiguous(), gain.contiguous()
    dx: torch.Tensor | None
    sums: torch.Tensor | None
    dshift: torch.Tensor | None
    if impl == "reference":
        dx, sums, dshift = _reference_backward(dy, x, gain, shift, eps)
    else:
        from ..triton_kernels.channel_norm import channel_norm_bwd

        dx = torch.empty_like(x) if wanted[0] else None
        shift = None if shift is None else shift.contiguous()
        sums, dshift = channel_norm_bwd(dy, x, gain, shift, dx, eps, sums=wanted[1] or wanted[2])
    return (
        dx if dx is not None and wanted[0] else x.new_empty(0),
        sums if sums is not None and wanted[1] else x.new_empty(0, dtype=_sum_dtype(x)),
        dshift if dshift is not None and wanted[2] else (x if shift is None else shift).new_empty(0),
    )


def _reference_backward(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    slopes, rows, factors = dy.to(_sum_dtype(x)), _shifted(x, shift), gain.to(_sum_dtype(x))
    _, mean, rstd = torch.native_layer_norm(rows, gain.shape, factors, factors, eps)
    # The bias says no more than that there is one.
    dx, dgain, dbias = torch.ops.aten.native_layer_norm_backward(
        slopes, rows, gain.shape, mean, rstd, factors, factors, [True, True, True]
    )
    dshift = None if shift is None else dx.flatten(0, -2).sum(dim=0).to(shift.dtype)
    return dx.to(x.dtype), torch.stack([dgain, dbias]), dshift


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    wanted: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape if wanted[0] else 0)
    sums = x.new_empty((2, *gain.shape) if wanted[1] else 0, dtype=_sum_dtype(x))
    return dx, sums, (x if shift is None else shift).new_empty(gain.shape if wanted[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gain, bias, shift, ctx.eps, _, ctx.impl = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, gain, shift)


def _autograd(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, gain, shift = ctx.saved_tensors
    want_x, want_gain, want_bias, want_shift = ctx.needs_input_grad[:4]
    wanted = [want_x, want_gain or want_bias, want_shift]
    dx, sums, dshift = torch.ops.hflfnerv.channel_norm_backward(dy, x, gain, shift, ctx.eps, wanted, ctx.impl)
    return (
        dx if want_x else None,
        sums[0].to(gain.dtype) if want_gain else None,
        sums[1].to(ctx.bias_dtype) if want_bias else None,
        dshift if want_shift else None,
        None,
        None,
        None,
    )


register(
    "channel_norm(Tensor x, Tensor gain, Tensor bias, Tensor? shift, float eps, ScalarType out_dtype, str impl) "
    "-> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    "channel_norm_backward(Tensor dy, Tensor x, Tensor gain, Tensor? shift, float eps, bool[] wanted, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


def _choice(x: torch.Tensor) -> str:
    """Return what ``"auto"`` stands for.

    On a GPU it is the kernels for half precision, by the count of kernels and bytes: autocast converts what PyTorch's
    reads and what it gives, each in a pass of its own. It is not measured yet (``python -m bench.gpu --parts encoder``
    compares them). A compiler joins those passes by itself.
    """
    half = x.dtype.itemsize == 2 or compute_dtype(x).itemsize == 2
    return "auto" if x.device.type == "cuda" and half and not torch.compiler.is_compiling() else "reference"


def channel_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Normalise each row over its channels: LayerNorm over the last axis.

    Equivalent PyTorch: ``F.layer_norm(x + shift, (C,), gain, bias, eps).to(out_dtype)``.

    Args:
        x: ``[..., C]``, floating point.
        gain: ``[C]`` in x's dtype (under autocast it may have another).
        bias: ``[C]``, likewise.
        shift: ``[C]``, likewise, such as the bias of the layer in front, whose gradient falls off with that of x; or
            None.
        eps: added to the variance.
        out_dtype: of the result; None for PyTorch's: x's, and under autocast on a GPU float32. A product that follows
            under autocast takes its dtype, and rounds to it whatever it is given.
        impl: ``"auto"``, ``"triton"`` (CUDA: up to 1024 channels, gradients included) or ``"reference"`` (PyTorch,
            anywhere). ``"auto"`` is ``"triton"`` where it can run and x is in half precision or autocast computes in
            it, but not under torch.compile.

    Returns:
        ``[..., C]`` in ``out_dtype``.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape, device or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Mean, variance and sums are float32, or float64 for float64, and what follows from them is rounded once.
        ``"triton"`` takes the variance from differences to the mean, and sums over rows in an order that depends on the
        shape alone.

    Example:
        >>> channel_norm(torch.zeros(1, 8, 9, 64), torch.ones(64), torch.zeros(64), eps=1e-6).shape
        torch.Size([1, 8, 9, 64])
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., C], got a scalar")
    for name, t in (("gain", gain), ("bias", bias), *([] if shift is None else [("shift", shift)])):
        check_tensor(name, t)
        check_like(name, t, x)
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(t.shape)}")
    entry = CHANNEL_NORM.select(_choice(x) if impl == "auto" else impl, x, gain, bias, shift, eps, out_dtype)
    y: torch.Tensor = entry.run(x, gain, bias, shift, eps, out_dtype)
    return y
