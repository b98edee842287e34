from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from hflfnerv.data import CONVENTIONAL_CODECS, ConventionalCodec, code_conventionally
from hflfnerv.errors import BackendUnavailable
from hflfnerv.metrics import psnr


def clip(count: int = 5, height: int = 64, width: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin((rows + 3 * t) / 9) * np.cos(columns / 11) for t in range(count)]
    return np.stack([np.stack([wave, 255 - wave, 0.5 * wave], axis=-1) for wave in waves]).round().astype(np.uint8)


@pytest.fixture(params=CONVENTIONAL_CODECS)
def codec(request: pytest.FixtureRequest) -> ConventionalCodec:
    chosen = CONVENTIONAL_CODECS[request.param]
    if chosen.unavailable() is not None:
        pytest.skip(chosen.unavailable())
    return chosen


@pytest.mark.parametrize("matrix", ["bt709", "bt601"])
def test_frames_come_back_in_order_and_alike(codec: ConventionalCodec, matrix: str) -> None:
    frames = clip()
    result = code_conventionally(frames, Fraction(25), codec, crf=4, matrix=matrix)
    assert result.frames.shape == frames.shape
    assert result.frames.dtype == np.uint8
    # Smooth waves lose little at this rate; a frame in the wrong place, or the wrong matrix, is under 25 dB.
    assert psnr(result.frames, frames).min() > 38
    assert psnr(result.frames[1:], frames[:-1]).max() < 30


def test_a_worse_crf_takes_fewer_bytes_and_loses_more(codec: ConventionalCodec) -> None:
    good, bad = (code_conventionally(clip(), Fraction(25), codec, crf=crf) for crf in (codec.crfs[0], codec.crfs[-1]))
    assert bad.num_bytes < good.num_bytes
    assert psnr(bad.frames, clip()).mean() < psnr(good.frames, clip()).mean()
    again = code_conventionally(clip(), Fraction(25), codec, crf=codec.crfs[0])
    assert again.num_bytes == good.num_bytes
    assert np.array_equal(again.frames, good.frames)


def test_odd_sides(codec: ConventionalCodec) -> None:
    frames = clip(3, 65, 99)
    result = code_conventionally(frames, Fraction(30000, 1001), codec, crf=8)
    assert result.frames.shape == frames.shape
    assert psnr(result.frames, frames).min() > 36


def test_no_bytes_but_the_videos(codec: ConventionalCodec) -> None:
    # One grey frame: what is left is parameter sets and headers. x264's and x265's comments are 600 to 2300 bytes.
    result = code_conventionally(np.full((1, 64, 96, 3), 128, np.uint8), Fraction(25), codec, crf=codec.crfs[-1])
    assert 20 < result.num_bytes < 250


def test_what_is_missing_is_named() -> None:
    missing = replace(CONVENTIONAL_CODECS["x265"], encoder="libx300")
    assert missing.unavailable() == "this build of PyAV has no encoder libx300"
    with pytest.raises(BackendUnavailable, match="x265 cannot be measured: this build of PyAV has no encoder libx300"):
        code_conventionally(clip(), Fraction(25), missing, crf=30)
    missing = replace(CONVENTIONAL_CODECS["x264"], decoders=("a", "b"))
    assert missing.unavailable() == "this build of PyAV has no decoder a or b"


def test_rejects(codec: ConventionalCodec) -> None:
    with pytest.raises(ValueError, match=f"crf must be in 0..{codec.worst_crf}"):
        code_conventionally(clip(), Fraction(25), codec, crf=codec.worst_crf + 1)
    with pytest.raises(ValueError, match="matrix must be one of bt709, bt601, got 'bt2020'"):
        code_conventionally(clip(), Fraction(25), codec, crf=30, matrix="bt2020")
    with pytest.raises(ValueError, match="threads must be at least 1"):
        code_conventionally(clip(), Fraction(25), codec, crf=30, threads=0)


def test_unknown_preset() -> None:
    codec = CONVENTIONAL_CODECS["x264"]
    if codec.unavailable() is not None:
        pytest.skip(codec.unavailable())
    with pytest.raises(ValueError, match="preset must be one of libx264's"):
        code_conventionally(clip(), Fraction(25), codec, crf=30, preset="quickly")
