"""The mask of the high-pass filter, on the half spectrum that a real FFT returns, in place."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def highpass_fwd_kernel(
    spectrum_ptr,
    H,
    W,
    removed_rows,
    removed_columns,
    rows,
    BLOCK: tl.constexpr,
):
    # Rows and columns whose frequency is in -n ... n, the only ones with a weight other than 1. Of a pair of mirrored
    # frequencies, of which -n ... n - 1 holds one or both, each gets half of what is removed of both.
    blocks = tl.cdiv(2 * (removed_columns + 1), BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    row_frequency = (pid // blocks) % rows - removed_rows
    image = (pid // blocks // rows).to(tl.int64)
    row = tl.where(row_frequency < 0, row_frequency + H, row_frequency)
    element = block * BLOCK + tl.arange(0, BLOCK)  # of the row: real, imaginary, real, ...
    column = element // 2
    mask = column <= removed_columns
    column_frequency = tl.where(2 * column == W, -column, column)
    # The Nyquist frequency of an even size is its own mirror.
    row_mirror = tl.where(2 * row_frequency == -H, row_frequency, -row_frequency)
    column_mirror = tl.where(2 * column == W, column_frequency, -column)
    inside = (row_frequency < removed_rows) & (column_frequency < removed_columns)
    mirror_inside = (row_mirror >= -removed_rows) & (row_mirror < removed_rows)
    mirror_inside = mirror_inside & (column_mirror >= -removed_columns)
    weight = 1.0 - 0.5 * (inside.to(tl.float32) + mirror_inside.to(tl.float32))
    pointers = spectrum_ptr + (image * H + row) * (W // 2 + 1) * 2 + element
    kept = tl.load(pointers, mask=mask & (weight > 0.0), other=0.0)
    tl.store(pointers, kept * weight, mask=mask)


def highpass_fwd(spectrum, width, removed_rows, removed_columns):
    """Multiply the half spectra ``[..., H, W // 2 + 1]`` (complex64, contiguous) with the filter's weights, in place.

    Args:
        spectrum: ``torch.fft.rfft2`` of images of ``width`` columns.
        width: W, which the half spectrum alone does not tell.
        removed_rows: n of the rows; their frequencies ``-n ... n - 1`` are removed.
        removed_columns: n of the columns.
    """
    height = spectrum.shape[-2]
    if removed_rows == 0 or removed_columns == 0 or spectrum.numel() == 0:
        return
    rows = min(2 * removed_rows + 1, height)
    images = spectrum.numel() // (height * spectrum.shape[-1])
    grid = (images * rows * triton.cdiv(2 * (removed_columns + 1), _BLOCK),)
    with torch.cuda.device_of(spectrum):
        highpass_fwd_kernel[grid](
            torch.view_as_real(spectrum),
            height,
            width,
            removed_rows,
            removed_columns,
            rows,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
