"""``hflfnerv bench``."""

from __future__ import annotations

import argparse
import math

from ._options import add_device, argument, print_json, size_hw

__all__ = ["add_parser", "run"]

_MODELS = ("hflf", "hnerv", "nerv")


def _models(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _MODELS:
            raise ValueError(f"--models must be of {', '.join(_MODELS)}, got {name!r}")
    return names


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--batches must be whole numbers of at least 1, comma separated, got {text!r}")
    return [int(part) for part in parts]


def _frames(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--frames must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be a positive number, got {text!r}")
    return seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="how fast this machine opens, decodes and trains; beside PyTorch without our kernels",
        description="Frames decoded per second, training steps per second, seconds from opening a file to its first "
        "frame and peak memory, of networks with random weights; beside the same networks in plain eager float32, and "
        "on a GPU torch.compile in bf16. Seconds on a CPU; minutes on a GPU, for the compiler.",
    )
    parser.add_argument("--models", type=argument(_models), default=",".join(_MODELS), help="(default: all)")
    parser.add_argument("--preset", choices=("best", "paper"), default="best", help="(default: best)")
    parser.add_argument("--size", help="parameters (default: 1.5M on a GPU, 0.3M on a CPU)")
    parser.add_argument(
        "--resolution", metavar="HxW", type=argument(size_hw), help="(default: 640x1280 on a GPU, 320x640 on a CPU)"
    )
    parser.add_argument(
        "--frames", type=argument(_frames), help="length of the video (default: 132 on a GPU, 8 on a CPU)"
    )
    parser.add_argument("--batches", type=argument(_batches), default="1,8,32", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=argument(_seconds), default=1.0, help="time for each figure (default: %(default)s)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="measure torch.compile too, which takes minutes (default: on a GPU)",
    )
    add_device(parser, ("auto", "fp32", "bf16", "fp16"), "auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure."""
    from .._device import resolve_device
    from ..codec.benchmark import measure
    from ..config import parse_size

    device = resolve_device(arguments.device)
    on_gpu = device.type == "cuda"
    height, width = arguments.resolution or ((640, 1280) if on_gpu else (320, 640))
    frames = arguments.frames or (132 if on_gpu else 8)
    size = parse_size(arguments.size or ("1.5M" if on_gpu else "0.3M"))
    rows = []
    for model in arguments.models:
        for row in measure(
            model,
            size,
            frames,
            height,
            width,
            device=device,
            preset=arguments.preset,
            precision=arguments.precision,
            batches=arguments.batches,
            seconds=arguments.seconds,
            compiled=on_gpu if arguments.compile is None else arguments.compile,
        ):
            rows.append(row)
            if not arguments.json:
                name = f"{row['model']} {row['preset']}, {row['what']}, batch {row['batch']}"
                kind = f"{row['implementation']} ({row['precision']})"
                print(f"{name:<38} {kind:<40} {row['value']:10.4g} {row['unit']:<9} {row['peak_memory_mb']:7.0f} MB")
    if arguments.json:
        print_json(rows)
    return 0
