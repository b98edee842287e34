"""Huffman coding of arrays, in NumPy: the definition of the bytes that HUFFMAN.md describes.

The compiled implementation produces the same bytes from the same arguments and accepts and rejects the same data, with
the same exception class; see :mod:`hflfnerv.huffman` for the public functions.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import (
    BadMagic,
    ChecksumMismatch,
    InvalidBitstream,
    InvalidCode,
    TruncatedBitstream,
    UnsupportedVersion,
)

__all__ = ["code_lengths", "decode", "decode_rows", "encode"]

Array = npt.NDArray[Any]
T = TypeVar("T")

MAGIC = b"HFLH"
VERSION = 1
CRC_AT = 5
BODY_SIZE_AT = 9
BODY_AT = 15
RAW, CONSTANT, HUFFMAN = 0, 1, 2
MAX_DIMS = 32
MAX_ELEMENTS = 2**40
MAX_CHUNK_SYMBOLS = 2**28
SAMPLED_SYMBOLS = 2**16
TYPES = (np.dtype("u1"), np.dtype("<i2"))
MAX_BITS = (11, 20)
ALPHABETS = (256, 65536)
SMALLEST = (0, -32768)


# --- code lengths and codes ---


def code_lengths(counts: Array, max_bits: int) -> Array:
    """Return the lengths of an optimal prefix code of at most ``max_bits`` bits.

    Package-merge (Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", 1990).
    Symbols are ordered by (count, index). On each level the leaves and the pairs of the level before are merged by
    weight, a leaf before a pair of equal weight; of the last level the 2n - 2 lightest are taken, and of every level
    before it what those contain. A symbol's length is the number of levels in which its leaf is taken.

    Args:
        counts: ``[n]`` uint64, how often each symbol occurs; at most ``2**max_bits`` of them are not 0.
        max_bits: the longest code allowed, in bits.

    Returns:
        ``[n]`` uint8; 0 for a symbol that does not occur, 1 for a symbol that occurs alone.
    """
    lengths = np.zeros(counts.size, np.uint8)
    order = np.flatnonzero(counts)
    order = order[np.argsort(counts[order], kind="stable")]
    if order.size < 2:
        lengths[order] = 1
        return lengths
    leaves = counts[order].astype(np.uint64)
    pairs = np.zeros(0, np.uint64)
    levels = []
    for _ in range(max_bits):
        items = np.concatenate([leaves, pairs])
        merged = np.argsort(items, kind="stable")
        levels.append(merged < leaves.size)
        even = items[merged[: items.size & ~1]]
        pairs = even[0::2] + even[1::2]
    taken = 2 * leaves.size - 2
    for is_leaf in reversed(levels):
        leaf = int(np.count_nonzero(is_leaf[:taken]))
        lengths[order[:leaf]] += np.uint8(1)
        taken = 2 * (taken - leaf)
    return lengths


def canonical_codes(lengths: Array) -> tuple[Array, Array]:
    """Return the symbols that have a code, by (length, symbol), and codes: each the one before plus 1, lengthened."""
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    codes = np.zeros(symbols.size, np.int64)
    code, length = 0, int(lengths[symbols[0]])
    for i, symbol in enumerate(symbols):
        code <<= int(lengths[symbol]) - length
        length = int(lengths[symbol])
        codes[i] = code
        code += 1
    return symbols, codes


# --- fields ---


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _BitWriter:
    def __init__(self) -> None:
        self.bits: list[int] = []

    def put(self, value: int, count: int) -> None:
        self.bits += [value >> i & 1 for i in range(count)]

    def put_unary(self, ones: int) -> None:
        self.bits += [1] * ones + [0]

    def getvalue(self) -> bytes:
        return np.packbits(np.array(self.bits, np.uint8), bitorder="little").tobytes()


class _Reader:
    """Reads fields; a field that runs past the end raises InvalidBitstream."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.used = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise InvalidBitstream(f"{what} run past the end")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1, "the fields")[0]

    def varint(self) -> int:
        value = 0
        for i in range(8):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if byte == 0 and i > 0:
                    raise InvalidBitstream("a number is not in its shortest form")
                return value
        raise InvalidBitstream("a number is longer than 8 bytes")

    def bits(self, count: int) -> int:
        value = 0
        for i in range(count):
            if self.left == 0:
                raise InvalidBitstream("a bit field runs past the end")
            value |= (self.data[self.at] >> self.used & 1) << i
            self.used += 1
            if self.used == 8:
                self.used = 0
                self.at += 1
        return value

    def unary(self, most: int) -> int:
        ones = 0
        while self.bits(1) == 1:
            ones += 1
            if ones > most:
                raise InvalidBitstream("a bit field is out of range")
        return ones

    def align(self) -> None:
        if self.used > 0:
            if self.data[self.at] >> self.used != 0:
                raise InvalidBitstream("padding bits are not zero")
            self.used = 0
            self.at += 1


# --- code tables ---


def _write_table(lengths: Array) -> bytes:
    symbols = np.flatnonzero(lengths).tolist()
    bits = _BitWriter()
    bits.put(int(lengths[symbols[0]]), 5)
    for previous, symbol in itertools.pairwise(symbols):
        absent = symbol - previous - 1
        if absent > 0:
            width = absent.bit_length() - 1
            bits.put(0b011, 3)
            bits.put_unary(width)
            bits.put(absent, width)
        delta = int(lengths[symbol]) - int(lengths[previous])
        if delta == 0:
            bits.put(0b0, 1)
        elif abs(delta) == 1:
            bits.put(0b01, 2)
            bits.put(delta < 0, 1)
        else:
            bits.put(0b111, 3)
            bits.put_unary(abs(delta) - 2)
            bits.put(delta < 0, 1)
    return _varint(symbols[0]) + _varint(symbols[-1] - symbols[0]) + bits.getvalue()


def _read_table(reader: _Reader, kind: int) -> Array:
    """Return the code lengths of the whole alphabet; anything but a complete prefix code is refused."""
    first, span = reader.varint(), reader.varint()
    alphabet, max_bits = ALPHABETS[kind], MAX_BITS[kind]
    if first >= alphabet or span == 0 or span >= alphabet - first:
        raise InvalidCode("the first and last symbol of a code are out of range")
    lengths = np.zeros(alphabet, np.uint8)
    symbol, length, kraft = first, reader.bits(5), 0
    while True:
        if not 1 <= length <= max_bits:
            raise InvalidCode(f"a code length must be in [1, {max_bits}], got {length}")
        lengths[symbol] = length
        kraft += 2 ** (max_bits - length)
        if kraft > 2**max_bits:
            raise InvalidCode("the code lengths are too short for a prefix code")
        if symbol == first + span:
            break
        symbol += 1
        after_gap = False
        while True:
            if reader.bits(1) == 0:
                break
            if reader.bits(1) == 0:
                length += -1 if reader.bits(1) else 1
                break
            if reader.bits(1) == 1:
                size = reader.unary(max_bits) + 2
                length += -size if reader.bits(1) else size
                break
            width = reader.unary(16)
            absent = 2**width | reader.bits(width)
            if after_gap or absent > first + span - symbol:
                raise InvalidCode("a run of absent symbols is out of place")
            symbol += absent
            after_gap = True
    reader.align()
    if kraft != 2**max_bits:
        raise InvalidCode("the code lengths leave code words unused")
    return lengths


def _as_invalid_code(read: Callable[[], T]) -> T:
    try:
        return read()
    except InvalidBitstream as error:
        raise InvalidCode(str(error)) from None


# --- encoder ---


def encode(arrays: Sequence[Array], groups: Sequence[int], as_list: bool, chunk_symbols: int) -> bytes:
    """Code arrays; see :func:`hflfnerv.huffman.encode` and :func:`hflfnerv.huffman.encode_many`.

    Args:
        arrays: uint8 or int16, of any shape.
        groups: for each array, the group whose table and chunks it shares; numbered as they first occur.
        as_list: whether the data is a list of arrays or one array.
        chunk_symbols: how many symbols a chunk holds.
    """
    body = bytes([as_list])
    if as_list:
        body += _varint(len(arrays))
    members: list[list[Array]] = []
    for array, group in zip(arrays, groups, strict=True):
        kind = 0 if array.dtype.itemsize == 1 else 1
        body += bytes([kind, array.ndim]) + b"".join(_varint(dim) for dim in array.shape)
        if as_list:
            body += _varint(group)
        if group == len(members):
            members.append([])
        members[group].append(array.ravel())
    for parts in members:
        alone = sum(part.size > 0 for part in parts) == 1
        body += _encode_group(np.concatenate(parts), chunk_symbols, alone)
    head = MAGIC + bytes([VERSION])
    tail = len(body).to_bytes(BODY_AT - BODY_SIZE_AT, "little") + body
    return head + zlib.crc32(tail, zlib.crc32(head)).to_bytes(4, "little") + tail


def _looks_incompressible(symbols: Array) -> bool:
    """Return whether the first 64 of every 1,024 of many bytes would gain less than 1/256 by a code of their own."""
    if symbols.dtype.itemsize != 1 or symbols.size < SAMPLED_SYMBOLS:
        return False
    starts = np.arange(0, symbols.size - 63, 1024)
    counts = np.bincount(symbols[starts[:, None] + np.arange(64)].ravel(), minlength=256)
    bits = int(counts @ code_lengths(counts, MAX_BITS[0]).astype(np.int64))
    return bits * 256 >= int(counts.sum()) * 8 * 255


def _encode_group(symbols: Array, chunk_symbols: int, alone: bool) -> bytes:
    kind = 0 if symbols.dtype.itemsize == 1 else 1
    raw = symbols.astype(TYPES[kind]).tobytes()
    indices = symbols.astype(np.int64) - SMALLEST[kind]
    if alone and _looks_incompressible(symbols):
        return bytes([RAW]) + raw
    counts = np.bincount(indices, minlength=ALPHABETS[kind])
    distinct = np.count_nonzero(counts)
    if distinct == 0:
        return bytes([RAW])
    if distinct == 1:
        return bytes([CONSTANT]) + raw[: TYPES[kind].itemsize]
    lengths = code_lengths(counts, MAX_BITS[kind])
    head = _varint(chunk_symbols) + _write_table(lengths)
    bits = int(counts @ lengths.astype(np.int64))
    chunks = -(-symbols.size // chunk_symbols)
    if len(head) + (bits + 7) // 8 + 2 * chunks >= len(raw):
        return bytes([RAW]) + raw
    payload, sizes = _encode_chunks(indices, lengths, chunk_symbols)
    least = min(sizes)
    width = (max(sizes) - least).bit_length()
    directory = _BitWriter()
    for size in sizes:
        directory.put(size - least, width)
    fields = [bytes([HUFFMAN]), head, len(payload).to_bytes(6, "little"), payload]
    return b"".join([*fields, _varint(least), bytes([width]), directory.getvalue()])


def _encode_chunks(indices: Array, lengths: Array, chunk_symbols: int) -> tuple[bytes, list[int]]:
    symbols, codes = canonical_codes(lengths)
    code_of = np.zeros(lengths.size, np.int64)
    code_of[symbols] = codes
    length = lengths[indices].astype(np.int64)
    code = code_of[indices]
    # Where each symbol begins: behind those before it in its chunk, whose first bit is that of a byte.
    chunk_starts = np.arange(0, indices.size, chunk_symbols)
    chunk_bytes = -(-np.add.reduceat(length, chunk_starts) // 8)
    chunk_bits = 8 * (np.cumsum(chunk_bytes) - chunk_bytes)
    start = np.cumsum(length) - length
    start += np.repeat(chunk_bits - start[chunk_starts], np.diff(np.append(chunk_starts, indices.size)))
    stream = np.zeros(8 * int(chunk_bytes.sum()), np.uint8)
    for i in range(int(length.max())):
        has = length > i
        stream[start[has] + i] = code[has] >> (length[has] - 1 - i) & 1
    return np.packbits(stream, bitorder="little").tobytes(), chunk_bytes.tolist()


# --- decoder ---


@dataclass
class _Group:
    kind: int
    count: int = 0
    mode: int = RAW
    chunk_symbols: int = 1
    raw: bytes = b""
    payload: bytes = b""
    offsets: Array = field(default_factory=lambda: np.zeros(1, np.int64))
    symbols: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # by (length, symbol)
    lengths: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    codes: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def decode(self, begin: int, end: int) -> Array:
        """Return symbols [begin, end) of the group."""
        dtype = TYPES[self.kind].newbyteorder("=")
        if begin == end:
            return np.zeros(0, dtype)
        if self.mode != HUFFMAN:
            stored = np.frombuffer(self.raw, TYPES[self.kind]).astype(dtype)
            return stored[begin:end] if self.mode == RAW else np.full(end - begin, stored[0])
        first, last = begin // self.chunk_symbols, -(-end // self.chunk_symbols)
        # A chunk of which only a part is wanted is decoded up to the end of that part, and its own end is not checked.
        counts = np.full(last - first, self.chunk_symbols)
        whole = np.full(last - first, True)
        stop = min(last * self.chunk_symbols, self.count)
        counts[-1] = end - (last - 1) * self.chunk_symbols
        whole[-1] = end == stop
        if begin % self.chunk_symbols:
            whole[0] = False
        out = self._decode_chunks(first, counts, whole)
        return out[begin - first * self.chunk_symbols :].astype(dtype)

    def _decode_chunks(self, first: int, counts: Array, whole: Array) -> Array:
        """Decode chunks side by side, one symbol of each at a time: ``counts[i]`` symbols of chunk ``first + i``."""
        max_bits = int(self.lengths[-1])
        # Codes with zeros appended to max_bits ascend, so the code that begins a window is found by bisection.
        aligned = self.codes << (max_bits - self.lengths)
        stream = np.unpackbits(np.frombuffer(self.payload, np.uint8), bitorder="little")
        position = 8 * self.offsets[first : first + counts.size]
        ends = 8 * self.offsets[first + 1 : first + 1 + counts.size]
        columns = np.zeros((int(counts.max()), counts.size), np.int64)
        for i in range(int(counts.max())):
            active = np.flatnonzero(counts > i)
            window = np.zeros(active.size, np.int64)
            for bit in range(max_bits):
                at = position[active] + bit
                window = window << 1 | np.where(at < stream.size, stream[np.minimum(at, stream.size - 1)], 0)
            rank = np.searchsorted(aligned, window, side="right") - 1
            columns[i, active] = self.symbols[rank]
            position[active] += self.lengths[rank]
        exact = (position <= ends) & (~whole | (position + 8 > ends))
        for i in np.flatnonzero(exact & whole).tolist():
            exact[i] = not stream[position[i] : ends[i]].any()
        if not exact.all():
            raise InvalidCode("a chunk does not end where the chunk sizes say")
        return np.concatenate([columns[:count, i] for i, count in enumerate(counts)]) + SMALLEST[self.kind]


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    group: int
    begin: int
    end: int


@dataclass
class _Layout:
    as_list: bool
    arrays: list[_Entry]
    groups: list[_Group]


def decode(data: bytes, as_list: bool, max_symbols: int, verify: bool) -> list[Array]:
    """Decode all arrays of data that is a list, or one array; ``as_list`` allows the former."""
    layout = _parse(data, max_symbols, verify)
    if layout.as_list and not as_list:
        raise InvalidBitstream("the data holds a list of arrays; use decode_many")
    symbols = [group.decode(0, group.count) for group in layout.groups]
    return [symbols[entry.group][entry.begin : entry.end].copy().reshape(entry.shape) for entry in layout.arrays]


def decode_rows(data: bytes, start: int, stop: int, max_symbols: int, verify: bool) -> Array:
    """Decode rows [start, stop) of the first axis of data that is one array."""
    layout = _parse(data, max_symbols, verify)
    if layout.as_list:
        raise InvalidBitstream("the data holds a list of arrays; use decode_many")
    (entry,) = layout.arrays
    if not entry.shape:
        raise ValueError("data must hold an array with at least one dimension, got a 0-d array")
    rows = entry.shape[0]
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"start and stop must satisfy 0 <= start <= stop <= {rows}, got {start} and {stop}")
    row_symbols = entry.end // rows if rows else 0
    return layout.groups[0].decode(start * row_symbols, stop * row_symbols).reshape(stop - start, *entry.shape[1:])


def _parse(data: bytes, max_symbols: int, verify: bool) -> _Layout:
    if data[:4] != MAGIC[: len(data)]:
        raise BadMagic("the data does not begin with 'HFLH'")
    if len(data) > 4 and data[4] != VERSION:
        raise UnsupportedVersion("the format version is not 1")
    if len(data) < BODY_AT:
        raise TruncatedBitstream("the data ends within the header")
    body_bytes = int.from_bytes(data[BODY_SIZE_AT:BODY_AT], "little")
    if body_bytes > len(data) - BODY_AT:
        raise TruncatedBitstream("the data is shorter than its header says")
    if body_bytes < len(data) - BODY_AT:
        raise InvalidBitstream("the data is longer than its header says")
    stored_crc = int.from_bytes(data[CRC_AT:BODY_SIZE_AT], "little")
    if verify and zlib.crc32(data[BODY_SIZE_AT:], zlib.crc32(data[:CRC_AT])) != stored_crc:
        raise ChecksumMismatch("the CRC-32 does not match")

    reader = _Reader(data, BODY_AT)
    kind = reader.byte()
    if kind > 1:
        raise InvalidBitstream("the kind must be 0 or 1")
    layout = _Layout(kind == 1, [], [])
    count = reader.varint() if layout.as_list else 1
    if count > reader.left:
        raise InvalidBitstream("there are more arrays than the data can hold")
    total = 0
    for _ in range(count):
        total = _parse_array(reader, layout, total, max_symbols)
    for group in layout.groups:
        _parse_group(reader, group)
    if reader.left != 0:
        raise InvalidBitstream("bytes are left after the last group")
    return layout


def _parse_array(reader: _Reader, layout: _Layout, total: int, max_symbols: int) -> int:
    kind, ndim = reader.byte(), reader.byte()
    if kind > 1:
        raise InvalidBitstream("the symbol type must be 0 or 1")
    if ndim > MAX_DIMS:
        raise InvalidBitstream(f"an array has more than {MAX_DIMS} dimensions")
    shape = tuple(reader.varint() for _ in range(ndim))
    if math.prod(dim for dim in shape if dim) > MAX_ELEMENTS:
        raise InvalidBitstream("an array has too many elements")
    size = math.prod(shape)
    if total + size > max_symbols:
        raise InvalidBitstream("the data declares more symbols than max_symbols allows")
    number = reader.varint() if layout.as_list else 0
    if number > len(layout.groups):
        raise InvalidBitstream("a group number is out of order")
    if number == len(layout.groups):
        layout.groups.append(_Group(kind))
    group = layout.groups[number]
    if group.kind != kind:
        raise InvalidBitstream("arrays of different types share a group")
    layout.arrays.append(_Entry(shape, number, group.count, group.count + size))
    group.count += size
    return total + size


def _parse_group(reader: _Reader, group: _Group) -> None:
    width = TYPES[group.kind].itemsize
    group.mode = reader.byte()
    if group.mode > HUFFMAN:
        raise InvalidBitstream("the mode must be 0, 1 or 2")
    if group.mode != RAW and group.count == 0:
        raise InvalidBitstream("a group without symbols must be raw")
    if group.mode != HUFFMAN:
        group.raw = reader.take(group.count * width if group.mode == RAW else width, "the symbols")
        return
    group.chunk_symbols = reader.varint()
    if not 1 <= group.chunk_symbols <= MAX_CHUNK_SYMBOLS:
        raise InvalidBitstream("the number of symbols in a chunk is out of range")
    chunks = -(-group.count // group.chunk_symbols)
    lengths = _as_invalid_code(lambda: _read_table(reader, group.kind))
    group.symbols, group.codes = canonical_codes(lengths)
    group.lengths = lengths[group.symbols].astype(np.int64)
    payload_bytes = int.from_bytes(reader.take(6, "the coded symbols"), "little")
    if group.count > payload_bytes * 8 or chunks > payload_bytes:
        raise InvalidBitstream("the coded symbols are too short for their number")
    group.payload = reader.take(payload_bytes, "the coded symbols")
    least, width = reader.varint(), reader.byte()
    if width > 32 or least > payload_bytes // chunks:
        raise InvalidBitstream("the chunk sizes are out of range")
    sizes = [least + reader.bits(width) for _ in range(chunks)]
    reader.align()
    if 0 in sizes or sum(sizes) != payload_bytes:
        raise InvalidBitstream("the chunk sizes do not add up to the coded symbols")
    group.offsets = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
