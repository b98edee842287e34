"""How an operation chooses among its implementations.

Each operation owns one ordered :class:`ImplementationTable`. ``impl="auto"`` takes the first entry that can run these
inputs on this machine; a named implementation that cannot run raises :class:`BackendUnavailable` with the reason, in
words, and never falls back. ``hflfnerv explain`` prints every table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BackendUnavailable

__all__ = ["Implementation", "ImplementationTable", "tables"]

_TABLES: dict[str, ImplementationTable] = {}


def _never(*_args: Any, **_kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        name: what a caller passes as ``impl=``, e.g. ``"triton"``, ``"cpp"`` or ``"reference"``.
        run: the callable; imports of heavy or optional modules happen inside it.
        unavailable: ``() -> None | str``; why this machine cannot run it at all.
        rejects: ``(*args, **kwargs) -> None | str``; why these inputs cannot be run, given the operation's arguments.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[], str | None] = _never
    rejects: Callable[..., str | None] = _never

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Return the reason why this entry cannot run these inputs here, or None if it can."""
        return self.unavailable() or self.rejects(*args, **kwargs)


class ImplementationTable:
    """The ordered implementations of one operation, fastest first; the last one runs everywhere."""

    def __init__(self, op: str, entries: Sequence[Implementation]) -> None:
        self.op = op
        self.entries = tuple(entries)
        _TABLES[op] = self

    def __iter__(self) -> Iterator[Implementation]:
        return iter(self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def select(self, impl: str, *args: Any, **kwargs: Any) -> Implementation:
        """Return the entry that ``impl`` means for these inputs.

        Raises:
            ValueError: ``impl`` is neither ``"auto"`` nor a name in the table.
            BackendUnavailable: the named entry cannot run, or (``"auto"``) none can.
        """
        if impl == "auto":
            reasons = []
            for entry in self.entries:
                reason = entry.why_not(*args, **kwargs)
                if reason is None:
                    return entry
                reasons.append(f"{entry.name}: {reason}")
            raise BackendUnavailable(f"{self.op} has no implementation for these inputs ({'; '.join(reasons)})")
        for entry in self.entries:
            if entry.name == impl:
                reason = entry.why_not(*args, **kwargs)
                if reason is not None:
                    raise BackendUnavailable(f"{self.op}: impl={impl!r} cannot run: {reason}")
                return entry
        raise ValueError(f"impl must be one of {('auto', *self.names)}, got {impl!r}")


def tables() -> tuple[ImplementationTable, ...]:
    """Return the tables of all operations imported so far, by name."""
    return tuple(_TABLES[name] for name in sorted(_TABLES))
