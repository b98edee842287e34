"""The logarithmic grid of quantisation steps, ``2 ** (exponent / 16)``, that files and training share."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_BITS",
    "MAX_EXPONENT",
    "MAX_ZERO_POINT",
    "MIN_BITS",
    "MIN_EXPONENT",
    "STEPS_PER_OCTAVE",
    "Levels",
    "log_steps",
]

#: Steps per octave, and the range of their exponent: 2**-126 to just under 2**128, normal float32 numbers.
STEPS_PER_OCTAVE: Final = 16
MIN_EXPONENT: Final = -126 * STEPS_PER_OCTAVE
MAX_EXPONENT: Final = 128 * STEPS_PER_OCTAVE - 1
MAX_ZERO_POINT: Final = 32767

#: Bits of a symbol, at least and at most.
MIN_BITS: Final = 2
MAX_BITS: Final = 12

# round(2**(23 + i / 16)): the significands of the steps within one octave. Written out, since they are the format.
_SIGNIFICANDS = np.array(
    [
        8388608, 8760003, 9147842, 9552851, 9975792, 10417458, 10878679, 11360319,
        11863283, 12388516, 12937002, 13509772, 14107901, 14732511, 15384775, 16065917,
    ],
    dtype=np.float32,
)  # fmt: skip


class Levels(NamedTuple):
    """The values a quantised tensor may have: ``step * n`` for the integers n of ``low .. high``.

    Attributes:
        exponent: of the step, ``MIN_EXPONENT .. MAX_EXPONENT``.
        low: at least ``-MAX_ZERO_POINT``.
        high: above ``low`` by less than ``2**MAX_BITS``.
    """

    exponent: int
    low: int
    high: int


def log_steps(exponent: NDArray[Any]) -> NDArray[np.float32]:
    """Return the float32 steps, exact: a 24-bit significand from the table of the format times a power of two.

    Args:
        exponent: integers in ``MIN_EXPONENT .. MAX_EXPONENT``, any shape.
    """
    octave, index = np.divmod(np.asarray(exponent, dtype=np.int32), STEPS_PER_OCTAVE)
    return np.asarray(np.ldexp(_SIGNIFICANDS[index], octave - 23), dtype=np.float32)
