"""Registration of the operations with PyTorch, so that torch.compile, CUDA graphs and autograd go through them.

Each schema ends in ``str impl``: one fake and one gradient formula serve every kernel, and the tests can put both
through opcheck and gradcheck where there is no GPU, with the implementation that needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]

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
