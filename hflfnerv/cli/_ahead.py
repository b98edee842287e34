"""An iterator that runs ahead of its reader, in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

__all__ = ["Ahead"]

T = TypeVar("T")

_POLL_SECONDS = 0.1


class Ahead(Generic[T]):
    """Makes the items of an iterable in a thread while the reader works on the last ones.

    Args:
        items: what to iterate over, once. What it raises is raised where the reader is.
        limit: how many finished items may wait.

    Attributes:
        seconds: time that making the items took so far.
    """

    def __init__(self, items: Iterable[T], limit: int) -> None:
        self.seconds = 0.0
        self._items = items
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(limit)
        self._stop = threading.Event()

    def __iter__(self) -> Generator[T, None, None]:
        thread = threading.Thread(target=self._work, name="ahead", daemon=True)
        thread.start()
        try:
            while True:
                kind, value = self._ready.get()
                if kind == "end":
                    return
                if kind == "error":
                    assert isinstance(value, BaseException)
                    raise value
                yield value  # type: ignore[misc]
        finally:
            self._stop.set()
            thread.join()

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            for item in self._items:
                self.seconds += time.perf_counter() - started
                if not self._put("item", item):
                    return
                started = time.perf_counter()
            self.seconds += time.perf_counter() - started
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, value: T | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put((kind, value), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
