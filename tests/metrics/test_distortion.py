from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hflfnerv.metrics import bits_per_pixel, ms_ssim, psnr, ssim


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return tuple(random.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))


def test_psnr_is_the_mean_over_frames_of_each_frames_own() -> None:
    a, b = pair((3, 17, 31, 3))
    b[1] = np.where(a[1] < 255, a[1] + 1, 254)
    errors = ((a.astype(float) - b) / 255) ** 2
    expected = [10 * math.log10(1 / error.mean()) for error in errors]
    values = psnr(a, b)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-14)
    assert values[1].item() == pytest.approx(20 * math.log10(255), rel=1e-14)
    assert psnr(a, b, reduction="mean").item() == pytest.approx(sum(expected) / 3, rel=1e-14)
    assert psnr(a[0], b[0]).tolist() == pytest.approx(expected[:1], rel=1e-14)


def test_every_form_of_frames_gives_the_same() -> None:
    a, b = pair((2, 17, 31, 3))
    tensors = torch.from_numpy(a), torch.from_numpy(b)
    assert torch.equal(psnr(*tensors), psnr(a, b))
    planes = [x.permute(0, 3, 1, 2).double() / 255 for x in tensors]
    assert psnr(*planes).tolist() == pytest.approx(psnr(a, b).tolist(), rel=1e-14)
    assert psnr(*(x.numpy() for x in planes)).tolist() == pytest.approx(psnr(a, b).tolist(), rel=1e-14)
    # A float32 sample is 2^-25 off at most, so the error of each difference is under 2^-23 of the largest.
    assert psnr(*(x.float() for x in planes)).tolist() == pytest.approx(psnr(a, b).tolist(), rel=1e-6)


def test_psnr_of_identical_frames_is_infinite() -> None:
    a, b = pair((2, 8, 8, 3))
    b[0] = a[0]
    assert psnr(a, b)[0] == math.inf
    assert psnr(a, b)[1] < math.inf
    assert psnr(a, b, reduction="mean") == math.inf


def test_psnr_is_exact_for_large_frames() -> None:
    black = torch.zeros(1, 1080, 1920, 3, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    assert psnr(black, white).item() == 0
    white[0, 0, 0, 0] = 254
    error = (255**2 * (black.numel() - 1) + 254**2) / (255**2 * black.numel())
    assert psnr(black, white).item() == pytest.approx(-10 * math.log10(error), rel=1e-6)
    assert psnr(black, white).item() > 0


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
def test_rejects(metric) -> None:
    a, b = pair((2, 176, 176, 3))
    planes = torch.zeros(2, 3, 176, 176)
    with pytest.raises(ValueError, match=r"must have the same shape, got \[2, 176, 176, 3\] and \[1, 176, 176, 3\]"):
        metric(a, b[:1])
    with pytest.raises(TypeError, match="both be uint8 or both floating point"):
        metric(a, planes)
    with pytest.raises(TypeError, match="a must be uint8 or floating point"):
        metric(a.astype(np.int32), b)
    with pytest.raises(ValueError, match=r"a must be \[T, H, W, 3\] or \[H, W, 3\]"):
        metric(a.transpose(0, 3, 1, 2), b)
    with pytest.raises(ValueError, match=r"b must be \[N, 3, H, W\]"):
        metric(planes, planes.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="must not be empty"):
        metric(a[:0], b[:0])
    with pytest.raises(ValueError, match="reduction must be"):
        metric(a, b, reduction="sum")


def test_bits_per_pixel() -> None:
    assert bits_per_pixel(1, (1, 2, 4)) == 1
    assert bits_per_pixel(0, (1, 2, 4, 3)) == 0
    assert bits_per_pixel(1_500_000, (132, 640, 1280)) == 8 * 1_500_000 / (132 * 640 * 1280)
    for num_bytes, shape in ((-1, (1, 2, 4)), (1, (2, 4)), (1, (1, 0, 4)), (1, (1, 2, 4, 4))):
        with pytest.raises(ValueError, match="must be"):
            bits_per_pixel(num_bytes, shape)
