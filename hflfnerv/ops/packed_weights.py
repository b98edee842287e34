"""Weights as the kernels read them, made once instead of at every call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

__all__ = ["TILES", "PackedWeights", "is_kept", "kept_weight", "tiles_allowed"]

#: The tiles that convolutions may take, in the order of their errors: see :class:`PackedWeights`.
TILES = ("small", "large", "integer")

# The objects whose ``with`` the caller is in, innermost last. A context has its own: threads share an object, and what
# is in use is no part of the object.
_ENTERED: ContextVar[tuple[PackedWeights, ...]] = ContextVar("packed_weights", default=())


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    """Return what changes when a weight is written to, moved, cast or given other data."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()


class _Kept(NamedTuple):
    """What is kept of one parameter."""

    weight: weakref.ref[torch.Tensor]
    state: tuple[Any, ...]
    packed: dict[tuple[Any, ...], torch.Tensor]  # by layout


class PackedWeights:
    """Keeps the weights of inference in the order in which the kernels read them, for the calls in its ``with``.

    Without it, every call of :func:`conv_pixel_shuffle_gelu` that runs a kernel orders the weight anew, in launches of
    their own. Kept are ``nn.Parameter``s, as long as they exist, and a kept one is made anew when the parameter has
    changed: by ``load_state_dict``, by ``.to()``, by an optimiser or anything else that writes to it in place. What is
    written through ``.data``, or to a parameter made in inference mode, PyTorch does not count and this does not see,
    which is why nothing is kept unless it is asked for. Threads may share one object, each in a ``with`` of its own.

    A CUDA graph that is captured inside reads the kept weights at every replay: run what it captures once before, hold
    this object and the parameters as long as the graph, and leave the weights as they are. Under torch.compile nothing
    is kept.

    Args:
        tiles: what ``impl="winograd"`` may take for large images, in the order of speed and errors. ``"small"``: what
            it takes without this. ``"large"``: for 5x5 convolutions tiles of 6 x 6 pixels instead of 4 x 4: less than
            three quarters of the products, and rounding errors five times as large, 1e-5 of the results' root mean
            square with 33 channels. ``"integer"``: for images of 3200 pixels on (8000 for 3x3 convolutions) and at most
            128 channels, tiles of 14 x 14 pixels (16 x 16) by Fourier transforms, with fewer products, of 16-bit
            integers, of which twice as many are made at a time. Their errors are 1e-4, a tenth of those of bfloat16,
            and what is not finite spreads to all results of the tiles that read it. Both errors are below what 8 bits
            show.

    Raises:
        ValueError: ``tiles`` is none of the three.

    Example:
        >>> with PackedWeights(), torch.inference_mode():
        ...     frames = [network(x) for x in inputs]  # doctest: +SKIP
    """

    def __init__(self, *, tiles: str = "small") -> None:
        if tiles not in TILES:
            raise ValueError(f"tiles must be one of {', '.join(map(repr, TILES))}, got {tiles!r}")
        self.tiles = tiles
        self._kept: dict[int, _Kept] = {}  # by the id of the parameter, which is not hashed by its values

    def __enter__(self) -> PackedWeights:
        _ENTERED.set((*_ENTERED.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _ENTERED.set(_ENTERED.get()[:-1])

    def get(self, weight: torch.Tensor, layout: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return ``make()``, or what it returned for the same weight, as it is now, and the same layout."""
        if not isinstance(weight, torch.nn.Parameter):
            return make()
        state, kept = _state(weight), self._kept.get(id(weight))
        if kept is not None and (kept.weight() is not weight or kept.state != state):
            kept = None
        if kept is not None and layout in kept.packed:
            return kept.packed[layout]
        packed = make()
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return packed  # which exists only once the graph has run
        if kept is None:
            forget = functools.partial(_forget, weakref.ref(self), id(weight))
            kept = self._kept[id(weight)] = _Kept(weakref.ref(weight, forget), state, {})
        kept.packed[layout] = packed
        return packed


def _forget(owner: weakref.ref[PackedWeights], key: int, weight: weakref.ref[torch.Tensor]) -> None:
    """Drop what is kept of a parameter that is gone, whose id may be another's by now."""
    packed_weights = owner()
    if packed_weights is not None and key in packed_weights._kept and packed_weights._kept[key].weight is weight:
        del packed_weights._kept[key]


def kept_weight(
    weight: torch.Tensor, layout: Callable[[], tuple[Any, ...]], make: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """Return what the :class:`PackedWeights` in use, if one is, keeps of a weight.

    Args:
        weight: what ``make`` works on.
        layout: returns all else that its result depends on.
        make: returns the weight as a kernel reads it.
    """
    entered = _in_use()
    return None if entered is None else entered.get(weight, layout(), make)


def is_kept(weight: torch.Tensor) -> bool:
    """Return whether the :class:`PackedWeights` in use, if one is, keeps a weight."""
    return _in_use() is not None and isinstance(weight, torch.nn.Parameter)


def tiles_allowed() -> str:
    """Return the ``tiles`` of the :class:`PackedWeights` in use, or ``"small"`` where none is."""
    entered = _in_use()
    return "small" if entered is None else entered.tiles


def _in_use() -> PackedWeights | None:
    entered = () if torch.compiler.is_compiling() else _ENTERED.get()
    return entered[-1] if entered else None
