"""What the container's fuzz target does with an input.

An input's first byte chooses what the rest is, so that a fuzzer need not guess checksums or deflate streams. Reading
may raise BitstreamError and nothing else.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

import numpy as np

from hflfnerv.codec._bytes import deflate
from hflfnerv.codec.bitstream import Bitstream
from hflfnerv.codec.container import Container
from hflfnerv.codec.entropy import entropy_coder
from hflfnerv.codec.header import Header
from hflfnerv.codec.sections import TensorSection
from hflfnerv.errors import BitstreamError

_MAX_ELEMENTS = 1 << 16


def _repaired(data: bytes) -> bytes:
    """The same file with checksums that match, as far as its directory can be followed."""
    out = bytearray(data)
    if len(out) < 12:
        return data
    end = 12 + 20 * struct.unpack_from("<H", out, 10)[0]
    if len(out) < end + 4:
        return data
    offset = end + 4
    for entry in range(12, end, 20):
        (length,) = struct.unpack_from("<Q", out, entry + 8)
        struct.pack_into("<I", out, entry + 16, zlib.crc32(out[offset : offset + min(length, len(out))]))
        offset = min(offset + length, len(out))
    struct.pack_into("<I", out, end, zlib.crc32(out[:end]))
    return bytes(out)


def _read_section(section: TensorSection) -> None:
    if sum(record.elements for record in section.records) > _MAX_ELEMENTS:
        return  # valid, and as large as it says: not what is looked for here
    for tensor in section.read().values():
        tensor.step.values(tensor.symbols)


def _read_file(data: bytes) -> None:
    stream = Bitstream.open(data)
    Header.from_json(stream.header.to_json())
    if sum(int(np.prod(shape)) for shape in stream.weight_shapes.values()) <= _MAX_ELEMENTS:
        stream.read_weights()
    shape = stream.embedding_shape
    if shape is not None and stream.header.frames * int(np.prod(shape)) <= _MAX_ELEMENTS:
        whole = stream.read_embeddings()
        last = stream.header.frames - 1
        assert stream.read_embeddings([last]).tobytes() == whole[last:].tobytes()
        stream.accounting()


def _section(data: bytes, key_interval: int = 0) -> bytes:
    """A tensor section from its parts: lengths in five bytes, description not yet deflated."""
    coder, description_size, raw_size, planes_size = struct.unpack_from("<BHBB", data.ljust(5, b"\0"))
    body = data[5:]
    description, body = body[:description_size], body[description_size:]
    deflated = deflate(description)
    raw, planes = min(raw_size, len(body)), min(planes_size, max(0, len(body) - raw_size))
    return struct.pack("<BBIIII", coder, key_interval, len(description), len(deflated), raw, planes) + deflated + body


def _huffman(body: bytes) -> bytes:
    """The body behind the header of HUFFMAN.md, with the checksum that it should have."""
    start, rest = b"HFLH\x01", len(body).to_bytes(6, "little") + body
    return start + struct.pack("<I", zlib.crc32(start + rest)) + rest


def one_input(data: bytes) -> None:
    """Read what an input says; raises nothing but what is a bug."""
    if not data:
        return
    kind, rest = data[0] % 7, data[1:]
    try:
        if kind == 0:
            Container.parse(rest)
        elif kind == 1:
            _read_file(_repaired(rest))
        elif kind == 2:
            header = Header.from_json(rest)
            assert Header.from_json(header.to_json()) == header
        elif kind == 3:
            _read_section(TensorSection(rest, "section WGTS"))
        elif kind == 4:
            _read_section(TensorSection(_section(rest), "section WGTS"))
        elif kind == 6:
            rows = TensorSection(_section(rest[1:], key_interval=rest[0] if rest else 0), "section EMBD", rows=True)
            if len(rows.records) == 1 and len(rows.records[0].shape) > 1 and rows.records[0].elements < 1 << 16:
                last = rows.records[0].shape[0] - 1
                rows.read_rows([last, last // 2])
        else:
            coder = entropy_coder("range" if rest[:1] >= b"\x80" else "huffman")
            coded = _huffman(rest[1:]) if rest[:1] == b"\x01" else rest[1:]
            dtypes = [np.dtype(np.uint8), np.dtype(np.int16)]
            with suppress(BitstreamError):
                coder.decode_arrays(coded, [70, 300], dtypes)
            coder.decode_rows(coded, (9, 33), dtypes[0], np.array([0, 4, 5, 8]))
    except BitstreamError:
        pass
