"""Weights as the kernels read them, made once instead of at every call."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch

__all__ = ["PackedWeights", "kept_weight", "large_tiles_allowed"]

_ACTIVE: ContextVar[PackedWeights | None] = ContextVar("packed_weights", default=None)


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    """Return what changes when a weight is written to, moved, cast or given other data."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()


class PackedWeights:
    """Keeps the weights of inference in the order in which the kernels read them, for the calls in its ``with``.

    Without it, every call of :func:`conv_pixel_shuffle_gelu` that runs a kernel orders the weight anew, in launches of
    their own. Kept are ``nn.Parameter``s, and a kept one is made anew when the parameter has changed: by
    ``load_state_dict``, by ``.to()``, by an optimiser or anything else that writes to it in place. What is written
    through ``.data``, or to a parameter made in inference mode, PyTorch does not count and this does not see, which is
    why nothing is kept unless it is asked for.

    A CUDA graph that is captured inside reads the kept weights at every replay: run what it captures once before, hold
    this object as long as the graph, and leave the weights as they are. Under torch.compile nothing is kept.

    Args:
        large_tiles: whether 5x5 convolutions by Winograd's method (``impl="winograd"``) may take tiles of 6 x 6 pixels
            instead of 4 x 4: less than three quarters of the products, and rounding errors five times as large, 1e-5 of
            the results with 33 channels. That is far below what 8 bits show.

    Example:
        >>> with PackedWeights(), torch.inference_mode():
        ...     frames = [network(x) for x in inputs]  # doctest: +SKIP
    """

    def __init__(self, *, large_tiles: bool = False) -> None:
        self.large_tiles = large_tiles
        # The weight itself is held too, so that its id stays its own.
        self._kept: dict[tuple[Any, ...], tuple[torch.Tensor, tuple[Any, ...], torch.Tensor]] = {}
        self._tokens: list[Token[PackedWeights | None]] = []

    def __enter__(self) -> PackedWeights:
        self._tokens.append(_ACTIVE.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.reset(self._tokens.pop())

    def get(self, weight: torch.Tensor, layout: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return ``make()``, or what it returned for the same weight, as it is now, and the same layout."""
        if not isinstance(weight, torch.nn.Parameter):
            return make()
        key, state = (id(weight), layout), _state(weight)
        kept = self._kept.get(key)
        if kept is not None and kept[1] == state:
            return kept[2]
        packed = make()
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            # What is made during a capture exists only once the graph has run.
            self._kept[key] = (weight, state, packed)
        return packed


def kept_weight(weight: torch.Tensor, layout: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Return what the :class:`PackedWeights` in use, if one is, keeps of a weight.

    Args:
        weight: what ``make`` works on.
        layout: all else that its result depends on.
        make: returns the weight as a kernel reads it.
    """
    active = None if torch.compiler.is_compiling() else _ACTIVE.get()
    return None if active is None else active.get(weight, layout, make)


def large_tiles_allowed() -> bool:
    """Return whether the :class:`PackedWeights` in use, if one is, allows large tiles."""
    active = None if torch.compiler.is_compiling() else _ACTIVE.get()
    return active is not None and active.large_tiles
