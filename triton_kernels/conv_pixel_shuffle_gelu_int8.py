"""The upsampling block in int8: an implicit GEMM of 8-bit integers, from images to images, for inference.

An image is int8 ``[B, H + 2 halo, W + 2 halo, CP]`` in memory: pixels of CP channels, a multiple of 8, so that every
load is 8 bytes wide whatever the number of channels. Its border holds the zero points of the channels, which is what
pads the convolution, so no load of x needs a mask: the rows of the GEMM behind the last pixel read the last pixel
again, and the taps behind the last one read the last one again, where the packed weight is zero.

As in float the N columns are the output channels in the order (i, j, c), in which PixelShuffle is an address map; here
each run of c is padded to a multiple of 4, so that 4 bytes are stored at once. The weight is ``[N, K]``, the order in
which the tensor cores take 8-bit operands. Sums are int32 and exact, all else is float32, with one rounding at the end.

One image has at most 2³¹ - 1 elements and the batch as many pixels (the callers see to it): offsets inside a tile fit
int32 and those of the tile are int64.
"""

import torch
import triton
import triton.language as tl

from ._activations import gelu, round_half_even
from ._tiles import Tile, column_blocks, halves, limits_of, padded_columns

_RUN = 4  # columns of one (i, j) are padded to a multiple of this
_DEPTH = 128  # the depth of the packed weight is a multiple of this, and so of every BLOCK_K
_BLOCK = 1024


@triton.jit
def _to_int8(steps):
    return round_half_even(tl.minimum(tl.maximum(steps, -128.0), 127.0)).to(tl.int8)


@triton.jit
def quantize_int8_fwd_kernel(
    x_ptr,
    inverse_ptr,
    zero_ptr,
    y_ptr,
    pixels,
    H,
    W,
    y_row,
    y_image,
    y_first,
    C: tl.constexpr,
    PIXEL: tl.constexpr,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # PIXEL elements from one pixel of x to the next; y_row, y_image and y_first count pixels.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = index // CP
    c = (index - pixel * CP).to(tl.int32)
    mask = (pixel < pixels) & (c < C)
    row = pixel // W
    image = row // H
    x = tl.load(x_ptr + pixel * PIXEL + c, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + c, mask=mask, other=0.0)
    zero = tl.load(zero_ptr + c, mask=mask, other=0).to(tl.float32)
    y_pixel = y_first + image * y_image + (row - image * H) * y_row + (pixel - row * W)
    tl.store(y_ptr + y_pixel * CP + c, _to_int8(x * inverse + zero), mask=mask)


@triton.jit
def _columns(
    sums,
    n,
    columns_ptr,
    y_ptr,
    y_pixel,
    y_row,
    mask,
    C: tl.constexpr,
    RUN: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    YP: tl.constexpr,
    FORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Scale, bias, GELU, quantisation and the shuffled store of the columns n of one tile."""
    scale = tl.load(columns_ptr + n)
    bias = tl.load(columns_ptr + NP + n)
    y = gelu(sums.to(tl.float32) * scale[None, :] + bias[None, :], FORM)
    if QUANTIZE:
        inverse = tl.load(columns_ptr + 2 * NP + n)
        zero = tl.load(columns_ptr + 3 * NP + n)
        y = _to_int8(y * inverse[None, :] + zero[None, :])
    ij = n // RUN
    c = n % RUN
    y_offset = y_pixel[:, None] + ((ij // R * y_row + ij % R) * YP + c)[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask[:, None] & ((ij < R * R) & (c < C))[None, :])


@triton.jit
def conv_pixel_shuffle_gelu_int8_fwd_kernel(
    x_ptr,
    weight_ptr,
    columns_ptr,
    y_ptr,
    M,
    H,
    W,
    x_row,
    x_image,
    y_row,
    y_image,
    y_first,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    KP: tl.constexpr,
    C: tl.constexpr,
    RUN: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    YP: tl.constexpr,
    FORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # x_row, x_image, y_row, y_image and y_first count pixels. Programs that share pixels follow each other.
    n_blocks: tl.constexpr = NP // (BLOCK_N + BLOCK_N2)
    pid = tl.program_id(0)
    n_start = pid % n_blocks * (BLOCK_N + BLOCK_N2)
    m_start = pid // n_blocks * BLOCK_M
    m = tl.minimum(m_start + tl.arange(0, BLOCK_M), M - 1)
    mask = m_start + tl.arange(0, BLOCK_M) < M
    row = m // W  # b H + h
    w = m - row * W
    image = row // H
    h = row - image * H
    first_image = m_start // W // H
    first_h = m_start // W - first_image * H
    image -= first_image
    x_ptr += (first_image.to(tl.int64) * x_image + first_h * x_row) * CP
    x_pixel = (image * x_image + (h - first_h) * x_row + w) * CP
    n = n_start + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if BLOCK_N2 > 0:
        n2 = n_start + BLOCK_N + tl.arange(0, BLOCK_N2)
        accumulator2 = tl.zeros((BLOCK_M, BLOCK_N2), dtype=tl.int32)
    for k_start in range(0, KH * KW * CP, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        tap = tl.minimum(k // CP, KH * KW - 1)
        x_offset = (tap // KW * x_row + tap % KW) * CP + k % CP
        x = tl.load(x_ptr + (x_pixel[:, None] + x_offset[None, :]))
        weight = tl.load(weight_ptr + (n * KP)[:, None] + k[None, :])
        accumulator = tl.dot(x, tl.trans(weight), accumulator, out_dtype=tl.int32)
        if BLOCK_N2 > 0:
            weight2 = tl.load(weight_ptr + (n2 * KP)[:, None] + k[None, :])
            accumulator2 = tl.dot(x, tl.trans(weight2), accumulator2, out_dtype=tl.int32)
    y_ptr += (y_first + first_image.to(tl.int64) * y_image + first_h * R * y_row) * YP
    y_pixel = (image * y_image + (h - first_h) * R * y_row + w * R) * YP
    # In parts, so that addresses and results of all columns need not be in registers at once.
    if BLOCK_N < 64:
        _columns(accumulator, n, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)
    else:
        left, right = halves(accumulator)
        first, second = halves(left)
        third, fourth = halves(right)
        n = n_start + tl.arange(0, BLOCK_N // 4)
        _columns(first, n, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)
        n += BLOCK_N // 4
        _columns(second, n, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)
        n += BLOCK_N // 4
        _columns(third, n, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)
        n += BLOCK_N // 4
        _columns(fourth, n, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)
    if BLOCK_N2 > 0:
        _columns(accumulator2, n2, columns_ptr, y_ptr, y_pixel, y_row, mask, C, RUN, R, NP, YP, FORM, QUANTIZE)


def tiles(pixels, n, limits):
    """Return the configurations for a problem, the preferred one first; the rest are for a sweep.

    Args:
        pixels: M, rows of the GEMM.
        n: columns, :func:`run_of` times r².
        limits: of the device.
    """
    columns = sum(column_blocks(n))
    wide = columns > 128
    candidates = [Tile(128, 128, 8, 3), Tile(64, 128, 8 if wide else 4, 3), Tile(128, 128, 8, 4), Tile(128, 64, 8, 4)]
    if triton.cdiv(pixels, 128) * triton.cdiv(n, columns) < limits.multiprocessors / 2:
        candidates.sort(key=lambda tile: tile.block_m)
    bytes_of = lambda tile: tile.num_stages * tile.block_k * (tile.block_m + columns)  # noqa: E731
    return [tile for tile in candidates if bytes_of(tile) <= limits.shared_bytes]


def run_of(channels):
    """Return the columns that C_out channels take for each (i, j)."""
    return triton.cdiv(channels, _RUN) * _RUN


def _in_columns(values, r):
    """Put ``[C r², ...]`` from the order (c, i, j) into that of the columns, padded by zeros."""
    channels = values.shape[0] // (r * r)
    columns = values.new_zeros((r * r, run_of(channels), *values.shape[1:]))
    columns[:, :channels] = values.unflatten(0, (channels, r * r)).transpose(0, 1)
    columns = columns.flatten(0, 1)
    packed = values.new_zeros((padded_columns(columns.shape[0]), *values.shape[1:]))
    packed[: columns.shape[0]] = columns
    return packed


def pack_weight(weight, r, pixel):
    """Return the weight int8 ``[C r², C_in, K_h, K_w]`` as the kernel reads it: ``[N, K]``, both padded by zeros.

    Args:
        weight: the weight.
        r: upscale factor.
        pixel: CP, channels of a pixel of x in memory.
    """
    columns = _in_columns(weight, r)
    count, channels, rows, taps = columns.shape
    depth = triton.cdiv(rows * taps * pixel, _DEPTH) * _DEPTH
    packed = weight.new_zeros((count, depth))
    packed[:, : rows * taps * pixel].view(count, rows, taps, pixel)[..., :channels] = columns.permute(0, 2, 3, 1)
    return packed


def pack_columns(scale, bias, r, inverse_scale=None, zero_point=None):
    """Return what the kernel reads for each column, float32 ``[4, N]``: scale, bias, and the output's quantisation.

    Args:
        scale: float32 ``[C r²]``.
        bias: float32 ``[C r²]``.
        r: upscale factor.
        inverse_scale: float32 ``[C]``, or None for an output in floating point.
        zero_point: int8 ``[C]``, or None.
    """
    per_channel = [torch.zeros_like(scale) if t is None else t.float().repeat_interleave(r * r) for t in
                   (inverse_scale, zero_point)]  # fmt: skip
    return torch.stack([_in_columns(values, r) for values in (scale, bias, *per_channel)])


def _in_pixels(image, height, width):
    """Return the row and the image of y in pixels, and the first pixel inside its border."""
    rows, columns = image.shape[2:]
    halo = (rows - height) // 2
    return columns, rows * columns, halo * columns + (columns - width) // 2


def quantize_int8_fwd(x, inverse_scale, zero_point, out):
    """Write x, quantised, into the inside of an image.

    Args:
        x: ``[B, C, H, W]``, channels-last.
        inverse_scale: float32 ``[C]``.
        zero_point: int8 ``[C]``.
        out: int8 ``[B, C, H + 2 halo, W + 2 halo]``, the image.
    """
    batch, channels, height, width = x.shape
    pixel = out.stride(3)
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        quantize_int8_fwd_kernel[(triton.cdiv(batch * height * width * pixel, _BLOCK),)](
            x,
            inverse_scale,
            zero_point,
            out,
            batch * height * width,
            height,
            width,
            *_in_pixels(out, height, width),
            C=channels,
            PIXEL=channels,
            CP=pixel,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )


def conv_pixel_shuffle_gelu_int8_fwd(x, packed, columns, out, kernel_size, r, approximate, *, tile=None):
    """Write the block's result into ``out``: the inside of an image, or a channels-last tensor in floating point.

    Args:
        x: int8 ``[B, C_in, H + K_h - 1, W + K_w - 1]``, an image.
        packed: the weight, from :func:`pack_weight`.
        columns: from :func:`pack_columns`.
        out: int8 ``[B, C, H r + 2 halo, W r + 2 halo]``, an image, or ``[B, C, H r, W r]`` in floating point.
        kernel_size: ``(K_h, K_w)``.
        r: upscale factor.
        approximate: ``"none"`` (GELU by erf) or ``"tanh"`` (its tanh form).
        tile: a :class:`Tile` instead of the table's choice.
    """
    batch, _, x_rows, x_columns = x.shape
    height, width = x_rows - kernel_size[0] + 1, x_columns - kernel_size[1] + 1
    channels, pixels = out.shape[1], batch * height * width
    if out.numel() == 0:
        return
    run = run_of(channels)
    tile = tile or tiles(pixels, run * r * r, limits_of(x))[0]
    block_n, block_n2 = column_blocks(run * r * r)
    with torch.cuda.device_of(x):
        conv_pixel_shuffle_gelu_int8_fwd_kernel[
            (triton.cdiv(pixels, tile.block_m) * (packed.shape[0] // (block_n + block_n2)),)
        ](
            x,
            packed,
            columns,
            out,
            pixels,
            height,
            width,
            x_columns,
            x_rows * x_columns,
            *_in_pixels(out, height * r, width * r),
            CP=x.stride(3),
            KH=kernel_size[0],
            KW=kernel_size[1],
            KP=packed.shape[1],
            C=channels,
            RUN=run,
            R=r,
            NP=packed.shape[0],
            # The stride of an axis of size 1 says nothing; that of an image is always right.
            YP=out.stride(3) if out.dtype == torch.int8 else channels,
            FORM="tanh" if approximate == "tanh" else "erf",
            QUANTIZE=out.dtype == torch.int8,
            BLOCK_M=tile.block_m,
            BLOCK_N=block_n,
            BLOCK_N2=block_n2,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
