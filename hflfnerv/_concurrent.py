"""Independent parts of a computation side by side, on streams of a CUDA device, and CUDA graphs of them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["capture", "concurrently", "side_by_side"]

T = TypeVar("T")

_STREAMS = 8  # at once, the current one included: PyTorch has 32 for a device, and gives them out in turn
_LOCAL = threading.local()
_LOCK = threading.Lock()
_BESIDE: dict[tuple[int, int], list[torch.cuda.Stream]] = {}
_CAPTURE = threading.Lock()
_BROKEN: list[torch.cuda.CUDAGraph] = []  # of captures that did not end; PyTorch's allocator still refers to them


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Let :func:`concurrently` use several streams meanwhile, in this thread.

    It is for computations that are ours from end to end. Elsewhere the operations of a network stay on the stream that
    its caller chose: hooks on gradients, such as those of data-parallel training, count on that.
    """
    before = _side_by_side()
    _LOCAL.side_by_side = True
    try:
        yield
    finally:
        _LOCAL.side_by_side = before


def _side_by_side() -> bool:
    return getattr(_LOCAL, "side_by_side", False)


def concurrently(*calls: functools.partial[T]) -> list[T]:
    """Call independent functions and return their results.

    Within :func:`side_by_side`, where the first call has an argument on a CUDA device, up to eight calls run at once:
    the first on the current stream, the others on streams of their own, the same ones each time. They begin after all
    that the current stream has been given so far, and whatever comes next there begins after all of them. In the
    capture of a CUDA graph they become branches of it. Small kernels that leave most of a device idle then take the
    time of the longest branch, not of the sum. Gradients run on the streams of what they are the gradients of.

    Args:
        calls: functions with their positional arguments; tensors, or sequences of them, are found there and in results.
            Any other tensor that a call reads, such as a weight, must be kept until the gradients are taken, or its
            memory may be given away on one stream while another reads it.
    """
    device = next((x.device for x in _tensors(calls[0].args) if x.is_cuda), None) if calls else None
    # A compiler sees one stream, and no state of threads.
    if device is None or torch.compiler.is_compiling() or not _side_by_side() or _BROKEN:
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    beside = _streams_beside(current, min(len(calls), _STREAMS) - 1)
    streams = [current, *beside]
    for stream in beside:
        stream.wait_stream(current)
    results = []
    try:
        for number, call in enumerate(calls):
            stream = streams[number % len(streams)]
            with torch.cuda.stream(stream):
                results.append(call())
            if stream is not current:
                # The allocator knows of the stream that a tensor was made on, and is told of the other.
                for read in _tensors(call.args):
                    read.record_stream(stream)
                for made in _tensors(results[-1]):
                    made.record_stream(current)
    finally:
        for stream in beside:
            current.wait_stream(stream)
    return results


def capture(run: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture what a function launches in a CUDA graph.

    One thread at a time does so: the beginning of a capture waits for the device, which CUDA does not allow while
    another one is under way. Other threads go on launching meanwhile.

    Where CUDA breaks a capture off, PyTorch's allocator takes it for still under way, and keeps all memory that was
    used on several streams for good. From then on :func:`concurrently` therefore uses one stream in this process.

    Args:
        run: called once; it computes nothing yet.
        stream: of its own, on which it runs.
        pool: the memory of graphs that never run at once, from ``torch.cuda.graph_pool_handle``; None for its own.

    Returns:
        The graph, and what ``run`` returned: tensors that each replay writes.

    Raises:
        RuntimeError: what is launched cannot be captured; the current stream is what it was.
    """
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(stream.device)
    results: list[T] = []
    failure: Exception | None = None
    with _CAPTURE:
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    results.append(run())
                except Exception as error:  # the capture may end as it should all the same
                    failure = error
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            _BROKEN.append(graph)
            if failure is None:
                raise
            raise failure from error
    if failure is not None:
        raise failure
    return graph, results[0]


def _streams_beside(current: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
    """Return streams that go with this one alone: while it is captured, so are they."""
    with _LOCK:
        streams = _BESIDE.setdefault((current.device_index, current.cuda_stream), [])
        while len(streams) < count:
            # Of a priority of their own, PyTorch gives out other streams than those that are being captured elsewhere.
            streams.append(torch.cuda.Stream(current.device, priority=-1))
        return streams[:count]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
