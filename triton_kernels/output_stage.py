"""The streams' last convolutions, activations, sum, clamp and rounding to 8 bits in one pass: features in, frames out.

A program makes a tile of the frame. Each head is nine products, one per tap, of the tile's pixels with three output
channels, padded to 16 columns. The nine reads of a pixel's features are meant to hit L1, so tiles are nearly square and
the loads are plain ones: asynchronous copies would go past it. One image has at most 2³¹ - 1 elements (the callers see
to it), so offsets inside an image fit int32 and those of the images are int64. Sums are float32.
"""

import torch
import triton
import triton.language as tl

from ._activations import round_half_even, tanh
from ._float32 import precision_of

_COLUMNS = 16  # the narrowest product of the tensor cores
_BLOCK_W = 16
_MOST = 3  # features


@triton.jit
def _head(
    accumulator, x_ptr, weight_ptr, frame, h, w, rows, columns, C: tl.constexpr, CP: tl.constexpr, PIXEL, PRECISION
):
    """Add the 3x3 convolution of one stream at the pixels (h, w)."""
    x_ptr += frame * rows * columns * PIXEL
    c = tl.arange(0, CP)
    n = tl.arange(0, accumulator.shape[1])
    for tap in tl.static_range(9):
        x_row, x_column = h + (tap // 3 - 1), w + (tap % 3 - 1)
        inside = (x_row >= 0) & (x_row < rows) & (x_column >= 0) & (x_column < columns)
        x_offset = ((x_row * columns + x_column) * PIXEL)[:, None] + c[None, :]
        x = tl.load(x_ptr + x_offset, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        weight = tl.load(weight_ptr + ((tap * CP + c) * n.shape[0])[:, None] + n[None, :])
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _first_columns(tile):
    """The first quarter of the columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    half, _ = tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))
    quarter, _ = tl.split(tl.permute(tl.reshape(half, (rows, 2, columns // 4)), (0, 2, 1)))
    return quarter


@triton.jit
def _close_group(image, sums, bias_ptr, SCALE):
    """Add a group's image: its sums with their bias, through tanh."""
    n = tl.arange(0, image.shape[1])
    z = _first_columns(sums) + tl.load(bias_ptr + n, mask=n < 3, other=0.0)[None, :]
    activated, _ = tanh(z)
    return image + SCALE * activated


@triton.jit
def output_stage_fwd_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    bias_ptr,
    y_ptr,
    H,
    W,
    rows0,
    rows1,
    rows2,
    columns0,
    columns1,
    columns2,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    CP0: tl.constexpr,
    CP1: tl.constexpr,
    CP2: tl.constexpr,
    PIXEL0: tl.constexpr,
    PIXEL1: tl.constexpr,
    PIXEL2: tl.constexpr,
    SCALE0: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    OFFSET: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Of each feature but the first: absent if there is no pointer. SCALE is that of the group that it ends, or None.
    w_blocks = tl.cdiv(W, BLOCK_W)
    h_blocks = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    frame = (pid // w_blocks // h_blocks).to(tl.int64)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    h = pid // w_blocks % h_blocks * BLOCK_H + pixel // BLOCK_W
    w = pid % w_blocks * BLOCK_W + pixel % BLOCK_W
    image = tl.full((BLOCK_H * BLOCK_W, COLUMNS // 4), OFFSET, dtype=tl.float32)
    sums = tl.zeros((BLOCK_H * BLOCK_W, COLUMNS), dtype=tl.float32)
    sums = _head(sums, x0_ptr, weight0_ptr, frame, h, w, rows0, columns0, C0, CP0, PIXEL0, PRECISION)
    if SCALE0 is not None:
        image = _close_group(image, sums, bias_ptr, SCALE0)
        sums = tl.zeros((BLOCK_H * BLOCK_W, COLUMNS), dtype=tl.float32)
        bias_ptr += 3
    if x1_ptr is not None:
        sums = _head(sums, x1_ptr, weight1_ptr, frame, h, w, rows1, columns1, C1, CP1, PIXEL1, PRECISION)
        if SCALE1 is not None:
            image = _close_group(image, sums, bias_ptr, SCALE1)
            sums = tl.zeros((BLOCK_H * BLOCK_W, COLUMNS), dtype=tl.float32)
            bias_ptr += 3
    if x2_ptr is not None:
        sums = _head(sums, x2_ptr, weight2_ptr, frame, h, w, rows2, columns2, C2, CP2, PIXEL2, PRECISION)
        image = _close_group(image, sums, bias_ptr, SCALE2)
    n = tl.arange(0, COLUMNS // 4)
    y_ptr += frame * H * W * 3
    y_offset = ((h * W + w) * 3)[:, None] + n[None, :]
    mask = ((h < H) & (w < W))[:, None] & (n < 3)[None, :]
    if BYTES:
        image = round_half_even(tl.minimum(tl.maximum(image, 0.0), 1.0) * 255.0).to(tl.uint8)
    tl.store(y_ptr + y_offset, image, mask=mask)


def pack_head(weight):
    """Return a head's weight ``[3, C, 3, 3]`` as the kernel reads it: ``[9, C, 16]``, channels a power of two.

    Depends on the weight alone, so a caller whose weights stay as they are can keep it.
    """
    channels = weight.shape[1]
    padded = max(triton.next_power_of_2(channels), 16)
    packed = torch.zeros((9, padded, _COLUMNS), dtype=weight.dtype, device=weight.device)
    packed[:, :channels, :3] = weight.permute(2, 3, 1, 0).reshape(9, channels, 3)
    return packed


def output_stage_fwd(features, packed, biases, groups, scales, offset, crop, as_bytes):
    """Return frames ``[B, H, W, 3]``, uint8 or float32.

    Args:
        features: up to three ``[B, C, H', W']`` of one dtype, channels-last, their pixels apart or not, in the order of
            their groups.
        packed: their weights, from :func:`pack_head`.
        biases: float32 ``[groups, 3]``, contiguous.
        groups: the group of each feature.
        scales: a number for each group.
        offset: a number.
        crop: ``(H, W)``, at most ``(H', W')``.
        as_bytes: whether to clamp to [0, 1] and round to 8 bits.
    """
    batch, first, (height, width) = features[0].shape[0], features[0], crop
    dtype = torch.uint8 if as_bytes else torch.float32
    y = torch.empty((batch, height, width, 3), dtype=dtype, device=first.device)
    if y.numel() == 0:
        return y
    absent = _MOST - len(features)
    ends = [g != following for g, following in zip(groups, [*groups[1:], None], strict=True)]
    each = {
        "C": [x.shape[1] for x in features],
        "CP": [weight.shape[1] for weight in packed],
        "PIXEL": [x.stride(3) for x in features],
        "SCALE": [scales[g] if end else None for g, end in zip(groups, ends, strict=True)],
    }
    block_h = 8 if first.dtype.itemsize == 2 else 4  # float32 takes twice the registers
    blocks = triton.cdiv(height, block_h) * triton.cdiv(width, _BLOCK_W)
    with torch.cuda.device_of(first):
        output_stage_fwd_kernel[(batch * blocks,)](
            *(*features, *[None] * absent),
            *(*packed, *[None] * absent),
            biases,
            y,
            height,
            width,
            *(*(x.shape[2] for x in features), *[1] * absent),
            *(*(x.shape[3] for x in features), *[1] * absent),
            **{f"{name}{i}": v for name, values in each.items() for i, v in enumerate([*values, *[None] * absent])},
            OFFSET=offset,
            BYTES=as_bytes,
            PRECISION=precision_of(first.dtype),
            COLUMNS=_COLUMNS,
            BLOCK_H=block_h,
            BLOCK_W=_BLOCK_W,
            num_warps=4,
            num_stages=1,
            # 255 times the image is rounded before it is rounded to an integer, as everywhere.
            enable_fp_fusion=False,
        )
    return y
