"""What follows the depthwise convolution in a ConvNeXt block, and its gradients: for the encoders here.

It is none of the public operations: ``x + gamma * linear2(GELU(linear1(LayerNorm(u))))`` is its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from . import _cpp
from ._channel_norm import channel_norm
from ._check import compute_dtype
from ._library import register, register_gradient
from ._scale_residual import scale_residual

__all__ = ["INVERTED_BOTTLENECK", "Bottleneck", "inverted_bottleneck"]


class Bottleneck(NamedTuple):
    """The parameters: of the norm, of the linear layers from C to N channels and back, and the scale of the branch."""

    gain: torch.Tensor
    shift: torch.Tensor
    weight1: torch.Tensor
    bias1: torch.Tensor
    weight2: torch.Tensor
    bias2: torch.Tensor
    gamma: torch.Tensor


def _run_reference(x: torch.Tensor, u: torch.Tensor, parameters: Bottleneck, eps: float) -> torch.Tensor:
    gain, shift, weight1, bias1, weight2, bias2, gamma = parameters
    y = channel_norm(u, gain, shift, eps=eps, out_dtype=compute_dtype(u), impl="reference")
    y = F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)
    return scale_residual(x, gamma, y, impl="reference")


def _run_amx(x: torch.Tensor, u: torch.Tensor, parameters: Bottleneck, eps: float) -> torch.Tensor:
    gain, shift, *linear, gamma = parameters
    linear = [p.to(torch.bfloat16) for p in linear]
    out: torch.Tensor = torch.ops.hflfnerv.inverted_bottleneck(
        x, u.to(torch.bfloat16), gain, shift, *linear, gamma, eps
    )
    return out


def _amx_rejects(x: torch.Tensor, u: torch.Tensor, parameters: Bottleneck, eps: float) -> str | None:
    reason = _cpp.rejects_amx_operand(u)
    if reason is not None:
        return reason
    dtype = torch.promote_types(x.dtype, parameters.gamma.dtype)
    if dtype != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16):
        return f"x and gamma of dtypes {x.dtype} and {parameters.gamma.dtype} are not added in torch.float32"
    return f"x of shape {tuple(x.shape)} is empty" if x.numel() == 0 else None


INVERTED_BOTTLENECK = ImplementationTable(
    "inverted_bottleneck",
    [
        Implementation("amx", _run_amx, _cpp.unavailable_amx, _amx_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _as_read(t: torch.Tensor) -> torch.Tensor:
    """Return a parameter as the kernel reads it: a matrix in bfloat16, a vector in float32."""
    return t.to(torch.bfloat16 if t.dim() == 2 else torch.float32).contiguous()


def _sizes(u: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[int]:
    return [u.numel() // u.shape[-1], u.shape[-1], Bottleneck(*parameters).weight1.shape[0]]


def _forward(
    x: torch.Tensor,
    u: torch.Tensor,
    *parameters_and_eps: Any,
) -> torch.Tensor:
    *given, eps = parameters_and_eps
    tensors = [_as_read(t) for t in given]
    x, u = x.contiguous(), u.contiguous()
    out = torch.empty_like(x, dtype=torch.float32)
    _cpp.load().inverted_bottleneck_fwd(
        _sizes(u, tensors),
        _cpp.dtype_name(x.dtype),
        [_cpp.address(t, t.dtype) for t in tensors],
        eps,
        _cpp.address(u, torch.bfloat16),
        _cpp.address(x, x.dtype),
        _cpp.address(out, torch.float32),
        threads=torch.get_num_threads(),
    )
    return out


def _forward_fake(x: torch.Tensor, u: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _backward(
    dout: torch.Tensor,
    u: torch.Tensor,
    *parameters_and_eps: Any,
) -> tuple[torch.Tensor, ...]:
    *given, eps = parameters_and_eps
    tensors = [_as_read(t) for t in given]
    dout, u = dout.contiguous(), u.contiguous()
    du = torch.empty_like(u)
    gradients = [torch.empty_like(t, dtype=torch.float32) for t in tensors]
    _cpp.load().inverted_bottleneck_bwd(
        _sizes(u, tensors),
        [_cpp.address(t, t.dtype) for t in tensors],
        eps,
        _cpp.address(u, torch.bfloat16),
        _cpp.address(dout, torch.float32),
        _cpp.address(du, torch.bfloat16),
        [_cpp.address(t, torch.float32) for t in gradients],
        threads=torch.get_num_threads(),
    )
    return du, *(g.to(t.dtype) for g, t in zip(gradients, given, strict=True))


def _backward_fake(dout: torch.Tensor, u: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    return u.new_empty(u.shape), *(t.new_empty(t.shape) for t in others[:-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *tensors, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients: list[torch.Tensor | None] = [None] * 8
    if any(ctx.needs_input_grad[1:9]):
        gradients = list(torch.ops.hflfnerv.inverted_bottleneck_backward(dout, *ctx.saved_tensors, ctx.eps))
    wanted = ctx.needs_input_grad
    dx = dout.to(ctx.x_dtype) if wanted[0] else None
    return dx, *(g if w else None for g, w in zip(gradients, wanted[1:9], strict=True)), None


_PARAMETERS = (
    "Tensor gain, Tensor shift, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor gamma, float eps"
)
# u is bfloat16, x is that or float32; parameters are of any dtype, and so are their gradients.
register(
    f"inverted_bottleneck(Tensor x, Tensor u, {_PARAMETERS}) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    f"inverted_bottleneck_backward(Tensor dout, Tensor u, {_PARAMETERS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


def inverted_bottleneck(
    x: torch.Tensor, u: torch.Tensor, parameters: Bottleneck, *, eps: float, impl: str = "auto"
) -> torch.Tensor:
    """Add the branch of a ConvNeXt block to x, from behind its depthwise convolution (Liu et al., arXiv 2201.03545).

    Equivalent PyTorch: ``x + gamma * F.linear(F.gelu(F.linear(n, weight1, bias1)), weight2, bias2)`` with
    ``n = F.layer_norm(u, gain.shape, gain, shift, eps)``.

    Args:
        x: ``[..., C]``, floating point.
        u: ``[..., C]`` in x's dtype, or in that in which autocast computes.
        parameters: gain, shift, the second bias and gamma ``[C]``, weights ``[N, C]`` and ``[C, N]``, the first bias
            ``[N]``.
        eps: added to the variance.
        impl: ``"auto"``, ``"amx"`` (CPU with AMX: bfloat16 products, gradients included, where x or gamma is in
            float32) or ``"reference"`` (PyTorch, anywhere).

    Returns:
        ``[..., C]`` in the dtype to which PyTorch promotes x and the branch.

    Raises:
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        ``"amx"`` rounds u, the norm's result, what GELU gives and the gradients of both to bfloat16, which it
        multiplies; all else is in float32. It keeps nothing but u for the gradients, and sums those of the parameters
        over pixels in an order that depends on the shape alone.
    """
    entry = INVERTED_BOTTLENECK.select(impl, x, u, parameters, eps)
    out: torch.Tensor = entry.run(x, u, parameters, eps)
    return out
