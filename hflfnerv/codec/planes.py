"""Planes of integers as the side information stores them: an offset, low bits as they are, and 8-bit symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_LOW_BITS", "Plane", "choose_plane", "pack_bits", "plane_bits", "unpack_bits"]

#: Values are within 18 bits, 8 of which the high part takes.
MAX_LOW_BITS: Final = 10

# What a symbol that occurs adds to a code table, about.
_TABLE_BITS = 5

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Plane:
    """How a plane is stored: ``offset + (high << low_bits | low)``, or ``offset`` alone.

    Attributes:
        offset: the least value.
        low_bits: how many low bits are stored as they are; None for a plane whose values are all ``offset``.
    """

    offset: int
    low_bits: int | None


def choose_plane(values: NDArray[Any]) -> Plane:
    """Choose how many low bits to store as they are: noise does not pay for a code table."""
    return _cheapest(values)[1]


def plane_bits(values: NDArray[Any]) -> float:
    """Estimate how many bits a plane takes: low bits, order-0 entropy of the high parts and their code table."""
    return _cheapest(values)[0]


def _cheapest(values: NDArray[Any]) -> tuple[float, Plane]:
    offset = int(values.min())
    shifted = values.ravel().astype(np.int64) - offset
    width = int(shifted.max()).bit_length()
    if width == 0:
        return 0.0, Plane(offset, None)
    choices = []
    for low_bits in range(max(0, width - 8), min(width, MAX_LOW_BITS + 1)):
        counts = np.bincount(shifted >> low_bits)
        counts = counts[counts > 0]
        entropy = float((counts * np.log2(values.size / counts)).sum())
        choices.append((values.size * low_bits + entropy + _TABLE_BITS * len(counts), low_bits))
    bits, low_bits = min(choices)
    return bits, Plane(offset, low_bits)


def pack_bits(values: Integers, width: int) -> bytes:
    """Pack the ``width`` low bits of each value, most significant first, to whole bytes."""
    bits = values[:, None] >> np.arange(width - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_bits(packed: bytes, count: int, width: int) -> Integers:
    """Undo :func:`pack_bits`; ``packed`` must have ``ceil(count * width / 8)`` bytes."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count * width).reshape(count, width)
    return np.asarray(bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64)), dtype=np.int64)
