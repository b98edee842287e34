"""What can be measured, as data.

A :class:`Point` is one operation on one input, with all contenders: ours, and the baselines that run in the same
process, in turn with ours, on the same input. A module below ``bench/`` registers a function that makes its points;
nothing is loaded or computed before the runner asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SUITES", "Contender", "Point", "Skipped", "suite"]


class Skipped(Exception):
    """Raised by a suite that cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a point.

    Attributes:
        name: ours (``"cpp"``) or a baseline with its settings (``"zstandard level 1"``).
        run: what is timed.
        units: how many units (bytes, symbols, frames) one run handles; less than the others' for a slow baseline, and
            then ``note`` says so.
        note: settings and caveats, kept with the result.
        facts: further figures of its own to keep, such as its memory; asked for once, after the timing.
    """

    name: str
    run: Callable[[], Any]
    units: float
    note: str = ""
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Point:
    """One line of results for each contender.

    Attributes:
        what: the operation, e.g. ``"huffman.decode"``.
        data: the input, in words.
        dtype: of the input.
        shape: of the input.
        unit: of the metric, e.g. ``"MB/s"``; a contender's value is units / seconds / ``scale``.
        scale: see ``unit``.
        contenders: ours first; the first of them whose name is ``baseline`` is what ratios refer to.
        baseline: a contender's name.
        check: raises if an output is wrong; called before anything is timed.
        facts: further figures of all contenders to keep, such as sizes.
    """

    what: str
    data: str
    dtype: str
    shape: Sequence[int]
    unit: str
    scale: float
    contenders: Sequence[Contender]
    baseline: str
    check: Callable[[], None]
    facts: dict[str, Any] = field(default_factory=dict)


SUITES: dict[str, Callable[[], Iterable[Point]]] = {}


def suite(name: str) -> Callable[[Callable[[], Iterable[Point]]], Callable[[], Iterable[Point]]]:
    """Register a function that makes points under a name."""

    def register(make: Callable[[], Iterable[Point]]) -> Callable[[], Iterable[Point]]:
        SUITES[name] = make
        return make

    return register
