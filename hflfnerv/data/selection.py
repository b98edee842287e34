"""Which frames, which size and which rate: what ``--frames``, ``--resize``, ``--crop`` and ``--fps`` are given."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TypeAlias

__all__ = ["MAX_TERM", "FrameRange", "as_frame_slice", "format_frames", "parse_fps", "parse_frames", "parse_size_hw"]

FrameRange: TypeAlias = "slice | tuple[int | None, int | None] | str | None"

_MAX_SIDE = 65536
_MAX_FPS = 1_000_000
_MAX_DENOMINATOR = 100_000
#: Of a fraction that a .hflf file and FFmpeg hold.
MAX_TERM = 2**31 - 1


def parse_frames(text: str) -> slice:
    """Read a range of frames as Python reads a slice: ``A:B``, ``:B``, ``A:`` or ``:``.

    ``A`` is the first frame, counted from 0, ``B`` the first one after the range; negative numbers count from the end.

    Returns:
        ``slice(A, B)``, with None for a side left out.

    Raises:
        ValueError: it is not of this form (there is no step).

    Example:
        >>> parse_frames("0:24")
        slice(0, 24, None)
    """
    match = re.fullmatch(r"\s*(-?\d{1,18})?\s*:\s*(-?\d{1,18})?\s*", text)
    if match is None:
        raise ValueError(f"frames must be A:B, :B or A: (first frame and the one after the last), got {text!r}")
    start, stop = (None if side is None else int(side) for side in match.groups())
    return slice(start, stop)


def as_frame_slice(frames: FrameRange) -> slice:
    """Return any form of a frame range as ``slice(start, stop)``.

    Raises:
        TypeError: it is neither a slice, a pair, a string nor None, or its sides are not integers.
        ValueError: it has a step, or the string or the pair is not of the right form.
    """
    if frames is None:
        return slice(None, None)
    if isinstance(frames, str):
        return parse_frames(frames)
    if isinstance(frames, slice):
        if frames.step not in (None, 1):
            raise ValueError(f"frames must have no step, got {frames.step!r}")
        start, stop = frames.start, frames.stop
    elif isinstance(frames, tuple):
        if len(frames) != 2:
            raise ValueError(f"frames must be (start, stop), got {frames!r}")
        start, stop = frames
    else:
        raise TypeError(f"frames must be a slice, (start, stop), a string A:B or None, got {frames!r}")
    for side in (start, stop):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"frames must have integers or None as its sides, got {side!r}")
    return slice(start, stop)


def format_frames(frames: slice) -> str:
    """Return the ``A:B`` that :func:`parse_frames` reads as this slice."""
    return f"{'' if frames.start is None else frames.start}:{'' if frames.stop is None else frames.stop}"


def parse_fps(fps: str | Fraction | float) -> Fraction:
    """Read a frame rate.

    Args:
        fps: a number, or text such as ``"25"``, ``"29.97"`` or ``"30000/1001"``; from 1/100000 to a million.

    Returns:
        The rate itself where its terms are less than 2**31, else, as for most floating-point numbers, the nearest with
        a denominator of at most 100,000.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> parse_fps("1/3600")
        Fraction(1, 3600)
    """
    rate: Fraction | None = None
    if isinstance(fps, str):
        # Fraction itself would compute what 1e999999999 is.
        if re.fullmatch(r"\s*\d{1,10}(\.\d{1,10}|\s*/\s*0*[1-9]\d{0,9})?\s*", fps, flags=re.ASCII):
            rate = Fraction("".join(fps.split()))
    elif math.isfinite(fps):
        rate = Fraction(fps)
    if rate is None or not Fraction(1, _MAX_DENOMINATOR) <= rate <= _MAX_FPS:
        raise ValueError(
            f"fps must be positive, from 1/{_MAX_DENOMINATOR} to {_MAX_FPS}, such as 25, 29.97 or 30000/1001, "
            f"got {fps!r}"
        )
    if max(rate.numerator, rate.denominator) <= MAX_TERM and isinstance(fps, (str, Fraction)):
        return rate
    return rate.limit_denominator(min(_MAX_DENOMINATOR, MAX_TERM // math.ceil(rate)))


def parse_size_hw(text: str) -> tuple[int, int]:
    """Read a frame size, ``HEIGHTxWIDTH``.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        ValueError: it is not of this form, or a side is not in 1..65536.

    Example:
        >>> parse_size_hw("640x1280")
        (640, 1280)
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(\d{1,9})\s*", text)
    if match is None:
        raise ValueError(f"size must be HEIGHTxWIDTH such as 640x1280, got {text!r}")
    height, width = int(match[1]), int(match[2])
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"size must have sides in 1..{_MAX_SIDE}, got {text!r}")
    return height, width
