"""The ``.hflf`` container: a magic number, a checked directory, and sections with a checksum each.

FORMAT.md specifies it byte by byte.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from ..errors import (
    BadMagic,
    ChecksumMismatch,
    InvalidBitstream,
    TruncatedBitstream,
    UnsupportedVersion,
)
from ._bytes import Reader, deflate, inflate
from .header import Header

__all__ = ["MAGIC", "VERSION", "Container", "Section", "SectionEntry", "write_container"]

MAGIC: Final = b"\x89HFL\r\n\x1a\n"
VERSION: Final = 1
MAX_SECTIONS: Final = 64
MAX_HEADER_BYTES: Final = 1 << 16

_PREFIX = struct.Struct("<8sHH")
_ENTRY = struct.Struct("<4sIQI")
_CHECKSUM = struct.Struct("<I")
_SIZE = struct.Struct("<I")
_MANDATORY = 1
_KNOWN = frozenset({"HEAD", "WGTS", "EMBD"})


@dataclass(frozen=True)
class Section:
    """A section to write.

    Attributes:
        tag: four upper-case ASCII letters or digits.
        data: its content.
        mandatory: whether a reader that does not know the tag must refuse the file.
    """

    tag: str
    data: bytes
    mandatory: bool = True


@dataclass(frozen=True)
class SectionEntry:
    """A section as the directory has it: where it is, how long, and the CRC-32 of its bytes."""

    tag: str
    mandatory: bool
    offset: int
    length: int
    crc32: int


def write_container(header: Header, sections: Sequence[Section]) -> bytes:
    """Return a complete file.

    Args:
        header: becomes the section HEAD.
        sections: the others, in the order in which they are to lie in the file.

    Raises:
        ValueError: a tag is malformed or appears twice, or the header is too large.
    """
    text = header.to_json()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header must be at most {MAX_HEADER_BYTES} bytes of JSON, got {len(text)}")
    everything = [Section("HEAD", _SIZE.pack(len(text)) + deflate(text)), *sections]
    tags = [section.tag for section in everything]
    if len(tags) > MAX_SECTIONS or len(set(tags)) != len(tags):
        raise ValueError(f"sections must be at most {MAX_SECTIONS - 1} with different tags other than HEAD, got {tags}")
    directory = bytearray(_PREFIX.pack(MAGIC, VERSION, len(everything)))
    for section in everything:
        if not _is_tag(section.tag):
            raise ValueError(f"tag must be four upper-case letters or digits, got {section.tag!r}")
        directory += _ENTRY.pack(
            section.tag.encode("ascii"),
            _MANDATORY if section.mandatory else 0,
            len(section.data),
            zlib.crc32(section.data),
        )
    directory += _CHECKSUM.pack(zlib.crc32(directory))
    return b"".join([bytes(directory), *(section.data for section in everything)])


class Container:
    """A file opened for reading.

    Opening checks the magic number, the version and the directory. A section's bytes are read, and their checksum
    compared, when the section is asked for.

    Attributes:
        entries: the directory, by tag, in file order.
        size: size of the file in bytes.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Use :meth:`parse` or :meth:`open`."""
        self._data = data
        self.size = len(data)
        self.entries = _read_directory(data)
        self._header: Header | None = None

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Container:
        """Open a file that is in memory.

        Raises:
            BitstreamError: it is not such a file, newer than this reader, or damaged.
        """
        return cls(bytes(data))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Container:
        """Open a file, mapping it: only what is asked for is read.

        Raises:
            OSError: it cannot be opened.
            BitstreamError: it is not such a file, newer than this reader, or damaged.
        """
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise TruncatedBitstream("the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return cls(data)
        except BaseException:
            data.close()
            raise

    def close(self) -> None:
        """Release the mapped file. What was read stays valid."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, tag: str) -> bool:
        return tag in self.entries

    def section(self, tag: str) -> bytes:
        """Return a section's content.

        Raises:
            InvalidBitstream: the file has no such section.
            ChecksumMismatch: its bytes are not those that were written.
        """
        entry = self.entries.get(tag)
        if entry is None:
            raise InvalidBitstream(f"the file has no section {tag}")
        data = self._data[entry.offset : entry.offset + entry.length]
        if zlib.crc32(data) != entry.crc32:
            raise ChecksumMismatch(f"section {tag} is damaged: its checksum does not match")
        return data

    @property
    def header(self) -> Header:
        """The header.

        Raises:
            BitstreamError: the section HEAD is damaged or invalid.
        """
        if self._header is None:
            reader = Reader(self.section("HEAD"), "section HEAD")
            (size,) = reader.unpack("I")
            if size > MAX_HEADER_BYTES:
                raise InvalidBitstream(f"section HEAD: declares {size} bytes, the limit is {MAX_HEADER_BYTES}")
            self._header = Header.from_json(inflate(reader.rest(), size, "section HEAD"))
        return self._header


def _is_tag(tag: str) -> bool:
    return len(tag) == 4 and tag.isascii() and tag.isalnum() and tag == tag.upper()


def _read_directory(data: bytes | mmap.mmap) -> dict[str, SectionEntry]:
    _check_magic(data[: len(MAGIC)])
    if len(data) < _PREFIX.size:
        raise TruncatedBitstream(f"the file ends after {len(data)} bytes, within its prefix")
    _, version, count = _PREFIX.unpack(data[: _PREFIX.size])
    if version != VERSION:
        raise UnsupportedVersion(f"the file has format version {version}, this reader knows version {VERSION}")
    if not 1 <= count <= MAX_SECTIONS:
        raise InvalidBitstream(f"the directory must have 1 to {MAX_SECTIONS} sections, got {count}")
    end = _PREFIX.size + count * _ENTRY.size
    if len(data) < end + _CHECKSUM.size:
        raise TruncatedBitstream(f"the file ends after {len(data)} bytes, within its directory")
    directory = data[:end]
    if _CHECKSUM.unpack(data[end : end + _CHECKSUM.size])[0] != zlib.crc32(directory):
        raise ChecksumMismatch("the directory is damaged: its checksum does not match")

    entries: dict[str, SectionEntry] = {}
    offset = end + _CHECKSUM.size
    for raw_tag, flags, length, crc32 in _ENTRY.iter_unpack(directory[_PREFIX.size :]):
        tag = raw_tag.decode("latin-1")
        if not _is_tag(tag) or tag in entries:
            raise InvalidBitstream(f"the directory has a malformed or repeated tag {tag!r}")
        if flags & ~_MANDATORY:
            raise InvalidBitstream(f"section {tag} has unknown flags {flags:#x}")
        if flags & _MANDATORY and tag not in _KNOWN:
            raise UnsupportedVersion(f"the file needs section {tag}, which this reader does not know")
        entries[tag] = SectionEntry(tag, bool(flags & _MANDATORY), offset, length, crc32)
        offset += length
    if offset > len(data):
        raise TruncatedBitstream(f"the file should have {offset} bytes, it has {len(data)}")
    if offset < len(data):
        raise InvalidBitstream(f"the file has {len(data) - offset} bytes after its last section")
    if next(iter(entries)) != "HEAD":
        raise InvalidBitstream("the first section must be HEAD")
    return entries


def _check_magic(start: bytes) -> None:
    if start == MAGIC:
        return
    if MAGIC.startswith(start):
        raise TruncatedBitstream(f"the file ends after {len(start)} bytes, within its magic number")
    if start[1:4] == MAGIC[1:4]:
        raise BadMagic("this .hflf file was damaged in transfer (line ends or the eighth bit were changed)")
    raise BadMagic(f"this is not an .hflf file: it begins with {start!r}")
