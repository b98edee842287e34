"""Writes the README's tables from ``bench/results``: ``python -m bench.readme``. A test holds the README to them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from .run import RESULTS, ROOT

__all__ = ["TABLES", "filled"]

Row = dict[str, Any]
README = ROOT / "README.md"


def rows_of(suite: str) -> list[Row]:
    """Return the results of a suite."""
    return [json.loads(text) for text in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]


def by_device(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each processor."""
    return [[row for row in rows if row["device"] == device] for device in dict.fromkeys(row["device"] for row in rows)]


def source_of(suite: str, rows: list[Row]) -> str:
    """Say where figures come from."""
    row = rows[0]
    # Rows without these fields are older than them: one thread, or a processor with AMX.
    threads = f"{row['threads']} threads" if "threads" in row else "one thread"
    return (
        f"`python -m bench.run {suite}` on {row['device']} with {row.get('simd', 'AMX')}, {threads}, at commit "
        f"{row['commit'][:10]}; rows in `bench/results/`."
    )


def huffman_table(rows: list[Row]) -> str:
    """Speed on the weights of the published HNeRV 1.5M, median, and its ratio to zstandard's."""
    rows = [row for row in rows if row["data"].startswith("real")]
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


def open_table(rows: list[Row]) -> str:
    """Time from the bytes of a file to a network ready to decode."""
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


def cpu_table(shuffle: list[Row], conv: list[Row]) -> str:
    """How many times as fast as PyTorch's own operations the CPU kernels are."""

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
    source = source_of("pixel_shuffle_gelu_cpu conv_pixel_shuffle_gelu_cpu", conv)
    note = "Speed over PyTorch's separate operations in the same run, the faster of our implementations. "
    return "\n".join([*lines, "", note + source])


def speed_table(suite: str, rows: list[Row], title: str, explained: str) -> str:
    """Speeds of all contenders, a column for each network, with their ratios to the baseline's."""
    networks = list(dict.fromkeys(row["data"] for row in rows))
    base = {row["data"]: row["p50"] for row in rows if row["implementation"] == row["baseline"]}
    found = {(row["implementation"], row["data"]): row["p50"] for row in rows}

    def cell(name: str, data: str) -> str:
        speed = found.get((name, data))
        return "" if speed is None else f"{speed:.1f} ({speed / base[data]:.2f})"

    names = sorted(dict.fromkeys(row["implementation"] for row in rows), key=lambda n: -found.get((n, networks[0]), 0))
    lines = [f"| {title} | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    lines += [f"| {name} | {' | '.join(cell(name, data) for data in networks)} |" for name in names]
    source = f"{explained}; ratios to {rows[0]['baseline']} in the same run. {source_of(suite, rows)}"
    return "\n".join([*lines, "", source])


def decode_table(rows: list[Row]) -> str:
    """Frames per second on the CPU."""
    return speed_table(
        "decode_cpu", rows, "decoding, frames per second", "From a frame's embedding to its uint8 pixels"
    )


def train_table(rows: list[Row]) -> str:
    """Training steps per second on the CPU."""
    return speed_table("train_cpu", rows, "training, steps per second", "Whole steps, optimiser included")


# What makes each table from the rows of one processor, and the suites they are of.
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "cpu": (cpu_table, ("pixel_shuffle_gelu_cpu", "conv_pixel_shuffle_gelu_cpu")),
    "decode": (decode_table, ("decode_cpu",)),
    "train": (train_table, ("train_cpu",)),
    "huffman": (huffman_table, ("huffman",)),
    "open": (open_table, ("open",)),
}


def tables(name: str) -> str:
    """Return a table for each processor that has rows of all its suites."""
    table, suites = TABLES[name]
    found = [{rows[0]["device"]: rows for rows in by_device(rows_of(suite))} for suite in suites]
    devices = [device for device in found[0] if all(device in rows for rows in found)]
    return "\n\n".join(table(*(rows[device] for rows in found)) for device in devices)


def filled(text: str) -> str:
    """Return the README's text with every marked table made anew."""
    for name in TABLES:
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        made = tables(name)
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
