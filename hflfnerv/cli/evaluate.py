"""``hflfnerv eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config import DECODE_PRECISIONS
from ._options import add_device, add_selection, print_json

__all__ = ["add_parser", "run"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("eval", help="PSNR, MS-SSIM, LPIPS and bits per pixel against the original")
    parser.add_argument("input", type=Path, metavar="IN.hflf")
    parser.add_argument("--reference", type=Path, required=True, metavar="INPUT", help="the original video or folder")
    add_selection(parser)
    add_device(parser, DECODE_PRECISIONS, "fp32")
    parser.add_argument("--json", action="store_true", help="print JSON, with the values of each frame")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a file; crop, resize, frames and matrix default to those it was encoded with."""
    from ..codec import Decoder, evaluate, load_reference

    decoder = Decoder(arguments.input, device=arguments.device, precision=arguments.precision)
    reference = load_reference(
        decoder,
        arguments.reference,
        frames=arguments.frames,
        resize=arguments.resize,
        crop=arguments.crop,
        untagged_matrix=arguments.untagged_matrix,
    )
    report = {"file": str(arguments.input), "bytes": decoder.bitstream.size}
    report.update(evaluate(decoder, reference, with_lpips=True))
    if arguments.json:
        print_json(report)
        return 0
    lines = {
        "PSNR": (report["psnr_db"], "dB"),
        "MS-SSIM": (report["ms_ssim"], ""),
        "LPIPS (VGG)": (report["lpips"], ""),
        "bits per pixel": (report["bits_per_pixel"], ""),
    }
    for name, (value, unit) in lines.items():
        print(f"{name:<16} {'not available' if value is None else f'{value:.4f} {unit}'.rstrip()}")
    if "lpips_unavailable" in report:
        print(report["lpips_unavailable"], file=sys.stderr)
    return 0
