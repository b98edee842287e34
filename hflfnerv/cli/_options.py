"""Types and options that several commands share."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from ..config import MATRICES

__all__ = [
    "add_device",
    "add_fps",
    "add_frames",
    "add_output",
    "add_selection",
    "argument",
    "check_folder",
    "check_outputs",
    "check_suffix",
    "print_json",
    "size_hw",
    "write_json",
]

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser's ValueError the message that argparse prints."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _frames(text: str) -> slice:
    from ..data import parse_frames

    return parse_frames(text)


def _fps(text: str) -> Fraction:
    from ..data import parse_fps

    return parse_fps(text)


def size_hw(text: str) -> tuple[int, int]:
    """Read HxW as ``(height, width)``."""
    from ..data import parse_size_hw

    return parse_size_hw(text)


def add_frames(parser: argparse.ArgumentParser) -> None:
    """Add --frames."""
    parser.add_argument(
        "--frames", metavar="A:B", type=argument(_frames), help="frames A to B-1, like a slice (default: all)"
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add --frames, --resize, --crop and --untagged-matrix: what decides which frames are read of an input."""
    add_frames(parser)
    parser.add_argument(
        "--resize", metavar="HxW", type=argument(size_hw), help="resize whole frames to HxW first (bicubic)"
    )
    parser.add_argument("--crop", metavar="HxW", type=argument(size_hw), help="centre crop to HxW, after --resize")
    parser.add_argument(
        "--untagged-matrix",
        choices=MATRICES,
        help="YUV matrix of a video that does not state its own (default: that of the .hflf file, or bt601 as FFmpeg "
        "takes it; players take bt709 from 720 rows on)",
    )


def add_fps(parser: argparse.ArgumentParser) -> None:
    """Add --fps."""
    parser.add_argument(
        "--fps",
        metavar="RATE",
        type=argument(_fps),
        help="frame rate such as 29.97 or 30000/1001, instead of the input's own (default: 25 where it has none)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --output of a command that makes a .hflf file."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT.hflf",
        help="replaced if there is one, once all is done",
    )


def add_device(parser: argparse.ArgumentParser, precisions: tuple[str, ...], default: str) -> None:
    """Add --device and --precision."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", choices=precisions, default=default, help=f"compute type (default: {default})")


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """Raise ValueError where a file that a command writes would replace one that it reads or another that it writes.

    An image that would be new in a folder that is read is refused too: the next command would read it.

    Args:
        outputs: by the names of their options; None for one that was not asked for.
        inputs: what is read.
    """
    from ..data.images import IMAGE_SUFFIXES

    taken: dict[str, str] = {}
    folders: set[str] = set()
    for source in inputs:
        if source is None:
            continue
        taken[os.path.realpath(source)] = "the file that is read"
        if source.is_dir():
            folders.add(os.path.realpath(source))
            images = (path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            taken.update({os.path.realpath(path): "the images that are read" for path in images})
    for name, path in outputs.items():
        if path is None:
            continue
        real = Path(os.path.realpath(path))
        other = taken.setdefault(str(real), f"that of {name}")
        if other != f"that of {name}":
            raise ValueError(f"{name} must be another file than {other}, got {path}")
        if str(real.parent) in folders and real.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{name} must not be an image in the folder that is read, got {path}")


def check_suffix(name: str, path: Path) -> None:
    """Raise ValueError where a coded video would get the name of something else."""
    if path.suffix.lower() != ".hflf":
        raise ValueError(f"{name} must end in .hflf, got {path}")


def check_folder(name: str, path: Path | None) -> None:
    """Raise ValueError where an option that names a folder, perhaps a new one, was given a file."""
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {path}")


def print_json(value: Any) -> None:
    """Print a report on standard output."""
    print(_to_json(value))


def write_json(path: Path, value: Any) -> None:
    """Write a report to a file, whole or not at all."""
    from .._atomic import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(_to_json(value) + "\n")


def _to_json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold by its name: the PSNR of identical frames is ``"inf"``."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
