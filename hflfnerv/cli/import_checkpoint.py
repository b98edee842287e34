"""``hflfnerv import``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._options import add_fps, add_output, add_selection, check_outputs, check_suffix

__all__ = ["add_parser", "run"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("import", help="a checkpoint of HNeRV or NVR-RRCP to a .hflf file")
    parser.add_argument("input", type=Path, metavar="CKPT", help="quant_vid.pth, or a training checkpoint")
    add_output(parser)
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="INPUT",
        help="the original, whose frame rate, colours and crop the file keeps for eval and players; a training "
        "checkpoint needs it for its encoder",
    )
    add_selection(parser)
    add_fps(parser)
    parser.add_argument("--weight-bits", type=int, default=8, help="for a training checkpoint (default: 8)")
    parser.add_argument("--embedding-bits", type=int, default=6, help="for a training checkpoint (default: 6)")
    parser.add_argument("--entropy", choices=("huffman", "range"), default="huffman", help="(default: huffman)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import a checkpoint."""
    from .._atomic import atomic_path, check_writable
    from ..codec import convert_checkpoint
    from ..config import EncodeConfig

    check_outputs({"--output": arguments.output}, [arguments.input, arguments.reference])
    check_suffix("--output", arguments.output)
    check_writable(arguments.output)
    data = convert_checkpoint(
        arguments.input,
        reference=arguments.reference,
        frames=arguments.frames,
        resize=arguments.resize,
        crop=arguments.crop,
        fps=arguments.fps,
        untagged_matrix=arguments.untagged_matrix or EncodeConfig.untagged_matrix,
        weight_bits=arguments.weight_bits,
        embedding_bits=arguments.embedding_bits,
        entropy=arguments.entropy,
    )
    with atomic_path(arguments.output) as temporary:
        temporary.write_bytes(data)
    print(f"{arguments.output}: {len(data):,} bytes, from {arguments.input.stat().st_size:,}")
    return 0
