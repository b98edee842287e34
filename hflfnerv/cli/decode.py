"""``hflfnerv decode``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..config import DECODE_PRECISIONS
from ._ahead import Ahead
from ._options import add_device, add_frames, check_outputs

__all__ = ["add_parser", "run"]

_FRAMES_AHEAD = 8


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("decode", help="a .hflf file to a video, a folder of PNG images or a NumPy array")
    parser.add_argument("input", type=Path, metavar="IN.hflf")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help=".mp4, .mkv, .y4m, .npy, or a folder for PNG"
    )
    parser.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        help="replace what is there, in a folder its frame_NNNNN.png; or nothing at all (default: a file is replaced, "
        "a folder that is not empty is refused)",
    )
    add_frames(parser)
    add_device(parser, DECODE_PRECISIONS, "auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Decode."""
    from ..codec import Color, Decoder
    from ..data import VideoWriter
    from ..data.selection import format_frames

    check_outputs({"--output": arguments.output}, [arguments.input])
    began = time.perf_counter()
    decoder = Decoder(arguments.input, device=arguments.device, precision=arguments.precision)
    chosen: slice = arguments.frames or slice(None)
    start, stop, _ = chosen.indices(len(decoder))
    if start >= stop:
        raise ValueError(
            f"--frames must select at least one of the frames 0 to {len(decoder) - 1}, got {format_frames(chosen)}"
        )
    _, height, width, _ = decoder.shape
    aspect = decoder.header.sample_aspect_ratio
    opened = time.perf_counter()
    frames = Ahead(decoder.iter_frames(start, stop), _FRAMES_AHEAD)
    writing = 0.0
    color = decoder.header.color or Color()
    with VideoWriter(
        arguments.output,
        decoder.fps,
        (height, width),
        overwrite=arguments.overwrite,
        sample_aspect_ratio=aspect,
        primaries=color.primaries,
        transfer=color.transfer,
    ) as writer:
        for frame in frames:
            before = time.perf_counter()
            writer.write(frame)
            writing += time.perf_counter() - before
        before = time.perf_counter()
    ended = time.perf_counter()
    count, total = stop - start, ended - began
    copying = decoder.engine.copy_seconds
    stages = {"weights": opened - began, "network": frames.seconds - copying, "copy": copying}
    stages["writing"] = writing + ended - before
    shares = ", ".join(f"{name} {seconds:.2f} s ({100 * seconds / total:.0f} %)" for name, seconds in stages.items())
    print(f"{arguments.output}: {count} frames of {height}x{width} in {total:.1f} s, {count / total:.1f} a second")
    print(f"  {shares}; network and writing overlap")
    return 0
