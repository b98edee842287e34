"""Quantised tensors as the content of a section: a description of each, the side information, the symbols.

WGTS holds all weights, EMBD the embeddings as one tensor whose first axis is the frame. FORMAT.md has the layout.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidBitstream
from ._bytes import Reader, deflate, inflate, varint, zigzag
from .entropy import EntropyCoder, entropy_coder_by_code
from .planes import MAX_LOW_BITS, Plane, choose_plane, pack_bits, unpack_bits
from .quantization import MAX_BITS, MAX_RANK, MIN_BITS, LogStep, MinMax, QuantizedTensor, Step, pair_shape, symbol_dtype

__all__ = ["TensorRecord", "TensorSection", "encode_tensors"]

MAX_ELEMENTS: Final = 1 << 27
MAX_PAIRS: Final = 1 << 22  # of a step and an offset, for which a file may spend no byte
MAX_TENSORS: Final = 4096
MAX_DESCRIPTION_BYTES: Final = 1 << 20
_MAX_NAME_BYTES = 255

_MINMAX_FLOAT32, _MINMAX_FLOAT16, _LOG = range(3)
_NO_AXIS = 255
# Rows are told from the row before; one row in so many is not, and begins what has to be read for those behind it.
_KEY_INTERVAL = 32
_PREFIX = "BBIIII"
# A plane's values are within 18 bits: sums of two 16-bit numbers.
_PLANE_LIMIT = 1 << 17

Array = NDArray[Any]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class TensorRecord:
    """What a section says of a tensor before its symbols."""

    name: str
    bits: int
    scheme: int
    axis: int | None
    shape: tuple[int, ...]
    planes: tuple[Plane, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def pair_shape(self) -> tuple[int, ...]:
        return pair_shape(self.shape, self.axis)

    @property
    def pairs(self) -> int:
        return math.prod(self.pair_shape)


def encode_tensors(tensors: Mapping[str, QuantizedTensor], coder: EntropyCoder, *, rows: bool = False) -> bytes:
    """Return a section's content.

    Args:
        tensors: by name, in the order to keep.
        coder: codes side information and symbols.
        rows: code the symbols of the one tensor so that slices of its first axis can be read alone.

    Raises:
        ValueError: there are too many tensors or elements, or names are too long or not printable.
    """
    if not 1 <= len(tensors) <= (1 if rows else MAX_TENSORS):
        raise ValueError(f"tensors must be 1 to {1 if rows else MAX_TENSORS}, got {len(tensors)}")
    elements = sum(tensor.symbols.size for tensor in tensors.values())
    if elements > MAX_ELEMENTS:
        raise ValueError(f"tensors must have at most {MAX_ELEMENTS} elements, got {elements}")
    pairs = sum(tensor.step.arrays[0].size for tensor in tensors.values())
    if pairs > MAX_PAIRS:
        raise ValueError(f"tensors must have at most {MAX_PAIRS} steps, got {pairs}")

    description = bytearray(varint(len(tensors)))
    raw = bytearray()
    high_parts: list[Array] = []
    for name, tensor in tensors.items():
        encoded_name = name.encode("utf-8")
        if len(encoded_name) > _MAX_NAME_BYTES or not name.isprintable():
            raise ValueError(f"a tensor's name must be printable, of at most {_MAX_NAME_BYTES} bytes, got {name!r:.60}")
        step, axis = tensor.step, tensor.step.axis
        description += varint(len(encoded_name)) + encoded_name
        description += bytes([tensor.bits, _scheme(step), _NO_AXIS if axis is None else axis, len(tensor.shape)])
        for size in tensor.shape:
            description += varint(size)
        if _scheme(step) == _MINMAX_FLOAT32:
            for array in step.arrays:
                raw += array.astype("<f4").tobytes()
            continue
        for values in _to_planes(step):
            plane = choose_plane(values)
            description += zigzag(plane.offset) + bytes([0 if plane.low_bits is None else 1 + plane.low_bits])
            if plane.low_bits is not None:
                shifted = values - plane.offset
                raw += pack_bits(shifted, plane.low_bits)
                high_parts.append((shifted >> plane.low_bits).astype(np.uint8))

    if len(description) > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"tensor names and shapes must fit {MAX_DESCRIPTION_BYTES} bytes, got {len(description)}")

    planes = coder.encode_arrays(high_parts) if high_parts else b""
    key_interval = 0
    if rows:
        (tensor,) = tensors.values()
        table = tensor.symbols.reshape(tensor.shape[0], -1)
        symbols = coder.encode_rows(table)
        differences = coder.encode_rows(_differences(table, tensor.bits, _KEY_INTERVAL))
        if len(differences) < len(symbols):
            symbols, key_interval = differences, _KEY_INTERVAL
    else:
        symbols = coder.encode_arrays([tensor.symbols.ravel() for tensor in tensors.values()])
    deflated = deflate(bytes(description))
    prefix = struct.pack(
        "<" + _PREFIX, coder.code, key_interval, len(description), len(deflated), len(raw), len(planes)
    )
    return prefix + deflated + bytes(raw) + planes + symbols


class TensorSection:
    """A section of quantised tensors opened for reading: descriptions at once, the rest when it is asked for.

    Attributes:
        records: the tensors, in file order.
        side_bytes: bytes of the side information (steps and offsets).
        symbol_bytes: bytes of the symbols.
        key_interval: of rows that are coded as differences, every so many are not; 0 if none are.
    """

    def __init__(self, data: bytes, what: str, *, rows: bool = False) -> None:
        """Read the descriptions.

        Args:
            data: the section's content, its checksum already compared; see :class:`~.entropy.EntropyCoder`.
            what: its name in messages.
            rows: whether it was written with ``rows``.

        Raises:
            BitstreamError: they are invalid.
        """
        self._what = what
        reader = Reader(data, what)
        code, key_interval, description_size, deflated_size, raw_size, planes_size = reader.unpack(_PREFIX)
        if key_interval and not rows:
            raise InvalidBitstream(f"{what}: the interval of key rows must be 0, got {key_interval}")
        if description_size > MAX_DESCRIPTION_BYTES:
            raise InvalidBitstream(f"{what}: declares {description_size} bytes, the limit is {MAX_DESCRIPTION_BYTES}")
        description = inflate(reader.take(deflated_size), description_size, what)
        self._raw = reader.take(raw_size)
        self._planes = reader.take(planes_size)
        self._symbols = reader.rest()
        self._code = code
        self.key_interval = key_interval
        self.side_bytes = raw_size + planes_size
        self.symbol_bytes = len(self._symbols)
        self.records = self._read_records(description)

    @cached_property
    def coder(self) -> EntropyCoder:
        """The coder that wrote the section.

        Raises:
            InvalidBitstream: its number is unknown.
            BackendUnavailable: it needs a package that is not installed.
        """
        return entropy_coder_by_code(self._code)

    def _read_records(self, description: bytes) -> tuple[TensorRecord, ...]:
        what = f"{self._what}: tensor descriptions"
        reader = Reader(description, what)
        count = reader.varint()
        if not 1 <= count <= MAX_TENSORS:
            raise InvalidBitstream(f"{what}: must be 1 to {MAX_TENSORS}, got {count}")
        records = tuple(_read_record(reader, what) for _ in range(count))
        reader.finish()
        if len({record.name for record in records}) != count:
            raise InvalidBitstream(f"{what}: two tensors have the same name")
        elements = sum(record.elements for record in records)
        if elements > MAX_ELEMENTS:
            raise InvalidBitstream(f"{what}: declare {elements} elements, the limit is {MAX_ELEMENTS}")
        pairs = sum(record.pairs for record in records)
        if pairs > MAX_PAIRS:
            raise InvalidBitstream(f"{what}: declare {pairs} steps, the limit is {MAX_PAIRS}")
        return records

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Steps and offsets of every tensor.

        Raises:
            BitstreamError: they are invalid.
        """
        counts = [record.pairs for record in self.records for plane in record.planes if plane.low_bits is not None]
        dtypes = [np.dtype(np.uint8)] * len(counts)
        high_parts = iter(self.coder.decode_arrays(self._planes, counts, dtypes) if counts else [])
        if not counts and self._planes:
            raise InvalidBitstream(f"{self._what}: has side information that belongs to no tensor")
        raw = Reader(self._raw, f"{self._what}: side information")
        steps = []
        for record in self.records:
            arrays: list[Array]
            if record.scheme == _MINMAX_FLOAT32:
                arrays = [np.frombuffer(raw.take(4 * record.pairs), dtype="<f4").astype(np.float32) for _ in range(2)]
            else:
                arrays = []
                for plane in record.planes:
                    values = np.full(record.pairs, plane.offset, dtype=np.int64)
                    if plane.low_bits is not None:
                        values += next(high_parts).astype(np.int64) << plane.low_bits
                        values += unpack_bits(
                            raw.take((record.pairs * plane.low_bits + 7) // 8), record.pairs, plane.low_bits
                        )
                    arrays.append(values)
            try:
                steps.append(_to_step(record, arrays))
            except ValueError as error:
                raise InvalidBitstream(f"{self._what}: {record.name}: {error}") from None
        raw.finish()
        return tuple(steps)

    def read_symbols(self) -> list[Array]:
        """Decode the symbols of every tensor, one-dimensional, in file order.

        Raises:
            BitstreamError: they are invalid.
        """
        return self.coder.decode_arrays(
            self._symbols,
            [record.elements for record in self.records],
            [symbol_dtype(record.bits) for record in self.records],
        )

    def read(self) -> dict[str, QuantizedTensor]:
        """Decode every tensor.

        Raises:
            BitstreamError: they are invalid.
        """
        return {
            record.name: self._tensor(record, array.reshape(record.shape), step)
            for record, array, step in zip(self.records, self.read_symbols(), self.steps, strict=True)
        }

    def read_rows(self, indices: Sequence[int] | Array) -> QuantizedTensor:
        """Decode slices of the first axis of the one tensor of the section, in the order asked for.

        Args:
            indices: at least one, each in ``0 .. T - 1``.

        Raises:
            BitstreamError: they are invalid.
        """
        (record,), (step,) = self.records, self.steps
        wanted, order = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        rows, columns = record.shape[0], math.prod(record.shape[1:])
        needed = _rows_needed(wanted, self.key_interval)
        symbols = self.coder.decode_rows(self._symbols, (rows, columns), symbol_dtype(record.bits), needed)
        if self.key_interval:
            if symbols.min() < 0 or symbols.max() >> record.bits:
                raise InvalidBitstream(f"{self._what}: {record.name}: a difference does not fit {record.bits} bits")
            symbols = _from_differences(symbols, needed, record.bits, self.key_interval)
            symbols = symbols[np.searchsorted(needed, wanted)]
        symbols = symbols[order].reshape(-1, *record.shape[1:])
        if record.axis:
            first, second = (array[indices] for array in step.arrays)
            step = type(step)(first, second, record.axis)
        return self._tensor(record, symbols, step)

    def _tensor(self, record: TensorRecord, symbols: Array, step: Step) -> QuantizedTensor:
        try:
            return QuantizedTensor(symbols, record.bits, step)
        except ValueError as error:
            raise InvalidBitstream(f"{self._what}: {record.name}: {error}") from None


def _read_record(reader: Reader, what: str) -> TensorRecord:
    size = reader.varint()
    try:
        name = reader.take(size).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidBitstream(f"{what}: a name is not UTF-8") from None
    # Messages repeat it, on terminals too.
    if size > _MAX_NAME_BYTES or not name.isprintable():
        raise InvalidBitstream(
            f"{what}: a name must be printable, of at most {_MAX_NAME_BYTES} bytes, got {name!r:.60}"
        )
    bits, scheme, axis, rank = reader.unpack("BBBB")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InvalidBitstream(f"{what}: {name}: bits must be in {MIN_BITS}..{MAX_BITS}, got {bits}")
    if scheme not in (_MINMAX_FLOAT32, _MINMAX_FLOAT16, _LOG):
        raise InvalidBitstream(f"{what}: {name}: scheme must be 0, 1 or 2, got {scheme}")
    if not 1 <= rank <= MAX_RANK or not (axis == _NO_AXIS or axis < rank):
        raise InvalidBitstream(f"{what}: {name}: has {rank} axes and pairs along axis {axis}")
    shape = tuple(reader.varint() for _ in range(rank))
    if not 1 <= math.prod(shape) <= MAX_ELEMENTS:
        raise InvalidBitstream(f"{what}: {name}: shape {shape} is empty or over {MAX_ELEMENTS} elements")
    planes = []
    for _ in range(0 if scheme == _MINMAX_FLOAT32 else 2):
        offset, (mode,) = reader.zigzag(), reader.unpack("B")
        if abs(offset) > _PLANE_LIMIT or mode > 1 + MAX_LOW_BITS:
            raise InvalidBitstream(f"{what}: {name}: side information has offset {offset} and mode {mode}")
        planes.append(Plane(offset, None if mode == 0 else mode - 1))
    return TensorRecord(name, bits, scheme, None if axis == _NO_AXIS else axis, shape, tuple(planes))


def _differences(rows: Array, bits: int, key_interval: int) -> Array:
    """Return rows ``[T, n]`` of symbols as differences from the row before, of the same range and dtype.

    Differences are taken modulo ``2**bits`` and counted 0, -1, 1, -2, ..., so that small ones are small symbols. Before
    a key row stands the middle of the range.
    """
    half = 1 << (bits - 1)
    before = np.roll(rows, 1, axis=0).astype(np.int64)
    before[::key_interval] = half
    difference = (rows - before + half) % (2 * half) - half
    return np.where(difference < 0, -2 * difference - 1, 2 * difference).astype(rows.dtype)


def _rows_needed(wanted: Array, key_interval: int) -> Array:
    """Return the rows that wanted ones are made of, ascending: each from its key row on."""
    if not key_interval:
        return wanted
    reach = np.arange(key_interval)
    rows = wanted[:, None] - reach
    return np.unique(rows[reach <= wanted[:, None] % key_interval])


def _from_differences(differences: Array, rows: Array, bits: int, key_interval: int) -> Array:
    """Return the symbols of rows, of which each is there from its key row on; the inverse of :func:`_differences`."""
    coded = differences.astype(np.uint16)
    words: Array = (coded >> 1) ^ -(coded & 1)  # modulo 2**16, and so modulo 2**bits
    is_key = rows % key_interval == 0
    words[is_key] += np.uint16(1 << (bits - 1))
    totals = np.cumsum(words, axis=0, dtype=np.uint16)
    key = np.maximum.accumulate(np.where(is_key, np.arange(len(rows)), 0))
    symbols: Array = totals - (totals - words)[key]
    return (symbols & np.uint16((1 << bits) - 1)).astype(differences.dtype)


def _scheme(step: Step) -> int:
    if isinstance(step, LogStep):
        return _LOG
    return _MINMAX_FLOAT16 if step.minimum.dtype == np.float16 else _MINMAX_FLOAT32


def _to_planes(step: Step) -> tuple[Integers, Integers]:
    """The integers that are stored for a step: exponents and zero points, or float16 numbers as ordered integers.

    A minimum is about minus half its range, so the sum of its integer and the scale's, which is near logarithmic in
    both, varies less than the minimum's own.
    """
    first, second = (array.ravel() for array in step.arrays)
    if isinstance(step, LogStep):
        return first.astype(np.int64), second.astype(np.int64)
    minimum, scale = _float16_to_ordered(first), _float16_to_ordered(second)
    return scale, minimum + scale


def _to_step(record: TensorRecord, arrays: Sequence[Array]) -> Step:
    first, second = (array.reshape(record.pair_shape) for array in arrays)
    if record.scheme == _LOG:
        for array in (first, second):
            if array.min() < -(2**15) or array.max() >= 2**15:
                raise ValueError("a step or zero point does not fit 16 bits")
        return LogStep(first.astype(np.int16), second.astype(np.int16), record.axis)
    if record.scheme == _MINMAX_FLOAT16:
        first, second = _ordered_to_float16(second - first), _ordered_to_float16(first)
    return MinMax(first, second, record.axis)


def _float16_to_ordered(values: Array) -> Integers:
    """Map float16 to integers in the same order: the bit pattern of a positive number, its complement for others."""
    pattern = values.astype("<f2").view("<u2").astype(np.int64)
    return np.where(pattern < 0x8000, pattern, 0x7FFF - pattern)


def _ordered_to_float16(values: Integers) -> Array:
    if values.min() < -0x8000 or values.max() > 0x7FFF:
        raise ValueError("a minimum or scale is not a float16 number")
    pattern = np.where(values >= 0, values, 0x7FFF - values)
    return pattern.astype("<u2").view("<f2").astype(np.float16)
