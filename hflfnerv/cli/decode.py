"""``hflfnerv decode``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ._options import add_device, add_frames

__all__ = ["add_parser", "run"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("decode", help="a .hflf file to a video, a folder of PNG images or a NumPy array")
    parser.add_argument("input", type=Path, metavar="IN.hflf")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help=".mp4, .mkv, .y4m, .npy, or a folder for PNG"
    )
    add_frames(parser)
    add_device(parser, ("auto", "fp32", "bf16", "fp16"), "auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Decode."""
    from ..codec import Decoder
    from ..data import VideoWriter

    decoder = Decoder(arguments.input, device=arguments.device, precision=arguments.precision)
    start, stop, _ = (arguments.frames or slice(None)).indices(len(decoder))
    if start >= stop:
        raise ValueError(f"--frames must select at least one of {len(decoder)} frames, got {start}:{stop}")
    _, height, width, _ = decoder.shape
    aspect = decoder.header.sample_aspect_ratio
    started = time.perf_counter()
    with VideoWriter(arguments.output, decoder.fps, (height, width), sample_aspect_ratio=aspect) as writer:
        for frame in decoder.iter_frames(start, stop):
            writer.write(frame)
    seconds = time.perf_counter() - started
    print(f"{arguments.output}: {stop - start} frames of {height}x{width} in {seconds:.1f} s")
    return 0
