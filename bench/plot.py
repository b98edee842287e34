"""Draws ``bench/results/<suite>.jsonl``: ``python -m bench.plot huffman -o huffman.png``; needs matplotlib."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .run import RESULTS


def main() -> int:
    """Draw one panel for each operation: the median of every contender, with p20 to p80, by input."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("-o", "--output", required=True, help="image file")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.suite}.jsonl"
    if not path.is_file():
        parser.error(f"suite must have results, got none at {path}; run python -m bench.run {arguments.suite} first")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[dict[str, Any]] = [json.loads(text) for text in path.read_text().splitlines()]
    operations = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = plt.subplots(len(operations), 1, figsize=(10, 4 * len(operations)), squeeze=False)
    for axis, what in zip(axes[:, 0], operations, strict=True):
        chosen = [row for row in rows if row["what"] == what]
        inputs = list(dict.fromkeys(row["data"] for row in chosen))
        names = list(dict.fromkeys(row["implementation"] for row in chosen))
        for i, name in enumerate(names):
            of = {row["data"]: row for row in chosen if row["implementation"] == name}
            places = [j + 0.8 * i / len(names) for j, data in enumerate(inputs) if data in of]
            middle = [row["p50"] for row in of.values()]
            low = [row["p50"] - row["p20"] for row in of.values()]
            high = [row["p80"] - row["p50"] for row in of.values()]
            axis.bar(places, middle, 0.8 / len(names), yerr=[low, high], label=name)
        axis.set_xticks([j + 0.4 * (1 - 1 / len(names)) for j in range(len(inputs))], inputs, fontsize=7)
        axis.set_yscale("log")
        axis.set_ylabel(chosen[0]["unit"])
        axis.set_title(f"{what} on {chosen[0]['device']}", fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
