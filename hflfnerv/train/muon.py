"""Muon: momentum whose matrices are orthogonalised before they are added to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]

# The quintic of Jordan et al. It does not converge to 1: it takes every singular value of (0, 1] to about 0.7..1.2 in
# the fewest steps, which is as good for an optimiser.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_SMALL = 16  # rows below which a step is all overhead


def orthogonalise(x: Tensor) -> Tensor:
    """Take the singular values of a matrix near 1 and keep its singular vectors.

    Five Newton-Schulz steps ``X <- a X + (b X X^T + c (X X^T)^2) X`` from ``X = x / |x|_F`` (K. Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024).

    Args:
        x: floating ``[M, N]``; computed in its own dtype.

    Returns:
        ``[M, N]`` with singular values in about 0.7..1.2; those under 1e-3 of the norm stay smaller. Zero for zero.
    """
    (result,) = orthogonalise_all([x])
    return result


def orthogonalise_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return :func:`orthogonalise` of each; those that take the same steps take them together, in one batch."""
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / x.norm().clamp(min=1e-20) for x in wide]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(wide):
        rows, columns = x.shape
        by_gram = rows >= _SMALL and 2 * rows <= columns and x.dtype in (torch.float32, torch.float64)
        groups.setdefault((by_gram, x.dtype, x.device, rows, None if by_gram else columns), []).append(i)
    results = list(wide)
    for (by_gram, *_), members in groups.items():
        chosen = [wide[i] for i in members]
        for i, result in zip(members, _by_gram(chosen) if by_gram else _by_steps(chosen), strict=True):
            results[i] = result
    return [y.mT if x.shape[0] > x.shape[1] else y for x, y in zip(matrices, results, strict=True)]


def _by_steps(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Take the steps for matrices of one shape."""
    x = _stacked(matrices)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _add_product(x, _add_product(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.unbind() if x.ndim == 3 else [x]


def _by_gram(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same for matrices of as many rows, with one product of the size of each in place of ten.

    Every step multiplies by a polynomial of ``X X^T``, and these commute: the product of all five is found from the
    first ``X X^T`` alone. An error of eps in its small eigenvalues grows to ``a^8 eps``: 2e-3 in float32, too much in
    half precision.
    """
    gram = _stacked([x @ x.mT for x in matrices])
    product = factor = _factor(gram)
    for _ in range(_STEPS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return [left @ x for left, x in zip(product if product.ndim == 3 else [product], matrices, strict=True)]


def _factor(gram: Tensor) -> Tensor:
    """Return ``a + b G + c G^2``, by which a step multiplies."""
    factor = _add_product(gram, gram, gram, beta=_B, alpha=_C)
    factor.diagonal(dim1=-2, dim2=-1).add_(_A)
    return factor


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices as a batch; one alone as it is, for which a product takes less time."""
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0]


def _add_product(added: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return ``beta added + alpha left right`` of matrices or batches of them."""
    add = torch.addmm if added.ndim == 2 else torch.baddbmm
    return add(added, left, right, beta=beta, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, each seen as a matrix ``[out, in * k * k]``.

    ``m <- mu m + (1 - mu) g``, ``w <- w - lr sqrt(max(1, M / N)) orthogonalise((1 - mu) g + mu m)`` (Jordan et al.; the
    momentum is Nesterov's). Every direction of a weight then moves by the same length, whatever its gradient: a network
    for one video learns its weak directions, the detail, from the first epochs on. The step does not depend on the
    scale of the loss. ``torch.optim.Muon`` takes matrices alone, and no learning rate on the device.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; a float, or a tensor of one element where a captured CUDA graph is to read it.
        momentum: mu, in [0, 1).

    Raises:
        ValueError: a parameter has fewer than two dimensions, or a setting is out of its range.

    Numerics:
        The orthogonalisation runs in the dtype of the weights on a CPU and in bfloat16 on a GPU, whose error is far
        below that of the quintic itself.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float | Tensor = 0.02, momentum: float = 0.95
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"params must have two or more dimensions, got one of shape {tuple(parameter.shape)}: "
                        "leave biases and gains to Adam"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [self._accelerated(parameter, group["momentum"]) for parameter in parameters]
            for parameter, update in zip(parameters, orthogonalise_all(matrices), strict=True):
                _move(parameter, update, group["lr"])
        return loss

    def _accelerated(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the momentum, and return the matrix to orthogonalise."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(average, momentum).flatten(1)
        return matrix.bfloat16() if matrix.is_cuda else matrix


def _move(parameter: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """Take a step of the optimiser along an orthogonalised matrix."""
    scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
    update = update.view_as(parameter)
    if isinstance(lr, Tensor):
        parameter.sub_(update * (lr * scale))
    else:
        parameter.add_(update, alpha=-lr * scale)
