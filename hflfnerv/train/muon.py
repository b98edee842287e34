"""Muon: momentum whose matrices are orthogonalised before they are added to the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._concurrent import concurrently
from .._impl import Implementation, ImplementationTable
from ..ops import _cpp

__all__ = ["ORTHOGONALISE", "Muon", "orthogonalise"]

# The quintic of Jordan et al. It does not converge to 1: it takes every singular value of (0, 1] to about 0.7..1.2 in
# the fewest steps, which is as good for an optimiser.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_SMALL = 16  # rows below which a step is all overhead


def orthogonalise(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Take the singular values of a matrix near 1 and keep its singular vectors.

    Five Newton-Schulz steps ``X <- a X + (b X X^T + c (X X^T)^2) X`` from ``X = x / |x|_F`` (K. Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024).

    Args:
        x: floating ``[M, N]``; computed in its own dtype.
        impl: ``"auto"``, ``"cpp"`` (float32 on a CPU with AVX2 or AVX-512) or ``"reference"`` (PyTorch, anywhere).

    Returns:
        ``[M, N]`` with singular values in about 0.7..1.2; those under 1e-3 of the norm stay smaller. Zero for zero.

    Raises:
        ValueError: the name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Every step multiplies by a polynomial of ``X X^T``, and these commute: their product is found from the first
        ``X X^T`` alone, always by ``"cpp"``, which computes half of each product since all are symmetric, and where it
        takes fewer products, and not in half precision, by ``"reference"``. An error of eps in the small eigenvalues of
        ``X X^T`` grows to ``a^8 eps``: 2e-3 in float32.
    """
    (result,) = orthogonalise_all([x], impl=impl)
    return result


def orthogonalise_all(matrices: Sequence[Tensor], *, impl: str = "auto") -> list[Tensor]:
    """Return :func:`orthogonalise` of each; those that take the same steps take them together, in one batch."""
    results: list[Tensor] = ORTHOGONALISE.select(impl, matrices).run(matrices)
    return results


def _run_cpp(matrices: Sequence[Tensor]) -> list[Tensor]:
    matrices = [x.contiguous() for x in matrices]
    results = [torch.empty_like(x) for x in matrices]
    _cpp.load().orthogonalise(
        [
            (*x.shape, _cpp.address(x, torch.float32), _cpp.address(y, torch.float32))
            for x, y in zip(matrices, results, strict=True)
        ],
        (_A, _B, _C),
        _STEPS,
        torch.get_num_threads(),
    )
    return results


def _cpp_rejects(matrices: Sequence[Tensor]) -> str | None:
    for x in matrices:
        if x.device.type != "cpu":
            return _cpp.rejects_tensor(x.device, x.dtype)
        if x.dtype != torch.float32:
            return f"dtype {x.dtype} is not torch.float32"
        if x.numel() == 0:
            return f"a matrix of shape {tuple(x.shape)} is empty"
    return None


def _run_reference(matrices: Sequence[Tensor]) -> list[Tensor]:
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / x.norm().clamp(min=1e-20) for x in wide]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(wide):
        rows, columns = x.shape
        by_gram = rows >= _SMALL and 2 * rows <= columns and x.dtype in (torch.float32, torch.float64)
        groups.setdefault((by_gram, x.dtype, x.device, rows, None if by_gram else columns), []).append(i)
    calls = [
        functools.partial(_by_gram if by_gram else _by_steps, [wide[i] for i in members])
        for (by_gram, *_), members in groups.items()
    ]
    results = list(wide)
    for members, made in zip(groups.values(), concurrently(*calls), strict=True):
        for i, result in zip(members, made, strict=True):
            results[i] = result
    return [y.mT if x.shape[0] > x.shape[1] else y for x, y in zip(matrices, results, strict=True)]


ORTHOGONALISE = ImplementationTable(
    "orthogonalise",
    [
        Implementation("cpp", _run_cpp, _cpp.unavailable, _cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _by_steps(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Take the steps for matrices of one shape."""
    x = _stacked(matrices)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _add_product(x, _add_product(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.unbind() if x.ndim == 3 else [x]


def _by_gram(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same for matrices of as many rows, with one product of the size of each in place of ten.

    An error of eps in the eigenvalues grows to ``a^8 eps``: too much in half precision.
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
            if parameters:
                self._move(parameters, group["lr"], group["momentum"])
        return loss

    def _move(self, parameters: list[Tensor], lr: float | Tensor, momentum: float) -> None:
        """Update the momenta, and take a step along what is orthogonalised of them."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        accelerated = torch._foreach_lerp(gradients, averages, momentum)
        matrices = [_as_matrix(x, parameter) for x, parameter in zip(accelerated, parameters, strict=True)]
        matrices = [x.bfloat16() if x.is_cuda else x for x in matrices]
        updates = [
            _as_weight(x.to(parameter.dtype), parameter)
            for x, parameter in zip(orthogonalise_all(matrices), parameters, strict=True)
        ]
        torch._foreach_mul_(updates, [max(1.0, x.shape[0] / x.shape[1]) ** 0.5 for x in matrices])
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(parameters, updates)


# The order of a matrix's columns changes nothing: that of a weight in memory needs no copy.


def _in_pixels(weight: Tensor) -> bool:
    """Return whether a weight has its input channels last in memory."""
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return what has the shape of a weight as ``[out, in k k]``, in the weight's order in memory."""
    return (x.permute(0, 2, 3, 1) if _in_pixels(weight) else x).flatten(1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """Undo :func:`_as_matrix`."""
    if not _in_pixels(weight):
        return matrix.view_as(weight)
    out, channels, rows, columns = weight.shape
    return matrix.view(out, rows, columns, channels).permute(0, 3, 1, 2)
