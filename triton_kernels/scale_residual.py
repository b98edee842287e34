"""``x + gamma * (y + bias)`` of rows of channels, one after the other in memory, and its gradients.

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
def scale_residual_fwd_kernel(
    x_ptr,
    gamma_ptr,
    y_ptr,
    bias_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_R
    start = first.to(tl.int64) * C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    offset = (r * C)[:, None] + c[None, :]
    inside = (first + r < rows)[:, None] & (c < C)[None, :]
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    out = x + gamma[None, :] * y
    tl.store(out_ptr + start + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_residual_bwd_kernel(
    dout_ptr,
    gamma_ptr,
    y_ptr,
    bias_ptr,
    dx_ptr,
    dy_ptr,
    partial_ptr,
    rows,
    steps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A share of the rows, of which there are so many that offsets inside one fit int32.
    share = tl.program_id(0)
    first = share * steps * BLOCK_R
    start = first.to(tl.int64) * C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dgamma = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if bias_ptr is not None:
        total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        row = step * BLOCK_R + r
        offset = (row * C)[:, None] + c[None, :]
        inside = (row < rows - first)[:, None] & (c < C)[None, :]
        dout = tl.load(dout_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        if partial_ptr is not None:
            dgamma += dout * tl.load(y_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                total += dout
        if dx_ptr is not None:
            tl.store(dx_ptr + start + offset, dout.to(dx_ptr.dtype.element_ty), mask=inside)
        if dy_ptr is not None:
            dy = gamma * dout
            tl.store(dy_ptr + start + offset, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        sums = tl.sum(dgamma, axis=0)
        if bias_ptr is None:
            tl.store(partial_ptr + share * C + c, sums, mask=c < C)
        else:
            # The bias is the same in all rows, and so is gamma.
            of_dout = tl.sum(total, axis=0)
            target = partial_ptr + share * 2 * C + c
            bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            factor = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            tl.store(target, sums + bias * of_dout, mask=c < C)
            tl.store(target + C, factor * of_dout, mask=c < C)


def scale_residual_fwd(x, gamma, y, bias, out_dtype):
    """Return ``x + gamma * (y + bias)``, contiguous.

    Args:
        x: ``[..., C]``, contiguous.
        gamma: ``[C]``, contiguous.
        y: ``[..., C]``, contiguous.
        bias: ``[C]``, contiguous, or None.
        out_dtype: of the result.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_r, block_c = tile(channels, _WARPS)
    out = torch.empty_like(x, dtype=out_dtype)
    with torch.cuda.device_of(x):
        scale_residual_fwd_kernel[(triton.cdiv(rows, block_r),)](
            x,
            gamma,
            y,
            bias,
            out,
            rows,
            C=channels,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return out


def scale_residual_bwd(dout, gamma, y, bias, dx, dy, *, sums):
    """Write the gradients of x and y, and return those of gamma and bias, ``[C]`` in the dtypes of these.

    The sums over rows are taken in two passes, a share for each program and then the sum of those, so they are the same
    in every run.

    Args:
        dout: ``[..., C]``, contiguous.
        gamma: ``[C]``, contiguous.
        y: ``[..., C]``, contiguous.
        bias: ``[C]``, contiguous, or None.
        dx: memory for dout in the dtype of x, contiguous, or None where it is not wanted.
        dy: memory for the gradient of y, contiguous, or None where it is not wanted.
        sums: whether those of gamma and bias are wanted; both are None otherwise, and that of bias is without one.
    """
    channels = dout.shape[-1]
    rows = dout.numel() // channels
    block_r, block_c = tile(channels, _BACKWARD_WARPS)
    programs, steps = shares(rows, block_r)
    partial = None
    if sums:
        of_each = (programs, 1 if bias is None else 2, channels)
        partial = torch.empty(of_each, dtype=torch.float32, device=dout.device)
    with torch.cuda.device_of(dout):
        scale_residual_bwd_kernel[(programs,)](
            dout,
            gamma,
            y,
            bias,
            dx,
            dy,
            partial,
            rows,
            steps,
            C=channels,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=_BACKWARD_WARPS,
            enable_fp_fusion=True,
        )
        if partial is None:
            return None, None
        dgamma = torch.empty_like(gamma)
        if bias is None:
            sum_shares(partial[:, 0], dgamma)
            return dgamma, None
        dbias = torch.empty_like(bias)
        sum_shares(partial[:, 0], dgamma, partial[:, 1], dbias)
        return dgamma, dbias
