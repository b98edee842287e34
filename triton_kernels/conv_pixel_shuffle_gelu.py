"""Convolution, bias, PixelShuffle and GELU as one implicit GEMM on channels-last tensors, and the way back.

The M rows are the pixels of x, K runs over (kernel row, kernel column, channel), and the N columns are the output
channels in the order n = (i, j, c) instead of the (c, i, j) of PixelShuffle. In that order the shuffle is an address
map: i picks a row of y, and within the row (w, j, c) is contiguous, as it is in the pre-activation z ``[B, H, W, N]``
that training keeps. Channels of x are padded to a multiple of 8, so that every load of x is 16 bytes wide in half
precision whatever the number of channels; dense rows of 33 channels would be loaded two bytes at a time.

The way back is three kernels. The first undoes GELU and the shuffle: dz, in the channel order of z, and the gradient of
the bias. The gradient of x is the convolution of dz with the flipped weight, by the forward kernel without an epilogue.
The gradient of the weight is the product of x, as the forward kernel gathers it, with dz, summed over the pixels: each
program sums a share of them, and a second pass sums the shares in a fixed order. dz is stored once instead of being
made from dy and z wherever it is read: the gradient of x reads every value of it K_h K_w times from L2, which is what
limits it, and of dy and z that would be twice as much. Its channels are padded to a multiple of 8 like those of x.

One image of x and of y has at most 2³¹ - 1 elements and the batch as many pixels (the callers see to it): offsets
inside a tile fit int32 and those of the tile are int64. Products are summed in float32, as is all other arithmetic.
"""

import torch
import triton
import triton.language as tl

from ._activations import gelu, gelu_derivative, gelu_form
from ._float32 import precision_of
from ._sums import sum_shares
from ._tiles import Tile, column_blocks, halves, limits_of, padded_columns

_GROUP = 8  # channels of x are padded to a multiple of this: 16 bytes in half precision
_DEPTH = 64  # rows of the packed weight are a multiple of this, and so of every BLOCK_K
_FAR = tl.constexpr(1 << 30)  # a row outside every image
_BLOCK = 1024
_STEPS = 8  # tiles that a backward program goes through before it writes its share of the bias gradient


@triton.jit
def pad_channels_kernel(
    x_ptr, y_ptr, elements, C: tl.constexpr, CP: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr
):
    # PIXEL elements from one pixel of x to the next.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = first + tl.arange(0, BLOCK)
    pixel = offset // CP
    c = offset - pixel * CP
    values = tl.load(x_ptr + pixel * PIXEL + c, mask=(offset < elements) & (c < C), other=0.0)
    tl.store(y_ptr + offset, values, mask=offset < elements)


@triton.jit
def _columns(z, n, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask, W, N: tl.constexpr, R: tl.constexpr, GELU, KEEP_Z):
    """Bias, GELU and the shuffled store of the columns n of one tile."""
    RUN: tl.constexpr = N // R  # (j, c)
    C: tl.constexpr = RUN // R
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (n % C) * (R * R) + n // C, mask=n < N, other=0.0)
        z += bias.to(tl.float32)[None, :]
    mask = mask[:, None] & (n < N)[None, :]
    if KEEP_Z:
        tl.store(z_ptr + (z_pixel[:, None] + n[None, :]), z.to(z_ptr.dtype.element_ty), mask=mask)
    y_offset = y_pixel[:, None] + (n // RUN * (W * RUN) + n % RUN)[None, :]
    if GELU != "":
        z = gelu(z, GELU)
    tl.store(y_ptr + y_offset, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_pixel_shuffle_gelu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    M,
    H,
    W,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    R: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that share pixels follow each other, so that x comes from memory once.
    n_blocks: tl.constexpr = NP // (BLOCK_N + BLOCK_N2)
    pid = tl.program_id(0)
    n_start = pid % n_blocks * (BLOCK_N + BLOCK_N2)
    m_start = pid // n_blocks * BLOCK_M
    m_offset = tl.arange(0, BLOCK_M)
    m = m_start + m_offset
    mask_m = m < M
    row = m // W  # b H + h
    w = m - row * W
    h = tl.where(mask_m, row % H, -_FAR)
    x_tile_ptr = x_ptr + m_start.to(tl.int64) * CP
    n = n_start + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        n2 = n_start + BLOCK_N + tl.arange(0, BLOCK_N2)
        accumulator2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.float32)
    for k_start in range(0, KH * KW * CP, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        tap = k // CP
        dh = tap // KW - KH // 2
        dw = tap % KW - KW // 2
        x_offset = (m_offset * CP)[:, None] + ((dh * W + dw) * CP + k % CP)[None, :]
        x_row = h[:, None] + tl.where(tap < KH * KW, dh, -_FAR)[None, :]
        x_column = w[:, None] + dw[None, :]
        inside = (x_row >= 0) & (x_row < H) & (x_column >= 0) & (x_column < W)
        x = tl.load(x_tile_ptr + x_offset, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + (k * NP)[:, None] + n[None, :])
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
        if BLOCK_N2 > 0:
            weight2 = tl.load(weight_ptr + (k * NP)[:, None] + n2[None, :])
            accumulator2 = tl.dot(x, weight2, accumulator2, input_precision=PRECISION)
    first_row = m_start // W
    y_ptr += first_row.to(tl.int64) * W * N
    y_pixel = (row - first_row) * (W * N) + w * (N // R)
    if KEEP_Z:
        z_ptr += m_start.to(tl.int64) * N
    z_pixel = m_offset * N
    # In parts, so that addresses and results of all columns need not be in registers at once.
    if BLOCK_N < 64:
        _columns(accumulator, n, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
    elif BLOCK_M <= 128:
        n = n_start + tl.arange(0, BLOCK_N // 2)
        left, right = halves(accumulator)
        _columns(left, n, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
        _columns(right, n + BLOCK_N // 2, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
    else:
        n = n_start + tl.arange(0, BLOCK_N // 4)
        left, right = halves(accumulator)
        first, second = halves(left)
        third, fourth = halves(right)
        _columns(first, n, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
        _columns(second, n + BLOCK_N // 4, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
        _columns(third, n + BLOCK_N // 2, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
        _columns(fourth, n + 3 * BLOCK_N // 4, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)
    if BLOCK_N2 > 0:
        _columns(accumulator2, n2, bias_ptr, y_ptr, y_pixel, z_ptr, z_pixel, mask_m, W, N, R, GELU, KEEP_Z)


@triton.jit
def conv_pixel_shuffle_gelu_bwd_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    partial_ptr,
    W,
    RUN: tl.constexpr,
    R: tl.constexpr,
    PIXEL: tl.constexpr,
    PAD: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STEPS: tl.constexpr,
):
    # q = (j, c) is contiguous in z and dz, and in dy unless its pixels, PIXEL elements apart, are padded: pixels w of
    # one row by q, for one row i of the R by R square. Behind the last i come the PAD channels of dz that are zero.
    q_blocks: tl.constexpr = (RUN + PAD + BLOCK_Q - 1) // BLOCK_Q
    pid = tl.program_id(0)
    w_blocks = tl.cdiv(W, BLOCK_W * STEPS)
    q = pid % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = pid // q_blocks % R
    part = (pid // q_blocks // R).to(tl.int64)
    row = part // w_blocks  # b H + h
    w_first = (part - row * w_blocks).to(tl.int32) * (BLOCK_W * STEPS)
    dy_row_ptr = dy_ptr + (row * R + i) * W * (R * PIXEL)
    dy_column = q if PIXEL * R == RUN else q // (RUN // R) * PIXEL + q % (RUN // R)
    z_base = row * W * (R * RUN) + i * RUN
    dz_base = row * W * (R * RUN + PAD) + i * RUN
    stored = tl.where(i == R - 1, RUN + PAD, RUN)
    if HAS_BIAS:
        total = tl.zeros((BLOCK_W, BLOCK_Q), dtype=tl.float32)
    for step in range(STEPS):
        w = w_first + step * BLOCK_W + tl.arange(0, BLOCK_W)
        mask = (w < W)[:, None] & (q < RUN)[None, :]
        z_offset = (w * (R * RUN))[:, None] + q[None, :]
        z = tl.load(z_ptr + z_base + z_offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_row_ptr + (w * (R * PIXEL))[:, None] + dy_column[None, :], mask=mask, other=0.0).to(tl.float32)
        dz = dy * gelu_derivative(z, FORM)
        dz_offset = (w * (R * RUN + PAD))[:, None] + q[None, :]
        tl.store(dz_ptr + dz_base + dz_offset, dz.to(dz_ptr.dtype.element_ty), mask=(w < W)[:, None] & (q < stored))
        if HAS_BIAS:
            total += dz
    if HAS_BIAS:
        tl.store(partial_ptr + part * (R * RUN) + i * RUN + q, tl.sum(total, axis=0), mask=q < RUN)


@triton.jit
def conv_pixel_shuffle_gelu_wgrad_kernel(
    x_ptr,
    dz_ptr,
    partial_ptr,
    M,
    H,
    W,
    share,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ZP: tl.constexpr,
    NP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that share pixels follow each other, so that x and dz come from memory once.
    K: tl.constexpr = KH * KW * CP
    k_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n_blocks: tl.constexpr = NP // (BLOCK_N + BLOCK_N2)
    pid = tl.program_id(0)
    k = pid % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    n_start = pid // k_blocks % n_blocks * (BLOCK_N + BLOCK_N2)
    part = pid // (k_blocks * n_blocks)
    tap = k // CP
    dh = tl.where(tap < KH * KW, tap // KW - KH // 2, -_FAR)
    dw = tap % KW - KW // 2
    m_first = part * share
    m_offset = tl.arange(0, BLOCK_M)
    row = (m_first + m_offset) // W
    w = m_first + m_offset - row * W
    h = row % H
    left = M - m_first
    x_ptr += m_first.to(tl.int64) * CP
    dz_ptr += m_first.to(tl.int64) * ZP
    x_offset = (m_offset * CP)[:, None] + (((tap // KW - KH // 2) * W + dw) * CP + k % CP)[None, :]
    n = n_start + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    if BLOCK_N2 > 0:
        n2 = n_start + BLOCK_N + tl.arange(0, BLOCK_N2)
        accumulator2 = tl.zeros((BLOCK_K, BLOCK_N2), dtype=tl.float32)
    for _ in range(0, share, BLOCK_M):
        mask_m = m_offset < left
        x_row = tl.where(mask_m, h, -_FAR)[:, None] + dh[None, :]
        x_column = w[:, None] + dw[None, :]
        inside = (x_row >= 0) & (x_row < H) & (x_column >= 0) & (x_column < W)
        x = tl.trans(tl.load(x_ptr + x_offset, mask=inside, other=0.0))
        dz_mask = mask_m[:, None] & (n < ZP)[None, :]
        dz = tl.load(dz_ptr + ((m_offset * ZP)[:, None] + n[None, :]), mask=dz_mask, other=0.0)
        accumulator = tl.dot(x, dz, accumulator, input_precision=PRECISION)
        if BLOCK_N2 > 0:
            dz_mask = mask_m[:, None] & (n2 < ZP)[None, :]
            dz2 = tl.load(dz_ptr + ((m_offset * ZP)[:, None] + n2[None, :]), mask=dz_mask, other=0.0)
            accumulator2 = tl.dot(x, dz2, accumulator2, input_precision=PRECISION)
        # The pixels BLOCK_M further on, without a division for each of them.
        left -= BLOCK_M
        x_ptr += BLOCK_M * CP
        dz_ptr += BLOCK_M * ZP
        w += BLOCK_M % W
        h += BLOCK_M // W % H + (w >= W).to(tl.int32)
        w = tl.where(w >= W, w - W, w)
        h = tl.where(h >= H, h - H, h)
    partial_offset = part.to(tl.int64) * K + k
    partial_rows = partial_ptr + (partial_offset * NP)[:, None]
    tl.store(partial_rows + n[None, :], accumulator, mask=(k < K)[:, None])
    if BLOCK_N2 > 0:
        tl.store(partial_rows + n2[None, :], accumulator2, mask=(k < K)[:, None])


def shared_bytes(tile, n, element_bytes):
    """Return the shared memory of the forward pipeline, from which Triton reuses what the epilogue needs."""
    return tile.num_stages * tile.block_k * (tile.block_m + sum(column_blocks(n))) * element_bytes


def tiles(pixels, n, dtype, limits, *, precision="ieee"):
    """Return the forward kernel's configurations for a problem, the preferred one first; the rest are for a sweep.

    Args:
        pixels: M, rows of the GEMM.
        n: output channels.
        dtype: of the tensors.
        limits: of the device.
        precision: of float32 products, "tf32" or "ieee".
    """
    element = dtype.itemsize
    columns = sum(column_blocks(n))
    wide = columns > 128
    if element == 4:
        # Without tensor cores ("ieee") a step is long enough, and registers are what is short.
        ieee = [Tile(32 if wide else 64, 16, 8, 2)]
        candidates = ieee if precision == "ieee" else [Tile(128, 32, 8, 3), Tile(64, 32, 8, 3)]
    else:
        # Four warps have no registers left for a second accumulator.
        candidates = [Tile(128, 64, 8, 3), Tile(64, 64, 8 if wide else 4, 3), Tile(128, 64, 8, 4)]
        # 256 rows read the weight half as often, and want the registers for 256 by 128 sums beside the operands.
        if limits.capability >= (9, 0) and not wide:
            candidates.append(Tile(256, 64, 8, 3))
    if triton.cdiv(pixels, 128) * triton.cdiv(n, columns) < limits.multiprocessors / 2:
        candidates.sort(key=lambda tile: tile.block_m)
    return [tile for tile in candidates if shared_bytes(tile, n, element) <= limits.shared_bytes]


def wgrad_tiles(depth, n, dtype, limits, *, precision="ieee"):
    """Return the configurations of the weight's gradient, the preferred one first; the rest are for a sweep.

    Args:
        depth: K, taps times padded channels of x: the rows of the result.
        n: N, its columns.
        dtype: of the tensors.
        limits: of the device.
        precision: of float32 products, "tf32" or "ieee".
    """
    columns = sum(column_blocks(n))
    if dtype.itemsize == 4:
        wide = columns > 64
        candidates = [Tile(16, 32 if wide else 64, 8, 2)] if precision == "ieee" else [Tile(32, 64, 8, 2)]
    else:
        candidates = [Tile(64, 128, 8, 3), Tile(64, 64, 8 if columns > 128 else 4, 3), Tile(32, 64, 8, 2)]
        if limits.capability >= (9, 0) and columns <= 128 and depth > 128:
            candidates.insert(0 if n <= 128 else len(candidates), Tile(32, 256, 8, 4))
        candidates = [tile for tile in candidates if tile.block_k < 2 * depth or tile.block_k == 64]
    bytes_of = lambda tile: tile.num_stages * tile.block_m * (tile.block_k + columns) * dtype.itemsize  # noqa: E731
    return [tile for tile in candidates if bytes_of(tile) <= limits.shared_bytes]


def _is_dense_and_aligned(x):
    return x.shape[1] % _GROUP == 0 and x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0


def _pixels_apart(x):
    """Return the elements from one pixel of a channels-last x to the next, None where its strides say anything else."""
    _, channels, height, width = x.shape
    pixel = x.stride(3)
    return pixel if x.stride() == (height * width * pixel, 1, width * pixel, pixel) and pixel >= channels else None


def _pad_channels(x, *, finite=True):
    """Return x as ``[B, H, W, C]`` with channels padded to a multiple of 8; a view where x is that already.

    Args:
        x: ``[B, C, H, W]``, in any layout.
        finite: what is behind the channels must be zeros. Otherwise it may be anything, such as what lies between
            pixels that are apart, as the CUDA kernel leaves them.
    """
    if _is_dense_and_aligned(x):
        return x.permute(0, 2, 3, 1)
    batch, channels, height, width = x.shape
    padded, pixel = triton.cdiv(channels, _GROUP) * _GROUP, _pixels_apart(x)
    if not finite and pixel == padded and x.data_ptr() % 16 == 0 and _reaches(x, padded):
        return x.as_strided((batch, height, width, padded), (height * width * pixel, width * pixel, pixel, 1))
    if pixel is None:
        x, pixel = x.contiguous(memory_format=torch.channels_last), channels
    y = torch.empty((batch, height, width, padded), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(y.numel(), _BLOCK),)
    pad_channels_kernel[grid](x, y, y.numel(), C=channels, CP=padded, PIXEL=pixel, BLOCK=_BLOCK, enable_fp_fusion=True)
    return y


def _reaches(x, padded):
    """Return whether the memory of x goes on behind the channels of its last pixel as far as those of padded ones."""
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1 + padded - x.shape[1]) * x.element_size() <= x.untyped_storage().nbytes()


def pack_weight(weight, r):
    """Return the weight ``[C r², C_in, K_h, K_w]`` as the kernel reads it: ``[K, N]``, both padded by zeros.

    Depends on the weight alone, so a caller whose weights stay as they are can keep it.
    """
    n, channels, rows, columns = weight.shape
    padded = triton.cdiv(channels, _GROUP) * _GROUP
    depth = triton.cdiv(rows * columns * padded, _DEPTH) * _DEPTH
    packed = torch.zeros((depth, padded_columns(n)), dtype=weight.dtype, device=weight.device)
    source = weight.reshape(n // (r * r), r, r, channels, rows, columns).permute(4, 5, 3, 1, 2, 0)
    target = packed[: rows * columns * padded].view(rows, columns, padded, -1)
    target[:, :, :channels, :n] = source.reshape(rows, columns, channels, n)
    return packed


def _convolve(x, packed, bias, y, z, kernel_size, r, form, tile, precision):
    """Run the forward kernel; the form of GELU is one of gelu_form, or "" for none."""
    batch, _, height, width = x.shape
    n = y.shape[1] * r * r
    precision = precision or precision_of(x.dtype)
    tile = tile or tiles(batch * height * width, n, x.dtype, limits_of(x), precision=precision)[0]
    block_n, block_n2 = column_blocks(n)
    grid = (triton.cdiv(batch * height * width, tile.block_m) * (packed.shape[1] // (block_n + block_n2)),)
    with torch.cuda.device_of(x):
        padded = _pad_channels(x)
        conv_pixel_shuffle_gelu_fwd_kernel[grid](
            padded,
            packed,
            bias,
            y,
            z,
            batch * height * width,
            height,
            width,
            CP=padded.shape[3],
            KH=kernel_size[0],
            KW=kernel_size[1],
            N=n,
            NP=packed.shape[1],
            R=r,
            GELU=form,
            KEEP_Z=z is not None,
            PRECISION=precision,
            BLOCK_M=tile.block_m,
            BLOCK_N=block_n,
            BLOCK_N2=block_n2,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )


def conv_pixel_shuffle_gelu_fwd(
    x, packed, bias, n, kernel_size, r, approximate, *, keep_z=False, tile=None, precision=None
):
    """Return ``(y, z)``, channels-last: y ``[B, N / r², H r, W r]`` and z ``[B, N, H, W]`` in the order (i, j, c).

    Args:
        x: ``[B, C_in, H, W]``; read as it is if channels-last with a multiple of 8 channels, else copied once.
        packed: the weight, from :func:`pack_weight`.
        bias: ``[N]`` in the order (c, i, j), or None.
        n: N, output channels of the convolution.
        kernel_size: ``(K_h, K_w)``, odd; the padding is half of it.
        r: upscale factor.
        approximate: ``"none"`` (GELU by erf) or ``"tanh"`` (its tanh form).
        keep_z: whether to write z; it is None otherwise.
        tile: a :class:`Tile` instead of the table's choice.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``; None for what PyTorch's convolutions are told to.
    """
    batch, _, height, width = x.shape
    options = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
    y = torch.empty((batch, n // (r * r), height * r, width * r), **options)
    z = torch.empty((batch, n, height, width), **options) if keep_z else None
    if y.numel() > 0:
        form = gelu_form(approximate, x.dtype)
        _convolve(x, packed, bias, y, z, kernel_size, r, form, tile, precision)
    return y, z


def conv_pixel_shuffle_gelu_bwd(dy, z, r, approximate, with_bias):
    """Return ``(dz, dbias)`` for dy ``[B, C, H r, W r]`` and z ``[B, C r², H, W]``, both channels-last.

    The pixels of dy may be padded in memory. What is between them is not read.

    dz is channels-last, in the channel order (i, j, c) of z, with as many zero channels behind them as make a multiple
    of 8; dbias is in the order (c, i, j) of the bias, or None. It is summed in two passes, a sum per program and then
    the sum of those, so it is the same in every run.
    """
    batch, n, height, width = z.shape
    padding = -n % _GROUP
    size = (batch, n + padding, height, width)
    dz = torch.empty(size, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    channels = n // (r * r)
    if z.numel() == 0:
        return dz, z.new_zeros(n) if with_bias else None
    run = r * channels
    # As little padding of the run as possible, then as long a run as possible.
    block_q = min((16, 32, 64, 128), key=lambda b: (triton.cdiv(run + padding, b) * b, -b))
    block_w = 2048 // block_q
    parts = batch * height * triton.cdiv(width, block_w * _STEPS)
    partial = z.new_empty((parts, n), dtype=torch.float32) if with_bias else None
    with torch.cuda.device_of(z):
        conv_pixel_shuffle_gelu_bwd_kernel[(parts * r * triton.cdiv(run + padding, block_q),)](
            dy,
            z,
            dz,
            partial,
            width,
            RUN=run,
            R=r,
            PIXEL=dy.stride(3),
            PAD=padding,
            FORM=gelu_form(approximate, z.dtype),
            HAS_BIAS=with_bias,
            BLOCK_W=block_w,
            BLOCK_Q=block_q,
            STEPS=_STEPS,
            num_warps=8,
            enable_fp_fusion=True,
        )
        if partial is None:
            return dz, None
        dbias = z.new_empty(n)
        sum_shares(partial.view(parts, r * r, channels), dbias.view(channels, r * r).t())
        return dz, dbias


def conv_pixel_shuffle_gelu_dgrad(dz, weight, r, *, tile=None, precision=None):
    """Return dx ``[B, C_in, H, W]``, channels-last.

    Args:
        dz: from :func:`conv_pixel_shuffle_gelu_bwd`.
        weight: ``[C r², C_in, K_h, K_w]``, in the order (c, i, j).
        r: upscale factor.
        tile: a :class:`Tile` instead of the table's choice.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``; None for what PyTorch's convolutions are told to.
    """
    batch, _, height, width = dz.shape
    n, channels, rows, columns = weight.shape
    size = (batch, channels, height, width)
    dx = torch.empty(size, dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last)
    if dx.numel() > 0:
        turned = weight.view(n // (r * r), r * r, channels, rows, columns).flip((3, 4)).permute(2, 1, 0, 3, 4)
        packed = pack_weight(turned.reshape(channels, n, rows, columns), 1)
        _convolve(dz, packed, None, dx, None, (rows, columns), 1, "", tile, precision)
    return dx


def conv_pixel_shuffle_gelu_wgrad(x, dz, weight, r, *, tile=None, precision=None):
    """Return the gradient of the weight, in its layout and its order (c, i, j).

    Summed in two passes, the shares of the programs and then their sum, so it is the same in every run on one kind of
    device.

    Args:
        x: ``[B, C_in, H, W]``; read as it is if channels-last with a multiple of 8 channels, else copied once.
        dz: from :func:`conv_pixel_shuffle_gelu_bwd`.
        weight: ``[C r², C_in, K_h, K_w]``, whose shape and layout alone are used.
        r: upscale factor.
        tile: a :class:`Tile` instead of the table's choice.
        precision: of float32 products, ``"tf32"`` or ``"ieee"``; None for what PyTorch's convolutions are told to.
    """
    batch, channels, height, width = x.shape
    n, _, rows, columns = weight.shape
    dweight = torch.empty_like(weight)
    if x.numel() == 0 or n == 0:
        return dweight.zero_()
    precision = precision or precision_of(x.dtype)
    padded_channels = triton.cdiv(channels, _GROUP) * _GROUP
    depth, pixels = rows * columns * padded_channels, batch * height * width
    limits = limits_of(x)
    tile = tile or wgrad_tiles(depth, n, x.dtype, limits, precision=precision)[0]
    block_n, block_n2 = column_blocks(n)
    blocks = triton.cdiv(depth, tile.block_k) * (padded_columns(n) // (block_n + block_n2))
    # As many programs as run at once: a large block has a multiprocessor for itself.
    at_once = limits.multiprocessors * (1 if tile.block_k * (block_n + block_n2) > 128 * 128 else 2)
    share = triton.cdiv(triton.cdiv(pixels, max(at_once // blocks, 1)), tile.block_m) * tile.block_m
    parts = triton.cdiv(pixels, share)
    partial = torch.empty((parts, depth, padded_columns(n)), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        # What is behind the channels reaches only rows of the result that are left out.
        padded = _pad_channels(x, finite=False)
        conv_pixel_shuffle_gelu_wgrad_kernel[(blocks * parts,)](
            padded,
            dz,
            partial,
            pixels,
            height,
            width,
            share,
            CP=padded_channels,
            KH=rows,
            KW=columns,
            ZP=dz.shape[1],
            NP=partial.shape[2],
            PRECISION=precision,
            BLOCK_M=tile.block_m,
            BLOCK_N=block_n,
            BLOCK_N2=block_n2,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        # A library's sum and copy are faster than one kernel that reads along columns and writes along rows.
        total = partial.sum(dim=0).view(rows, columns, padded_channels, -1)[:, :, :channels, :n]
        ordered = total.unflatten(3, (r * r, n // (r * r))).permute(4, 3, 2, 0, 1)
        dweight.unflatten(0, (n // (r * r), r * r)).copy_(ordered)
    return dweight
