"""Tables of what ``python -m bench.gpu`` measured, for the page of benchmarks and the README."""

from __future__ import annotations

from collections.abc import Iterator

from .gpu import Row, best, is_limit, read
from .run import RESULTS

# Parts, in the order of the page, with the title of their table and the name of its figures.
PARTS = [
    ("decode", "Decoding, frames left on the device"),
    ("training", "Training steps, encoder and optimiser included"),
    ("block", "The block, forward"),
    ("block-training", "The block, forward and backward"),
    ("gradients", "Its gradients alone, against cuDNN"),
    ("streams", "Blocks of few channels"),
    ("int8", "The block in int8"),
    ("pointwise", "Bias, PixelShuffle and GELU"),
    ("highpass", "The FFT high-pass filter"),
    ("output", "The output stage"),
    ("loss", "The loss of training and its gradient"),
    ("fuse", "Published networks before and after `hflfnerv.fuse`"),
    ("encode", "Whole encodes"),
]
LIBRARY = ("eager", "torch.compile", "conv2d")  # how the names of contenders begin that are PyTorch alone


def rows_of(part: str) -> list[Row]:
    """Return the rows of a part, none where it has not run."""
    return read(RESULTS / f"gpu-{part}.jsonl")


def is_library(row: Row) -> bool:
    """Return whether a row is of PyTorch's own operations."""
    name = str(row["implementation"])
    return name.startswith(LIBRARY) and not name.startswith("conv2d+")


def points(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield what was measured, on what, and the rows of it."""
    for what, data in dict.fromkeys((row["what"], row["data"]) for row in rows):
        yield what, data, [row for row in rows if (row["what"], row["data"]) == (what, data)]


def cell(row: Row | None, commit: str | None = None) -> str:
    """Return a contender's name and speed, and its commit where that is another than the one given."""
    if row is None:
        return ""
    other = "" if commit in (None, row["commit"]) else f", at {row['commit'][:7]}"
    return f"{row['p50']:,.1f} ({row['implementation']}{other})"


def part_table(part: str, title: str) -> str:
    """A line for each point: PyTorch's fastest by eager execution and by compilation, and ours."""
    rows = rows_of(part)
    unit = rows[0]["unit"]
    limit = next((key[9:] for row in rows for key in row if key.startswith("share_of_")), None)
    share = f" | share of {limit}" if limit else ""
    lines = [
        f"| {title}, {unit} | eager | torch.compile | ours | ours / the faster of them{share} | commit |",
        "|---|---|---|---|---|---|" + "---|" * bool(limit),
    ]
    for what, data, every in points(rows):
        contenders = [row for row in every if not is_limit(row)]
        library = [row for row in contenders if is_library(row)]
        compiled = best([row for row in library if row["implementation"].startswith("torch.compile")])
        eager = best([row for row in library if row is not compiled])
        ours, rival = best([row for row in contenders if not is_library(row)]), best(library)
        ratio = "" if ours is None or rival is None else f"{ours['p50'] / rival['p50']:.2f} x"
        of_limit = f" | {100 * ours[f'share_of_{limit}']:.0f} %" if limit and ours else " |" * bool(limit)
        name = f"{what.split('.')[-1]}, {data}" if len({row["what"] for row in rows}) > 1 else data
        commit = (ours or contenders[0])["commit"]
        cells = f"{cell(eager, commit)} | {cell(compiled, commit)} | {cell(ours)}"
        lines.append(f"| {name} | {cells} | {ratio}{of_limit} | {commit[:7]} |")
    return "\n".join(lines)


def limits_line(rows: list[Row]) -> str:
    """Say what the device can do at most, as measured there."""
    copy = next(row for row in rows if row["what"] == "limits.copy")
    cache = best([row for row in rows if row["what"] == "limits.l2_read"])
    products = {row["dtype"]: row["p50"] for row in rows if row["what"] == "limits.matmul"}
    rates = ", ".join(f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in products.items())
    read = "" if cache is None else f"reads from the second cache {cache['p50'] / 1e3:.1f} TB/s, "
    return (
        f"Measured there: a copy {copy['p50'] / 1e3:.2f} TB/s, {read}PyTorch's product of two 8192 x 8192 matrices "
        f"{rates}."
    )


def check_line(rows: list[Row]) -> str:
    """Say how many results agreed with float64."""
    counts = dict.fromkeys((row["what"].split(".")[-1] for row in rows), 0)
    for row in rows:
        counts[row["what"].split(".")[-1]] += 1
    of = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"Results compared with float64 on the device and found right, at commit {rows[0]['commit'][:7]}: {of}."


def gpu_tables() -> str:
    """All parts that have rows."""
    limits, checks = rows_of("limits"), rows_of("check")
    if not limits:
        return "Not measured yet: `python -m bench.gpu`."
    row = limits[0]
    versions = row["versions"]
    source = (
        f"`python -m bench.gpu` on one {row['device']} (driver {row['driver']}), torch {versions['torch']}, triton "
        f"{versions['triton']}; medians, each contender a CUDA graph whose replays alternate with the others', with "
        "cold caches for single operations. Every result was compared with float64 before it was timed. A row's commit "
        "is that of the code it measured; PyTorch's own, which does not depend on it, has a commit beside it where it "
        "was measured in another run. Rows in `bench/results/gpu-*.jsonl`."
    )
    texts = [source, limits_line(limits), *([check_line(checks)] if checks else [])]
    texts += [part_table(part, title) for part, title in PARTS if rows_of(part)]
    return "\n\n".join(texts)


#: Lines of the README: what is measured, the part, how its ``what`` and its ``data`` begin.
SUMMARY = [
    ("the last block of HNeRV 1.5M, batch 8, bfloat16", "block", "", "s5, batch 8, bfloat16"),
    ("the same, forward and backward", "block-training", "", "s5, batch 8, bfloat16"),
    ("decoding HNeRV 1.5M at 640x1280, batch 8", "decode", "decode", "hnerv 1.5M, 640x1280, batch 8"),
    ("decoding the dual stream as published, batch 8", "decode", "decode", "hflf 1.5M, 640x1280, batch 8"),
]


def gpu_summary() -> str:
    """The ratios that matter most on a GPU, each to the fastest of PyTorch's that were measured at the same commit."""
    lines, device = [], None
    for text, part, what, data in SUMMARY:
        rows = [row for row in rows_of(part) if row["what"].startswith(what) and row["data"].startswith(data)]
        ours = best([r for r in rows if not is_library(r) and not is_limit(r)])
        rival = None if ours is None else best([r for r in rows if is_library(r) and r["commit"] == ours["commit"]])
        if ours is None or rival is None:
            continue
        device = ours["device"]
        speed, ratio = f"{ours['p50']:,.0f} {ours['unit']}", ours["p50"] / rival["p50"]
        lines.append(f"| {text} | {speed} ({ours['implementation']}) | {ratio:.2f} x ({rival['implementation']}) |")
    head = f"| {device} | ours | against PyTorch's fastest in the same run |"
    return "\n".join([head, "|---|---|---|", *lines])
