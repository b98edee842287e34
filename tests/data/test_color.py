from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hflfnerv.config import MATRICES
from hflfnerv.data import load_video
from hflfnerv.data.color import SWS_MATRICES
from hflfnerv.errors import MediaError

UNSPECIFIED, LIMITED, FULL = 0, 1, 2
BT709, BT470BG, SMPTE170M, SMPTE240M = 1, 5, 6, 7


def flat_planes(yuv: list[int], size: tuple[int, int], subsampling: tuple[int, int], bits: int) -> list[np.ndarray]:
    dtype = np.uint8 if bits == 8 else np.uint16
    chroma = (-(-size[0] // subsampling[0]), -(-size[1] // subsampling[1]))
    return [np.full(shape, code, dtype) for shape, code in zip((size, chroma, chroma), yuv, strict=True)]


# swscale's default conversion of 8-bit subsampled frames works with tables, up to 2.6 levels off; the accurate one is
# right to rounding, but for a fixed offset of up to 0.75 where more than 8 bits are of full range.
@pytest.mark.parametrize(
    ("pixel_format", "bits", "subsampling", "tolerance"),
    [
        ("yuv420p", 8, (2, 2), 2.6),
        ("yuv422p", 8, (1, 2), 2.6),
        ("yuv444p", 8, (1, 1), 0.52),
        ("yuv420p10le", 10, (2, 2), 1.27),
        ("yuv444p10le", 10, (1, 1), 1.27),
    ],
)
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize(
    ("tag", "matrix"), [(BT709, "bt709"), (BT470BG, "bt601"), (SMPTE170M, "bt601"), (SMPTE240M, "smpte240m")]
)
@pytest.mark.parametrize("size", [(32, 48), (31, 17)])
def test_tagged_colours_come_out_right(
    tmp_path: Path,
    colorimetry: Any,
    write_clip: Any,
    pixel_format: str,
    bits: int,
    subsampling: tuple[int, int],
    tolerance: float,
    color_range: int,
    tag: int,
    matrix: str,
    size: tuple[int, int],
) -> None:
    codes = [colorimetry.to_yuv(color, matrix, color_range == FULL, bits) for color in colorimetry.COLORS]
    path = write_clip(
        tmp_path / "clip.mkv",
        [flat_planes(yuv, size, subsampling, bits) for yuv in codes],
        pixel_format,
        size,
        colorspace=tag,
        color_range=color_range,
    )
    video = load_video(path)
    assert video.shape == (len(colorimetry.COLORS), *size)
    assert (video.color.matrix, video.color.range) == (matrix, "full" if color_range == FULL else "limited")
    assert video.color.matrix_tagged
    assert video.color.range_tagged
    for frame, yuv in zip(video.frames.numpy(), codes, strict=True):
        error = np.abs(frame - colorimetry.to_rgb(yuv, matrix, color_range == FULL, bits))
        assert error.max() <= tolerance


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_untagged_video_is_bt601_limited_at_every_size(
    tmp_path: Path, colorimetry: Any, write_clip: Any, size: tuple[int, int]
) -> None:
    yuv = colorimetry.to_yuv((200, 30, 60), "bt601", False, 8)
    path = write_clip(tmp_path / "clip.mkv", [flat_planes(yuv, size, (1, 1), 8)], "yuv444p", size)
    video = load_video(path)
    assert (video.color.matrix, video.color.range) == ("bt601", "limited")
    assert not video.color.matrix_tagged
    assert not video.color.range_tagged
    assert np.abs(video.frames[0].numpy() - colorimetry.to_rgb(yuv, "bt601", False, 8)).max() <= 0.52

    other = load_video(path, untagged_matrix="bt709")
    assert other.color.matrix == "bt709"
    assert np.abs(other.frames[0].numpy() - colorimetry.to_rgb(yuv, "bt709", False, 8)).max() <= 0.52


def test_the_matrices_that_can_be_asked_for() -> None:
    assert set(MATRICES) == set(SWS_MATRICES)


def test_the_assumed_matrix_gives_way_to_a_tag(tmp_path: Path, colorimetry: Any, write_clip: Any) -> None:
    planes = flat_planes(colorimetry.to_yuv((200, 30, 60), "bt709", False, 8), (16, 16), (1, 1), 8)
    path = write_clip(tmp_path / "clip.mkv", [planes], "yuv444p", (16, 16), colorspace=BT709, color_range=LIMITED)
    assert load_video(path, untagged_matrix="smpte240m").color.matrix == "bt709"
    with pytest.raises(ValueError, match="untagged_matrix must be one of"):
        load_video(path, untagged_matrix="bt2020")


def test_rgb_and_grey_video_are_exact(tmp_path: Path, colorimetry: Any, write_clip: Any, write_rgb_clip: Any) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (3, 17, 31, 3), dtype=np.uint8)
    video = load_video(write_rgb_clip(tmp_path / "rgb.mov", rgb))
    assert np.array_equal(video.frames.numpy(), rgb)
    assert (video.color.matrix, video.color.range) == ("rgb", "full")

    path = write_clip(tmp_path / "grey.mkv", ([frame[..., 0]] for frame in rgb), "gray", (17, 31))
    assert np.array_equal(load_video(path).frames.numpy(), np.repeat(rgb[..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"color_trc": 16}, "HDR video \\(PQ"),
        ({"color_trc": 18}, "HDR video \\(HLG"),
        ({"color_primaries": 9}, "wide-gamut"),
        ({"colorspace": 9}, "wide-gamut"),
        ({"colorspace": 8}, "matrix ycgco"),
    ],
)
def test_colours_without_a_conversion_are_refused(
    tmp_path: Path, colorimetry: Any, write_clip: Any, tags: dict[str, int], message: str
) -> None:
    planes = flat_planes([500, 512, 512], (16, 16), (1, 1), 10)
    path = write_clip(tmp_path / "clip.mkv", [planes], "yuv444p10le", (16, 16), **tags)
    with pytest.raises(MediaError, match=message):
        load_video(path)


def test_alpha_is_dropped_only_where_it_is_opaque(tmp_path: Path, colorimetry: Any, write_clip: Any) -> None:
    bgra = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 4), dtype=np.uint8)
    bgra[..., 3] = 255
    path = write_clip(tmp_path / "opaque.mkv", [[bgra[0]]], "bgra", (16, 16))
    assert np.array_equal(load_video(path).frames[0].numpy(), bgra[0, ..., 2::-1])
    bgra[0, 5, 5, 3] = 254
    path = write_clip(tmp_path / "transparent.mkv", [[bgra[0]]], "bgra", (16, 16))
    with pytest.raises(MediaError, match="frame 0 has transparent pixels"):
        load_video(path)


# The arguments are FFmpeg's: degrees counterclockwise, then mirroring.
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        ((0, False, False), lambda image: image),
        ((-90, False, False), lambda image: np.rot90(image, -1)),
        ((90, False, False), lambda image: np.rot90(image, 1)),
        ((180, False, False), lambda image: np.rot90(image, 2)),
        ((0, True, False), lambda image: image[:, ::-1]),
        ((0, False, True), lambda image: image[::-1]),
    ],
)
def test_the_display_matrix_is_applied(tmp_path: Path, write_rgb_clip: Any, rotation: Any, expected: Any) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    path = write_rgb_clip(tmp_path / "clip.mov", rgb, rotation=rotation, sample_aspect_ratio=Fraction(4, 3))
    video = load_video(path)
    upright = np.stack([expected(image) for image in rgb])
    assert np.array_equal(video.frames.numpy(), upright)
    turned = upright.shape != rgb.shape
    assert video.sample_aspect_ratio == (Fraction(3, 4) if turned else Fraction(4, 3))


def test_a_slanted_display_matrix_is_refused(tmp_path: Path, write_rgb_clip: Any) -> None:
    path = write_rgb_clip(tmp_path / "clip.mov", np.zeros((1, 16, 24, 3), np.uint8), rotation=(30, False, False))
    with pytest.raises(MediaError, match="no multiple of 90 degrees"):
        load_video(path)
