"""Sums over the shares that programs write, in the order, memory and dtype of the result.

A reduction over the first axis of few columns and many rows gives a library little to do at the same time, and what it
makes is then cast and put into another order, a kernel each. Here one kernel does all that. A program sums all rows of
a block of columns, tile by tile in a fixed order, so results are the same in every run.

Results and the rows of what is summed have less than 2³¹ elements (the callers see to it). Sums are float32.
"""

import torch
import triton
import triton.language as tl

_TILE = 4096  # elements of a program at a time
_WARPS = 8
_MULTIPROCESSORS = 132  # of an H100, each of which runs up to four programs at the same time
_BLOCKS = (16, 32, 64, 128, 256, 512)  # columns of a program: few to fill the device, in whole sectors of memory
_NARROW = (4, 8)  # in parts of sectors, where rows are so many that a program's loop over them takes longer
_AXES = 5


@triton.jit(
    do_not_specialize=[
        "rows",
        "row_stride",
        "columns",
        *(f"size_{axis}" for axis in range(1, _AXES)),
        *(f"{name}_{axis}" for name in ("from", "to") for axis in range(_AXES)),
        "more_start",
        "more_stride",
        "more_columns",
    ]
)
def sum_shares_kernel(
    partial_ptr,
    out_ptr,
    more_ptr,
    rows,
    row_stride,
    columns,
    size_1,
    size_2,
    size_3,
    size_4,
    from_0,
    from_1,
    from_2,
    from_3,
    from_4,
    to_0,
    to_1,
    to_2,
    to_3,
    to_4,
    more_start,
    more_stride,
    more_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Columns count through the axes of the result, the last one first. Behind their blocks come those of more_ptr.
    blocks = tl.cdiv(columns, BLOCK_C)
    pid = tl.program_id(0)
    column = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    rest = column // size_4
    i_4 = column - rest * size_4
    i_3 = rest % size_3
    rest = rest // size_3
    i_2 = rest % size_2
    rest = rest // size_2
    i_1 = rest % size_1
    i_0 = rest // size_1
    source = i_0 * from_0 + i_1 * from_1 + i_2 * from_2 + i_3 * from_3 + i_4 * from_4
    target = i_0 * to_0 + i_1 * to_1 + i_2 * to_2 + i_3 * to_3 + i_4 * to_4
    found = inside
    if more_ptr is not None:
        more = column - blocks * BLOCK_C
        of_more = (more >= 0) & (more < more_columns)
        source = tl.where(of_more, more_start + more, source)
        found = inside | of_more
        row_stride = tl.where(pid < blocks, row_stride, more_stride)
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + r
        offset = row.to(tl.int64)[:, None] * row_stride + source[None, :]
        sums += tl.load(partial_ptr + offset, mask=(row < rows)[:, None] & found[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + target, total.to(out_ptr.dtype.element_ty), mask=inside)
    if more_ptr is not None:
        tl.store(more_ptr + more, total.to(more_ptr.dtype.element_ty), mask=of_more)


def _axes(partial, out):
    """Return the axes of a result as (size, stride of a share, stride of the result), neighbours as one if they can."""
    axes = []
    for size, source, target in zip(out.shape, partial.stride()[1:], out.stride(), strict=True):
        if axes and (axes[-1][1], axes[-1][2]) == (size * source, size * target):
            axes[-1] = (axes[-1][0] * size, source, target)
        elif size > 1:
            axes.append((size, source, target))
    return [(1, 0, 0)] * (_AXES - len(axes)) + axes


def _columns_of(rows, columns):
    """Return how many columns a program takes."""
    if rows > _TILE // _BLOCKS[0] and triton.cdiv(columns, _NARROW[-1]) <= _MULTIPROCESSORS:
        return next(b for b in _NARROW if triton.cdiv(columns, b) <= _MULTIPROCESSORS)
    return next((b for b in _BLOCKS if triton.cdiv(columns, b) <= 4 * _MULTIPROCESSORS), _BLOCKS[-1])


def sum_shares(partial, out, more=None, more_out=None):
    """Write ``partial.sum(0)`` into ``out``, and if given that of ``more`` into ``more_out``.

    Args:
        partial: float32 ``[P, ...]`` of up to five axes behind P that are not one in memory, any strides.
        out: ``[...]``, floating point, any strides.
        more: float32 ``[P, N]``, in the memory of ``partial`` behind its first element, the columns next to each other.
        more_out: ``[N]``, contiguous.
    """
    axes = _axes(partial, out)
    rows, columns = partial.shape[0], out.numel()
    start = stride = count = 0
    if more is not None:
        start, stride = more.storage_offset() - partial.storage_offset(), more.stride(0)
        count = more.shape[1]
    block_c = _columns_of(rows, columns)
    block_r = min(triton.next_power_of_2(rows), _TILE // block_c)
    sizes, sources, targets = zip(*axes, strict=True)
    with torch.cuda.device_of(partial):
        sum_shares_kernel[(triton.cdiv(columns, block_c) + triton.cdiv(count, block_c),)](
            partial,
            out,
            more_out,
            rows,
            partial.stride(0),
            columns,
            *sizes[1:],
            *sources,
            *targets,
            start,
            stride,
            count,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=min(max(block_r * block_c // 128, 1), _WARPS),
            num_stages=1,
            enable_fp_fusion=True,
        )
    return out
