"""Clips for the tests of reading and writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

Planes = Sequence[np.ndarray]
ClipWriter = Callable[..., Path]

# Kr and Kb of ITU-R BT.709, BT.601 and SMPTE 240M.
WEIGHTS = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "smpte240m": (0.212, 0.087)}
COLORS = [(0, 0, 0), (255, 255, 255), (200, 30, 60), (20, 180, 90), (40, 50, 220), (128, 128, 128), (250, 220, 10)]


def to_yuv(rgb: tuple[int, int, int], matrix: str, full: bool, bits: int) -> list[int]:
    kr, kb = WEIGHTS[matrix]
    red, green, blue = (value / 255 for value in rgb)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    u, v = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    unit, top = 2 ** (bits - 8), 2**bits - 1
    if full:
        return [round(top * y), *(min(top, round(top * chroma + 128 * unit)) for chroma in (u, v))]
    return [round(unit * (219 * y + 16)), *(round(unit * (224 * chroma + 128)) for chroma in (u, v))]


def to_rgb(yuv: list[int], matrix: str, full: bool, bits: int) -> np.ndarray:
    kr, kb = WEIGHTS[matrix]
    unit, top = 2 ** (bits - 8), 2**bits - 1
    luma = yuv[0] / top if full else (yuv[0] / unit - 16) / 219
    u, v = ((code - 128 * unit) / top if full else (code / unit - 128) / 224 for code in yuv[1:])
    red, blue = luma + (2 - 2 * kr) * v, luma + (2 - 2 * kb) * u
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(255 * np.array([red, green, blue]), 0, 255)


@pytest.fixture(scope="session")
def colorimetry() -> SimpleNamespace:
    """The YUV matrices in floating point, from their definitions."""
    return SimpleNamespace(COLORS=COLORS, to_yuv=to_yuv, to_rgb=to_rgb)


def _fill(plane: av.video.plane.VideoPlane, values: np.ndarray) -> None:
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(plane.height, -1)
    rows[:, : raw.shape[1]] = raw
    plane.update(rows.tobytes())


@pytest.fixture(scope="session")
def write_clip() -> ClipWriter:
    """A function that writes frames given as raw planes, with the stream's tags as asked for."""

    def write(
        path: Path,
        frames: Iterable[Planes],
        pixel_format: str,
        size: tuple[int, int],
        *,
        codec: str = "ffv1",
        fps: Fraction | int = 25,
        format: str | None = None,
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
        pts: Sequence[int] | None = None,
        time_base: Fraction | None = None,
        rotation: tuple[float, bool, bool] | None = None,
        **tags: Any,
    ) -> Path:
        height, width = size
        with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=fps, options=options or {})
            context = stream.codec_context
            context.width, context.height, context.pix_fmt = width, height, pixel_format
            context.time_base = time_base or 1 / Fraction(fps)
            for name, value in tags.items():
                setattr(context, name, value)
            if rotation is not None:
                stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
            for index, planes in enumerate(frames):
                frame = av.VideoFrame(width, height, pixel_format)
                for plane, values in zip(frame.planes, planes, strict=True):
                    _fill(plane, values)
                frame.pts = index if pts is None else pts[index]
                frame.time_base = context.time_base
                if "color_range" in tags:
                    frame.color_range = tags["color_range"]
                if "colorspace" in tags:
                    frame.colorspace = tags["colorspace"]
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def write_rgb_clip(write_clip: ClipWriter) -> ClipWriter:
    """A function that writes RGB frames without loss, [T, H, W, 3], as a video."""

    def write(path: Path, frames: np.ndarray, **kwargs: Any) -> Path:
        return write_clip(path, ([frame] for frame in frames), "rgb24", frames.shape[1:3], codec="png", **kwargs)

    return write


@pytest.fixture(scope="session")
def write_grey_clip(write_clip: ClipWriter) -> ClipWriter:
    """A function that writes frames by x264, 4:2:0, from luma [T, H, W]; for what needs a real codec."""

    def write(path: Path, luma: np.ndarray, **kwargs: Any) -> Path:
        height, width = luma.shape[1:]
        chroma = np.full((height // 2, width // 2), 128, np.uint8)
        planes = ([frame, chroma, chroma] for frame in luma)
        return write_clip(path, planes, "yuv420p", (height, width), codec="libx264", **kwargs)

    return write
