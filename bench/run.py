"""Runs benchmarks: ``python -m bench.run [suite ...]``; all suites if none is named.

Each point is checked before it is timed. Its contenders then run in turn, round after round, so that a change of the
machine's load meets all of them alike. The table shows the median, and its ratio to the baseline's; every contender of
every point becomes one line in ``bench/results/<suite>.jsonl``, in the place of what the same processor gave before.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import platform
import statistics
import sys
import time
from typing import Any

import torch

from hflfnerv import _machine

from . import ops
from .registry import SUITES, Contender, Point, Skipped

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FAST_SECONDS = 0.005
FAST_RUNS = 8
PACKAGES = ("numpy", "torch", "av", "triton", "zstandard", "dahuffman", "constriction")


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides the code under test."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Results that a run before this one wrote do not change what is measured. A copy is what whoever made it says.
    told = "HFLFNERV_COMMIT" in os.environ
    status = "" if told else _machine.git(ROOT, "status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": _machine.processor(),
        "simd": _machine.vector_extensions(),
        "driver": None,  # of a GPU
        "versions": versions,
        "commit": _machine.commit_of(ROOT),
        "dirty": None if status is None else bool(status),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def seconds_of(point: Point, budget: float) -> dict[str, list[float]]:
    """Time the contenders in turn until the budget in seconds is spent; each runs three times at least."""
    times: dict[str, list[float]] = {contender.name: [] for contender in point.contenders}
    for contender in point.contenders:
        contender.run()
    deadline = time.perf_counter() + budget
    while True:
        for contender in point.contenders:
            spent = times[contender.name]
            # A slow baseline does not take the time of the others.
            if len(spent) >= 3 and sum(spent) > budget / len(point.contenders):
                continue
            # A slow contender leaves cold caches to the next; so a fast one warms up first, then runs several times.
            fast = min(spent, default=0.0) < FAST_SECONDS
            if fast:
                contender.run()
            for _ in range(FAST_RUNS if fast else 1):
                begin = time.perf_counter()
                contender.run()
                spent.append(time.perf_counter() - begin)
        if min(map(len, times.values())) >= 3 and time.perf_counter() > deadline:
            return times


def line(point: Point, contender: Contender, seconds: list[float]) -> dict[str, Any]:
    """Return the result of one contender, without the environment."""
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    p50 = statistics.median(seconds)
    speed = contender.units / point.scale
    return {
        "what": point.what,
        "implementation": contender.name,
        "baseline": point.baseline,
        "data": point.data,
        "dtype": point.dtype,
        "shape": list(point.shape),
        "metric": "throughput",
        "unit": point.unit,
        "p20": round(speed / p80, 4),
        "p50": round(speed / p50, 4),
        "p80": round(speed / p20, 4),
        "best": round(speed / min(seconds), 4),
        "runs": len(seconds),
        "note": contender.note,
        **point.facts,
        **contender.facts(),
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print one table for each operation."""
    for what in dict.fromkeys(result["what"] for result in results):
        rows = [result for result in results if result["what"] == what]
        print(f"\n{what} ({rows[0]['unit']}; ratio to {rows[0]['baseline']})")
        for data in dict.fromkeys(row["data"] for row in rows):
            print(f"  {data}")
            of = {row["implementation"]: row for row in rows if row["data"] == data}
            base = of[rows[0]["baseline"]]
            for name, row in of.items():
                memory = f"   peak {row['peak_bytes'] / 1e6:.0f} MB" if row.get("peak_bytes") else ""
                print(
                    f"    {name:28s} p50 {row['p50']:10.2f}   p20..p80 {row['p20']:10.2f} ..{row['p80']:10.2f}   "
                    f"ratio {row['p50'] / base['p50']:8.3f}   best/best {row['best'] / base['best']:8.3f}{memory}"
                )


def main() -> int:
    """Run the suites named on the command line."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=f"of {', '.join(sorted(SUITES))}; all if none is named"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each point (default: %(default)s)")
    parser.add_argument("--no-write", action="store_true", help="leave bench/results as it is")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.suites) - set(SUITES))
    if unknown:
        parser.error(f"suite must be one of {', '.join(sorted(SUITES))}, got {', '.join(unknown)}")
    count = torch.get_num_threads()
    for name in arguments.suites or sorted(SUITES):
        results = []
        torch.set_num_threads(count)  # which the suite before may have changed
        try:
            for point in SUITES[name]():
                point.check()
                times = seconds_of(point, arguments.seconds)
                now = environment()
                results += [line(point, contender, times[contender.name]) | now for contender in point.contenders]
                print(f"{point.what} on {point.data}: done", file=sys.stderr)
        except Skipped as reason:
            print(f"{name}: skipped: {reason}", file=sys.stderr)
        if results:
            show(results)
            if not arguments.no_write:
                write(RESULTS / f"{name}.jsonl", results)
    return 0


def write(path: pathlib.Path, results: list[dict[str, Any]]) -> None:
    """Write results in the place of what the same device gave before; those of other devices stay."""
    path.parent.mkdir(exist_ok=True)
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    others = [row for row in rows if row["device"] != results[0]["device"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*others, *results]))


if __name__ == "__main__":
    sys.exit(main())
