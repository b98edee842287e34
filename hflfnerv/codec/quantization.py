"""Uniform quantisation of weights and embeddings, and the exact arithmetic that undoes it.

Two ways to store the step and the offset, one pair for a whole tensor or one per slice of it:

* ``"log"``, which ``encode`` uses: steps ``2 ** (k / 16)`` with an integer ``k``, and integer zero points. A pair
  costs about 10 bits once coded.
* ``"minmax"``, the published HNeRV checkpoints': minimum and scale as they are, float32 for a whole tensor and float16
  per slice. A pair costs about 20 bits; importing a checkpoint keeps it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from .._log_step import (
    MAX_BITS,
    MAX_EXPONENT,
    MAX_ZERO_POINT,
    MIN_BITS,
    MIN_EXPONENT,
    STEPS_PER_OCTAVE,
    Levels,
    log_steps,
)
from .planes import plane_bits

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "LogStep",
    "MinMax",
    "QuantizedTensor",
    "Scheme",
    "Step",
    "dequantize",
    "quantize",
    "quantize_tensors",
    "quantize_to_levels",
]

Scheme = Literal["log", "minmax"]
Array = NDArray[Any]

MAX_RANK: Final = 8

_MAX_MAGNITUDE = 2.0**100
_MAX_PAIR_RATIO = 0.02
_SCHEMES = ("log", "minmax")
# Bits that a float16 (minimum, scale) pair takes in a file, measured on trained networks.
_MINMAX_PAIR_BITS = 20.0


@dataclass(frozen=True, eq=False)
class MinMax:
    """Minima and scales: ``value = minimum + scale * symbol``.

    Attributes:
        minimum: float16 or float32, broadcastable against the tensor: shape ``()`` for a whole tensor, otherwise the
            tensor's with a 1 at ``axis``.
        scale: same dtype and shape, at least 0.
        axis: the axis along which elements share a pair; None for the whole tensor.
    """

    minimum: Array
    scale: Array
    axis: int | None

    def __post_init__(self) -> None:
        if self.minimum.dtype not in (np.float16, np.float32) or self.scale.dtype != self.minimum.dtype:
            raise TypeError(
                "minimum and scale must both be float16 or both float32, "
                f"got {self.minimum.dtype} and {self.scale.dtype}"
            )
        if not np.isfinite(self.minimum).all() or not np.isfinite(self.scale).all() or (self.scale < 0).any():
            raise ValueError("minimum and scale must be finite and scale not negative, got other values")

    @property
    def arrays(self) -> tuple[Array, Array]:
        return self.minimum, self.scale

    def values(self, symbols: Array) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            scaled = self.scale.astype(np.float32) * symbols.astype(np.float32)
            return np.asarray(self.minimum.astype(np.float32) + scaled, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class LogStep:
    """Steps on a logarithmic grid: ``value = 2 ** (exponent / 16) * (symbol - zero_point)``.

    Attributes:
        exponent: int16 in ``MIN_EXPONENT .. MAX_EXPONENT``; shape as in :class:`MinMax`.
        zero_point: int16, same shape, within ±``MAX_ZERO_POINT``; it need not be a symbol.
        axis: the axis along which elements share a pair; None for the whole tensor.
    """

    exponent: Array
    zero_point: Array
    axis: int | None

    def __post_init__(self) -> None:
        if self.exponent.dtype != np.int16 or self.zero_point.dtype != np.int16:
            raise TypeError(
                f"exponent and zero_point must be int16, got {self.exponent.dtype} and {self.zero_point.dtype}"
            )
        if self.exponent.size and not MIN_EXPONENT <= self.exponent.min() <= self.exponent.max() <= MAX_EXPONENT:
            raise ValueError(f"exponent must be in {MIN_EXPONENT}..{MAX_EXPONENT}, got {self.exponent.min()}"
                             f"..{self.exponent.max()}")  # fmt: skip
        if (self.zero_point < -MAX_ZERO_POINT).any():
            raise ValueError(f"zero_point must be in ±{MAX_ZERO_POINT}, got {self.zero_point.min()}")

    @property
    def arrays(self) -> tuple[Array, Array]:
        return self.exponent, self.zero_point

    @property
    def steps(self) -> NDArray[np.float32]:
        """The float32 steps, exact: a 24-bit significand from the table of the format times a power of two."""
        return log_steps(self.exponent)

    def values(self, symbols: Array) -> NDArray[np.float32]:
        offset = symbols.astype(np.int32) - self.zero_point.astype(np.int32)
        with np.errstate(over="ignore"):
            return np.asarray(self.steps * offset.astype(np.float32), dtype=np.float32)


Step = MinMax | LogStep


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as integers and the description of their step.

    Attributes:
        symbols: ``0 .. 2**bits - 1`` in the tensor's shape; uint8 up to 8 bits, int16 above.
        bits: 2 to 12.
        step: how symbols become values.
    """

    symbols: Array
    bits: int
    step: Step

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        shape = self.symbols.shape
        if self.symbols.dtype != symbol_dtype(self.bits):
            raise TypeError(f"symbols of {self.bits} bits must be {symbol_dtype(self.bits)}, got {self.symbols.dtype}")
        if not 1 <= len(shape) <= MAX_RANK or 0 in shape:
            raise ValueError(f"symbols must have 1 to {MAX_RANK} axes and no empty one, got shape {shape}")
        if self.symbols.min() < 0 or self.symbols.max() >= 2**self.bits:
            raise ValueError(
                f"symbols must be in 0..{2**self.bits - 1}, got {self.symbols.min()}..{self.symbols.max()}"
            )
        expected = pair_shape(shape, self.step.axis)
        for array in self.step.arrays:
            if array.shape != expected:
                raise ValueError(f"step.axis={self.step.axis} needs pairs of shape {expected}, got {array.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.symbols.shape
        return shape

    @property
    def pairs(self) -> int:
        """Number of (step, offset) pairs."""
        return int(self.step.arrays[0].size)


def symbol_dtype(bits: int) -> np.dtype[Any]:
    """The dtype of symbols of that many bits: uint8, or int16 above 8."""
    return np.dtype(np.uint8 if bits <= 8 else np.int16)


def pair_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Shape of the (step, offset) pairs of a tensor: ``()``, or its own with a 1 at ``axis``."""
    if axis is None:
        return ()
    if not 0 <= axis < len(shape):
        raise ValueError(f"axis must be None or in 0..{len(shape) - 1}, got {axis}")
    return (*shape[:axis], 1, *shape[axis + 1 :])


def dequantize(quantized: QuantizedTensor) -> NDArray[np.float32]:
    """Return the values that a quantised tensor stands for.

    ``minimum + scale * symbol`` or ``step * (symbol - zero_point)``.

    Returns:
        float32 in the tensor's shape.

    Numerics:
        Every operation is one float32 operation with rounding to nearest even, in the order written, without fused
        multiply-add: the same bits on every machine. FORMAT.md has the definition.
    """
    return quantized.step.values(quantized.symbols)


def quantize(
    tensor: Array,
    bits: int,
    *,
    scheme: Scheme = "log",
    max_pair_ratio: float = _MAX_PAIR_RATIO,
) -> QuantizedTensor:
    """Quantise a tensor uniformly between its extremes.

    One pair for the whole tensor, or one per slice along an axis, whichever has the least mean absolute error. As in
    HNeRV, an axis is a candidate if the number of its pairs is less than 2 % of the number of elements.

    Args:
        tensor: finite float values, at least one, 1 to 8 axes; taken as float32.
        bits: bits of a symbol, 2 to 12.
        scheme: ``"log"`` or ``"minmax"``; see the module's description.
        max_pair_ratio: a per-axis candidate needs ``pairs / elements`` below this.

    Returns:
        The quantised tensor. With ``"log"``, each value is within half its step; no value is clipped.

    Raises:
        ValueError: the tensor is empty, or holds NaN or infinite values, or values of 2**100 and more.

    Example:
        >>> import numpy as np
        >>> from hflfnerv.codec.quantization import dequantize, quantize
        >>> q = quantize(np.linspace(-1, 1, 100, dtype=np.float32), bits=8)
        >>> bool(np.abs(dequantize(q) - np.linspace(-1, 1, 100)).max() <= q.step.steps / 2)
        True
    """
    return _candidates(tensor, bits, scheme, max_pair_ratio)[0].quantized


def quantize_tensors(
    tensors: Mapping[str, Array],
    bits: int,
    *,
    scheme: Scheme = "log",
    max_pair_ratio: float = _MAX_PAIR_RATIO,
    side_limit: float = 0.0115,
) -> dict[str, QuantizedTensor]:
    """Quantise the tensors of a network, keeping the side information of all within a fraction of their size.

    Each tensor by itself as in :func:`quantize`. Where that would give more (step, offset) pairs than ``side_limit``
    allows, tensors go to a candidate with fewer pairs, beginning where that loses least precision per bit saved.

    Args:
        tensors: what :func:`quantize` takes, by name.
        bits: bits of a symbol.
        scheme: ``"log"`` or ``"minmax"``.
        max_pair_ratio: as in :func:`quantize`.
        side_limit: the largest estimated share of the pairs in the coded size. ``math.inf`` for no limit.

    Returns:
        The quantised tensors, in the same order.
    """
    candidates = {name: _candidates(tensor, bits, scheme, max_pair_ratio) for name, tensor in tensors.items()}
    chosen = {name: options[0] for name, options in candidates.items()}
    symbol_bits = sum(option.elements for option in chosen.values()) * (bits - 0.5)

    def side_bits() -> float:
        return sum(option.side_bits for option in chosen.values())

    while side_bits() > side_limit * (symbol_bits + side_bits()):
        swaps = [
            (option.lost_bits(chosen[name]) / (chosen[name].side_bits - option.side_bits), name, option)
            for name, options in candidates.items()
            for option in options
            if option.side_bits < chosen[name].side_bits
        ]
        if not swaps:
            break
        _, name, option = min(swaps, key=lambda swap: swap[:2])
        chosen[name] = option
    return {name: option.quantized for name, option in chosen.items()}


def quantize_to_levels(tensor: Array, levels: Levels) -> QuantizedTensor:
    """Quantise a tensor to given levels, in as many bits as its values then need.

    ``symbol - zero_point = clip(round(value / step), low, high)``, half to even: what training with quantised weights
    computes (:func:`hflfnerv.train.fake_quantize`).

    Args:
        tensor: what :func:`quantize` takes.
        levels: the step and the range.

    Returns:
        The quantised tensor, one pair for all of it. Each value within the range is within half a step.

    Raises:
        ValueError: as :func:`quantize`; or the levels are not such that the format has.

    Numerics:
        The quotient is one float32 division.
    """
    if not MIN_EXPONENT <= levels.exponent <= MAX_EXPONENT:
        raise ValueError(f"levels.exponent must be in {MIN_EXPONENT}..{MAX_EXPONENT}, got {levels.exponent}")
    if not -MAX_ZERO_POINT <= levels.low <= levels.high <= MAX_ZERO_POINT or levels.high - levels.low >= 2**MAX_BITS:
        raise ValueError(
            f"levels must be at most {2**MAX_BITS} within ±{MAX_ZERO_POINT}, got {levels.low}..{levels.high}"
        )
    exponent = np.array(levels.exponent, dtype=np.int16)
    with np.errstate(over="ignore"):
        steps = np.clip(np.rint(_checked(tensor) / log_steps(exponent)), levels.low, levels.high).astype(np.int32)
    low, high = int(steps.min()), int(steps.max())
    bits = max(MIN_BITS, (high - low).bit_length())
    return QuantizedTensor(
        (steps - low).astype(symbol_dtype(bits)), bits, LogStep(exponent, np.array(-low, dtype=np.int16), None)
    )


@dataclass(frozen=True)
class _Candidate:
    quantized: QuantizedTensor
    error: float

    @property
    def elements(self) -> int:
        return int(self.quantized.symbols.size)

    @cached_property
    def side_bits(self) -> float:
        """Estimated size of the pairs in a file."""
        step = self.quantized.step
        if isinstance(step, MinMax):
            return _MINMAX_PAIR_BITS * self.quantized.pairs
        return sum(plane_bits(array) for array in step.arrays)

    def lost_bits(self, other: _Candidate) -> float:
        """Precision lost against another candidate, in bits over all elements."""
        if other.error == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.elements * math.log2(self.error / other.error) if self.error else -math.inf


def _candidates(tensor: Array, bits: int, scheme: Scheme, max_pair_ratio: float) -> list[_Candidate]:
    """All ways to quantise a tensor, the one of least mean absolute error first; the whole tensor wins a tie."""
    _check_bits(bits)
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {_SCHEMES}, got {scheme!r}")
    values = _checked(tensor)
    step = _log_step if scheme == "log" else _minmax_step
    options = []
    for axis in (None, *range(values.ndim)):
        pairs = math.prod(pair_shape(values.shape, axis))
        if axis is not None and pairs >= max_pair_ratio * values.size:
            continue
        quantized = step(values, bits, axis)
        if quantized is not None:
            error = float(np.abs(dequantize(quantized) - values).mean(dtype=np.float64))
            options.append(_Candidate(quantized, error))
    return sorted(options, key=lambda option: option.error)


def _checked(tensor: Array) -> NDArray[np.float32]:
    """Return a tensor's values as float32, or raise a ValueError that says why they cannot be quantised."""
    values = np.ascontiguousarray(tensor, dtype=np.float32)
    if not 1 <= np.ndim(tensor) <= MAX_RANK or values.size == 0:
        raise ValueError(f"tensor must have 1 to {MAX_RANK} axes and no empty one, got shape {np.shape(tensor)}")
    if not np.isfinite(values).all():
        raise ValueError("tensor must be finite, got NaN or infinite values: training has diverged")
    if np.abs(values).max() >= _MAX_MAGNITUDE:
        raise ValueError(f"tensor must be below 2**100 in magnitude, got {np.abs(values).max()}")
    return values


def _log_step(values: NDArray[np.float32], bits: int, axis: int | None) -> QuantizedTensor:
    low = np.asarray(values.min(axis, keepdims=axis is not None), dtype=np.float64)
    high = np.asarray(values.max(axis, keepdims=axis is not None), dtype=np.float64)
    levels = 2**bits - 1
    # The least step that could do: the range may reach half a step beyond the outer levels, and the offset must fit.
    least = np.maximum((high - low) / (levels + 1), np.maximum(np.abs(low), np.abs(high)) / MAX_ZERO_POINT)
    nonzero = least > 0
    exponent = np.full(low.shape, MIN_EXPONENT, dtype=np.int16)
    exponent[nonzero] = np.clip(np.ceil(np.log2(least[nonzero]) * STEPS_PER_OCTAVE), MIN_EXPONENT, MAX_EXPONENT)
    # A slice of zeros is exact with any step: take one that its neighbours have, which codes best.
    exponent[~nonzero] = exponent[nonzero].min() if nonzero.any() else 0
    while True:
        step = LogStep(exponent, np.zeros_like(exponent), axis).steps.astype(np.float64)
        first = np.rint(low / step)
        too_fine = (np.rint(high / step) - first > levels) | (np.abs(first) > MAX_ZERO_POINT)
        if not too_fine.any():
            break
        exponent = np.where(too_fine, exponent + 1, exponent).astype(np.int16)
    symbols = (np.rint(values / step) - first).astype(symbol_dtype(bits))
    return QuantizedTensor(symbols, bits, LogStep(exponent, np.asarray(-first, dtype=np.int16), axis))


def _minmax_step(values: NDArray[np.float32], bits: int, axis: int | None) -> QuantizedTensor | None:
    """HNeRV's own arithmetic, or None where its float16 pairs overflow."""
    minimum = np.asarray(values.min(axis, keepdims=axis is not None), dtype=np.float32)
    levels = np.float32(2**bits - 1)
    scale = np.asarray((values.max(axis, keepdims=axis is not None) - minimum) / levels, dtype=np.float32)
    if axis is not None:
        with np.errstate(over="ignore"):
            minimum, scale = minimum.astype(np.float16), scale.astype(np.float16)
        if not np.isfinite(minimum).all() or not np.isfinite(scale).all():
            return None
    divisor = np.where(scale > 0, scale, np.ones_like(scale)).astype(np.float32)
    symbols = np.rint((values - minimum.astype(np.float32)) / divisor)
    symbols = np.where(scale > 0, np.clip(symbols, 0, levels), np.float32(0))
    return QuantizedTensor(symbols.astype(symbol_dtype(bits)), bits, MinMax(minimum, scale, axis))


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits must be an integer, got {bits!r}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in {MIN_BITS}..{MAX_BITS}, got {bits}")
