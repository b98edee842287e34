from __future__ import annotations

import pytest
import torch

from hflfnerv.data import centre_crop, resize, transforms


def test_crop_keeps_the_centre() -> None:
    frames = torch.arange(2 * 7 * 8).reshape(2, 7, 8, 1).expand(2, 7, 8, 3)
    assert torch.equal(centre_crop(frames, 3, 4), frames[:, 2:5, 2:6])
    assert torch.equal(centre_crop(frames[0], 7, 8), frames[0])


@pytest.mark.parametrize(("full", "part", "first"), [(720, 640, 40), (4, 3, 0), (6, 3, 2), (8, 5, 2), (10, 5, 2)])
def test_crop_rounds_halves_to_even(full: int, part: int, first: int) -> None:
    frames = torch.arange(full).reshape(1, full, 1, 1)
    assert centre_crop(frames, part, 1)[0, 0, 0, 0] == first


@pytest.mark.parametrize("size", [(8, 4), (4, 9), (0, 4)])
def test_crop_rejects(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="crop must be at least 1x1 and fit into the frames of 7x8"):
        centre_crop(torch.zeros(1, 7, 8, 3), *size)


def test_resize_interpolates() -> None:
    ramp = torch.arange(64).mul(4).to(torch.uint8)[None, None, :, None].expand(2, 32, 64, 3)
    small = resize(ramp, 8, 16)
    assert small.shape == (2, 8, 16, 3)
    assert small.is_contiguous()
    # Antialiased: away from the border each value is the mean of the four that it covers.
    assert torch.equal(small[1, 4, 3:13, 1].int(), (4 * (4 * torch.arange(3, 13)) + 6).int())
    # Bicubic overshoots a step; uint8 must not wrap round.
    step = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    step[:, :, 4:] = 255
    large = resize(step, 31, 17)
    assert large.shape == (1, 31, 17, 3)
    assert large[0, 15, 6, 0] == 0
    assert large[0, 15, 10, 0] == 255


def test_resize_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randint(0, 256, (5, 17, 31, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    together = resize(frames, 24, 20)
    monkeypatch.setattr(transforms, "_BATCH_BYTES", 1)
    assert torch.equal(resize(frames, 24, 20), together)
    assert resize(frames, 17, 31) is frames


def test_resize_rejects() -> None:
    with pytest.raises(TypeError, match="uint8"):
        resize(torch.zeros(1, 4, 4, 3), 2, 2)
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        resize(torch.zeros(4, 4, 3, dtype=torch.uint8), 2, 2)
    with pytest.raises(ValueError, match="at least 1x1"):
        resize(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, 2)
