"""Huffman coding of quantised arrays: a fast, self-describing and checked replacement for dahuffman in NeRV code.

    >>> import numpy as np
    >>> from hflfnerv import huffman
    >>> weights = np.array([[3, 3, 2, 3], [3, 4, 3, 3]], np.uint8)
    >>> data = huffman.encode(weights)
    >>> bool((huffman.decode(data) == weights).all())
    True

The bytes are described in ``hflfnerv/codec/HUFFMAN.md``; every implementation writes the same ones.
"""

from __future__ import annotations

import functools
import heapq
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from . import _ext
from ._impl import Implementation, ImplementationTable

__all__ = ["code_lengths", "decode", "decode_many", "decode_rows", "encode", "encode_many", "payload_bits"]

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview | Array

DEFAULT_CHUNK_SYMBOLS = 1920
DEFAULT_MAX_SYMBOLS = 2**28
_MAX_CHUNK_SYMBOLS = 2**28
_MAX_DIMS = 32
_MAX_ELEMENTS = 2**40
_MAX_CODE_BITS = 20
_MAX_MERGED = 64  # above this many arrays of a type, neighbours are merged before any pair is compared


@dataclass(frozen=True)
class _Coder:
    """What an implementation offers; the arguments are those of :mod:`hflfnerv.reference.huffman`."""

    encode: Callable[[Sequence[Array], Sequence[int], bool, int], bytes]
    decode: Callable[[Any, bool, int, bool, bool], list[Array]]
    decode_rows: Callable[[Any, int, int, int, bool, bool], Array]
    code_lengths: Callable[[Array, int], Array]


def _cpp() -> _Coder:
    c = _ext.load()
    return _Coder(c.huffman_encode, c.huffman_decode, c.huffman_decode_rows, c.huffman_code_lengths)


def _reference() -> _Coder:
    from .reference import huffman as r

    return _Coder(
        r.encode,
        lambda data, as_list, max_symbols, verify, copy: r.decode(bytes(data), as_list, max_symbols, verify),
        lambda data, start, stop, max_symbols, verify, copy: r.decode_rows(
            bytes(data), start, stop, max_symbols, verify
        ),
        r.code_lengths,
    )


_TABLE = ImplementationTable(
    "huffman",
    [
        Implementation("cpp", _cpp, unavailable=_ext.unavailable),
        Implementation("reference", _reference),
    ],
)


def _coder(impl: str) -> _Coder:
    return _chosen(impl, _ext.unavailable())


@functools.cache
def _chosen(impl: str, _unavailable: str | None) -> _Coder:
    """Return the coder that ``impl`` means; kept, because choosing takes as long as decoding some hundred symbols."""
    coder: _Coder = _TABLE.select(impl).run()
    return coder


def encode(symbols: Array, *, chunk_symbols: int | None = None, impl: str = "auto") -> bytes:
    """Code one array with a canonical Huffman code of its own.

    Args:
        symbols: uint8 or int16, any shape (0-d and empty too); an array that is not C-contiguous is copied.
        chunk_symbols: how many consecutive symbols can be decoded on their own, in [1, 2**28]; the size of a row makes
            :func:`decode_rows` read that row only. 1,920 if None.
        impl: ``"cpp"``, ``"reference"``, or ``"auto"`` for the first of them that can run.

    Returns:
        The coded array with its dtype and shape. Data that would not shrink is stored as it is.

    Raises:
        TypeError: ``symbols`` is not a NumPy array of uint8 or int16.
        ValueError: ``chunk_symbols`` or the shape is out of range, or ``impl`` is unknown.
        BackendUnavailable: ``impl="cpp"`` and the extension is not there.

    Numerics:
        Lossless. The bytes depend on the arguments alone, not on the implementation or the machine.

    Example:
        >>> len(encode(np.zeros(1_000_000, np.uint8)))
        24
    """
    array = _checked("symbols", symbols)
    return _coder(impl).encode([array], [0], False, _checked_chunk(chunk_symbols))


def decode(
    data: Buffer,
    *,
    impl: str = "auto",
    max_symbols: int = DEFAULT_MAX_SYMBOLS,
    verify: bool = True,
    copy: bool = True,
) -> Array:
    """Decode what :func:`encode` returned.

    Args:
        data: the bytes, as any contiguous buffer.
        impl: as in :func:`encode`.
        max_symbols: how many symbols the data may declare; a guard against a few bytes that ask for all memory.
        verify: whether to compare the checksum. Without it, data that was changed may give wrong symbols, a wrong dtype
            or a wrong shape and no error, so that is for data known to be whole, such as a section of a container whose
            own checksum was compared. Everything else is still checked: hostile data is as safe to decode as with it.
        copy: whether symbols that did not shrink, and so are stored as they are, are copied too. If not, they come as a
            read-only view of ``data``, which must not change as long as the array lives; where ``data`` begins at an
            odd address int16 is copied all the same, and ``impl="reference"`` always copies.

    Returns:
        A new array, of the dtype and shape that were encoded; or a view, if ``copy`` is false.

    Raises:
        BitstreamError: the data is not such bytes: :class:`~hflfnerv.errors.BadMagic`, ``UnsupportedVersion``,
            ``TruncatedBitstream``, ``ChecksumMismatch``, ``InvalidCode`` or ``InvalidBitstream``.
        TypeError: ``data`` is not a buffer.
        ValueError: ``data`` is not contiguous, ``max_symbols`` is negative, or ``impl`` is unknown.
        BackendUnavailable: ``impl="cpp"`` and the extension is not there.

    Numerics:
        Exact. A change of any single bit of the data is found by its checksum, unless ``verify`` is false.

    Example:
        >>> decode(encode(np.array([1, -1, 1], np.int16)))
        array([ 1, -1,  1], dtype=int16)
    """
    (array,) = _coder(impl).decode(_checked_data(data), False, _checked_max(max_symbols), bool(verify), bool(copy))
    return array


def decode_rows(
    data: Buffer,
    start: int,
    stop: int,
    *,
    impl: str = "auto",
    max_symbols: int = DEFAULT_MAX_SYMBOLS,
    verify: bool = True,
    copy: bool = True,
) -> Array:
    """Decode some rows of what :func:`encode` returned, reading only the chunks they lie in.

    Args:
        data: the bytes, as any contiguous buffer.
        start: the first row of the first axis.
        stop: the row behind the last; ``0 <= start <= stop <= shape[0]``.
        impl: as in :func:`encode`.
        max_symbols: as in :func:`decode`; it bounds the whole array.
        verify: as in :func:`decode`. The checksum takes a pass over the whole data, however few rows are wanted.
        copy: as in :func:`decode`.

    Returns:
        A new array equal to ``decode(data)[start:stop]``; or a view, if ``copy`` is false.

    Raises:
        ValueError: the rows are out of range or the array has no axis; and as in :func:`decode`.
        BitstreamError: as in :func:`decode`; the checksum covers the whole data and is checked first, if at all.
        TypeError: as in :func:`decode`, or a row is not an integer.
        BackendUnavailable: as in :func:`decode`.

    Numerics:
        Exact, and the same as decoding everything.

    Example:
        >>> decode_rows(encode(np.arange(8, dtype=np.uint8).reshape(4, 2), chunk_symbols=2), 1, 2)
        array([[2, 3]], dtype=uint8)
    """
    rows = (operator.index(start), operator.index(stop))
    if not 0 <= rows[0] <= rows[1] < 2**63:
        raise ValueError(f"start and stop must satisfy 0 <= start <= stop < 2**63, got {start} and {stop}")
    return _coder(impl).decode_rows(_checked_data(data), *rows, _checked_max(max_symbols), bool(verify), bool(copy))


def encode_many(arrays: Sequence[Array], *, chunk_symbols: int | None = None, impl: str = "auto") -> bytes:
    """Code a list of arrays; arrays share a code where that makes the whole smaller.

    Groups of arrays that share a code are found by merging the pair of groups that saves most until none saves any.
    One code per array, one code per dtype, and these groups are then coded, and the smallest is returned.

    Args:
        arrays: uint8 and int16 arrays of any shapes; the list may be empty.
        chunk_symbols: as in :func:`encode`; a chunk may hold symbols of several arrays of a group.
        impl: as in :func:`encode`.

    Returns:
        The coded arrays with their dtypes and shapes.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in :func:`encode`.

    Numerics:
        As in :func:`encode`; the choice of the groups uses integer arithmetic only.

    Example:
        >>> [a.shape for a in decode_many(encode_many([np.zeros((2, 3), np.uint8), np.ones(4, np.int16)]))]
        [(2, 3), (4,)]
    """
    checked = [_checked(f"arrays[{i}]", array) for i, array in enumerate(arrays)]
    chunk = _checked_chunk(chunk_symbols)
    coder = _coder(impl)
    candidates: list[list[int]] = []
    for groups in (_merged(checked), [int(a.dtype == np.int16) for a in checked], list(range(len(checked)))):
        numbered = _numbered(groups)
        if numbered not in candidates:
            candidates.append(numbered)
    return min((coder.encode(checked, groups, True, chunk) for groups in candidates), key=len)


def decode_many(
    data: Buffer,
    *,
    impl: str = "auto",
    max_symbols: int = DEFAULT_MAX_SYMBOLS,
    verify: bool = True,
    copy: bool = True,
) -> list[Array]:
    """Decode what :func:`encode_many` returned; a single coded array gives a list of one.

    Args:
        data: the bytes, as any contiguous buffer.
        impl: as in :func:`encode`.
        max_symbols: how many symbols the data may declare in total.
        verify: as in :func:`decode`.
        copy: as in :func:`decode`.

    Returns:
        New arrays, in the order, dtypes and shapes that were encoded; views among them, if ``copy`` is false.

    Raises:
        BitstreamError, TypeError, ValueError, BackendUnavailable: as in :func:`decode`.

    Numerics:
        Exact, as in :func:`decode`.

    Example:
        >>> decode_many(encode_many([np.array([7, 7], np.uint8)]))
        [array([7, 7], dtype=uint8)]
    """
    return _coder(impl).decode(_checked_data(data), True, _checked_max(max_symbols), bool(verify), bool(copy))


def code_lengths(counts: npt.ArrayLike, max_bits: int, *, impl: str = "auto") -> Array:
    """Return the lengths of an optimal prefix code whose longest code has at most ``max_bits`` bits (package-merge).

    Args:
        counts: ``[n]`` integers, how often each symbol occurs; in [0, 2**40].
        max_bits: the longest code allowed, in [1, 20] bits; at most ``2**max_bits`` symbols may occur.
        impl: as in :func:`encode`.

    Returns:
        ``[n]`` uint8, the length of each symbol's code in bits; 0 where the count is 0, 1 for a symbol alone.

    Raises:
        TypeError: ``counts`` does not hold integers.
        ValueError: an argument is out of range.
        BackendUnavailable: ``impl="cpp"`` and the extension is not there.

    Numerics:
        Exact integer arithmetic; ties go the same way in every implementation.

    Example:
        >>> code_lengths([5, 1, 1, 0, 9], 3)
        array([2, 3, 3, 0, 1], dtype=uint8)
    """
    values = np.asarray(counts)
    if values.size == 0:
        values = values.astype(np.uint64)
    if values.dtype.kind not in "iu":
        raise TypeError(f"counts must hold integers, got dtype {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"counts must be one-dimensional, got shape {values.shape}")
    if values.size and (int(values.min()) < 0 or int(values.max()) > 2**40):
        raise ValueError(f"counts must be in [0, 2**40], got {int(values.min())} to {int(values.max())}")
    bits = operator.index(max_bits)
    if not 1 <= bits <= _MAX_CODE_BITS:
        raise ValueError(f"max_bits must be in [1, {_MAX_CODE_BITS}], got {bits}")
    occurring = int(np.count_nonzero(values))
    if occurring > 2**bits:
        least = (occurring - 1).bit_length()
        raise ValueError(f"max_bits must be at least {least} for {occurring} symbols, got {bits}")
    return _coder(impl).code_lengths(np.ascontiguousarray(values, np.uint64), bits)


def payload_bits(symbols: Array) -> int:
    """Return what the NeRV papers count as the coded size: the code lengths of all symbols, and nothing else.

    HNeRV and its successors build ``dahuffman.HuffmanCodec.from_data(symbols)`` and sum the lengths of its codes: an
    optimal code without a length limit over the symbols and one end-of-file symbol that occurs once. The table, the
    shapes and the end of the file itself are not counted.

    Args:
        symbols: uint8 or int16, any shape.

    Returns:
        The number of bits, equal to dahuffman's to the bit.

    Raises:
        TypeError: ``symbols`` is not a NumPy array of uint8 or int16.
        ValueError: its shape is out of range.

    Numerics:
        Exact. Where several codes are optimal, ties are broken as dahuffman does: by the first symbol of a subtree, the
        end of file before all others.

    Example:
        >>> payload_bits(np.array([1, 1, 1, 2], np.uint8))
        5
    """
    array = _checked("symbols", symbols)
    values, counts = np.unique(array, return_counts=True)
    end_of_file = -(2**15) - 1
    # The total length of all codes is the sum of the weights of the inner nodes; the depth of the end of file is how
    # many inner nodes hold it, and always in the first place, since it sorts before every symbol of equal weight.
    heap = [(1, end_of_file, True)]
    heap += [(count, value, False) for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        weight_a, first_a, has_end_a = heapq.heappop(heap)
        weight_b, _, has_end_b = heapq.heappop(heap)
        has_end = has_end_a or has_end_b
        total += weight_a + weight_b - has_end
        heapq.heappush(heap, (weight_a + weight_b, first_a, has_end))
    return total


# --- which arrays share a code ---


def _numbered(groups: Sequence[int]) -> list[int]:
    """Renumber groups in the order in which they first occur."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


def _merged(arrays: Sequence[Array]) -> list[int]:
    """Return a group for each array, from merging the pair of groups that saves most until none does."""
    group_of = list(range(len(arrays)))
    for dtype in (np.uint8, np.int16):
        chosen = [i for i, array in enumerate(arrays) if array.dtype == dtype and array.size]
        run = -(-len(chosen) // _MAX_MERGED) or 1
        members = [chosen[i : i + run] for i in range(0, len(chosen), run)]
        for group in _merge(members, _histograms([arrays[i] for i in chosen], run), 8 * np.dtype(dtype).itemsize):
            for i in group:
                group_of[i] = group[0]
    return group_of


def _histograms(arrays: Sequence[Array], run: int) -> Array:
    """Return one histogram for each ``run`` arrays, over the symbols that occur in any of them."""
    if not arrays:
        return np.zeros((0, 0), np.int64)
    least = -(2**15) if arrays[0].dtype == np.int16 else 0
    rows = [np.bincount(array.ravel().astype(np.int64) - least) for array in arrays]
    table = np.zeros((-(-len(rows) // run), max(row.size for row in rows)), np.int64)
    for i, row in enumerate(rows):
        table[i // run, : row.size] += row
    return table[:, table.any(axis=0)]


def _merge(members: list[list[int]], histograms: Array, raw_bits: int) -> list[list[int]]:
    alive = list(range(len(members)))
    cost = _estimated_cost(histograms, raw_bits)
    saving = np.zeros((len(members), len(members)), np.int64)

    def compare(a: int, others: list[int]) -> None:
        together = _estimated_cost(histograms[others] + histograms[a], raw_bits)
        saving[a, others] = saving[others, a] = cost[a] + cost[others] - together

    for position, a in enumerate(alive[:-1]):
        compare(a, alive[position + 1 :])
    while len(alive) > 1:
        a, b = sorted(divmod(int(saving.argmax()), len(members)))
        if saving[a, b] <= 0:
            break
        alive.remove(b)
        members[a] = sorted(members[a] + members[b])
        histograms[a] += histograms[b]
        cost[a] = _estimated_cost(histograms[a : a + 1], raw_bits)[0]
        saving[b, :] = saving[:, b] = 0
        if len(alive) > 1:
            compare(a, [other for other in alive if other != a])
    return [members[a] for a in alive]


def _estimated_cost(histograms: Array, raw_bits: int) -> Array:
    """Return about how much a group with each histogram takes, in 2**-16 bits: entropy and table, or raw."""
    total = histograms.sum(axis=1)
    entropy = _n_log2_n(total) - _n_log2_n(histograms).sum(axis=1)
    table = 3 * np.count_nonzero(histograms, axis=1) + 160
    cost: Array = np.minimum(entropy + (table << 16), (raw_bits * total + 16) << 16)
    return cost


def _n_log2_n(n: Array) -> Array:
    """Return n log2 n in 2**-16, 0 for n = 0, in integers only so that it is the same everywhere."""
    values, places = np.unique(n, return_inverse=True)
    positive = np.maximum(values, 1)
    exponent = np.zeros(values.shape, np.int64)
    for shift in (32, 16, 8, 4, 2, 1):
        exponent += np.where(positive >> (exponent + shift) > 0, shift, 0)
    # log2 of the mantissa, bit by bit: squaring doubles it.
    mantissa = (positive << np.maximum(30 - exponent, 0)) >> np.maximum(exponent - 30, 0)
    log = exponent
    for _ in range(16):
        mantissa = mantissa * mantissa >> 30
        carry = mantissa >> 31
        log = log << 1 | carry
        mantissa >>= carry
    result: Array = (values * log)[places].reshape(n.shape)
    return result


# --- arguments ---


def _checked(name: str, array: Array) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}; for a tensor use .cpu().numpy()")
    if array.dtype not in (np.uint8, np.int16):
        raise TypeError(f"{name} must have dtype uint8 or int16, got {array.dtype}; convert it with .astype first")
    if array.ndim > _MAX_DIMS:
        raise ValueError(f"{name} must have at most {_MAX_DIMS} dimensions, got {array.ndim}; reshape it first")
    if math.prod(dim for dim in array.shape if dim) > _MAX_ELEMENTS:
        raise ValueError(f"{name} must have at most 2**40 elements, got shape {array.shape}")
    return array if array.flags.c_contiguous else array.copy(order="C")


def _checked_chunk(chunk_symbols: int | None) -> int:
    if chunk_symbols is None:
        return DEFAULT_CHUNK_SYMBOLS
    count = operator.index(chunk_symbols)
    if not 1 <= count <= _MAX_CHUNK_SYMBOLS:
        raise ValueError(f"chunk_symbols must be in [1, 2**28], got {count}")
    return count


def _checked_max(max_symbols: int) -> int:
    count = operator.index(max_symbols)
    if not 0 <= count < 2**63:
        raise ValueError(f"max_symbols must be in [0, 2**63), got {count}")
    return count


def _checked_data(data: Buffer) -> bytes | memoryview:
    if isinstance(data, bytes):
        return data
    try:
        view = memoryview(cast("bytes", data))
    except TypeError:
        raise TypeError(f"data must be bytes or another buffer, got {type(data).__name__}") from None
    if not view.c_contiguous:
        raise ValueError("data must be a contiguous buffer; pass bytes(data)")
    return view.cast("B") if view.nbytes else memoryview(b"")
