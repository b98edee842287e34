"""Bounds-checked reading and writing of the fields that the format is made of. All integers are little-endian."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final

from ..errors import InvalidBitstream, TruncatedBitstream

__all__ = ["Reader", "deflate", "inflate", "varint", "zigzag"]

_MAX_VARINT_BYTES: Final = 9


def varint(value: int) -> bytes:
    """Encode a non-negative integer under 2**63, seven bits a byte, least significant first (LEB128)."""
    if not 0 <= value < 2**63:
        raise ValueError(f"value must be in 0..2**63 - 1, got {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> bytes:
    """Encode a signed integer as a varint: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return varint(2 * value if value >= 0 else -2 * value - 1)


def deflate(data: bytes) -> bytes:
    """Compress to a raw deflate stream."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def inflate(data: bytes, size: int, what: str) -> bytes:
    """Decompress a raw deflate stream that must give exactly ``size`` bytes and end where ``data`` ends.

    Raises:
        InvalidBitstream: it does not; never more than ``size + 1`` bytes are produced.
    """
    decompressor = zlib.decompressobj(-15)
    try:
        out = decompressor.decompress(data, size + 1)
    except zlib.error as error:
        raise InvalidBitstream(f"{what}: bad deflate stream ({error})") from None
    if len(out) != size or not decompressor.eof or decompressor.unused_data:
        raise InvalidBitstream(f"{what}: the deflate stream must give the {size} bytes that are declared")
    return out


class Reader:
    """A cursor over bytes. Reading past the end raises TruncatedBitstream and names what was being read."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise TruncatedBitstream(f"{self._what}: needs {count} more bytes at {self.position}, has {self.left}")
        start = self.position
        self.position += count
        return self._data[start : self.position]

    def rest(self) -> bytes:
        return self.take(self.left)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def varint(self) -> int:
        value = 0
        for index in range(_MAX_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if byte == 0 and index:
                    break
                return value
        raise InvalidBitstream(f"{self._what}: integer at {self.position} is not in its shortest form or too long")

    def zigzag(self) -> int:
        value = self.varint()
        return value // 2 if value % 2 == 0 else -(value // 2) - 1

    def finish(self) -> None:
        if self.left:
            raise InvalidBitstream(f"{self._what}: has {self.left} bytes too many")
