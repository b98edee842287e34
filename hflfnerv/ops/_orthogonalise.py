"""Orthogonalisation of matrices by the steps of Newton and Schulz, for the optimiser Muon.

It is none of the public operations: :class:`hflfnerv.train.Muon` is what uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._concurrent import concurrently
from .._impl import Implementation, ImplementationTable
from . import _cpp, _cuda, _triton

__all__ = ["ORTHOGONALISE", "SMALL_ROWS", "multiplies_bfloat16", "orthogonalise", "orthogonalise_all"]

# The quintic of Jordan et al. It does not converge to 1: it takes every singular value of (0, 1] to about 0.7..1.2 in
# the fewest steps, which is as good for an optimiser.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_OVERHEAD_ROWS = 16  # below which a step is all overhead
_ALIGNED = 8  # elements of 16 bits that a GPU's tensor cores read at once: rows of others are slow

#: The smaller side of a matrix that ``"cuda"`` and ``"triton"`` take has at most so many rows or columns.
SMALL_ROWS = 128
_LARGEST = 2**22  # elements of a matrix: offsets have 32 bits, and there may be hundreds of matrices


def multiplies_bfloat16(x: Tensor) -> bool:
    """Return whether x is where bfloat16 is multiplied faster than float32: on a GPU, or on a CPU with AMX."""
    return x.is_cuda or (x.device.type == "cpu" and _cpp.unavailable_amx() is None)


def orthogonalise(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Take the singular values of a matrix near 1 and keep its singular vectors.

    Five Newton-Schulz steps ``X <- a X + (b X X^T + c (X X^T)^2) X`` from ``X = x / |x|_F`` (K. Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024).

    Args:
        x: floating ``[M, N]``; computed in its own dtype.
        impl: ``"auto"``, ``"cuda"`` (float32 on Hopper, a side of at most 128), ``"triton"`` (the same on any GPU),
            ``"amx"`` (bfloat16 on a CPU with AMX), ``"cpp"`` (float32 on a CPU with AVX2 or AVX-512) or
            ``"reference"`` (PyTorch, anywhere).

    Returns:
        ``[M, N]`` with singular values in about 0.7..1.2; those under 1e-3 of the norm stay smaller. Zero for zero.

    Raises:
        ValueError: the name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Every step multiplies by a polynomial of ``X X^T``, and these commute: their product is found from the first
        ``X X^T`` alone, always by ``"triton"`` and by ``"cuda"`` and ``"cpp"``, which compute half of each product,
        since all are symmetric, and where it takes fewer products, and not in half precision, by ``"reference"``. An
        error of eps in the small eigenvalues of ``X X^T`` grows to ``a^8 eps``: 2e-3 in float32. ``"cuda"`` and
        ``"triton"`` take three products of TF32 for one of float32. ``"amx"`` takes the steps one after the other,
        as ``"reference"`` does in half precision: what is multiplied is rounded, and sums are in float32.
    """
    (result,) = orthogonalise_all([x], impl=impl)
    return result


def orthogonalise_all(matrices: Sequence[Tensor], *, impl: str = "auto") -> list[Tensor]:
    """Return :func:`orthogonalise` of each; those that take the same steps take them together, in one batch."""
    members: dict[str, list[int]] = {}
    for i, x in enumerate(matrices):
        members.setdefault(ORTHOGONALISE.select(impl, x).name, []).append(i)
    calls = [
        functools.partial(entry.run, [matrices[i] for i in members[entry.name]])
        for entry in ORTHOGONALISE
        if entry.name in members
    ]
    return _in_order([members[entry.name] for entry in ORTHOGONALISE if entry.name in members], concurrently(*calls))


def _in_order(places: Sequence[Sequence[int]], results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the results of several calls in one list: those of ``results[k]`` at ``places[k]``."""
    at = {i: made for some, of in zip(places, results, strict=True) for i, made in zip(some, of, strict=True)}
    return [at[i] for i in range(len(at))]


def _run_cuda(matrices: Sequence[Tensor]) -> list[Tensor]:
    return _cuda.orthogonalise_matrices([x.contiguous() for x in matrices], (_A, _B, _C), _STEPS)


def _cuda_rejects(x: Tensor) -> str | None:
    return _cuda.rejects_float32(x.device, x.dtype) or _gpu_rejects(x)


def _run_triton(matrices: Sequence[Tensor]) -> list[Tensor]:
    from ..triton_kernels import orthogonalise as kernels

    made: list[Tensor] = kernels.orthogonalise([x.contiguous() for x in matrices], (_A, _B, _C), _STEPS)
    return made


def _triton_rejects(x: Tensor) -> str | None:
    return _triton.rejects_tensor(x.device, x.dtype) or _gpu_rejects(x)


def _gpu_rejects(x: Tensor) -> str | None:
    if x.dtype != torch.float32:
        return f"dtype {x.dtype} is not torch.float32"
    if not 0 < min(x.shape) <= SMALL_ROWS:
        return f"a matrix of shape {tuple(x.shape)} has no side from 1 to {SMALL_ROWS}"
    if x.numel() > _LARGEST:
        return f"a matrix of shape {tuple(x.shape)} has more than {_LARGEST} elements"
    return None


def _run_amx(matrices: Sequence[Tensor]) -> list[Tensor]:
    return _run_on_cpu(_cpp.load().orthogonalise_bfloat16, matrices, torch.bfloat16)


def _amx_rejects(x: Tensor) -> str | None:
    return _cpu_rejects(x, torch.bfloat16)


def _run_cpp(matrices: Sequence[Tensor]) -> list[Tensor]:
    return _run_on_cpu(_cpp.load().orthogonalise, matrices, torch.float32)


def _cpp_rejects(x: Tensor) -> str | None:
    return _cpu_rejects(x, torch.float32)


def _run_on_cpu(kernel: Callable[..., None], matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    matrices = [x.contiguous() for x in matrices]
    results = [torch.empty_like(x) for x in matrices]
    kernel(
        [(*x.shape, _cpp.address(x, dtype), _cpp.address(y, dtype)) for x, y in zip(matrices, results, strict=True)],
        (_A, _B, _C),
        _STEPS,
        torch.get_num_threads(),
    )
    return results


def _cpu_rejects(x: Tensor, dtype: torch.dtype) -> str | None:
    if x.device.type != "cpu":
        return _cpp.rejects_tensor(x.device, x.dtype)
    if x.dtype != dtype:
        return f"dtype {x.dtype} is not {dtype}"
    if x.numel() == 0:
        return f"a matrix of shape {tuple(x.shape)} is empty"
    return None


def _run_reference(matrices: Sequence[Tensor]) -> list[Tensor]:
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / x.norm().clamp(min=1e-20) for x in wide]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(wide):
        rows, columns = x.shape
        by_gram = rows >= _OVERHEAD_ROWS and 2 * rows <= columns and x.dtype in (torch.float32, torch.float64)
        groups.setdefault((by_gram, x.dtype, x.device, rows, None if by_gram else columns), []).append(i)
    calls = [
        functools.partial(_by_gram if by_gram else _by_steps, [wide[i] for i in members])
        for (by_gram, *_), members in groups.items()
    ]
    results = _in_order(list(groups.values()), concurrently(*calls))
    return [y.mT if x.shape[0] > x.shape[1] else y for x, y in zip(matrices, results, strict=True)]


ORTHOGONALISE = ImplementationTable(
    "orthogonalise",
    [
        Implementation("cuda", _run_cuda, _cuda.unavailable, _cuda_rejects),
        Implementation("triton", _run_triton, _triton.unavailable, _triton_rejects),
        Implementation("amx", _run_amx, _cpp.unavailable_amx, _amx_rejects),
        Implementation("cpp", _run_cpp, _cpp.unavailable, _cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _by_steps(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Take the steps for matrices of one shape."""
    x = _stacked(matrices)
    rows, columns = x.shape[-2:]
    if x.is_cuda and x.dtype.itemsize == 2:
        x = F.pad(x, (0, -columns % _ALIGNED, 0, -rows % _ALIGNED))
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _add_product(x, _add_product(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    x = x[..., :rows, :columns]
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
