"""Rate-distortion: points of coded clips, their mean over clips, Bjontegaard deltas between curves, and a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .._atomic import atomic_path
from .._version import __version__
from ..data import ConventionalCodec, Video, code_conventionally
from ..errors import BackendUnavailable
from ..metrics import bd_psnr, bd_rate, bits_per_pixel
from .bitstream import Source
from .decoder import Decoder
from .evaluation import compare, evaluate

__all__ = ["bjontegaard", "check_plot", "conventional_point", "file_point", "mean_points", "plot_points"]

_PLOT_SUFFIXES = (".svg", ".png", ".pdf")

#: One measured point. ``implementation`` names the curve, ``setting`` the point on it.
Row = dict[str, Any]


def conventional_point(
    video: Video, codec: ConventionalCodec, *, crf: int, preset: str | None = None, threads: int = 1
) -> Row:
    """Code a clip with x264, x265 or SVT-AV1 and measure it.

    The YUV matrix is the source's own where that is BT.709 or BT.601, and BT.709 for everything else (RGB images).

    Args and errors are those of :func:`~hflfnerv.data.code_conventionally`.

    Returns:
        The point; bits per pixel count every packet, quality is that of RGB frames, mean over the frames.
    """
    preset = codec.preset if preset is None else preset
    matrix = video.color.matrix if video.color.matrix in ("bt709", "bt601") else "bt709"
    frames = video.frames.numpy()
    result = code_conventionally(frames, video.fps, codec, crf=crf, preset=preset, matrix=matrix, threads=threads)
    quality = compare(result.frames, video.frames)
    return {
        **_identity(f"{codec.name} {preset}", f"CRF {crf}", video),
        "settings": {"encoder": codec.encoder, "preset": preset, "crf": crf, "matrix": matrix, "threads": threads}
        | {"pixel_format": "yuv420p"},
        "bytes": result.num_bytes,
        "bits_per_pixel": bits_per_pixel(result.num_bytes, frames.shape),
        "psnr_db": quality["psnr_db"],
        "ms_ssim": quality["ms_ssim"],
        "seconds": {"encode": result.encode_seconds, "decode": result.decode_seconds},
        "versions": _versions(),
    }


def file_point(video: Video, decoder: Decoder, *, setting: str) -> Row:
    """Measure a ``.hflf`` file of a clip.

    Args:
        video: the original, prepared as it was for coding.
        decoder: the file.
        setting: names the point on its curve.

    Raises:
        ValueError: the file is not of this clip's shape, or of other frames, another resize or another crop of it.
    """
    header = decoder.header
    # A source of another size was prepared by other means: nothing tells then how its frames belong to the file's.
    if header.source is not None and (header.source.height, header.source.width) == video.source_size:
        coded, given = _preparation(header.source), _preparation(video)
        if coded != given:
            raise ValueError(
                f"video must be what the file was made of ({coded}), got {given}: give the frames, resize and crop "
                "with which it was encoded"
            )
    quality = evaluate(decoder, video.frames)
    return {
        **_identity(f"{header.model['model']} {header.preset}", setting, video),
        "settings": {"parameters": decoder.model.parameter_counts()["total"], **(header.training or {})},
        "bytes": decoder.bitstream.size,
        "bits_per_pixel": quality["bits_per_pixel"],
        "psnr_db": quality["psnr_db"],
        "ms_ssim": quality["ms_ssim"],
        "versions": _versions(),
    }


def mean_points(rows: Iterable[Row]) -> list[Row]:
    """Average each point over the clips.

    Returns:
        One row for each curve and setting that every clip has, in the order in which they came, with
        ``bits_per_pixel``, ``psnr_db`` and ``ms_ssim`` (None where a clip has none).
    """
    rows = list(rows)
    clips = {row["clip"] for row in rows}
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["implementation"], row["setting"]), {})[row["clip"]] = row
    points = []
    for (implementation, setting), group in groups.items():
        if group.keys() != clips:
            continue
        point: Row = {"implementation": implementation, "setting": setting, "clips": len(clips)}
        for metric in ("bits_per_pixel", "psnr_db", "ms_ssim"):
            values = [row[metric] for row in group.values()]
            point[metric] = None if None in values else float(np.mean(values))
        points.append(point)
    return points


def bjontegaard(points: Sequence[Row], anchor: str) -> list[Row]:
    """Compare every curve with one of them.

    Args:
        points: of several curves, e.g. from :func:`mean_points`.
        anchor: the curve compared with.

    Returns:
        For every other curve ``implementation``, ``anchor``, ``bd_rate_percent`` and ``bd_psnr_db``; None where that
        does not exist, and then ``unavailable`` says why.

    Raises:
        ValueError: there is no curve of this name.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        curves.setdefault(point["implementation"], []).append((point["bits_per_pixel"], point["psnr_db"]))
    if anchor not in curves:
        raise ValueError(f"anchor must be one of {', '.join(curves)}, got {anchor!r}")
    rows = []
    for name, curve in curves.items():
        if name == anchor:
            continue
        row: Row = {"implementation": name, "anchor": anchor, "bd_rate_percent": None, "bd_psnr_db": None}
        reasons = []
        for key, delta in (("bd_rate_percent", bd_rate), ("bd_psnr_db", bd_psnr)):
            try:
                row[key] = delta(curves[anchor], curve)
            except ValueError as error:
                reasons.append(str(error))
        if reasons:
            row["unavailable"] = "; ".join(dict.fromkeys(reasons))
        rows.append(row)
    return rows


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise now what :func:`plot_points` would raise after everything has been measured.

    Raises:
        BackendUnavailable: matplotlib is missing.
        ValueError: the suffix is none of ``.svg``, ``.png`` and ``.pdf``.
    """
    if Path(path).suffix.lower() not in _PLOT_SUFFIXES:
        raise ValueError(f"plot must end in {', '.join(_PLOT_SUFFIXES)}, got {os.fspath(path)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(f"plots need matplotlib ({error}): pip install 'hflfnerv[plot]'") from error


def plot_points(points: Sequence[Row], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw PSNR over bits per pixel, on a logarithmic axis, one line for each curve.

    Args:
        points: of several curves; those that begin with ``paper-`` are dashed.
        path: an image; the suffix decides the format (``.svg``, ``.png``, ``.pdf``).
        title: of the plot.

    Raises:
        BackendUnavailable: matplotlib is missing.
        ValueError: the suffix is none of these.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[Row]] = {}
    for point in points:
        curves.setdefault(point["implementation"], []).append(point)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        ordered = sorted(curve, key=lambda point: float(point["bits_per_pixel"]))
        rates, qualities = zip(*((point["bits_per_pixel"], point["psnr_db"]) for point in ordered), strict=True)
        axes.plot(rates, qualities, "x--" if name.startswith("paper-") else "o-", markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("RGB PSNR, dB")
    axes.set_title(title, fontsize=9)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    # Without dates and random names the same points give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "hflfnerv"}), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Date": None} if temporary.suffix == ".svg" else None)


def _preparation(made: Source | Video) -> str:
    height, width = made.source_size if isinstance(made, Video) else (made.height, made.width)
    rows, columns = made.resize or (height, width)
    top, left, kept_rows, kept_columns = made.crop or (0, 0, rows, columns)
    return (
        f"frames from {made.first_frame}, resized to {rows}x{columns}, {kept_rows}x{kept_columns} of that at row {top} "
        f"and column {left}"
    )


def _identity(implementation: str, setting: str, video: Video) -> Row:
    return {
        "what": "rate_distortion",
        "implementation": implementation,
        "clip": video.name,
        "setting": setting,
        "shape": [*video.shape, 3],
    }


def _versions() -> dict[str, str]:
    return {"hflfnerv": __version__, "av": metadata.version("av"), "python": platform.python_version()}
