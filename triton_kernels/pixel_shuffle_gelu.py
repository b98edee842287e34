"""Bias, PixelShuffle and GELU in one pass, forward and backward, for contiguous and channels-last tensors.

One image of x has at most 2³¹ - 1 elements (the callers see to it), so offsets inside an image fit int32 and those of
the images are int64. Both layouts read x along its contiguous axis and write y along its own; between the two Triton
exchanges the tile through shared memory. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from ._activations import gelu, gelu_derivative, gelu_form
from ._sums import sum_shares

_TILE = 2048
_STEPS = 8  # tiles that a channels-last backward program goes through before it writes its share of the bias gradient


@triton.jit
def _nchw_tile(C, W, HW, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """Pixels p of one image plane by the R columns j that they become, for one row i of the R by R square."""
    blocks = tl.cdiv(HW, BLOCK_P)
    pid = tl.program_id(0)
    block = pid % blocks
    i = (pid // blocks) % R
    plane = pid // blocks // R  # b C + c
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    j = tl.arange(0, BLOCK_J)[None, :]
    mask = (p < HW) & (j < R)
    base = plane.to(tl.int64) * R * R * HW
    h = p // W
    x_offset = (i * R + j) * HW + p
    y_offset = ((h * R + i) * W + (p - h * W)) * R + j
    channel = ((plane % C) * R + i) * R + j
    return base, x_offset, y_offset, mask, channel, plane // C * blocks + block


@triton.jit
def pixel_shuffle_gelu_nchw_fwd_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    C,
    W,
    HW,
    R: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    base, x_offset, y_offset, mask, channel, _ = _nchw_tile(C, W, HW, R, BLOCK_P, BLOCK_J)
    z = tl.load(x_ptr + base + x_offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + channel, mask=tl.arange(0, BLOCK_J)[None, :] < R, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + y_offset, gelu(z, FORM).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pixel_shuffle_gelu_nchw_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    C,
    W,
    HW,
    R: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    base, x_offset, y_offset, mask, channel, part = _nchw_tile(C, W, HW, R, BLOCK_P, BLOCK_J)
    z = tl.load(x_ptr + base + x_offset, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + base + y_offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + channel, mask=tl.arange(0, BLOCK_J)[None, :] < R, other=0.0).to(tl.float32)
    dx = dy * gelu_derivative(z, FORM)
    tl.store(dx_ptr + base + x_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        sums = tl.sum(dx, axis=0)[None, :]
        tl.store(partial_ptr + part.to(tl.int64) * C * R * R + channel, sums, mask=tl.arange(0, BLOCK_J)[None, :] < R)


@triton.jit
def _nhwc_tile(W, w_start, c_start, C: tl.constexpr, R: tl.constexpr, BLOCK_W, BLOCK_C, BLOCK_RR):
    """Pixels w of one row by channels c of the result by the places k = i R + j of the R by R square."""
    w = w_start + tl.arange(0, BLOCK_W)[:, None, None]
    c = c_start + tl.arange(0, BLOCK_C)[None, :, None]
    k = tl.arange(0, BLOCK_RR)[None, None, :]
    x_offset = (w * C + c) * R * R + k
    y_offset = ((k // R * W + w) * R + k % R) * C + c
    return x_offset, y_offset, (w < W) & (c < C) & (k < R * R)


@triton.jit
def _nhwc_bias(bias_ptr, c_start, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_RR: tl.constexpr):
    c = c_start + tl.arange(0, BLOCK_C)[:, None]
    k = tl.arange(0, BLOCK_RR)[None, :]
    bias = tl.load(bias_ptr + c * R * R + k, mask=(c < C) & (k < R * R), other=0.0)
    return bias.to(tl.float32)[None, :, :]


@triton.jit
def pixel_shuffle_gelu_nhwc_fwd_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    W,
    C: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RR: tl.constexpr,
):
    pid = tl.program_id(0)
    w_blocks = tl.cdiv(W, BLOCK_W)
    c_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c_start = pid % c_blocks * BLOCK_C
    w_start = pid // c_blocks % w_blocks * BLOCK_W
    base = (pid // c_blocks // w_blocks).to(tl.int64) * W * C * R * R  # of the row b H + h, in x as in y
    x_offset, y_offset, mask = _nhwc_tile(W, w_start, c_start, C, R, BLOCK_W, BLOCK_C, BLOCK_RR)
    z = tl.load(x_ptr + base + x_offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += _nhwc_bias(bias_ptr, c_start, C, R, BLOCK_C, BLOCK_RR)
    tl.store(y_ptr + base + y_offset, gelu(z, FORM).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pixel_shuffle_gelu_nhwc_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    W,
    C: tl.constexpr,
    R: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RR: tl.constexpr,
    STEPS: tl.constexpr,
):
    pid = tl.program_id(0)
    w_blocks = tl.cdiv(W, BLOCK_W * STEPS)
    c_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c_start = pid % c_blocks * BLOCK_C
    w_first = pid // c_blocks % w_blocks * (BLOCK_W * STEPS)
    part = (pid // c_blocks).to(tl.int64)
    base = (pid // c_blocks // w_blocks).to(tl.int64) * W * C * R * R
    if HAS_BIAS:
        bias = _nhwc_bias(bias_ptr, c_start, C, R, BLOCK_C, BLOCK_RR)
        total = tl.zeros((BLOCK_W, BLOCK_C, BLOCK_RR), dtype=tl.float32)
    for step in range(STEPS):
        w_start = w_first + step * BLOCK_W
        x_offset, y_offset, mask = _nhwc_tile(W, w_start, c_start, C, R, BLOCK_W, BLOCK_C, BLOCK_RR)
        z = tl.load(x_ptr + base + x_offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + y_offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        dx = dy * gelu_derivative(z, FORM)
        tl.store(dx_ptr + base + x_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            total += dx
    if HAS_BIAS:
        c = c_start + tl.arange(0, BLOCK_C)[:, None]
        k = tl.arange(0, BLOCK_RR)[None, :]
        partial_offset = part * C * R * R + c * R * R + k
        tl.store(partial_ptr + partial_offset, tl.sum(total, axis=0), mask=(c < C) & (k < R * R))


def _nchw_blocks(r):
    block_j = triton.next_power_of_2(r)
    return {"BLOCK_P": _TILE // block_j, "BLOCK_J": block_j}


def _nhwc_blocks(channels, r):
    block_rr = triton.next_power_of_2(r * r)
    # As little padding of the channels as possible, then as long a run of them as possible.
    fits = [b for b in (1, 2, 4, 8, 16, 32, 64) if b * block_rr <= _TILE]
    block_c = min((b for b in fits if b >= 8 or b == fits[-1]), key=lambda b: (triton.cdiv(channels, b) * b, -b))
    return {"BLOCK_W": _TILE // (block_c * block_rr), "BLOCK_C": block_c, "BLOCK_RR": block_rr}


def _is_channels_last(x):
    return not x.is_contiguous()


def pixel_shuffle_gelu_fwd(x, r, bias, approximate):
    """Return y ``[B, C, H r, W r]`` in the layout of x ``[B, C r², H, W]``, which is contiguous or channels-last."""
    batch, channels, height, width = x.shape
    channels //= r * r
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    y = torch.empty((batch, channels, height * r, width * r), dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    options = {"R": r, "FORM": gelu_form(approximate, x.dtype), "HAS_BIAS": bias is not None, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        if _is_channels_last(x):
            blocks = _nhwc_blocks(channels, r)
            w_blocks = triton.cdiv(width, blocks["BLOCK_W"])
            grid = (batch * height * w_blocks * triton.cdiv(channels, blocks["BLOCK_C"]),)
            pixel_shuffle_gelu_nhwc_fwd_kernel[grid](x, bias, y, width, channels, **options, **blocks)
        else:
            blocks = _nchw_blocks(r)
            grid = (batch * channels * r * triton.cdiv(height * width, blocks["BLOCK_P"]),)
            pixel_shuffle_gelu_nchw_fwd_kernel[grid](x, bias, y, channels, width, height * width, **options, **blocks)
    return y


def pixel_shuffle_gelu_bwd(dy, x, r, bias, approximate):
    """Return (dx, dbias) for dy and x of one layout; dbias is None without a bias.

    The gradient of the bias is summed in two passes, a sum per program and then the sum of those, so it is the same
    in every run.
    """
    batch, channels, height, width = x.shape
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if x.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    channels //= r * r
    options = {"R": r, "FORM": gelu_form(approximate, x.dtype), "HAS_BIAS": bias is not None, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        if _is_channels_last(x):
            blocks = _nhwc_blocks(channels, r)
            parts = batch * height * triton.cdiv(width, blocks["BLOCK_W"] * _STEPS)
            partial = None if bias is None else x.new_empty((parts, x.shape[1]), dtype=torch.float32)
            grid = (parts * triton.cdiv(channels, blocks["BLOCK_C"]),)
            pixel_shuffle_gelu_nhwc_bwd_kernel[grid](
                dy, x, bias, dx, partial, width, channels, **options, **blocks, STEPS=_STEPS, num_warps=8
            )
        else:
            blocks = _nchw_blocks(r)
            parts = batch * triton.cdiv(height * width, blocks["BLOCK_P"])
            partial = None if bias is None else x.new_empty((parts, x.shape[1]), dtype=torch.float32)
            grid = (parts * channels * r,)
            pixel_shuffle_gelu_nchw_bwd_kernel[grid](
                dy, x, bias, dx, partial, channels, width, height * width, **options, **blocks
            )
        return dx, None if partial is None else sum_shares(partial, bias.new_empty(bias.shape))
