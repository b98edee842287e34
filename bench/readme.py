"""Writes the tables of README.md and docs/benchmarks.md from ``bench/results``: ``python -m bench.readme``.

A test holds both pages to the rows.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hflfnerv.config import PRESETS

from .gpu_report import gpu_summary, gpu_tables
from .run import RESULTS, ROOT

__all__ = ["PAGES", "filled"]

Row = dict[str, Any]
README, BENCHMARKS, DEMO = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "demo.json"


def rows_of(suite: str) -> list[Row]:
    """Return the results of a suite, none where it has not run."""
    path = RESULTS / f"{suite}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    if suite == "train_cpu":
        # Rows without a preset are older than the field, and of ``paper``.
        rows = [row if "preset" in row else row | {"data": row["data"].replace("M, ", "M paper, ", 1)} for row in rows]
    return rows


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
    every = rows
    rows = [row for row in rows if row["data"].startswith("real")]
    of = {(row["what"], row["implementation"]): row for row in rows}
    both = ("huffman.decode", "huffman.encode")
    lines = [
        "| 1.5 M 8-bit weights of the published HNeRV | decode | encode |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["implementation"] for what in both for row in rows if row["what"] == what):
        cells = []
        for what in both:
            row = of.get((what, name))
            if row is None:  # there is no encoding without a checksum
                cells.append("")
                continue
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
    return "\n".join([*lines, "", *huffman_inputs(every)])


def huffman_inputs(rows: list[Row]) -> list[str]:
    """Speed on all inputs, as ratios to the peers' in the same run."""
    of = {(row["data"], row["what"], row["implementation"]): row["p50"] for row in rows}
    ours = rows[0]["implementation"]  # the fastest of this machine comes first
    unverified = f"{ours}, unverified"
    peers = ("zstandard level 1", "zstandard level 1, checksum", "dahuffman")
    columns = [
        column
        for peer in peers
        for column in ((f"{peer}: decode", "huffman.decode", ours, peer), ("encode", "huffman.encode", ours, peer))
    ]
    # Rows without it are older than it.
    has_unverified = any(row["implementation"] == unverified for row in rows)
    if has_unverified:
        columns[0] = ("decode", *columns[0][1:])
        columns.insert(0, (f"{peers[0]}: decode unverified", "huffman.decode", unverified, peers[0]))
    lines = [
        f"| Speed of {ours} over | {' | '.join(title for title, *_ in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        cells = []
        for _, what, name, peer in columns:
            other = of.get((data, what, peer))
            ratio = of[data, what, name] / other if other else 0
            cells.append(f"{ratio:,.{0 if ratio >= 100 else 2}f}" if other else "")
        lines.append(f"| {data} | {' | '.join(cells)} |")
    if has_unverified:
        lines += [
            "",
            "Like for like: unverified decoding (`verify=False`) beside zstandard, which has no checksum unless asked, "
            "and decoding as it is by default beside zstandard with a checksum.",
        ]
    for data in dict.fromkeys(row["data"] for row in rows):
        if speed := of.get((data, "huffman.decode", f"{unverified}, no copy")):
            ratio = speed / of[data, "huffman.decode", peers[0]]
            lines += [
                "",
                f"What does not shrink ({data}) is stored as it is, and decoding it is a copy, for zstandard too. As a "
                f"view (`copy=False`) it is there {ratio:,.0f} times as fast as zstandard's copy.",
            ]
    return lines


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
    note = (
        "Speed over PyTorch's separate operations in the same run, of the fastest of ours, `auto` among them; "
        "inference with kept weights and the tiles that the decoder takes at that commit. "
    )
    return "\n".join([*lines, "", note + source])


def training_ops_table(rows: list[Row]) -> str:
    """How many times as fast as PyTorch's the other operations of a training step are."""
    base = {row["data"]: row["p50"] for row in rows if row["implementation"] == row["baseline"]}
    lines = ["| forward and backward, channels-last | speed over PyTorch |", "|---|---|"]
    lines += [
        f"| {row['data']} | {row['p50'] / base[row['data']]:.1f} x |"
        for row in rows
        if row["implementation"] != row["baseline"]
    ]
    note = "PyTorch's operations as one writes them down, in the same run. "
    return "\n".join([*lines, "", note + source_of("training_ops_cpu", rows)])


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
    explained = "Whole steps, optimiser included: Adam for `paper`, Muon for `best`, before its quantised epochs"
    return speed_table("train_cpu", rows, "training, steps per second", explained)


def precision_table(rows: list[Row]) -> str:
    """What each precision costs in PSNR, and how far its frames are from float32's."""
    lines = [
        "| decoding | PSNR | below float32 | samples within a level | furthest |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['data']}: {row['implementation']} | {row['psnr_db']:.3f} dB | {row['cost_db']:.3f} dB | "
        f"{100 * row['within_one_level']:.2f} % | {row['largest_difference']} |"
        for row in rows
    ]
    source = source_of("precision", rows).replace("bench.run precision", "bench.precision")
    return "\n".join([*lines, "", "8-bit frames against the original, and against float32's. " + source])


def fuse_table(rows: list[Row]) -> str:
    """Published networks before and after ``hflfnerv.fuse``."""
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
    explained = (
        "The same weights before and after `hflfnerv.fuse`; a training step is forward and backward. Memory is the "
        "most that the process takes beyond its code, weights included. "
    )
    return "\n".join([*lines, "", explained + source_of("fuse", rows)])


def lead(suite: str, what: str, data: str, against: str | None = None) -> Callable[[str], str]:
    """Return what gives the cell of a processor: the ratio of our fastest to the baseline, or to ``against``.

    Args:
        suite: whose rows.
        what: their ``what``.
        data: how their ``data`` begins.
        against: another implementation than the rows' baseline.
    """

    def cell(device: str) -> str:
        rows = [row for row in rows_of(suite) if row["device"] == device and row["what"] == what]
        rows = [row for row in rows if row["data"].startswith(data)]
        peers = {row["data"]: row["p50"] for row in rows if row["implementation"] == (against or row["baseline"])}
        ours = [row for row in rows if row["implementation"].startswith(OURS)]
        if not ours or not peers:
            return ""
        best = max(ours, key=lambda row: row["p50"] / peers[row["data"]])
        ratio = best["p50"] / peers[best["data"]]
        dtype = f", {best['dtype']}" if best["dtype"] in ("float32", "bfloat16") else ""
        return f"{ratio:,.{1 if ratio < 100 else 0}f} x ({best['implementation']}{dtype})"

    return cell


# Implementations of this package, as the suites call them.
OURS = ("amx", "fused", "module", "cpp", "winograd", "conv2d+cpp", "hflfnerv")
_BLOCK = "33 -> 28*4, k = 5, 320 x 640"
# What the summary has: a line of text, and what makes its cells.
SUMMARY: list[tuple[str, Callable[[str], str]]] = [
    (
        "decoding the published HNeRV 1.5M at 640x1280, against PyTorch in eager float32",
        lead("decode_cpu", "decode_cpu", "published", "PyTorch fp32, eager"),
    ),
    (
        "one upsampling block, 33 to 28 channels at 640x1280, against PyTorch's operations",
        lead("conv_pixel_shuffle_gelu_cpu", "conv_pixel_shuffle_gelu.inference", _BLOCK),
    ),
    ("the same, forward and backward", lead("conv_pixel_shuffle_gelu_cpu", "conv_pixel_shuffle_gelu.training", _BLOCK)),
    *(
        (
            f"a training step of the dual stream of `{preset}`, 1.5M at 640x1280, against eager float32",
            lead("train_cpu", "train", f"hflf 1.5M {preset}"),
        )
        for preset in PRESETS
    ),
    ("published HNeRV code after `hflfnerv.fuse`, training", lead("fuse", "fuse.training", "HNeRV")),
    ("Huffman decoding of its weights, one thread, against zstandard -1", lead("huffman", "huffman.decode", "real")),
    ("the same, against dahuffman", lead("huffman", "huffman.decode", "real", "dahuffman")),
]


def summary_table() -> str:
    """The ratios that matter most, a column for each processor."""
    rows = rows_of("decode_cpu")
    devices = {row["device"]: f"{row['device']}, {row.get('simd', 'AMX')}" for row in rows}
    lines = [f"| two CPU cores | {' | '.join(devices.values())} |", "|---|" + "---|" * len(devices)]
    for text, cell in SUMMARY:
        cells = [cell(device) for device in devices]
        if any(cells):
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def demo_line() -> str:
    """What ``make demo`` gives, from the report that it wrote."""
    report = json.loads(DEMO.read_text())
    machine, seconds = report["machine"], round(report["total_seconds"])
    return (
        f"{report['frames']} frames of {report['height']} x {report['width']} in {report['bytes']:,} bytes, "
        f"{report['psnr_db']:.2f} dB, after {report['seconds']['train']:.0f} s of training and {seconds // 60} min "
        f"{seconds % 60} s in all, on {machine['threads']} threads of {machine['processor']} with {machine['simd']} "
        f"([demo.json](docs/demo.json), at commit {machine['commit'][:10]})."
    )


# What makes each table of the benchmarks' page from the rows of one processor, and the suites they are of.
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "decode": (decode_table, ("decode_cpu",)),
    "train": (train_table, ("train_cpu",)),
    "cpu": (cpu_table, ("pixel_shuffle_gelu_cpu", "conv_pixel_shuffle_gelu_cpu")),
    "ops": (training_ops_table, ("training_ops_cpu",)),
    "precision": (precision_table, ("precision",)),
    "fuse": (fuse_table, ("fuse",)),
    "huffman": (huffman_table, ("huffman",)),
    "open": (open_table, ("open",)),
}


def tables(name: str) -> str:
    """Return a table for each processor that has rows of all its suites, or how to measure them."""
    table, suites = TABLES[name]
    found = [{rows[0]["device"]: rows for rows in by_device(rows_of(suite))} for suite in suites]
    devices = [device for device in found[0] if all(device in rows for rows in found)]
    if not devices:
        return f"Not measured yet: `python -m bench.run {' '.join(suites)}`."
    return "\n\n".join(table(*(rows[device] for rows in found)) for device in devices)


#: The marked places of each page, and what makes them.
PAGES: dict[pathlib.Path, dict[str, Callable[[], str]]] = {
    README: {"demo": demo_line, "summary": summary_table, "gpu-summary": gpu_summary},
    BENCHMARKS: {"gpu": gpu_tables, **{name: functools.partial(tables, name) for name in TABLES}},
}


def filled(page: pathlib.Path) -> str:
    """Return a page's text with every marked table made anew."""
    text = page.read_text()
    for name, make in PAGES[page].items():
        made = make()
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page.name} must have one place marked {name}, got {count}")
    return text


def main() -> int:
    """Rewrite the pages."""
    for page in PAGES:
        page.write_text(filled(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
