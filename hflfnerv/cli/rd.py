"""``hflfnerv rd``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._options import add_device, add_fps, add_selection, argument, check_folder, check_outputs, write_json

if TYPE_CHECKING:
    from ..codec import Decoder
    from ..config import EncodeConfig
    from ..data import ConventionalCodec

__all__ = ["add_parser", "run"]

# Presets and CRFs for --help, which must not load the codecs; a test holds them to those of the codecs.
_CODECS = {
    "x264": ("medium", "20,24,28,32,36,40,44"),
    "x265": ("medium", "20,24,28,32,36,40,44"),
    "svt-av1": ("6", "28,38,48,58"),
}
_MODELS = ("hflf", "hnerv", "nerv")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _crfs(text: str) -> list[int]:
    parts = _list(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"CRFs must be whole numbers, comma separated, got {text!r}")
    return [int(part) for part in parts]


def _codecs(text: str) -> list[str]:
    names = [] if text == "none" else _list(text)
    for name in names:
        if name not in _CODECS:
            raise ValueError(f"codecs must be of {', '.join(_CODECS)}, or none, got {name!r}")
    return names


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "rd",
        help="rate-distortion against x264, x265 and SVT-AV1",
        description="Measures bits per pixel and RGB quality of x264, x265 and SVT-AV1, of .hflf files (--hflf) and of "
        "networks trained now (--sizes) on the same frames; mean over the frames, then over the inputs.",
    )
    parser.add_argument("input", type=Path, nargs="+", metavar="INPUT", help="video files, or folders of images")
    add_selection(parser)
    add_fps(parser)
    parser.add_argument(
        "--codecs", type=argument(_codecs), default=",".join(_CODECS), help="comma separated, or none (default: all)"
    )
    for name, (preset, crfs) in _CODECS.items():
        parser.add_argument(f"--{name}-preset", metavar="PRESET", help=f"(default: {preset})")
        parser.add_argument(f"--{name}-crf", metavar="N,...", type=argument(_crfs), help=f"(default: {crfs})")
    parser.add_argument("--threads", type=int, default=1, help="threads of x264, x265 and SVT-AV1 (default: 1)")
    parser.add_argument(
        "--hflf",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".hflf files of the inputs; of several inputs each file is that one's with whose name its own begins",
    )
    parser.add_argument(
        "--sizes", type=argument(_list), default=[], metavar="S,S,...", help="train networks, e.g. 0.3M,1M"
    )
    parser.add_argument("--model", nargs="+", choices=_MODELS, default=["hflf"], help="of --sizes (default: hflf)")
    parser.add_argument("--preset", nargs="+", default=["best"], help="of --sizes (default: best)")
    parser.add_argument("--epochs", type=int, default=300, help="of --sizes (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of --sizes (default: 1)")
    add_device(parser, ("auto", "fp32", "bf16", "fp16"), "fp32")
    parser.add_argument(
        "--workdir", type=Path, help="keeps the files and checkpoints of --sizes; the same command resumes there"
    )
    parser.add_argument("--anchor", help="curve that others are compared with (default: x265's, or the first)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every point to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the mean curves: .svg, .png or .pdf")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    from .._atomic import check_writable
    from ..codec import bjontegaard, check_plot, mean_points, plot_points

    networks = _networks(arguments)
    trained = [
        path
        for source in arguments.input
        for config in networks
        if (path := _trained(source, config, arguments)) is not None
    ]
    check_outputs(
        {"--json": arguments.json, "--plot": arguments.plot}
        | {f"the file of --sizes {path.name}": path for path in trained},
        [*arguments.input, *arguments.hflf],
    )
    for path in trained:
        if path.exists() and not _checkpoints(path).is_dir():
            raise ValueError(
                f"--workdir must not hold files of others, got {path} without the folder of its checkpoints"
            )
    for path in (arguments.json, arguments.plot):
        if path is not None:
            check_writable(path)
    check_folder("--workdir", arguments.workdir)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    codecs = _available(arguments)
    files = _files_by_input(arguments.hflf, arguments.input)
    if not (codecs or networks or arguments.hflf):
        raise ValueError(
            "--codecs, --hflf or --sizes must name something to measure, got nothing that can be used here"
        )

    rows: list[dict[str, Any]] = []
    for source in arguments.input:
        for row in _measure(source, files[source], codecs, networks, arguments):
            rows.append(row)
            if not arguments.quiet:
                print(f"{row['clip']}: {_line(row)}", file=sys.stderr, flush=True)

    points = mean_points(rows)
    curves = list(dict.fromkeys(point["implementation"] for point in points))
    left_out = sorted({row["implementation"] for row in rows} - set(curves))
    if left_out:
        print(f"no mean of {', '.join(left_out)}: not every input has the same points", file=sys.stderr)
    anchor = arguments.anchor or next((name for name in curves if name.startswith("x265")), curves[0] if curves else "")
    deltas = bjontegaard(points, anchor) if len(curves) > 1 and anchor in curves else []
    for point in points:
        print(_line(point))
    for delta in deltas:
        print(_delta(delta))
    if arguments.json is not None:
        write_json(arguments.json, {"rows": rows, "mean": points, "bjontegaard": deltas})
    if arguments.plot is not None:
        what = arguments.input[0].name if len(arguments.input) == 1 else f"mean of {len(arguments.input)} clips"
        plot_points(points, arguments.plot, title=what)
    if arguments.anchor not in (None, *curves):  # what was measured is not lost for that
        raise ValueError(f"--anchor must be one of the curves ({', '.join(curves)}), got {anchor!r}")
    return 0


def _available(arguments: argparse.Namespace) -> list[tuple[ConventionalCodec, str, list[int]]]:
    """Return the codecs to measure, with presets and CRFs; name the missing ones."""
    from ..data import CONVENTIONAL_CODECS

    chosen = []
    for name in arguments.codecs:
        codec = CONVENTIONAL_CODECS[name]
        reason = codec.unavailable()
        if reason is not None:
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        option = name.replace("-", "_")
        preset, crfs = getattr(arguments, f"{option}_preset"), getattr(arguments, f"{option}_crf")
        chosen.append((codec, preset or codec.preset, crfs or list(codec.crfs)))
    return chosen


def _networks(arguments: argparse.Namespace) -> list[EncodeConfig]:
    """Return what to train on each input."""
    from ..config import EncodeConfig

    return [
        EncodeConfig(
            model=model,
            preset=preset,
            size=size,
            epochs=arguments.epochs,
            seed=arguments.seed,
            device=arguments.device,
            precision=arguments.precision,
            frames=arguments.frames,
            resize=arguments.resize,
            crop=arguments.crop,
            untagged_matrix=arguments.untagged_matrix or EncodeConfig.untagged_matrix,
        )
        for model in arguments.model
        for preset in arguments.preset
        for size in arguments.sizes
    ]


def _name(source: Path) -> str:
    """Return what the video of an input is called."""
    return source.resolve().name if source.is_dir() else source.stem


def _trained(source: Path, config: EncodeConfig, arguments: argparse.Namespace) -> Path | None:
    """Return where the file of a network stays, or None."""
    if arguments.workdir is None:
        return None
    path: Path = arguments.workdir / f"{_name(source)}-{config.model}-{config.preset}-{config.size}.hflf"
    return path


def _checkpoints(path: Path) -> Path:
    return path.with_suffix(".work")


def _files_by_input(files: list[Path], sources: list[Path]) -> dict[Path, list[Path]]:
    """Give each .hflf file to its input, small ones first."""
    names = {source: _name(source) for source in sources}
    twice = [name for name in names.values() if list(names.values()).count(name) > 1]
    if twice or len(names) < len(sources):
        raise ValueError(f"INPUT must have different names, got {', '.join(twice or map(str, sources))} more than once")
    of: dict[Path, list[Path]] = {source: [] for source in sources}
    for path in sorted(files, key=lambda path: path.stat().st_size):
        owners = sources if len(sources) == 1 else [s for s in sources if path.name.startswith(names[s])]
        if not owners:
            raise ValueError(
                f"--hflf must begin with the name of an input ({', '.join(names.values())}), got {path.name}"
            )
        of[max(owners, key=lambda source: len(names[source]))].append(path)
    return of


def _measure(
    source: Path,
    files: list[Path],
    codecs: list[tuple[ConventionalCodec, str, list[int]]],
    networks: list[EncodeConfig],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the points of one input."""
    from ..codec import conventional_point, file_matrix, file_point
    from ..config import EncodeConfig
    from ..data import load_video

    decoders = [_open(path, arguments) for path in files]
    assumed = [arguments.untagged_matrix] if arguments.untagged_matrix else [*map(file_matrix, decoders)]
    video = load_video(
        source,
        frames=arguments.frames,
        resize=arguments.resize,
        crop=arguments.crop,
        fps=arguments.fps,
        untagged_matrix=next(iter(assumed), EncodeConfig.untagged_matrix),
    )
    ranks: dict[tuple[str, str], int] = {}
    for path, decoder in zip(files, decoders, strict=True):
        color = decoder.header.color
        if color is not None and color.matrix != video.color.matrix:
            raise ValueError(
                f"--hflf must be made of the frames that are measured, got {path}, whose input was read by the matrix "
                f"{color.matrix} and not {video.color.matrix}: --untagged-matrix chooses that of an input without a tag"
            )
        curve = (decoder.header.model["model"], decoder.header.preset)
        ranks[curve] = ranks.get(curve, 0) + 1
        yield file_point(video, decoder, setting=f"file {ranks[curve]}")
    for config in networks:
        yield file_point(video, _train(source, config, arguments), setting=f"{config.size}")
    for codec, preset, crfs in codecs:
        for crf in crfs:
            yield conventional_point(video, codec, crf=crf, preset=preset, threads=arguments.threads)


def _open(path: Path, arguments: argparse.Namespace) -> Decoder:
    from ..codec import Decoder
    from ..errors import BitstreamError

    try:
        return Decoder(path, device=arguments.device, precision="fp32")
    except BitstreamError as error:
        raise type(error)(f"{path}: {error}") from error


def _train(source: Path, config: EncodeConfig, arguments: argparse.Namespace) -> Decoder:
    """Encode an input; with --workdir the file and its checkpoint stay there."""
    from dataclasses import replace

    from ..codec import Decoder, encode
    from ._progress import progress_observer

    path = _trained(source, config, arguments)
    if path is not None:
        config = replace(config, workdir=_checkpoints(path))
    with progress_observer(quiet=arguments.quiet) as observer:
        result = encode(source, config, fps=arguments.fps, observer=observer)
    if path is not None:
        result.save(path)
    return Decoder(result.bitstream, device=arguments.device, precision="fp32")


def _line(row: dict[str, Any]) -> str:
    ssim = "" if row["ms_ssim"] is None else f"   MS-SSIM {row['ms_ssim']:.4f}"
    return (
        f"{row['implementation']:<16} {row['setting']:<8} {row['bits_per_pixel']:9.5f} bits per pixel   "
        f"{row['psnr_db']:6.2f} dB{ssim}"
    )


def _delta(row: dict[str, Any]) -> str:
    rate = "rate not comparable" if row["bd_rate_percent"] is None else f"BD-rate {row['bd_rate_percent']:+.1f} %"
    psnr = "PSNR not comparable" if row["bd_psnr_db"] is None else f"BD-PSNR {row['bd_psnr_db']:+.2f} dB"
    reason = f" ({row['unavailable']})" if "unavailable" in row else ""
    return f"{row['implementation']} against {row['anchor']}: {rate}, {psnr}{reason}"
