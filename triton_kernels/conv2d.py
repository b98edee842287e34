"""A 3x3 convolution to at most three channels, such as a network's head, on channels-last tensors, and the way back.

Three output channels leave a library's tiles empty. Forward, each of the nine taps is a product of a tile's pixels with
three columns, padded to 16. On the way back the values of dy that a pixel of x meets, 27 of nine pixels, are gathered
once, as a row of a matrix g: dx = g w with the 27 rows of the weight, and the gradient of the weight is gᵀ x, so one
pass over x and dy makes all gradients. The nine reads of a pixel are meant to hit L1.

The pixels of x may be apart in memory; what is between them is not read. One image has at most 2³¹ - 1 elements and the
batch as many pixels (the callers see to it). Sums are float32.
"""

import torch
import triton
import triton.language as tl

from ._float32 import precision_of
from ._sums import sum_shares

_COLUMNS = 16  # the narrowest product of the tensor cores
_MEETINGS = 32  # 27 (tap, output channel) pairs, padded
_BLOCK = 128
_BACKWARD_BLOCK = 64  # its loads are narrow and many, and so are their addresses
_STEPS = 32  # tiles that a backward program goes through before it writes its share of the sums


@triton.jit
def conv2d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    N: tl.constexpr,
    PIXEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m_start = tl.program_id(0) * BLOCK
    m_offset = tl.arange(0, BLOCK)
    m = m_start + m_offset
    row = m // W  # b H + h
    w = m - row * W
    h = row % H
    x_ptr += m_start.to(tl.int64) * PIXEL
    c = tl.arange(0, CP)
    n = tl.arange(0, COLUMNS)
    sums = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
    for tap in tl.static_range(9):
        dh = tap // 3 - 1
        dw = tap % 3 - 1
        inside = (m < M) & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
        x_offset = ((m_offset + (dh * W + dw)) * PIXEL)[:, None] + c[None, :]
        x = tl.load(x_ptr + x_offset, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        weight = tl.load(weight_ptr + ((tap * CP + c) * COLUMNS)[:, None] + n[None, :])
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptr += m_start.to(tl.int64) * N
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + (m_offset * N)[:, None] + n[None, :], sums.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    bias_partial_ptr,
    M,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    N: tl.constexpr,
    PIXEL: tl.constexpr,
    MEETINGS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    # Row k of the weight is for tap k // N and output channel k % N: of a pixel of x the one at that tap is dy's pixel
    # on the other side. dx_ptr or partial_ptr is None where that gradient is not wanted.
    pid = tl.program_id(0)
    k = tl.arange(0, MEETINGS)
    dh = 1 - k // N // 3
    dw = 1 - k // N % 3
    c = tl.arange(0, CP)
    if dx_ptr is not None:
        weight = tl.load(weight_ptr + (k * CP)[:, None] + c[None, :])
    if partial_ptr is not None:
        sums = tl.zeros((MEETINGS, CP), dtype=tl.float32)
        bias_sums = tl.zeros((MEETINGS,), dtype=tl.float32)
    m_offset = tl.arange(0, BLOCK)
    for step in range(STEPS):
        m_start = (pid * STEPS + step) * BLOCK
        m = m_start + m_offset
        row = m // W
        w = m - row * W
        h = row % H
        there_h, there_w = h[:, None] + dh[None, :], w[:, None] + dw[None, :]
        inside = (m < M)[:, None] & (k < 9 * N)[None, :]
        inside &= (there_h >= 0) & (there_h < H) & (there_w >= 0) & (there_w < W)
        g_offset = (m_offset * N)[:, None] + ((dh * W + dw) * N + k % N)[None, :]
        g = tl.load(dy_ptr + m_start.to(tl.int64) * N + g_offset, mask=inside, other=0.0)
        x_offset = (m_offset * PIXEL)[:, None] + c[None, :]
        mask = (m < M)[:, None] & (c < C)[None, :]
        if dx_ptr is not None:
            dx = tl.dot(g, weight, input_precision=PRECISION)
            tl.store(dx_ptr + m_start.to(tl.int64) * PIXEL + x_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            x = tl.load(x_ptr + m_start.to(tl.int64) * PIXEL + x_offset, mask=mask, other=0.0)
            sums = tl.dot(tl.trans(g), x, sums, input_precision=PRECISION)
            bias_sums += tl.sum(g.to(tl.float32), axis=0)
    if partial_ptr is not None:
        rows = pid * MEETINGS + k
        tl.store(partial_ptr + (rows * CP)[:, None] + c[None, :], sums)
        tl.store(bias_partial_ptr + rows, bias_sums)


def _padded(channels):
    return max(triton.next_power_of_2(channels), 16)


def _pixel(x):
    return x.stride(3)


def _options(x, n):
    _, channels, height, width = x.shape
    return {
        "M": x.shape[0] * height * width,
        "H": height,
        "W": width,
        "C": channels,
        "CP": _padded(channels),
        "N": n,
        "PIXEL": _pixel(x),
        "PRECISION": precision_of(x.dtype),
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def conv2d_fwd(x, weight, bias):
    """Return y ``[B, N, H, W]``, channels-last.

    Args:
        x: ``[B, C, H, W]``, channels-last, its pixels apart or not.
        weight: ``[N, C, 3, 3]``, N at most 3.
        bias: ``[N]`` or None.
    """
    batch, channels, height, width = x.shape
    n = weight.shape[0]
    y = torch.empty((batch, n, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    packed = torch.zeros((9, _padded(channels), _COLUMNS), dtype=weight.dtype, device=weight.device)
    packed[:, :channels, :n] = weight.permute(2, 3, 1, 0).reshape(9, channels, n)
    options = _options(x, n)
    with torch.cuda.device_of(x):
        conv2d_fwd_kernel[(triton.cdiv(options["M"], _BLOCK),)](
            x, packed, bias, y, **options, COLUMNS=_COLUMNS, BLOCK=_BLOCK
        )
    return y


def conv2d_bwd(dy, x, weight, dx, *, sums):
    """Write the gradient of x, and return those of weight and bias, ``[N, C, 3, 3]`` and ``[N]``.

    The sums over pixels are taken in two passes, a share for each program and then the sum of those, so they are the
    same in every run.

    Args:
        dy: ``[B, N, H, W]``, channels-last.
        x: ``[B, C, H, W]``, channels-last, its pixels apart or not.
        weight: ``[N, C, 3, 3]``, N at most 3.
        dx: memory for the gradient of x with x's strides, or None where it is not wanted.
        sums: whether the other two are wanted; both are None otherwise.
    """
    n, channels = weight.shape[:2]
    options = _options(x, n)
    padded = options["CP"]
    packed = torch.zeros((_MEETINGS, padded), dtype=weight.dtype, device=weight.device)
    packed[: 9 * n, :channels] = weight.permute(2, 3, 0, 1).reshape(9 * n, channels)
    parts = triton.cdiv(options["M"], _BACKWARD_BLOCK * _STEPS)
    partial = bias_partial = None
    if sums:
        memory = torch.empty(parts * _MEETINGS * (padded + 1), dtype=torch.float32, device=x.device)
        partial, bias_partial = memory.split([parts * _MEETINGS * padded, parts * _MEETINGS])
        partial, bias_partial = partial.view(parts, _MEETINGS, padded), bias_partial.view(parts, _MEETINGS)
    with torch.cuda.device_of(x):
        conv2d_bwd_kernel[(parts,)](
            dy, x, packed, dx, partial, bias_partial, **options, MEETINGS=_MEETINGS, BLOCK=_BACKWARD_BLOCK, STEPS=_STEPS
        )
        if partial is None:
            return None, None
        dweight, dbias = torch.empty_like(weight), weight.new_empty(n)
        taps = partial[:, : 9 * n, :channels].unflatten(1, (3, 3, n))
        # The tap in the middle meets every pixel of dy once.
        sum_shares(taps, dweight.permute(2, 3, 0, 1), bias_partial[:, 4 * n : 5 * n], dbias)
        return dweight, dbias
