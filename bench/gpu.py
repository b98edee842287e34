"""Everything there is to measure on a GPU: ``python -m bench.gpu [--parts conv,models]``; all parts if none is named.

For a bare machine with a GPU, PyTorch, Triton, a C++ compiler and nothing to download: the checkout is used as it is,
without installation (checkout.py), the extension is built in place, and what is missing is said. Each part runs in a
process of its own and ends within its time (``--minutes``), so that one that fails or hangs leaves the others alone;
within it a contender or a point that fails leaves the others alone, and makes the part a failed one at its end. Each
writes ``bench/results/gpu-<part>.jsonl``, row by row, in the place of what the same device gave for the same contender
before, and prints its table; one line for each point is printed last. The exit code is the number of parts that failed.

Every result is compared with its float64 reference before it is timed. Contenders run in turn in one process, each
replayed from a CUDA graph with cold L2, unless a row says otherwise; times are CUDA events, medians with p20 and p80.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .run import RESULTS, ROOT, environment

Row = dict[str, Any]
#: Two rows with these in common measure the same.
IDENTITY = ("what", "data", "implementation", "dtype", "device")


class PartFailed(Exception):
    """Something could not be done or measured; the message says what and why."""


class Part(NamedTuple):
    """One part: its purpose, and the function that yields its rows, by module and name; or a function of its own."""

    purpose: str
    function: str | Callable[[argparse.Namespace], None]


def build(arguments: argparse.Namespace) -> None:
    """Build the extension in place."""
    if importlib.util.find_spec("setuptools") is None:
        raise PartFailed("the extension cannot be built without setuptools; other parts run without the extension")
    if arguments.dry_run:
        return
    environment = {**os.environ, "HFLFNERV_REQUIRE_EXT": "1"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    record = json.loads((ROOT / "hflfnerv" / "_build.json").read_text())
    if record["no_cuda"] is not None:
        raise PartFailed(f"the extension was built, but without its CUDA kernels: {record['no_cuda']}")


def run_tests(arguments: argparse.Namespace) -> None:
    """Run the tests of what runs on the GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        raise PartFailed("pytest is not installed; the part check compares every operation without it")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "tests/ops",
        "tests/nn",
        "tests/models/test_convnext.py",
        "tests/test_concurrent.py",
    ]
    if importlib.util.find_spec("psutil") is not None:  # without which there is no training of high-pass frames
        command += ["tests/train/test_step.py", "tests/codec/test_engine_cuda.py"]
    # What needs no GPU is left to the machines that have none.
    command += ["-k", "not interpreter and not ahead_of_time"]
    if arguments.dry_run:
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling kernels, on the processor.
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_PLUGINS": "bench.checkout"}
    if not arguments.dry_run:
        environment["HFLFNERV_REQUIRE"] = "cuda"
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


PARTS = {
    "build": Part("the extension, in place", build),
    "tests": Part("pytest of what runs on the GPU, with HFLFNERV_REQUIRE=cuda", run_tests),
    "limits": Part("bandwidth of a copy and of L2, rate of matrix products", "bench.limits:points"),
    "check": Part("every operation against float64 in float32, float16, bfloat16", "bench.check:points"),
    "pointwise": Part(
        "bias, PixelShuffle, GELU, forward and backward", "bench.ops.bench_pixel_shuffle_gelu:gpu_points"
    ),
    "cudnn": Part("the blocks' convolutions alone", "bench.ops.bench_conv_pixel_shuffle_gelu:library_points"),
    "gradients": Part(
        "the gradients of x and weight, kernels against cuDNN",
        "bench.ops.bench_conv_pixel_shuffle_gelu:gradient_points",
    ),
    "block": Part("the whole block, forward", "bench.ops.bench_conv_pixel_shuffle_gelu:forward_points"),
    "int8": Part("the whole block in int8, forward", "bench.ops.bench_conv_pixel_shuffle_gelu_int8:gpu_points"),
    "block-training": Part(
        "the whole block, forward and backward", "bench.ops.bench_conv_pixel_shuffle_gelu:training_points"
    ),
    "streams": Part(
        "blocks of few channels, forward and gradients", "bench.ops.bench_conv_pixel_shuffle_gelu:stream_points"
    ),
    "head": Part("the last convolution of a network, forward and backward", "bench.ops.bench_head:gpu_points"),
    "depthwise": Part(
        "the encoders' depthwise convolutions, forward and backward", "bench.ops.bench_depthwise_conv2d:gpu_points"
    ),
    "encoder": Part("encoders and blocks of them, forward and backward", "bench.ops.bench_encoder:gpu_points"),
    "highpass": Part("the FFT high-pass filter", "bench.ops.bench_highpass:gpu_points"),
    "output": Part("the output stage", "bench.ops.bench_output_stage:gpu_points"),
    "loss": Part("the loss of training and its gradient", "bench.ops.bench_stream_loss:gpu_points"),
    "decode": Part("decoding with HNeRV and HFLF-NeRV", "bench.networks:decode_points"),
    "training": Part("their training steps", "bench.networks:training_points"),
    "muon": Part("the matrices of the optimiser Muon", "bench.ops.bench_orthogonalise:gpu_points"),
    "profile": Part("the kernels of a training step and their shares of its time", "bench.kernels:points"),
    "fuse": Part(
        "published networks before and after hflfnerv.fuse, and their memory", "bench.ops.bench_fuse:gpu_points"
    ),
    "learning": Part("short encodes, with and without the kernels of each operation (--clip)", "bench.learning:points"),
    "encode": Part("whole encodes of a clip with both, 300 epochs (--clip)", "bench.encode:points"),
}
NOT_TO_WARM = ("limits", "learning", "encode")  # which compile little, and take the time that they take
GROUPS = {
    "conv": ["cudnn", "gradients", "block", "int8", "block-training", "streams"],
    "models": ["decode", "training"],
}


#: The modes of torch.compile by the value of --compile.
COMPILE = {"max-autotune": ("max-autotune", "default"), "default": ("default",), "none": ()}
_WARM_UP_SECONDS = 0.01


def run_part(name: str, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Run one part in this process and add its rows to ``rows``; they are written as they come."""
    function = PARTS[name].function
    if not isinstance(function, str):
        function(arguments)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    if importlib.util.find_spec("torch") is None:
        raise PartFailed("PyTorch is not installed")
    import torch

    from . import checkout  # noqa: F401  before anything asks for the kernels
    from .device import Machine

    if not arguments.dry_run and not torch.cuda.is_available():
        raise PartFailed("PyTorch sees no CUDA device (--dry-run goes through the parts without one)")
    torch.backends.cudnn.benchmark = True
    machine = Machine(
        dry=arguments.dry_run,
        seconds=arguments.seconds,
        deadline=deadline,
        only=arguments.only,
        clip=arguments.clip,
        compile_modes=COMPILE[arguments.compile],
    )
    module, attribute = function.split(":")
    for row in getattr(importlib.import_module(module), attribute)(machine):
        rows.append(row)
        keep(results_path(name, arguments), row)
    for point in machine.left_out:
        print(f"{name}: no time left for {point}; repeat with --parts {name} --only '{point}'")
    if machine.failures:
        raise PartFailed(f"{len(machine.failures)} of its points and contenders:\n  " + "\n  ".join(machine.failures))


def results_path(name: str, arguments: argparse.Namespace) -> pathlib.Path:
    """Return where a part's rows go."""
    folder = arguments.results or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(folder, f"gpu-{name}.jsonl")


def read(path: pathlib.Path) -> list[Row]:
    """Return the rows of a file, none where there is none."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def keep(path: pathlib.Path, row: Row) -> None:
    """Write a row in the place of the one it repeats; a file is never without the rows that it had.

    Time on a GPU is scarce: rows of other points, of other devices, and of contenders that fail this time stay.
    """
    from hflfnerv._atomic import atomic_path

    rows = [other for other in read(path) if any(other.get(key) != row.get(key) for key in IDENTITY)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(each) + "\n" for each in [*rows, row]))


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a short table: one per contender, with its share of the limit and ratio to the baseline."""
    for what in dict.fromkeys(row["what"] for row in rows):
        of_what = [row for row in rows if row["what"] == what]
        if of_what[0]["metric"] == "relative error":
            worst = max(of_what, key=lambda row: float(row["p50"]))
            yield f"{what}: {len(of_what)} results right, largest error {worst['p50']:.2e} ({worst['data']})"
            continue
        yield f"{what} ({of_what[0]['unit']}; ratio to {of_what[0]['baseline']})"
        for data in dict.fromkeys(row["data"] for row in of_what):
            contenders = [row for row in of_what if row["data"] == data]
            base = next((row["p50"] for row in contenders if row["implementation"] == row["baseline"]), None)
            yield f"  {data}"
            for row in contenders:
                share = next((f"{key[9:]} {100 * row[key]:5.1f} %" for key in row if key.startswith("share_of_")), "")
                ratio, form = _compared(row, base) if base else "", _form(row)
                yield (
                    f"    {row['implementation']:<48.48s} {row['p50']:10{form}}  "
                    f"({row['p20']:{form}} .. {row['p80']:{form}})  "
                    f"{row['milliseconds']:9.4f} ms {ratio}  {share}"
                )


def _form(row: Row) -> str:
    return ".2f" if row["metric"] == "quality" else ".1f"


def _compared(row: Row, base: float) -> str:
    """Return how a row stands to a rate, or to a quality in decibels."""
    return f"{row['p50'] - base:+6.2f} dB" if row["metric"] == "quality" else f"{row['p50'] / max(base, 1e-9):6.2f} x"


def is_limit(row: Row) -> bool:
    """Return whether a row is no contender but what none can surpass: a copy of the bytes that they move."""
    return str(row["implementation"]).startswith("copy")


def best(rows: list[Row]) -> Row | None:
    """Return the fastest, None of none."""
    return max(rows, key=lambda row: float(row["p50"]), default=None)


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield one line per point: the best of ours, its share of the limit, and its ratio to the best rival."""
    checks = [row for row in rows if row["metric"] == "relative error"]
    yield from table(checks)
    points: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["metric"] != "relative error":
            points.setdefault((row["what"], row["data"]), []).append(row)
    for (what, data), contenders in points.items():
        rivals = [row for row in contenders if row["implementation"].startswith(("eager", "torch.compile"))]
        ours = [row for row in contenders if row not in rivals and not is_limit(row)]
        # What computes in int8 is no match for what computes in half precision, and has a line of its own.
        in_int8 = [row for row in ours if "int8" in row["implementation"]]
        in_float = [row for row in ours if row not in in_int8]
        for of_ours in [rows for rows in (in_int8, in_float) if rows] or [ours]:
            yield f"{what}, {data}: {_standing(of_ours, rivals, contenders)}"


def _standing(ours: list[Row], rivals: list[Row], contenders: list[Row]) -> str:
    # Whoever failed has no row.
    row = best(ours) or best(contenders)
    assert row is not None
    rival = best(rivals or [other for other in contenders if other["implementation"] == other["baseline"]])
    share = next((f", {100 * row[key]:.0f} % of {key[9:]}" for key in row if key.startswith("share_of_")), "")
    alone = rival is None or rival is row
    ratio = "" if alone else f", {_compared(row, rival['p50']).strip()} {rival['implementation']}"
    return f"{row['implementation']} {row['p50']:{_form(row)}} {row['unit']}{share}{ratio}"


def start(name: str, arguments: argparse.Namespace, *options: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start one part in a process of its own; ``options`` come last and count."""
    command = [sys.executable, "-m", "bench.gpu", "--here", "--parts", name, "--minutes", str(arguments.minutes)]
    command += ["--seconds", str(arguments.seconds), "--only", arguments.only, "--compile", arguments.compile]
    command += ["--results", str(arguments.results.resolve())] if arguments.results else []
    command += ["--dry-run"] if arguments.dry_run else []
    command += ["--clip", str(pathlib.Path(arguments.clip).resolve())] if arguments.clip else []
    # A group and no session of its own: what ends this process's session ends the part as well.
    return subprocess.Popen([*command, *options], cwd=ROOT, preexec_fn=os.setpgrp, **pipes)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_apart(name: str, arguments: argparse.Namespace) -> str | None:
    """Run one part in a process of its own; return why it failed, or None."""
    process = start(name, arguments)
    try:
        # A point that has begun may outlast the deadline a little; what hangs is ended here, with what it started.
        code = process.wait(timeout=60 * arguments.minutes + 55)
    except subprocess.TimeoutExpired:
        return f"it took more than {arguments.minutes:g} minutes"
    finally:
        end(process)
    return f"exit code {code}, see above" if code else None


def warm_up(arguments: argparse.Namespace) -> None:
    """Run the parts that measure all at once, without their rows: what they compile stays in the caches on the disk."""
    names = [name for name in arguments.chosen if isinstance(PARTS[name].function, str) and name not in NOT_TO_WARM]
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        options = ("--results", folder, "--seconds", str(_WARM_UP_SECONDS))
        # What fails here fails again, and says so, where it counts.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = [start(name, arguments, *options, **quiet) for name in names]
        try:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(deadline - time.monotonic(), 0.0))
        finally:
            for process in processes:
                end(process)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="", help="comma separated, see --list; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--only", default="", metavar="TEXT", help="only points whose name contains this")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for each part (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each contender (default: %(default)s)")
    parser.add_argument(
        "--results", type=pathlib.Path, help=f"folder of the rows (default: {RESULTS.relative_to(ROOT)})"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="go through it all on the CPU with tiny shapes; times nothing"
    )
    parser.add_argument(
        "--clip", metavar="PATH", help="video of the parts learning and encode (default: bunny.mp4 of the shared data)"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="max-autotune",
        help="contenders under torch.compile: all, those in its default mode, or none; max-autotune searches for "
        "minutes (default: %(default)s)",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="first run the parts at once, in as many minutes, and throw the rows away: what Triton and torch.compile "
        "compile is in their caches then, compiled on all cores",
    )
    parser.add_argument("--here", action="store_true", help="in this process, not each part in its own")
    arguments = parser.parse_args(argv)
    chosen: list[str] = []
    for name in filter(None, arguments.parts.split(",")):
        if name not in PARTS and name not in GROUPS:
            parser.error(f"--parts must be of {', '.join([*PARTS, *GROUPS])}, got {name!r}")
        chosen += GROUPS.get(name, [name])
    arguments.chosen = list(dict.fromkeys(chosen)) or list(PARTS)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the parts named on the command line; return how many failed."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dry_run and arguments.results is None:
            arguments.results = pathlib.Path(folder)  # a dry run leaves the results alone
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen parts; return how many failed."""
    if arguments.list:
        for name, part in PARTS.items():
            print(f"{name:15s} {part.purpose}")
        for name, names in GROUPS.items():
            print(f"{name:15s} {' and '.join(names)}")
        return 0
    if not arguments.here:
        # What ends this process ends the part that runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    elif os.getpgrp() == os.getpid() and len(arguments.chosen) == 1 and not arguments.dry_run:
        # Whoever started this part may be gone, and nothing is to be left running on the device.
        signal.alarm(int(60 * arguments.minutes) + 60)
    failed: dict[str, str] = {}
    rows: list[Row] = []
    started = environment()["time"]
    cold = arguments.warm
    for name in arguments.chosen:
        if cold and isinstance(PARTS[name].function, str):  # the extension is built by then
            cold, begin = False, time.monotonic()
            warm_up(arguments)
            print(f"== warming up: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        begin = time.monotonic()
        if arguments.here:
            try:
                run_part(name, arguments, rows)
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
        else:
            reason = run_apart(name, arguments)
            if reason is not None:
                failed[name] = reason
        print(f"== {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    if arguments.here:
        print("\n".join(table(rows)))
    else:
        paths = [results_path(name, arguments) for name in arguments.chosen]
        # Those of other runs in the same files are not this one's to report.
        rows = [row for path in paths for row in read(path) if row["time"] >= started]
        print("\n" + "\n".join(summary(rows)))
    for name, reason in failed.items():
        print(f"{name}: FAILED: {reason}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
