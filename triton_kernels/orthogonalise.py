"""The steps of Newton and Schulz for many small matrices at once, each by a program of its own.

All factors of the steps are polynomials of the first Gram matrix, so they commute, are symmetric, and have its size: a
program forms X Xᵀ, makes the product of the factors out of it, and multiplies X by that once. A library takes more than
ten kernels for each matrix, none of which fills a device.

What a program computes with lies in a memory of its own, which the caches hold, since it does not fit into registers;
its threads read what the others wrote, so there is a barrier after each product. Products of float32 are three of TF32:
an error in the small eigenvalues of X Xᵀ grows to a^8 times itself, and those of one alone would be too large.
"""

import functools

import torch
import triton
import triton.language as tl

_COLUMNS = 32  # of a product, at a time: more do not fit into registers
_BLOCK = 32
_BUFFERS = 5


@triton.jit
def _product(
    left_ptr,
    right_ptr,
    to_ptr,
    added_ptr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    DIAGONAL: tl.constexpr,
    NP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # to = ALPHA left right + BETA added + DIAGONAL, or without added_ptr to = left right. Rows are read of both, as the
    # tensor cores want them: all matrices here are symmetric.
    n = tl.arange(0, NP)
    k = tl.arange(0, BLOCK)
    for panel in range(0, NP, COLUMNS):
        column = panel + tl.arange(0, COLUMNS)
        sums = tl.zeros((NP, COLUMNS), dtype=tl.float32)
        for start in range(0, NP, BLOCK):
            left = tl.load(left_ptr + n[:, None] * NP + (start + k)[None, :])
            right = tl.load(right_ptr + column[:, None] * NP + (start + k)[None, :])
            sums = tl.dot(left, tl.trans(right), sums, input_precision="tf32x3")
        offset = n[:, None] * NP + column[None, :]
        if added_ptr is not None:
            sums = ALPHA * sums + BETA * tl.load(added_ptr + offset)
            sums += tl.where(n[:, None] == column[None, :], DIAGONAL, 0.0)
        tl.store(to_ptr + offset, sums)
    tl.debug_barrier()


@triton.jit
def orthogonalise_kernel(
    x_ptr,
    y_ptr,
    table_ptr,
    scratch_ptr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    NP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A matrix of N <= NP rows and M columns; of a tall one the columns are taken for rows.
    pid = tl.program_id(0)
    table_ptr += pid * 5
    x_ptr += tl.load(table_ptr)
    y_ptr += tl.load(table_ptr)
    N = tl.load(table_ptr + 1)
    M = tl.load(table_ptr + 2)
    stride_n = tl.load(table_ptr + 3)
    stride_m = tl.load(table_ptr + 4)
    gram_ptr = scratch_ptr + pid.to(tl.int64) * (5 * NP * NP)
    factor_ptr = gram_ptr + NP * NP
    other_ptr = factor_ptr + NP * NP
    product_ptr = other_ptr + NP * NP
    next_ptr = product_ptr + NP * NP

    n = tl.arange(0, NP)
    k = tl.arange(0, BLOCK)
    squares = tl.zeros((NP, BLOCK), dtype=tl.float32)
    for start in range(0, M, BLOCK):
        m = start + k
        mask = (n < N)[:, None] & (m < M)[None, :]
        x = tl.load(x_ptr + n[:, None] * stride_n + m[None, :] * stride_m, mask=mask, other=0.0)
        squares += x * x
    norm = tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0))
    scale = 1.0 / tl.where(norm < 1e-20, 1e-20, norm)

    for panel in range(0, NP, COLUMNS):
        column = panel + tl.arange(0, COLUMNS)
        gram = tl.zeros((NP, COLUMNS), dtype=tl.float32)
        for start in range(0, M, BLOCK):
            m = start + k
            inside = (m < M)[None, :]
            left_offset = n[:, None] * stride_n + m[None, :] * stride_m
            right_offset = column[:, None] * stride_n + m[None, :] * stride_m
            left = tl.load(x_ptr + left_offset, mask=(n < N)[:, None] & inside, other=0.0)
            right = tl.load(x_ptr + right_offset, mask=(column < N)[:, None] & inside, other=0.0)
            gram = tl.dot(left * scale, tl.trans(right * scale), gram, input_precision="tf32x3")
        offset = n[:, None] * NP + column[None, :]
        tl.store(gram_ptr + offset, gram)
        tl.store(product_ptr + offset, (n[:, None] == column[None, :]).to(tl.float32))
    tl.debug_barrier()

    for step in range(STEPS):
        _product(gram_ptr, gram_ptr, factor_ptr, gram_ptr, C, B, A, NP, COLUMNS, BLOCK)
        _product(factor_ptr, product_ptr, next_ptr, None, 1.0, 0.0, 0.0, NP, COLUMNS, BLOCK)
        if step + 1 < STEPS:
            _product(factor_ptr, gram_ptr, other_ptr, None, 1.0, 0.0, 0.0, NP, COLUMNS, BLOCK)
            _product(other_ptr, factor_ptr, gram_ptr, None, 1.0, 0.0, 0.0, NP, COLUMNS, BLOCK)
        product_ptr, next_ptr = next_ptr, product_ptr

    for start in range(0, M, COLUMNS):
        m = start + tl.arange(0, COLUMNS)
        inside = (m < M)[None, :]
        y = tl.zeros((NP, COLUMNS), dtype=tl.float32)
        for inner in range(0, NP, BLOCK):
            row = inner + k
            left = tl.load(product_ptr + n[:, None] * NP + row[None, :])
            x_offset = row[:, None] * stride_n + m[None, :] * stride_m
            x = tl.load(x_ptr + x_offset, mask=(row < N)[:, None] & inside, other=0.0)
            y = tl.dot(left, x * scale, y, input_precision="tf32x3")
        tl.store(y_ptr + n[:, None] * stride_n + m[None, :] * stride_m, y, mask=(n < N)[:, None] & inside)


@functools.cache
def _table(shapes, device):
    """Return offset, rows, columns and their strides of each matrix: made once, and kept, since graphs read it."""
    entries, offset = [], 0
    for rows, columns in shapes:
        tall = rows > columns
        entries.append((offset, *((columns, rows, 1, columns) if tall else (rows, columns, columns, 1))))
        offset += rows * columns
    return torch.tensor(entries, dtype=torch.int32, device=device)


def orthogonalise(matrices, quintic, steps):
    """Return ``steps`` steps ``X <- a X + (b X Xᵀ + c (X Xᵀ)²) X`` of each matrix, from ``X = x / |x|``.

    Args:
        matrices: float32 ``[rows, columns]`` on one device, the smaller of both at most 128.
        quintic: a, b, c.
        steps: their number.
    """
    shapes = tuple(tuple(x.shape) for x in matrices)
    x = torch.cat([matrix.reshape(-1) for matrix in matrices])
    y = torch.empty_like(x)
    padded = 64 if max(min(shape) for shape in shapes) <= 64 else 128
    scratch = torch.empty((len(shapes), _BUFFERS, padded, padded), dtype=torch.float32, device=x.device)
    a, b, c = quintic
    with torch.cuda.device_of(x):
        orthogonalise_kernel[(len(shapes),)](
            x,
            y,
            _table(shapes, x.device),
            scratch,
            A=a,
            B=b,
            C=c,
            STEPS=steps,
            NP=padded,
            COLUMNS=_COLUMNS,
            BLOCK=_BLOCK,
            num_warps=8 if padded == 128 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return [part.view(shape) for part, shape in zip(y.split([m.numel() for m in matrices]), shapes, strict=True)]
