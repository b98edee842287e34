"""An iterator in a thread: order, bound, errors, and a reader that stops."""

from __future__ import annotations

import threading

import pytest

from hflfnerv.cli._ahead import Ahead


def test_items_come_in_order():
    ahead = Ahead(range(100), 3)
    assert list(ahead) == list(range(100))
    assert ahead.seconds > 0
    assert list(Ahead([], 1)) == []


def test_it_is_ahead_by_the_limit_at_most():
    made, waiting = [], threading.Event()

    def items():
        for item in range(20):
            made.append(item)
            if item == 4:
                waiting.set()
            yield item

    reader = iter(Ahead(items(), 3))
    assert next(reader) == 0
    assert waiting.wait(10)  # 1, 2, 3 wait, 4 is made and finds no place
    assert len(made) <= 6
    assert list(reader) == list(range(1, 20))


def test_errors_reach_the_reader():
    def items():
        yield 1
        raise ValueError("broken")

    reader = iter(Ahead(items(), 2))
    assert next(reader) == 1
    with pytest.raises(ValueError, match="broken"):
        next(reader)


def test_a_reader_that_stops_ends_the_thread():
    before = threading.active_count()
    reader = iter(Ahead(range(1000), 2))
    next(reader)
    assert threading.active_count() == before + 1
    reader.close()
    assert threading.active_count() == before
