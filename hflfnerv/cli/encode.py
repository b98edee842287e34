"""``hflfnerv encode``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from ..config import SCHEDULES
from ._options import (
    add_device,
    add_fps,
    add_output,
    add_selection,
    argument,
    check_folder,
    check_outputs,
    check_suffix,
    write_json,
)

__all__ = ["add_parser", "run"]


def _size(text: str) -> int:
    from ..config import parse_size

    return parse_size(text)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("encode", help="a video or a folder of images to one .hflf file")
    parser.add_argument("input", type=Path, help="video file, or folder of images (sorted naturally)")
    add_output(parser)
    parser.add_argument("--model", choices=("hflf", "hnerv", "nerv"), default="hflf", help="(default: hflf)")
    parser.add_argument("--preset", choices=("best", "paper"), default="best", help="(default: best)")
    parser.add_argument(
        "--size", type=argument(_size), default="1.5M", help="parameters of embeddings and decoders (default: 1.5M)"
    )
    parser.add_argument("--epochs", type=int, default=300, help="(default: 300)")
    parser.add_argument("--optimizer", choices=("adam", "muon"), help="(default: the preset's)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the preset's)")
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="WD",
        help="of Muon, as a part of the learning rate (default: the preset's)",
    )
    parser.add_argument("--schedule", choices=SCHEDULES, help="how the learning rate falls (default: the preset's)")
    parser.add_argument(
        "--batch-size", type=int, help="frames a step (default: the preset's, for the length of training)"
    )
    parser.add_argument(
        "--encoder-input", choices=("highpass", "frame"), help="what the encoder sees (default: the preset's)"
    )
    add_selection(parser)
    add_fps(parser)
    parser.add_argument(
        "--quantization-share",
        type=float,
        metavar="PART",
        help="last part of the epochs, 0 to 1, that is trained with quantised weights (default: the preset's)",
    )
    parser.add_argument(
        "--rate-weight",
        type=float,
        metavar="W",
        help="so many per cent of the error are worth one per cent of the file; more makes it smaller, 0 takes "
        "--weight-bits for every weight (default: the preset's)",
    )
    parser.add_argument("--weight-bits", type=int, help="with --rate-weight, of the finest steps (default: 8, or 10)")
    parser.add_argument(
        "--embedding-bits", type=int, help="with --rate-weight, of the finest steps (default: 6, or 10)"
    )
    parser.add_argument("--entropy", choices=("huffman", "range"), default="huffman", help="(default: huffman)")
    add_device(parser, ("auto", "fp32", "bf16", "fp16"), "fp32")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="folder of checkpoints; the same command resumes there (default: OUT.hflf.work, removed at the end)",
    )
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60, metavar="S", help="time between checkpoints (default: 60)"
    )
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard logs to DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full report to FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Encode."""
    from .._atomic import check_writable
    from ..codec import encode
    from ..config import EncodeConfig
    from ..errors import TrainingInterrupted
    from ._progress import progress_observer

    output: Path = arguments.output
    check_outputs({"--output": output, "--json": arguments.json}, [arguments.input])
    check_suffix("--output", output)
    check_writable(output)
    if arguments.json is not None:
        check_writable(arguments.json)
    workdir: Path = arguments.workdir or output.with_name(output.name + ".work")
    check_folder("--workdir", workdir)
    check_folder("--tensorboard", arguments.tensorboard)
    config = EncodeConfig(
        model=arguments.model,
        preset=arguments.preset,
        size=arguments.size,
        epochs=arguments.epochs,
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        encoder_input=arguments.encoder_input,
        crop=arguments.crop,
        resize=arguments.resize,
        frames=arguments.frames,
        untagged_matrix=arguments.untagged_matrix or EncodeConfig.untagged_matrix,
        quantization_share=arguments.quantization_share,
        rate_weight=arguments.rate_weight,
        weight_bits=arguments.weight_bits,
        embedding_bits=arguments.embedding_bits,
        entropy=arguments.entropy,
        device=arguments.device,
        precision=arguments.precision,
        seed=arguments.seed,
        workdir=workdir,
        checkpoint_seconds=arguments.checkpoint_seconds,
        tensorboard=arguments.tensorboard,
    )
    try:
        with progress_observer(quiet=arguments.quiet) as observer:
            result = encode(arguments.input, config, fps=arguments.fps, observer=observer)
        result.save(output)
    except TrainingInterrupted as error:
        raise TrainingInterrupted(f"{error}; the same command goes on from there") from None
    finally:
        # Without a checkpoint in it the folder is of no use; with one it stays until the file is written.
        with suppress(OSError):
            workdir.rmdir()
    if arguments.json is not None:
        write_json(arguments.json, result.report)
    if arguments.workdir is None:
        _remove_checkpoints(workdir)
    report = result.report
    ssim = "" if report["ms_ssim"] is None else f", MS-SSIM {report['ms_ssim']:.4f}"
    print(
        f"{output}: {report['frames']} frames of {report['height']}x{report['width']}, "
        f"{report['bytes']:,} bytes, {report['bits_per_pixel']:.4f} bits per pixel, "
        f"PSNR {report['psnr_db']:.2f} dB{ssim}, {sum(report['seconds'].values()):.0f} s"
    )
    return 0


def _remove_checkpoints(folder: Path) -> None:
    """Remove checkpoints, halves of them that a killed run left, and the folder if there is nothing else in it."""
    with suppress(OSError):
        for path in folder.glob("*checkpoint*.safetensors"):
            path.unlink()
        folder.rmdir()
