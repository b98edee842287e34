"""Registration of the operations with PyTorch, so that torch.compile, CUDA graphs and autograd go through them.

Each schema ends in ``str impl``: one fake and one gradient formula serve every kernel, and the tests can put both
through opcheck and gradcheck where there is no GPU, with the implementation that needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register", "register_convolution", "register_gradient"]

_LIBRARY: Any = torch.library.Library("hflfnerv", "DEF")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define ``hflfnerv::<schema>``.

    Args:
        schema: name, arguments and results, as in ``"op(Tensor x) -> Tensor"``.
        run: the implementation, below autograd, for every device.
        fake: the same for tensors without data: shapes, dtypes and strides of the results.
        setup_context: ``(ctx, inputs, output)``, keeps what ``backward`` needs.
        backward: ``(ctx, *grads)``, one gradient per argument; None where no argument can want one.
    """
    name = schema.split("(", maxsplit=1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hflfnerv::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"hflfnerv::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def register_gradient(schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``hflfnerv::<op>_backward``, the gradient of an operation, which has none itself.

    Args:
        schema: name, arguments and results, as in ``"op_backward(Tensor dy) -> Tensor"``.
        run: see :func:`register`.
        fake: likewise.
    """
    op = schema.split("(", maxsplit=1)[0].removesuffix("_backward")

    def no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{op} has no second derivative in its kernels; use impl='reference'")

    register(schema, run=run, fake=fake, setup_context=None, backward=no_second_derivative)


def register_convolution(
    name: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Define ``hflfnerv::<name>``, a convolution of ``(x, weight, bias, impl)``, and its gradient.

    Args:
        name: of the operation.
        run: see :func:`register`.
        fake: likewise.
        backward: ``(dy, x, weight, wanted, impl)``, the gradients of x, weight and bias, empty where not wanted.
        backward_fake: the same for tensors without data.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, ctx.impl = inputs
        ctx.with_bias = bias is not None
        ctx.save_for_backward(x, weight)

    def autograd(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.with_bias and ctx.needs_input_grad[2]]
        op = getattr(torch.ops.hflfnerv, f"{name}_backward")
        gradients = op(dy, *ctx.saved_tensors, wanted, ctx.impl)
        return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), None)

    register(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
        run=run,
        fake=fake,
        setup_context=setup_context,
        backward=autograd,
    )
    arguments = "Tensor dy, Tensor x, Tensor weight, bool[] wanted, str impl"
    register_gradient(f"{name}_backward({arguments}) -> (Tensor, Tensor, Tensor)", run=backward, fake=backward_fake)
