from __future__ import annotations

import numpy as np
import pytest
import torch

from hflfnerv.metrics import MS_SSIM_MIN_SIDE, ms_ssim, ssim


def frames(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A pattern in whole numbers, and the same with noise of up to 30 levels: [H, W, 3], uint8."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    clean = 64 + (3 * x + 5 * y + 50 * c) // 4 % 128
    noisy = np.clip(clean + (31 * x * x + 57 * y * y + 13 * x * y + 7 * c) % 61 - 30, 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


# pytorch-msssim 1.0.0 on the frames above as float64 [1, 3, H, W] / 255: ssim(a, b, data_range=1), ms_ssim(likewise).
# Odd sides are among them: it pads them with zeros before halving.
REFERENCE = {
    (161, 161): (0.251120426, 0.814639044),
    (163, 240): (0.245581052, 0.810883844),
    (180, 322): (0.250835690, 0.812534225),
}
# Twice the error of the package itself in float32 against these values (at most 8.2e-7 and 4.6e-7), and one rounding.
SSIM_TOLERANCE = 2 * 8.2e-7 + 2**-24
MS_SSIM_TOLERANCE = 2 * 4.6e-7 + 2**-24


@pytest.mark.parametrize("size", REFERENCE)
def test_equals_pytorch_msssim(size: tuple[int, int]) -> None:
    a, b = frames(*size)
    assert ssim(a, b).item() == pytest.approx(REFERENCE[size][0], abs=SSIM_TOLERANCE)
    assert ms_ssim(a, b).item() == pytest.approx(REFERENCE[size][1], abs=MS_SSIM_TOLERANCE)
    planes = [torch.from_numpy(x).permute(2, 0, 1)[None].double() / 255 for x in (a, b)]
    assert ms_ssim(*planes).item() == pytest.approx(REFERENCE[size][1], abs=MS_SSIM_TOLERANCE)


def test_small_frames() -> None:
    a, b = (x[:11, :31] for x in frames(161, 161))
    assert ssim(a, b).item() == pytest.approx(0.189111109, abs=SSIM_TOLERANCE)
    with pytest.raises(ValueError, match="SSIM needs frames of at least 11 pixels on each side, got 10x31"):
        ssim(a[:10], b[:10])
    assert MS_SSIM_MIN_SIDE == 161
    with pytest.raises(ValueError, match="MS-SSIM needs frames of at least 161 pixels on each side, got 160x161"):
        ms_ssim(*(x[:160] for x in frames(161, 161)))


def test_values_per_frame() -> None:
    a, b = frames(161, 161)
    left, right = np.stack([a, a, a]), np.stack([a, b, 255 - a])
    for metric in (ssim, ms_ssim):
        values = metric(left, right)
        assert (values.shape, values.dtype) == ((3,), torch.float64)
        assert values[0] == 1
        assert torch.equal(values[1:2], metric(a, b))
        assert metric(left, right, reduction="mean") == values.mean()
        assert torch.equal(metric(right, left), values)
    # Inverted structure has a negative contrast-structure term, which counts as none.
    assert ms_ssim(a, 255 - a).item() == 0
