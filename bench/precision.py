"""What each precision costs: ``python -m bench.precision FILE=REFERENCE ...``, frames against those of float32.

A FILE is an ``.hflf``, or a published checkpoint of HNeRV (``.pth``); its REFERENCE is the clip it codes. Each
precision becomes a line of ``bench/results/precision.jsonl``: the PSNR against the original, what it is below that of
float32, and how far the 8-bit frames are from float32's.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hflfnerv.codec import Decoder, convert_checkpoint
from hflfnerv.codec.evaluation import load_reference
from hflfnerv.metrics import psnr

from .run import RESULTS, environment, write

PATH = RESULTS / "precision.jsonl"
PRECISIONS = ("fp32", "int16", "bf16", "fp16", "int8")  # float16 takes minutes on a CPU


def measure(
    path: pathlib.Path, reference: pathlib.Path, precisions: list[str], every: int, device: str
) -> Iterator[dict[str, Any]]:
    """Yield a row for each precision.

    Args:
        path: the coded video.
        reference: its original.
        precisions: to decode in.
        every: decode every so many-th frame.
        device: where to decode.
    """
    data = convert_checkpoint(path) if path.suffix == ".pth" else path.read_bytes()
    exact = Decoder(data, device, "fp32")
    chosen = list(range(0, len(exact), every))
    # An imported file does not know how its frames were cropped.
    crop = exact.shape[1:3] if exact.header.source is None else None
    original = load_reference(exact, reference, crop=crop)[chosen]
    of_float32 = exact.frames(chosen)
    expected = float(psnr(torch.from_numpy(of_float32), original, reduction="mean"))
    parameters = exact.model.parameter_counts()["total"]
    for precision in precisions:
        decoder = Decoder(data, device, precision)
        frames = decoder.frames(chosen)
        levels = np.abs(frames.astype(np.int16) - of_float32)
        reached = float(psnr(torch.from_numpy(frames), original, reduction="mean"))
        on_gpu = decoder.device.type == "cuda"
        yield environment() | {
            **({"device": torch.cuda.get_device_name(decoder.device), "simd": None} if on_gpu else {}),
            "what": "precision",
            "data": f"{path.stem}, {exact.header.model['model']} {parameters / 1e6:.2g} M, {len(chosen)} frames",
            "implementation": f"{precision} ({type(decoder.engine).__name__})",
            "shape": list(frames.shape),
            "psnr_db": reached,
            "cost_db": expected - reached,
            "within_one_level": float((levels <= 1).mean()),
            "largest_difference": int(levels.max()),
            "threads": torch.get_num_threads(),
        }


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE=REFERENCE")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "int16", "bf16", "int8"])
    parser.add_argument("--every", type=int, default=12, help="decode every so many-th frame (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=pathlib.Path, default=PATH)
    arguments = parser.parse_args()
    rows = []
    for pair in arguments.files:
        path, _, reference = pair.partition("=")
        if not reference:
            parser.error(f"FILE=REFERENCE must name a coded video and its original, got {pair!r}")
        paths = pathlib.Path(path), pathlib.Path(reference)
        for row in measure(*paths, arguments.precisions, arguments.every, arguments.device):
            print(
                f"{row['data']}: {row['implementation']:24s} {row['psnr_db']:.3f} dB, {row['cost_db']:+.3f}, "
                f"{100 * row['within_one_level']:.2f} % within a level, at most {row['largest_difference']}"
            )
            rows.append(row)
    write(arguments.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
