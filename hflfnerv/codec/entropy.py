"""Entropy coders for symbols, behind one interface.

``huffman`` is the paper's and needs nothing else. ``range`` is a range coder with adaptive models, about one per cent
smaller, through the optional package ``constriction``. FORMAT.md specifies what both write.
"""

from __future__ import annotations

import itertools
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from .. import huffman
from ..errors import BackendUnavailable, BitstreamError, InvalidBitstream, InvalidCode
from ._bytes import Reader, varint

__all__ = ["ENTROPY_CODERS", "EntropyCoder", "HuffmanCoder", "RangeCoder", "entropy_coder", "entropy_coder_by_code"]

Array = NDArray[Any]

_MAX_ALPHABET: Final = 1 << 12


class EntropyCoder(ABC):
    """Codes lists of arrays, and tables of rows of which any can be read alone.

    Symbols are uint8, or int16 in 0..4095.

    Decoders take data whose integrity is known: a container compares a section's checksum before it gives it out, so
    they compute none. Of other data, damage may give wrong symbols; whatever it is, it gives symbols of the sizes asked
    for or an error.

    Attributes:
        name: what ``--entropy`` calls it.
        code: its number in files.
    """

    name: ClassVar[str]
    code: ClassVar[int]

    @abstractmethod
    def encode_arrays(self, arrays: Sequence[Array]) -> bytes:
        """Code one-dimensional arrays, each with a model of its own or one that several share."""

    @abstractmethod
    def decode_arrays(self, data: bytes, sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]]) -> list[Array]:
        """Decode what :meth:`encode_arrays` wrote, given the length and the dtype of each array.

        Raises:
            BitstreamError: the data is not such arrays.
        """

    @abstractmethod
    def encode_rows(self, rows: Array) -> bytes:
        """Code a table ``[T, n]`` so that rows can be decoded alone."""

    @abstractmethod
    def decode_rows(self, data: bytes, shape: tuple[int, int], dtype: np.dtype[Any], wanted: Array) -> Array:
        """Decode rows of a table of the given shape, and little else.

        Args:
            data: what :meth:`encode_rows` wrote.
            shape: ``(T, n)`` of the whole table.
            dtype: dtype of the symbols.
            wanted: indices of rows, ascending, each once, at least one.

        Returns:
            ``[len(wanted), n]``.

        Raises:
            BitstreamError: the data is not such a table.
        """


class HuffmanCoder(EntropyCoder):
    """Canonical Huffman codes, one table per tensor or shared, by cost: :mod:`hflfnerv.huffman`."""

    name = "huffman"
    code = 0

    def encode_arrays(self, arrays: Sequence[Array]) -> bytes:
        return huffman.encode_many(arrays)

    def decode_arrays(self, data: bytes, sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]]) -> list[Array]:
        arrays = huffman.decode_many(data, max_symbols=sum(sizes), verify=False)
        expected = [((size,), dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
        if [(array.shape, array.dtype) for array in arrays] != expected:
            raise InvalidBitstream("the coded arrays are not those that the section describes")
        return arrays

    def encode_rows(self, rows: Array) -> bytes:
        return huffman.encode(rows, chunk_symbols=rows.shape[1])

    def decode_rows(self, data: bytes, shape: tuple[int, int], dtype: np.dtype[Any], wanted: Array) -> Array:
        out = np.empty((len(wanted), shape[1]), dtype=dtype)
        position = 0
        for start, stop in _runs(wanted):
            try:
                rows = huffman.decode_rows(data, start, stop, max_symbols=shape[0] * shape[1], verify=False)
            except BitstreamError:
                raise
            except ValueError as error:  # the table is shorter than described, or none
                raise InvalidBitstream(f"the coded rows are not those that the section describes: {error}") from None
            if rows.shape != (stop - start, shape[1]) or rows.dtype != dtype:
                raise InvalidBitstream("the coded rows are not those that the section describes")
            out[position : position + len(rows)] = rows
            position += len(rows)
        return out


class RangeCoder(EntropyCoder):
    """Range coding (Martin 1979) with integer models, through ``constriction``.

    Arrays are coded with adaptive models: the counts of the symbols seen so far in the array, updated after blocks that
    grow from 64 to 4096 symbols, so no histogram is stored. Rows are coded in small groups with one stored model.

    Numerics:
        Models are integer frequencies with a fixed total, and every float that the library gets is an exact dyadic
        fraction: the same bytes on every machine.

    Raises:
        BackendUnavailable: on construction, where ``constriction`` is not installed.
    """

    name = "range"
    code = 1

    _TOTAL_BITS = 16
    _FIRST_BLOCK = 64
    _LAST_BLOCK = 4096
    _GROUP_SYMBOLS = 2048

    def __init__(self) -> None:
        self._library = _constriction()

    def encode_arrays(self, arrays: Sequence[Array]) -> bytes:
        alphabets = [int(array.max()) + 1 for array in arrays]
        encoder = self._library.stream.queue.RangeEncoder()
        for array, alphabet in zip(arrays, alphabets, strict=True):
            counts = np.zeros(alphabet, dtype=np.int64)
            for start, stop in self._blocks(array.size, alphabet):
                block = array[start:stop].astype(np.int32)
                encoder.encode(block, self._model(_frequencies(counts, self._TOTAL_BITS)))
                counts += np.bincount(block, minlength=alphabet)
        return b"".join(varint(alphabet) for alphabet in alphabets) + _to_bytes(encoder.get_compressed())

    def decode_arrays(self, data: bytes, sizes: Sequence[int], dtypes: Sequence[np.dtype[Any]]) -> list[Array]:
        reader = Reader(data, "range-coded arrays")
        alphabets = [_alphabet(reader, dtype) for dtype in dtypes]
        decoder = self._decoder(reader.rest())
        arrays = []
        for size, dtype, alphabet in zip(sizes, dtypes, alphabets, strict=True):
            array = np.zeros(size, dtype=dtype)
            counts = np.zeros(alphabet, dtype=np.int64)
            for start, stop in self._blocks(size, alphabet):
                model = self._model(_frequencies(counts, self._TOTAL_BITS))
                block = self._decode(decoder, model, stop - start)
                array[start:stop] = block
                counts += np.bincount(block, minlength=alphabet)
            arrays.append(array)
        self._finish(decoder)
        return arrays

    def encode_rows(self, rows: Array) -> bytes:
        alphabet = int(rows.max()) + 1
        per_group = math.ceil(self._GROUP_SYMBOLS / rows.shape[1])
        frequencies = _frequencies(np.bincount(rows.ravel(), minlength=alphabet), _table_bits(alphabet))
        model = self._model(frequencies)
        groups = []
        for start in range(0, len(rows), per_group):
            encoder = self._library.stream.queue.RangeEncoder()
            if alphabet > 1:
                encoder.encode(rows[start : start + per_group].ravel().astype(np.int32), model)
            groups.append(_to_bytes(encoder.get_compressed()))
        return b"".join(
            [
                varint(alphabet),
                varint(per_group),
                *(varint(int(frequency)) for frequency in frequencies),
                *(varint(len(group) // 4) for group in groups),
                *groups,
            ]
        )

    def decode_rows(self, data: bytes, shape: tuple[int, int], dtype: np.dtype[Any], wanted: Array) -> Array:
        reader = Reader(data, "range-coded rows")
        alphabet = _alphabet(reader, dtype)
        per_group = reader.varint()
        if not 1 <= per_group <= self._GROUP_SYMBOLS:
            raise InvalidCode(f"range-coded rows: a group must have 1 to {self._GROUP_SYMBOLS} rows, got {per_group}")
        table = [reader.varint() for _ in range(alphabet)]
        if min(table) < 1 or sum(table) != 1 << _table_bits(alphabet):
            raise InvalidCode("range-coded rows: the frequencies must be positive and have the fixed total")
        lengths = [4 * reader.varint() for _ in range(math.ceil(shape[0] / per_group))]
        offsets = list(itertools.accumulate(lengths, initial=0))
        words = reader.rest()
        if offsets[-1] != len(words):
            raise InvalidBitstream(f"range-coded rows: groups need {offsets[-1]} bytes, there are {len(words)}")
        model = self._model(np.array(table, dtype=np.int64))
        out = np.zeros((len(wanted), shape[1]), dtype=dtype)
        groups = wanted // per_group
        for group in np.unique(groups):
            first = int(group) * per_group
            count = min(per_group, shape[0] - first)
            decoder = self._decoder(words[offsets[group] : offsets[group + 1]])
            if alphabet > 1:
                rows = self._decode(decoder, model, count * shape[1]).reshape(count, shape[1])
                out[groups == group] = rows[wanted[groups == group] - first]
            self._finish(decoder)
        return out

    def _blocks(self, size: int, alphabet: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of symbols between model updates; none for an array of zeros, which is not coded."""
        start, length = 0, self._FIRST_BLOCK
        while start < size and alphabet > 1:
            yield start, min(start + length, size)
            start += length
            length = min(2 * length, self._LAST_BLOCK)

    def _model(self, frequencies: NDArray[np.int64]) -> Any:
        if len(frequencies) == 1:
            return None
        # A total of a power of two: the quotients are exact, and so is what the library makes of them.
        return self._library.stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)

    def _decoder(self, data: bytes) -> Any:
        if len(data) % 4:
            raise InvalidBitstream(f"range-coded data must be whole 32-bit words, got {len(data)} bytes")
        return self._library.stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))

    @staticmethod
    def _decode(decoder: Any, model: Any, count: int) -> NDArray[np.int32]:
        try:
            return np.asarray(decoder.decode(model, count))
        except AssertionError as error:
            raise InvalidCode(f"range-coded data is invalid: {error}") from None

    @staticmethod
    def _finish(decoder: Any) -> None:
        if not decoder.maybe_exhausted():
            raise InvalidCode("range-coded data is invalid: words are left over")


def _constriction() -> types.ModuleType:
    try:
        import constriction
    except ImportError:
        raise BackendUnavailable(
            "the range coder needs the package constriction: pip install 'hflfnerv[range]', "
            "or code with --entropy huffman"
        ) from None
    library: types.ModuleType = constriction
    return library


def _frequencies(counts: NDArray[np.int64], total_bits: int) -> NDArray[np.int64]:
    """Integer frequencies for counts: each at least 1, total ``2**total_bits``, the remainder to the first mode."""
    total, alphabet = 1 << total_bits, len(counts)
    frequencies = 1 + (counts + 1) * (total - alphabet) // (int(counts.sum()) + alphabet)
    frequencies[np.argmax(frequencies)] += total - int(frequencies.sum())
    return frequencies


def _table_bits(alphabet: int) -> int:
    """Bits of the total of a stored table: 6 more than a symbol has, which costs under 0.01 bit a symbol."""
    return min(16, (alphabet - 1).bit_length() + 6)


def _alphabet(reader: Reader, dtype: np.dtype[Any]) -> int:
    alphabet = reader.varint()
    most = 256 if dtype == np.uint8 else _MAX_ALPHABET
    if not 1 <= alphabet <= most:
        raise InvalidCode(f"range-coded data: an alphabet must have 1 to {most} symbols, got {alphabet}")
    return alphabet


def _to_bytes(words: NDArray[np.uint32]) -> bytes:
    return words.astype("<u4").tobytes()


def _runs(indices: Array) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of consecutive numbers in an ascending array."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    for run in np.split(indices, breaks):
        yield int(run[0]), int(run[-1]) + 1


#: The coders by name.
ENTROPY_CODERS: Final[dict[str, type[EntropyCoder]]] = {coder.name: coder for coder in (HuffmanCoder, RangeCoder)}


def entropy_coder(name: str) -> EntropyCoder:
    """Return the coder of that name.

    Raises:
        ValueError: there is none.
        BackendUnavailable: it needs a package that is not installed.
    """
    if name not in ENTROPY_CODERS:
        raise ValueError(f"entropy must be one of {tuple(ENTROPY_CODERS)}, got {name!r}")
    return ENTROPY_CODERS[name]()


def entropy_coder_by_code(code: int) -> EntropyCoder:
    """Return the coder that has that number in files.

    Raises:
        InvalidBitstream: there is none.
        BackendUnavailable: it needs a package that is not installed.
    """
    for coder in ENTROPY_CODERS.values():
        if coder.code == code:
            return coder()
    raise InvalidBitstream(f"entropy coder must be one of 0 and 1, got {code}")
