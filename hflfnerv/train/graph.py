"""A training step as a CUDA graph: launched as one, whatever number of kernels it has."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from .._concurrent import capture
from .._device import first_line

__all__ = ["CapturedStep"]

_WARM_UP = 3


class CapturedStep:
    """Calls a step as it is a few times, then captures it in a CUDA graph, and replays that from then on.

    The first calls are steps like all others: in them the optimisers make their state, cuDNN finds its algorithms and
    Triton compiles its kernels, none of which a graph can hold. They and the capture use a stream of their own. Where
    the step cannot be captured, a warning says why, once, and the step is called as it is.

    Args:
        step: reads and writes the same tensors in every call, and does not wait for the device.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._capturable = True

    def __call__(self) -> None:
        """Take one step; returns before the device is done with it."""
        if self._graph is None and self._capturable and self._calls >= _WARM_UP:
            self._capture()
        self._calls += 1
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        current.wait_stream(self._stream)

    def _capture(self) -> None:
        try:
            self._graph, _ = capture(self._step, self._stream)
        except RuntimeError as error:
            self._capturable = False
            torch.cuda.empty_cache()
            warnings.warn(
                f"training without a CUDA graph, which is slower: the step cannot be captured ({first_line(error)})",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        torch.cuda.empty_cache()  # what the first calls used; the graph has memory of its own
