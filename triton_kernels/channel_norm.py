"""LayerNorm over rows of channels, one after the other in memory, and its gradients.

A row is in the registers of one program, so that its mean is taken away before squares are summed, and everything is
read once. The gradients need mean and deviation again: they read x in any case, and take both from it.

There are less than 2³¹ rows (the callers see to it). Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from ._rows import shares, tile
from ._sums import sum_shares

_WARPS = 4
_BACKWARD_WARPS = 8


@triton.jit
def _normalise(x_ptr, offset, inside, shift_ptr, c, C: tl.constexpr, EPS: tl.constexpr):
    """Rows of x and shift with mean 0 and variance 1, zero outside; and what they were multiplied by."""
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x = tl.where(inside, x + tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :], 0.0)
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + EPS)[:, None]
    return centred * rstd, rstd


@triton.jit
def channel_norm_fwd_kernel(
    x_ptr,
    gain_ptr,
    bias_ptr,
    shift_ptr,
    y_ptr,
    rows,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_R
    start = first.to(tl.int64) * C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    offset = (r * C)[:, None] + c[None, :]
    inside = (first + r < rows)[:, None] & (c < C)[None, :]
    gain = tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normal, _ = _normalise(x_ptr + start, offset, inside, shift_ptr, c, C, EPS)
    y = normal * gain[None, :] + bias[None, :]
    tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    gain_ptr,
    shift_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    steps,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A share of the rows, of which there are so many that offsets inside one fit int32.
    share = tl.program_id(0)
    first = share * steps * BLOCK_R
    start = first.to(tl.int64) * C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    gain = tl.load(gain_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if shift_ptr is not None:
        dshift = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        row = step * BLOCK_R + r
        offset = (row * C)[:, None] + c[None, :]
        inside = (row < rows - first)[:, None] & (c < C)[None, :]
        dy = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        normal, rstd = _normalise(x_ptr + start, offset, inside, shift_ptr, c, C, EPS)
        if partial_ptr is not None:
            dgain += dy * normal
            dbias += dy
        if dx_ptr is not None or shift_ptr is not None:
            # What mean and deviation take away: the slopes' mean, and their part along the row.
            slope = dy * gain
            mean = (tl.sum(slope, axis=1) / C)[:, None]
            along = (tl.sum(slope * normal, axis=1) / C)[:, None]
            dx = rstd * (slope - mean - normal * along)
            if dx_ptr is not None:
                tl.store(dx_ptr + start + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if shift_ptr is not None:
                dshift += tl.where(inside, dx, 0.0)
    if partial_ptr is not None:
        target = partial_ptr + share * (2 if shift_ptr is None else 3) * C + c
        tl.store(target, tl.sum(dgain, axis=0), mask=c < C)
        tl.store(target + C, tl.sum(dbias, axis=0), mask=c < C)
        if shift_ptr is not None:
            tl.store(target + 2 * C, tl.sum(dshift, axis=0), mask=c < C)


def channel_norm_fwd(x, gain, bias, shift, eps, out_dtype):
    """Return y ``[..., C]``, contiguous.

    Args:
        x: ``[..., C]``, contiguous.
        gain: ``[C]``, contiguous.
        bias: ``[C]``, contiguous.
        shift: ``[C]``, contiguous, what is added to x, or None.
        eps: added to the variance.
        out_dtype: of y.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_r, block_c = tile(channels, _WARPS)
    y = torch.empty_like(x, dtype=out_dtype)
    with torch.cuda.device_of(x):
        channel_norm_fwd_kernel[(triton.cdiv(rows, block_r),)](
            x,
            gain,
            bias,
            shift,
            y,
            rows,
            C=channels,
            EPS=eps,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return y


def channel_norm_bwd(dy, x, gain, shift, dx, eps, *, sums):
    """Write the gradient of x, and return those of gain and bias, ``[2, C]`` in float32, and of shift in its dtype.

    The sums over rows are taken in two passes, a share for each program and then the sum of those, so they are the same
    in every run.

    Args:
        dy: ``[..., C]``, contiguous.
        x: ``[..., C]``, contiguous.
        gain: ``[C]``, contiguous.
        shift: ``[C]``, contiguous, what was added to x, or None.
        dx: memory for the gradient of x, contiguous, or None where it is not wanted.
        eps: added to the variance.
        sums: whether the others are wanted; None otherwise, and that of shift is without one.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_r, block_c = tile(channels, _BACKWARD_WARPS)
    if shift is not None:  # a third sum takes registers
        block_r = max(block_r // 2, 1)
    programs, steps = shares(rows, block_r)
    partial = None
    if sums:
        partial = torch.empty((programs, 2 if shift is None else 3, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        channel_norm_bwd_kernel[(programs,)](
            dy,
            x,
            gain,
            shift,
            dx,
            partial,
            rows,
            steps,
            C=channels,
            EPS=eps,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=_BACKWARD_WARPS,
            enable_fp_fusion=True,
        )
        if partial is None:
            return None, None
        if shift is None and programs == 1:
            return partial[0], None
        made = partial.new_empty(2, channels)
        if shift is None:
            return sum_shares(partial, made), None
        dshift = torch.empty_like(shift)
        return sum_shares(partial[:, :2], made, partial[:, 2], dshift), dshift
