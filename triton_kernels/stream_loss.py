"""Activations, sum of the streams and squared error in one pass over channels-last images, and the gradient in another.

Images and target have the same memory order, (row, column, colour), but rows of their own lengths where the image is
larger than the frame. One image has at most 2³¹ - 1 elements (the callers see to it), so offsets inside an image fit
int32 and those of the images are int64. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from ._activations import tanh

_BLOCK = 1024
_ROWS = 2  # rows of one program


@triton.jit
def _error(low_ptr, high_ptr, target_ptr, low_offset, high_offset, target_offset, mask):
    """Error at the places of one row, and the derivatives of both activations there."""
    dark, low_slope = tanh(tl.load(low_ptr + low_offset, mask=mask, other=0.0).to(tl.float32))
    image = dark * 0.5 + 0.5
    high_slope = low_slope
    if high_ptr is not None:
        fine, high_slope = tanh(tl.load(high_ptr + high_offset, mask=mask, other=0.0).to(tl.float32))
        image += fine
    target = tl.load(target_ptr + target_offset, mask=mask, other=0).to(tl.float32)
    return tl.where(mask, image - target / 255.0, 0.0), low_slope * 0.5, high_slope


@triton.jit
def stream_loss_fwd_kernel(
    low_ptr,
    high_ptr,
    target_ptr,
    partial_ptr,
    target_rows,
    target_row,
    low_rows,
    low_row,
    high_rows,
    high_row,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # ROWS rows of a frame. Of each tensor: the number of its rows, and their length in elements.
    blocks = tl.cdiv(target_rows, ROWS)
    pid = tl.program_id(0)
    frame = (pid // blocks).to(tl.int64)
    low_ptr += frame * low_rows * low_row
    if high_ptr is not None:
        high_ptr += frame * high_rows * high_row
    target_ptr += frame * target_rows * target_row
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = pid % blocks * ROWS
    for row in range(first, tl.minimum(first + ROWS, target_rows)):
        for start in range(0, target_row, BLOCK):
            element = start + tl.arange(0, BLOCK)
            low_offset, high_offset = row * low_row + element, row * high_row + element
            target_offset = row * target_row + element
            mask = element < target_row
            error, _, _ = _error(low_ptr, high_ptr, target_ptr, low_offset, high_offset, target_offset, mask)
            total += error * error
    tl.store(partial_ptr + pid, tl.sum(total, axis=0))


@triton.jit
def stream_loss_bwd_kernel(
    dloss_ptr,
    low_ptr,
    high_ptr,
    target_ptr,
    dlow_ptr,
    dhigh_ptr,
    target_rows,
    target_row,
    low_rows,
    low_row,
    high_rows,
    high_row,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # As above, of the images: outside the frame their gradient is zero.
    rows, columns = low_rows, low_row
    if high_ptr is not None:
        rows, columns = tl.maximum(low_rows, high_rows), tl.maximum(low_row, high_row)
    blocks = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    frame = (pid // blocks).to(tl.int64)
    low_ptr += frame * low_rows * low_row
    dlow_ptr += frame * low_rows * low_row
    if high_ptr is not None:
        high_ptr += frame * high_rows * high_row
        dhigh_ptr += frame * high_rows * high_row
    target_ptr += frame * target_rows * target_row
    scale = 2.0 * tl.load(dloss_ptr + frame) / (target_rows * target_row)
    first = pid % blocks * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        target_end = tl.where(row < target_rows, target_row, 0)
        low_end = tl.where(row < low_rows, low_row, 0)
        high_end = tl.where(row < high_rows, high_row, 0)
        for start in range(0, columns, BLOCK):
            element = start + tl.arange(0, BLOCK)
            low_offset, high_offset = row * low_row + element, row * high_row + element
            target_offset = row * target_row + element
            mask = element < target_end
            error, low_slope, high_slope = _error(
                low_ptr, high_ptr, target_ptr, low_offset, high_offset, target_offset, mask
            )
            error *= scale
            dlow = (error * low_slope).to(dlow_ptr.dtype.element_ty)
            tl.store(dlow_ptr + low_offset, dlow, mask=element < low_end)
            if high_ptr is not None:
                dhigh = (error * high_slope).to(dhigh_ptr.dtype.element_ty)
                tl.store(dhigh_ptr + high_offset, dhigh, mask=element < high_end)


def _sizes(target, low, high):
    """Return the number of rows and their length in elements, of the target and of the images."""
    images = (low, low if high is None else high)
    return [target.shape[1], 3 * target.shape[2], *(size for t in images for size in (t.shape[2], 3 * t.shape[3]))]


def stream_loss_fwd(low, target, high):
    """Return the mean squared errors ``[B]`` in float32.

    Args:
        low: ``[B, 3, H', W']``, channels-last.
        target: ``[B, H, W, 3]``, uint8, contiguous.
        high: as ``low``, with rows and columns of its own, or None.
    """
    batch, rows, columns, _ = target.shape
    blocks = triton.cdiv(rows, _ROWS)
    partial = torch.empty((batch, blocks), dtype=torch.float32, device=low.device)
    if batch > 0:
        sizes = _sizes(target, low, high)
        with torch.cuda.device_of(low):
            stream_loss_fwd_kernel[(batch * blocks,)](
                low, high, target, partial, *sizes, BLOCK=_BLOCK, ROWS=_ROWS, enable_fp_fusion=True
            )
    return partial.sum(dim=1) / (3 * rows * columns)


def stream_loss_bwd(dloss, low, target, high):
    """Return ``(dlow, dhigh)``, channels-last, for dloss ``[B]`` in float32; the second is None without ``high``."""
    dlow = torch.empty_like(low, memory_format=torch.channels_last)
    dhigh = None if high is None else torch.empty_like(high, memory_format=torch.channels_last)
    if low.numel() > 0:
        sizes = _sizes(target, low, high)
        grid = (low.shape[0] * triton.cdiv(max(sizes[2], sizes[4]), _ROWS),)
        with torch.cuda.device_of(low):
            stream_loss_bwd_kernel[grid](
                dloss, low, high, target, dlow, dhigh, *sizes, BLOCK=_BLOCK, ROWS=_ROWS, enable_fp_fusion=True
            )
    return dlow, dhigh
