"""A convolution of each channel with a kernel of its own, stride 1, on channels-last tensors, and its gradients.

There is nothing in it for the tensor cores. Each tap of each pixel is one product, and to load a value and convert it
to float32 costs more than that; so a value that is loaded meets all rows of the kernel. Each of the kernel's columns
loads it anew, from L1.

Forward, a program makes ROWS rows of a block of pixels and channels: for each column of the kernel a window of as many
rows of x goes down over the kernel's rows. The gradient of x is the same with the kernel turned round.

For the gradient of the weight a program keeps the sums of all taps, pixel by pixel, while it goes through its share of
the image; a row of x meets a window of dy. Pixels are added up once, in the end.

An image has at most 2³¹ - 1 elements and the batch as many pixels (the callers see to it). Sums are float32.
"""

import torch
import triton
import triton.language as tl

from ._sums import sum_shares

_CHANNELS = 64  # of a program at most
_ELEMENTS = 4  # of a thread in each tensor; with 8, sums and window take nearly all registers
_WARPS = 4
_ROWS = (8, 4, 2)  # of y in a program: many to reuse values, few to fill the device
_MULTIPROCESSORS = 132  # of an H100
_BACKWARD_WARPS = 8
_BACKWARD_ROWS = 8  # of x at a time
_SHARES = 2 * _MULTIPROCESSORS  # of the sums over pixels: as many programs as run at the same time


@triton.jit
def depthwise_conv2d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    H,
    W,
    C: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    across = tl.cdiv(W, BLOCK_W)
    down = tl.cdiv(H, ROWS)
    band = pid // across  # of ROWS rows, through all images
    h_start = band % down * ROWS
    w_start = pid % across * BLOCK_W
    start = ((band // down * H + h_start).to(tl.int64) * W + w_start) * C
    x_ptr += start
    y_ptr += start
    w_offset = tl.arange(0, BLOCK_W)
    h = tl.full((BLOCK_W, 1), h_start, dtype=tl.int32)
    w = w_start + w_offset
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (w_offset * C)[:, None] + c[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32),)
    for column in range(K_W):
        dw = column - K_W // 2
        inside = ((w + dw >= 0) & (w + dw < W))[:, None] & (c < C)[None, :]
        window = ()
        for row in tl.static_range(ROWS + K_H - 1):
            dh = row - K_H // 2
            row_inside = h + dh >= 0 if dh < 0 else h + dh < H
            x = tl.load(x_ptr + (dh * W + dw) * C + offset, mask=inside & row_inside, other=0.0)
            window += (x.to(tl.float32),)
            if row >= ROWS - 1:
                tap = (row - (ROWS - 1)) * K_W + column
                if TURNED:
                    tap = K_H * K_W - 1 - tap
                weight = tl.load(weight_ptr + tap * C + c, mask=c < C, other=0.0)
                added = ()
                for r in tl.static_range(ROWS):
                    added += (sums[r] + window[r] * weight[None, :],)
                sums = added
                window = window[1:]
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    inside = (w < W)[:, None] & (c < C)[None, :]
    for r in tl.static_range(ROWS):
        y = (sums[r] + bias[None, :]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + r * W * C + offset, y, mask=inside & (h + r < H))


@triton.jit
def depthwise_conv2d_bwd_kernel(
    dy_ptr,
    x_ptr,
    partial_ptr,
    tiles,
    steps,
    H,
    W,
    C: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The axes are the kernel's columns, a block of dy's columns, channels. Columns are a power of two, and the kernel's
    # an odd number: in the first that is left over x is taken for 1, so that a sum of dy alone is there, the gradient
    # of the bias in the kernel's middle row.
    share = tl.program_id(0)
    across = tl.cdiv(W, BLOCK_W)
    down = tl.cdiv(H, ROWS)
    column = tl.arange(0, COLUMNS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = tl.arange(0, BLOCK_W)[None, :, None]
    there = here + (column - K_W // 2)[:, None, None]
    x_offset = there * C + c[None, None, :]
    # For every column of the kernel anew: a thread needs the values of dy that its values of x meet.
    dy_offset = (here + tl.zeros_like(there)) * C + c[None, None, :]
    of_kernel = (column < K_W)[:, None, None]
    ones = (column == K_W)[:, None, None] & (c < C)[None, None, :]
    sums = ()
    for _ in tl.static_range(K_H):
        sums += (tl.zeros((COLUMNS, BLOCK_W, BLOCK_C), dtype=tl.float32),)
    for tile in range(share * steps, tl.minimum((share + 1) * steps, tiles)):
        # Tiles that follow each other lie below each other, and share rows of dy.
        strip = tile // down
        h_start = tile % down * ROWS
        w_start = strip % across * BLOCK_W
        h = tl.full((1, BLOCK_W, 1), h_start, dtype=tl.int32)
        start = ((strip // across * H + h_start).to(tl.int64) * W + w_start) * C
        inside = (w_start + here < W) & (c < C)[None, None, :]
        x_inside = inside & (w_start + there >= 0) & (w_start + there < W) & of_kernel
        window = ()
        for row in tl.static_range(ROWS + K_H - 1):
            dh = row - K_H // 2
            row_inside = h + dh >= 0 if dh < 0 else h + dh < H
            dy = tl.load(dy_ptr + start + dh * W * C + dy_offset, mask=inside & row_inside, other=0.0)
            window += (dy.to(tl.float32),)
            if row >= K_H - 1:
                r = row - (K_H - 1)
                mask = x_inside & (h + r < H)
                x = tl.load(x_ptr + start + r * W * C + x_offset, mask=mask, other=ones.to(x_ptr.dtype.element_ty))
                added = ()
                for k in tl.static_range(K_H):
                    # The lowest of the rows of dy meets x with the kernel's first.
                    added += (sums[k] + x.to(tl.float32) * window[K_H - 1 - k],)
                sums = added
                window = window[1:]
    column = column[:, None]
    target = (share * K_H * (K_W + 1) + column) * C + c[None, :]
    for k in tl.static_range(K_H):
        total = tl.sum(sums[k], axis=1)
        tl.store(partial_ptr + target + k * (K_W + 1) * C, total, mask=(column <= K_W) & (c < C)[None, :])


def _block(x, elements):
    """Return how many pixels of a row and channels are at most so many elements, both powers of two."""
    channels = min(triton.next_power_of_2(x.shape[1]), _CHANNELS)
    return min(triton.next_power_of_2(x.shape[3]), elements // channels), channels


def _options(x, kernel, elements):
    # A block that is smaller than usual has fewer threads, each with as many elements.
    return {
        "H": x.shape[2],
        "W": x.shape[3],
        "C": x.shape[1],
        "K_H": kernel[0],
        "K_W": kernel[1],
        "num_warps": max(elements // (32 * _ELEMENTS), 1),
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _taps(weight):
    """Return the taps as the kernel reads them: ``[K_h, K_w, C]`` in float32, a view where they lie like that."""
    taps = weight[:, 0].permute(1, 2, 0)
    return taps.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _convolve(x, weight, bias, y, *, turned):
    batch, channels, height, width = x.shape
    block_w, block_c = _block(x, 32 * _ELEMENTS * _WARPS)

    def grid(rows):
        return batch * triton.cdiv(height, rows) * triton.cdiv(width, block_w), triton.cdiv(channels, block_c)

    rows = next((rows for rows in _ROWS if grid(rows)[0] * grid(rows)[1] >= _MULTIPROCESSORS), _ROWS[-1])
    with torch.cuda.device_of(x):
        depthwise_conv2d_fwd_kernel[grid(rows)](
            x,
            _taps(weight),
            bias,
            y,
            **_options(x, weight.shape[2:], block_w * block_c),
            TURNED=turned,
            ROWS=rows,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
        )


def depthwise_conv2d_fwd(x, weight, bias):
    """Return y ``[B, C, H, W]``, channels-last.

    Args:
        x: ``[B, C, H, W]``, channels-last.
        weight: ``[C, 1, K_h, K_w]``, both odd; read as it is if float32 and channels-innermost in memory, else copied.
        bias: ``[C]`` or None.
    """
    y = torch.empty_like(x)
    _convolve(x, weight, bias, y, turned=False)
    return y


def depthwise_conv2d_bwd(dy, x, weight, dx, *, sums):
    """Write the gradient of x, and return those of weight and bias, ``[C, 1, K_h, K_w]`` and ``[C]``.

    That of bias has the dtype of x. The sums over pixels are taken in two passes, a share for each program and then the
    sum of those, so they are the same in every run.

    Args:
        dy: ``[B, C, H, W]``, channels-last.
        x: ``[B, C, H, W]``, channels-last.
        weight: likewise.
        dx: memory for the gradient of x, channels-last, or None where it is not wanted.
        sums: whether the other two are wanted; both are None otherwise.
    """
    if dx is not None:
        _convolve(dy, weight, None, dx, turned=True)
    if not sums:
        return None, None
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[2:]
    padded = triton.next_power_of_2(columns + 1)
    block_w, block_c = _block(x, 32 * _ELEMENTS * _BACKWARD_WARPS // padded)
    blocks = triton.cdiv(channels, block_c)
    tiles = batch * triton.cdiv(height, _BACKWARD_ROWS) * triton.cdiv(width, block_w)
    steps = triton.cdiv(tiles, triton.cdiv(_SHARES, blocks))
    shares = triton.cdiv(tiles, steps)
    partial = torch.empty((shares, rows, columns + 1, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        depthwise_conv2d_bwd_kernel[(shares, blocks)](
            dy,
            x,
            partial,
            tiles,
            steps,
            **_options(x, (rows, columns), padded * block_w * block_c),
            COLUMNS=padded,
            ROWS=_BACKWARD_ROWS,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
        )
        dweight, dbias = weight.new_empty(weight.shape), x.new_empty(channels)
        taps = dweight[:, 0].permute(1, 2, 0)
        sum_shares(partial[:, :, :columns], taps, partial[:, rows // 2, columns], dbias)
        return dweight, dbias
