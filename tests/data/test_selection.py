from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hflfnerv.data import parse_fps, parse_frames, parse_size_hw
from hflfnerv.data.selection import as_frame_slice, format_frames


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:24", slice(0, 24)),
        (":24", slice(None, 24)),
        ("3:", slice(3, None)),
        (":", slice(None, None)),
        ("-5:-1", slice(-5, -1)),
        (" 1 : 2 ", slice(1, 2)),
    ],
)
def test_parse_frames(text: str, expected: slice) -> None:
    assert parse_frames(text) == expected
    assert parse_frames(format_frames(expected)) == expected


@pytest.mark.parametrize("text", ["", "5", "1:2:3", "a:b", "1.5:2", "--1:", "1-2", "9" * 30 + ":"])
def test_parse_frames_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="frames must be A:B"):
        parse_frames(text)


def test_any_form_of_a_range() -> None:
    assert as_frame_slice(None) == slice(None, None)
    assert as_frame_slice((2, None)) == as_frame_slice("2:") == as_frame_slice(slice(2, None, 1)) == slice(2, None)
    with pytest.raises(ValueError, match="no step"):
        as_frame_slice(slice(0, 4, 2))
    with pytest.raises(ValueError, match=r"\(start, stop\)"):
        as_frame_slice((1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integers or None"):
        as_frame_slice((0.5, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a slice"):
        as_frame_slice(7)  # type: ignore[arg-type]


def test_parse_size_hw() -> None:
    assert parse_size_hw("640x1280") == (640, 1280)
    assert parse_size_hw(" 17 X 31 ") == (17, 31)


@pytest.mark.parametrize("text", ["", "640", "640x", "0x5", "5x0", "-1x5", "640*1280", "1x65537", "1.5x2"])
def test_parse_size_hw_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="size must"):
        parse_size_hw(text)


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ("25", Fraction(25)),
        (" 29.97 ", Fraction(2997, 100)),
        ("30000/1001", Fraction(30000, 1001)),
        ("24000 / 1001", Fraction(24000, 1001)),
        ("1/3600", Fraction(1, 3600)),
        (30000 / 1001, Fraction(30000, 1001)),
        (23.976, Fraction(2997, 125)),
        (1 / 3600, Fraction(1, 3600)),
        (25, Fraction(25)),
        (Fraction(2147483647, 90000), Fraction(2147483647, 90000)),
        # Terms that a file cannot hold.
        (Fraction(2**40 + 1, 2**40), Fraction(1)),
        (999_999.999_99, Fraction(1_000_000)),
    ],
)
def test_frame_rates(given: str | float | Fraction, rate: Fraction) -> None:
    assert parse_fps(given) == rate


@pytest.mark.parametrize(
    "given",
    [
        "",
        "a",
        "inf",
        "nan",
        "0",
        "-1",
        "1/0",
        "1e999999999",
        "25/",
        "1 2",
        "2000000",
        0,
        -25,
        1e-6,
        1e7,
        np.nan,
        np.inf,
    ],
)
def test_what_is_no_frame_rate(given: str | float) -> None:
    with pytest.raises(ValueError, match=r"fps must be positive, from 1/100000 to 1000000, such as 25, .*, got "):
        parse_fps(given)
