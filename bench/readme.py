"""Writes the README's tables from ``bench/results``: ``python -m bench.readme``. A test holds the README to them."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .run import RESULTS, ROOT

__all__ = ["TABLES", "filled"]

Row = dict[str, Any]
README = ROOT / "README.md"


def rows_of(suite: str) -> list[Row]:
    """Return the results of a suite."""
    return [json.loads(text) for text in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]


def source_of(suite: str, rows: list[Row]) -> str:
    """Say where figures come from."""
    row = rows[0]
    return (
        f"`python -m bench.run {suite}` on {row['device']}, one thread, at commit {row['commit'][:10]}; "
        f"rows in `bench/results/{suite}.jsonl`."
    )


def huffman_table() -> str:
    """Speed on the weights of the published HNeRV 1.5M, median, and its ratio to zstandard's."""
    rows = [row for row in rows_of("huffman") if row["data"].startswith("real")]
    of = {(row["what"], row["implementation"]): row for row in rows}
    lines = [
        "| 1.5 M 8-bit weights of the published HNeRV | decode | encode |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        cells = []
        for what in ("huffman.decode", "huffman.encode"):
            row = of[what, name]
            ratio = row["p50"] / of[what, row["baseline"]]["p50"]
            cells.append(f"{row['p50']:,.{0 if row['p50'] >= 10 else 2}f} MB/s ({ratio:.{2 if ratio >= 0.1 else 4}f})")
        ours = f"**{name}**" if name.startswith("cpp") else name
        lines.append(f"| {ours} | {' | '.join(cells)} |")
    sizes = rows[0]
    lines += [
        "",
        f"Ratios to zstandard level 1 in the same run. Size: {sizes['bytes']:,} bytes with tables and chunk directory, "
        f"{100 * (sizes['bytes'] / sizes['payload_bytes'] - 1):.2f} % over the optimal code's payload. "
        + source_of("huffman", rows),
    ]
    return "\n".join(lines)


def open_table() -> str:
    """Time from the bytes of a file to a network ready to decode."""
    rows = rows_of("open")
    names = {
        "hflf, huffman": "`.hflf`, Huffman",
        "hflf, range": "`.hflf`, range coder",
        rows[0]["baseline"]: "the published file, `torch.load` and dequantise",
    }
    sizes = {"hflf, huffman": "huffman_bytes", "hflf, range": "range_bytes", rows[0]["baseline"]: "published_bytes"}
    lines = ["| published HNeRV 1.5 M, Bunny | file | open |", "|---|---|---|"]
    for row in rows:
        name = row["implementation"]
        if name in names:
            lines.append(f"| {names[name]} | {row[sizes[name]]:,} bytes | {1000 / row['p50']:.1f} ms |")
    return "\n".join([*lines, "", source_of("open", rows)])


def cpu_table() -> str:
    """How many times as fast as PyTorch's own operations the CPU kernels are."""
    shuffle, conv = rows_of("pixel_shuffle_gelu_cpu"), rows_of("conv_pixel_shuffle_gelu_cpu")

    def ratios(rows: list[Row], what: str) -> dict[str, str]:
        chosen = [row for row in rows if row["what"] == what]
        base = {row["data"]: row["p50"] for row in chosen if row["implementation"] == row["baseline"]}
        best: dict[str, tuple[float, str]] = {}
        for row in chosen:
            if row["implementation"] != row["baseline"]:
                entry = (row["p50"] / base[row["data"]], row["implementation"])
                best[row["data"]] = max(entry, best.get(row["data"], entry))
        return {data: f"{ratio:.1f} x" for data, (ratio, _) in best.items()}

    forward, backward = (ratios(shuffle, f"pixel_shuffle_gelu.{way}") for way in ("forward", "backward"))
    lines = ["| `pixel_shuffle_gelu`, C r² x H x W | forward | backward |", "|---|---|---|"]
    lines += [f"| {data} | {forward[data]} | {backward[data]} |" for data in forward]
    inference, training = (ratios(conv, f"conv_pixel_shuffle_gelu.{way}") for way in ("inference", "training"))
    lines += ["", "| `conv_pixel_shuffle_gelu`, channels-last | inference | forward and backward |", "|---|---|---|"]
    lines += [
        f"| {data} | {inference.get(data, '')} | {training.get(data, '')} |" for data in {**inference, **training}
    ]
    row = conv[0]
    return "\n".join(
        [
            *lines,
            "",
            "Speed over PyTorch's separate operations in the same run, the faster of our implementations. "
            "`python -m bench.run pixel_shuffle_gelu_cpu conv_pixel_shuffle_gelu_cpu` on "
            f"{row['device']} with AMX, {row['threads']} threads, at commit {row['commit'][:10]}; rows in "
            "`bench/results/`.",
        ]
    )


def speed_table(suite: str, title: str, explained: str) -> str:
    """Speeds of all contenders, a column for each network, with their ratios to the baseline's."""
    rows = rows_of(suite)
    networks = list(dict.fromkeys(row["data"] for row in rows))
    base = {row["data"]: row["p50"] for row in rows if row["implementation"] == row["baseline"]}
    found = {(row["implementation"], row["data"]): row["p50"] for row in rows}

    def cell(name: str, data: str) -> str:
        speed = found.get((name, data))
        return "" if speed is None else f"{speed:.1f} ({speed / base[data]:.2f})"

    names = sorted(dict.fromkeys(row["implementation"] for row in rows), key=lambda n: -found.get((n, networks[0]), 0))
    lines = [f"| {title} | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    lines += [f"| {name} | {' | '.join(cell(name, data) for data in networks)} |" for name in names]
    source = (
        f"{explained}; ratios to {rows[0]['baseline']} in the same run. `python -m bench.run {suite}` on "
        f"{rows[0]['device']} with AMX, {rows[0]['threads']} threads, at commit {rows[0]['commit'][:10]}; rows in "
        f"`bench/results/{suite}.jsonl`."
    )
    return "\n".join([*lines, "", source])


def decode_table() -> str:
    """Frames per second on the CPU."""
    return speed_table("decode_cpu", "decoding, frames per second", "From a frame's embedding to its uint8 pixels")


def train_table() -> str:
    """Training steps per second on the CPU."""
    return speed_table("train_cpu", "training, steps per second", "Whole steps, optimiser included")


def fuse_table() -> str:
    """Published networks before and after ``hflfnerv.fuse``."""
    rows = rows_of("fuse")
    found = {(row["what"], row["data"], row["implementation"]): row for row in rows}
    eager, fused = rows[0]["baseline"], rows[0]["implementation"]

    def cells(what: str, data: str) -> Iterator[str]:
        before, after = found[what, data, eager], found[what, data, fused]
        yield f"{before['p50']:.2f} → {after['p50']:.2f} ({after['p50'] / before['p50']:.2f} x)"
        yield f"{before['peak_bytes'] / 1e6:.0f} → {after['peak_bytes'] / 1e6:.0f} MB"

    lines = [
        "| eager → fused | frames per second | peak memory | training steps per second | peak memory |",
        "|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        both = [*cells("fuse.inference", data), *cells("fuse.training", data)]
        lines.append(f"| {data} | {' | '.join(both)} |")
    row = rows[0]
    source = (
        "The same weights before and after `hflfnerv.fuse`; a training step is forward and backward. Memory is the "
        "most that the process takes beyond its code, weights included. `python -m bench.run fuse` on "
        f"{row['device']}, {row['threads']} threads, at commit {row['commit'][:10]}; rows in "
        "`bench/results/fuse.jsonl`."
    )
    return "\n".join([*lines, "", source])


TABLES: dict[str, Callable[[], str]] = {
    "fuse": fuse_table,
    "cpu": cpu_table,
    "decode": decode_table,
    "train": train_table,
    "huffman": huffman_table,
    "open": open_table,
}


def filled(text: str) -> str:
    """Return the README's text with every marked table made anew, or with how to measure what it is to show."""
    for name, table in TABLES.items():
        try:
            made = table()
        except FileNotFoundError as error:
            made = f"Not measured yet: `python -m bench.run {pathlib.Path(error.filename).stem}`."
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{README.name} must have one place marked {name}, got {count}")
    return text


def main() -> int:
    """Rewrite the README."""
    README.write_text(filled(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
