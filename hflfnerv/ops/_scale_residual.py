"""A branch added to what it branched from, each of its channels scaled, and the gradients: for the encoders here.

It is none of the public operations: ``x + gamma * (y + bias)`` is its definition.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .._impl import Implementation, ImplementationTable
from ._check import check_like, check_tensor, compute_dtype
from ._library import register, register_gradient
from ._triton import rejects_rows, unavailable

__all__ = ["SCALE_RESIDUAL", "scale_residual"]


def _run_reference(x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x + gamma * (y if bias is None else y + bias)


def _run_triton(x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.scale_residual(x, gamma, y, bias, "triton")
    return out


def _triton_rejects(x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    return rejects_rows(x, gamma.dtype, y.dtype, *([] if bias is None else [bias.dtype]))


SCALE_RESIDUAL = ImplementationTable(
    "scale_residual",
    [
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _out_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])


def _forward(
    x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, impl: str
) -> torch.Tensor:
    x, gamma, y = x.contiguous(), gamma.contiguous(), y.contiguous()
    if impl == "reference":
        return _run_reference(x, gamma, y, bias)
    from ..triton_kernels.scale_residual import scale_residual_fwd

    of_channels = None if bias is None else bias.contiguous()
    out: torch.Tensor = scale_residual_fwd(x, gamma, y, of_channels, _out_dtype(x, gamma, y, bias))
    return out


def _forward_fake(
    x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, impl: str
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=_out_dtype(x, gamma, y, bias))


def _backward(
    dout: torch.Tensor,
    gamma: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    x_dtype: torch.dtype,
    wanted: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, gamma, y = dout.contiguous(), gamma.contiguous(), y.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = torch.empty_like(dout, dtype=x_dtype) if wanted[0] else None
    dy = torch.empty_like(y) if wanted[2] else None
    dgamma: torch.Tensor | None
    dbias: torch.Tensor | None
    if impl == "reference":
        slopes = dout.to(torch.promote_types(dout.dtype, torch.float32))
        dgamma = (slopes * (y if bias is None else y + bias)).flatten(0, -2).sum(dim=0).to(gamma.dtype)
        dbias = None if bias is None else (slopes.flatten(0, -2).sum(dim=0) * gamma).to(bias.dtype)
        if dx is not None:
            dx.copy_(dout)
        if dy is not None:
            dy.copy_(gamma * dout)
    else:
        from ..triton_kernels.scale_residual import scale_residual_bwd

        dgamma, dbias = scale_residual_bwd(dout, gamma, y, bias, dx, dy, sums=wanted[1] or wanted[3])
    return (
        y.new_empty(0, dtype=x_dtype) if dx is None else dx,
        gamma.new_empty(0) if dgamma is None or not wanted[1] else dgamma,
        y.new_empty(0) if dy is None else dy,
        (gamma if bias is None else bias).new_empty(0) if dbias is None or not wanted[3] else dbias,
    )


def _backward_fake(
    dout: torch.Tensor,
    gamma: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    x_dtype: torch.dtype,
    wanted: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_bias = gamma if bias is None else bias
    of_each = zip((y, gamma, y, of_bias), (x_dtype, gamma.dtype, y.dtype, of_bias.dtype), wanted, strict=True)
    dx, dgamma, dy, dbias = (t.new_empty(t.shape if want else 0, dtype=dtype) for t, dtype, want in of_each)
    return dx, dgamma, dy, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gamma, y, bias, ctx.impl = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gamma, y, bias)


def _autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    given = wanted[0] and dout.dtype == ctx.x_dtype  # then it is the gradient of x
    made = [wanted[0] and not given, *wanted[1:]]
    gradients: list[torch.Tensor | None] = [None] * 4
    if any(made):
        op = torch.ops.hflfnerv.scale_residual_backward
        gradients = [
            gradient if make else None
            for gradient, make in zip(op(dout, *ctx.saved_tensors, ctx.x_dtype, made, ctx.impl), made, strict=True)
        ]
    return dout if given else gradients[0], *gradients[1:], None


register(
    "scale_residual(Tensor x, Tensor gamma, Tensor y, Tensor? bias, str impl) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    "scale_residual_backward(Tensor dout, Tensor gamma, Tensor y, Tensor? bias, ScalarType x_dtype, bool[] wanted, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


def _choice(x: torch.Tensor, y: torch.Tensor) -> str:
    """Return what ``"auto"`` stands for.

    On a GPU it is the kernels where one of the tensors is in half precision, by the count of kernels and bytes: PyTorch
    takes two passes, and four back. It is not measured yet (``python -m bench.gpu --parts encoder`` compares them). A
    compiler joins those passes by itself.
    """
    half = compute_dtype(x).itemsize == 2 or min(x.dtype.itemsize, y.dtype.itemsize) == 2
    return "auto" if x.device.type == "cuda" and half and not torch.compiler.is_compiling() else "reference"


def scale_residual(
    x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Add a branch to x, each of its channels scaled.

    Equivalent PyTorch: ``x + gamma * (y + bias)``.

    Args:
        x: ``[..., C]``, floating point.
        gamma: ``[C]`` in x's dtype (under autocast it may have another).
        y: ``[..., C]`` in x's dtype (likewise).
        bias: ``[C]`` in x's dtype (likewise), or None.
        impl: ``"auto"``, ``"triton"`` (CUDA: up to 1024 channels, gradients included) or ``"reference"`` (PyTorch,
            anywhere). ``"auto"`` is ``"triton"`` where it can run and x or y is in half precision or autocast computes
            in it, but not under torch.compile.

    Returns:
        ``[..., C]`` in the dtype to which PyTorch promotes the tensors: float32 if one of them is.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape, device or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        ``"triton"`` computes in float32 and rounds once, and sums the gradients of gamma and bias over rows in an order
        that depends on the shape alone.

    Example:
        >>> scale_residual(torch.zeros(1, 8, 9, 64), torch.ones(64), torch.zeros(1, 8, 9, 64)).shape
        torch.Size([1, 8, 9, 64])
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., C], got a scalar")
    others = [("gamma", gamma, x.shape[-1:]), ("y", y, x.shape)]
    if bias is not None:
        others.append(("bias", bias, x.shape[-1:]))
    for name, t, shape in others:
        check_tensor(name, t)
        check_like(name, t, x)
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    entry = SCALE_RESIDUAL.select(_choice(x, y) if impl == "auto" else impl, x, gamma, y, bias)
    out: torch.Tensor = entry.run(x, gamma, y, bias)
    return out
