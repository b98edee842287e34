"""``hflfnerv info``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._options import print_json

__all__ = ["add_parser", "describe", "run"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("info", help="what a .hflf file holds")
    parser.add_argument("input", type=Path, metavar="IN.hflf")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def describe(path: Path) -> dict[str, Any]:
    """Return what ``info`` prints, as a JSON-ready dictionary."""
    import json

    from ..codec import Bitstream, load_model

    with Bitstream.open(path) as bitstream:
        header = json.loads(bitstream.header.to_json())
        accounting = bitstream.accounting()
        return {
            "file": str(path),
            "bytes": accounting.file_bytes,
            "bits_per_pixel": accounting.bits_per_pixel,
            "paper_bits_per_pixel": accounting.paper_bits_per_pixel,
            "entropy": accounting.entropy,
            "key_interval": bitstream.key_interval,
            "section_bytes": dict(accounting.section_bytes),
            "symbol_bytes": accounting.symbol_bytes,
            "side_information_bytes": accounting.side_information_bytes,
            "paper_symbol_bits": accounting.paper_symbol_bits,
            "paper_bits": accounting.paper_bits,
            "parameters": load_model(bitstream).parameter_counts(),
            "header": header,
        }


def run(arguments: argparse.Namespace) -> int:
    """Describe a file."""
    report = describe(arguments.input)
    if arguments.json:
        print_json(report)
        return 0
    header, parameters = report["header"], report["parameters"]
    model = header["model"]["model"]
    fps = header["fps"][0] / header["fps"][1]
    streams = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if name != "total")
    sections = ", ".join(f"{name} {count:,}" for name, count in report["section_bytes"].items())
    interval = report["key_interval"]
    differences = f"; embeddings as differences, whole every {interval} frames" if interval else ""
    lines = {
        "model": f"{model}, preset {header['preset']}, {parameters['total']:,} parameters ({streams})",
        "video": f"{header['frames']} frames of {header['height']}x{header['width']} at {fps:.6g} frames per second",
        "size": f"{report['bytes']:,} bytes, {report['bits_per_pixel']:.6f} bits per pixel",
        "sections": f"{sections} bytes",
        "coding": (
            f"{report['entropy']}: {report['symbol_bytes']:,} bytes of symbols, "
            f"{report['side_information_bytes']:,} bytes of steps and offsets" + differences
        ),
        "as the papers count": (
            f"{report['paper_bits_per_pixel']:.6f} bits per pixel: Huffman code lengths, no tables, "
            "16 bits per minimum and scale"
        ),
        "written by": header["writer"],
    }
    print(report["file"])
    for name, text in lines.items():
        print(f"  {name:<20} {text}")
    return 0
