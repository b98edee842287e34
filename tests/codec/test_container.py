from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import pytest

from hflfnerv.codec._bytes import Reader, deflate, inflate, varint, zigzag
from hflfnerv.codec.container import MAGIC, Container, Section, write_container
from hflfnerv.codec.header import Color, Header, Source
from hflfnerv.errors import (
    BadMagic,
    BitstreamError,
    ChecksumMismatch,
    InvalidBitstream,
    TruncatedBitstream,
    UnsupportedVersion,
)

_HEADER = {
    "fps": [25, 1],
    "frames": 2,
    "height": 4,
    "model": {"model": "nerv"},
    "preset": "paper",
    "width": 6,
    "writer": "test",
}


def _head(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<I", len(text) if size is None else size) + deflate(text)


def _file(sections: list[tuple[bytes, int, bytes]], *, version: int = 1, lengths: list[int] | None = None) -> bytes:
    """A file written field by field, checksums right."""
    directory = MAGIC + struct.pack("<HH", version, len(sections))
    for index, (tag, flags, data) in enumerate(sections):
        length = len(data) if lengths is None else lengths[index]
        directory += struct.pack("<4sIQI", tag, flags, length, zlib.crc32(data))
    return directory + struct.pack("<I", zlib.crc32(directory)) + b"".join(data for _, _, data in sections)


def _with_header(**changes: object) -> bytes:
    fields = {key: value for key, value in {**_HEADER, **changes}.items() if value is not ...}
    return _file([(b"HEAD", 1, _head(json.dumps(fields).encode()))])


def test_round_trip(header: Header, tmp_path: Path) -> None:
    data = write_container(header, [Section("WGTS", b"abc"), Section("NOTE", b"", mandatory=False)])
    path = tmp_path / "a.hflf"
    path.write_bytes(data)
    with Container.open(path) as mapped:
        for container in (Container.parse(data), Container.parse(memoryview(data)), mapped):
            assert container.header == header
            assert list(container.entries) == ["HEAD", "WGTS", "NOTE"]
            assert (container.section("WGTS"), container.section("NOTE")) == (b"abc", b"")
            assert container.size == len(data)
            assert "EMBD" not in container
            with pytest.raises(InvalidBitstream, match="no section EMBD"):
                container.section("EMBD")


def test_layout_is_that_of_the_specification(header: Header) -> None:
    data = write_container(header, [Section("WGTS", b"abc"), Section("NOTE", b"xy", mandatory=False)])
    head = Container.parse(data).section("HEAD")
    assert data == _file([(b"HEAD", 1, head), (b"WGTS", 1, b"abc"), (b"NOTE", 0, b"xy")])
    assert data[:8] == bytes([0x89, 0x48, 0x46, 0x4C, 0x0D, 0x0A, 0x1A, 0x0A])


def test_header_is_canonical_json(header: Header) -> None:
    assert header.to_json() == (
        b'{"color":{"matrix":"bt709","range":"limited"},"fps":[30000,1001],"frames":5,"height":17,'
        b'"model":{"model":"hnerv","widths":[4,3]},"preset":"paper","sample_aspect_ratio":[4,3],'
        b'"source":{"crop":[1,2,17,31],"height":48,"width":64},"training":{"epochs":300,"lr":0.001},"width":31,'
        b'"writer":"test"}'
    )
    assert Header.from_json(header.to_json()) == header
    assert Header.from_json(json.dumps(json.loads(header.to_json()), indent=1).encode()) == header


def test_unknown_fields_are_ignored() -> None:
    fields = {**_HEADER, "later": {"a": [1, None]}, "color": {"matrix": "rgb", "chroma": "left"}}
    header = Header.from_json(json.dumps(fields).encode())
    assert header == dataclasses.replace(Header.from_json(json.dumps(_HEADER).encode()), color=Color(matrix="rgb"))


def test_unknown_sections() -> None:
    head = (b"HEAD", 1, _head(json.dumps(_HEADER).encode()))
    container = Container.parse(_file([head, (b"NEW1", 0, b"?")]))
    assert container.header.frames == 2
    with pytest.raises(UnsupportedVersion, match="NEW1"):
        Container.parse(_file([head, (b"NEW1", 1, b"?")]))


def test_section_checksums_are_compared_when_read(header: Header) -> None:
    data = bytearray(write_container(header, [Section("WGTS", b"abc"), Section("EMBD", b"def")]))
    data[-4] ^= 1
    container = Container.parse(bytes(data))
    assert container.header == header
    assert container.section("EMBD") == b"def"
    with pytest.raises(ChecksumMismatch, match="section WGTS"):
        container.section("WGTS")


def test_damaged_directories() -> None:
    head = (b"HEAD", 1, _head(json.dumps(_HEADER).encode()))
    good = _file([head, (b"WGTS", 1, b"abc")])
    assert Container.parse(good).header.width == 6
    cases: list[tuple[bytes, type[BitstreamError], str]] = [
        (b"", TruncatedBitstream, "ends after 0 bytes"),
        (b"\x89HF", TruncatedBitstream, "ends after 3 bytes"),
        (good[:9], TruncatedBitstream, "within its prefix"),
        (good[:40], TruncatedBitstream, "within its directory"),
        (good[:-1], TruncatedBitstream, "should have"),
        (good + b"\0", InvalidBitstream, "1 bytes after its last section"),
        (b"RIFF" + good[4:], BadMagic, "is not an .hflf file"),
        (good.replace(b"\r\n", b"\n", 1), BadMagic, "damaged in transfer"),
        (bytes([9]) + good[1:], BadMagic, "damaged in transfer"),
        (_file([head], version=2), UnsupportedVersion, "format version 2"),
        (_file([]), InvalidBitstream, "1 to 64 sections, got 0"),
        (_file([head] + [(b"A%03d" % i, 0, b"") for i in range(64)]), InvalidBitstream, "got 65"),
        (_file([head, head]), InvalidBitstream, "repeated tag 'HEAD'"),
        (_file([head, (b"wgts", 0, b"")]), InvalidBitstream, "malformed or repeated tag 'wgts'"),
        (_file([head, (b"WGT\xff", 0, b"")]), InvalidBitstream, "malformed"),
        (_file([head, (b"WGTS", 3, b"")]), InvalidBitstream, "unknown flags 0x3"),
        (_file([(b"WGTS", 1, b"abc"), head]), InvalidBitstream, "must be HEAD"),
        # What overlapping or far sections would take: lengths that do not add up to the file.
        (_file([head, (b"WGTS", 1, b"abc")], lengths=[len(head[2]), 2]), InvalidBitstream, "1 bytes after"),
        (_file([head, (b"WGTS", 1, b"abc")], lengths=[len(head[2]), 4]), TruncatedBitstream, "should have"),
        (_file([head, (b"WGTS", 1, b"abc")], lengths=[2**64 - 1, 2**64 - 1]), TruncatedBitstream, "should have"),
        (good[:20] + b"\1" + good[21:], ChecksumMismatch, "directory is damaged"),
    ]
    for data, error, message in cases:
        with pytest.raises(error, match=message):
            Container.parse(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": ...}, "must have the fields .'frames'"),
        ({"frames": 0}, r"frames must be in 1\.\.16777216"),
        ({"frames": 2**24 + 1}, "frames must be in"),
        ({"frames": True}, "frames must be an integer, got True"),
        ({"frames": 2.0}, "frames must be an integer"),
        ({"frames": "2"}, "frames must be an integer"),
        ({"height": -1}, "height must be in"),
        ({"width": 16385}, "width must be in"),
        ({"width": 10**400}, "width must be in"),
        ({"fps": [25, 0]}, "fps must be in"),
        ({"fps": [25]}, "fps must be 2 integers"),
        ({"fps": 25}, "fps must be 2 integers"),
        ({"fps": [2**31, 1]}, "fps must be in"),
        ({"sample_aspect_ratio": [0, 1]}, "sample_aspect_ratio must be in"),
        ({"sample_aspect_ratio": None}, "sample_aspect_ratio must be 2 integers"),
        ({"model": "hnerv"}, "model must be an object"),
        ({"model": {}}, "a string 'model'"),
        ({"model": {"model": 1}}, "a string 'model'"),
        ({"model": {"model": "x", "a": [[[[[[[[[]]]]]]]]]}}, "8 levels"),
        ({"model": {"model": "x", "a": [0] * 5000}}, "4096 values"),
        ({"model": {"model": "x", "a": 2**60}}, "2.*53"),
        ({"model": {"model": "x", "a": "y" * 2000}}, "1024 characters"),
        ({"preset": 1}, "preset must be a string"),
        ({"preset": "a\n"}, "printable"),
        ({"writer": "w" * 300}, "at most 256"),
        ({"color": []}, "color must be an object"),
        ({"color": {"range": "tv"}}, "color.range must be"),
        ({"color": {"matrix": 5}}, "color.matrix must be a string"),
        ({"source": {"height": 1}}, "width"),
        ({"source": {"height": 1, "width": "x"}}, "source.width must be an integer"),
        ({"source": {"height": 1, "width": 1, "crop": [1, 2, 3]}}, "source.crop must be 4 integers"),
        ({"source": {"height": 1, "width": 1, "resize": [0, 3]}}, "source.resize must be in 1"),
        ({"training": []}, "training must be an object"),
    ],
)
def test_hostile_headers(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidBitstream, match=message):
        _ = Container.parse(_with_header(**changes)).header


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "header"),
        (b"[]", "must be an object"),
        (b"{", "header"),
        (b"\xff\xfe", "header"),
        (b'{"a":1,"a":2}', "same key twice"),
        (b'{"frames":NaN}', "NaN is not JSON"),
        (b'{"frames":-Infinity}', "Infinity is not JSON"),
        (b"[" * 60000, "nested too deeply"),
        (b'{"frames":' + b"9" * 60000 + b"}", "header"),
    ],
)
def test_hostile_json(text: bytes, message: str) -> None:
    with pytest.raises(InvalidBitstream, match=message):
        _ = Container.parse(_file([(b"HEAD", 1, _head(text))])).header


def test_deflate_bombs_are_not_inflated() -> None:
    bomb = deflate(bytes(1 << 27))
    text = json.dumps(_HEADER).encode()
    cases = [
        struct.pack("<I", 2**32 - 1) + bomb,
        struct.pack("<I", 1 << 16) + bomb,
        _head(text, size=len(text) - 1),
        _head(text, size=len(text) + 1),
        _head(text) + b"\0",
        _head(text)[:-1],
        b"\0\0\0",
        struct.pack("<I", 5) + b"\xff\xff",
    ]
    for head in cases:
        data = _file([(b"HEAD", 1, head)])
        tracemalloc.start()
        with pytest.raises(BitstreamError, match="section HEAD"):
            _ = Container.parse(data).header
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(data) + (1 << 20)


def test_writer_rejects() -> None:
    header = Header.from_json(json.dumps(_HEADER).encode())
    with pytest.raises(ValueError, match="different tags"):
        write_container(header, [Section("WGTS", b""), Section("WGTS", b"")])
    with pytest.raises(ValueError, match="different tags"):
        write_container(header, [Section("HEAD", b"")])
    with pytest.raises(ValueError, match="four upper-case"):
        write_container(header, [Section("note", b"")])
    with pytest.raises(TypeError, match="fps must be a Fraction"):
        Header({"model": "x"}, 1, 1, 1, 25, "p", "w")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="JSON values"):
        Header({"model": "x", "a": object()}, 1, 1, 1, Fraction(25), "p", "w")
    with pytest.raises(ValueError, match="finite"):
        Header({"model": "x", "a": float("nan")}, 1, 1, 1, Fraction(25), "p", "w")
    with pytest.raises(ValueError, match=r"source\.height"):
        Source(height=0, width=1)
    many = {str(i): "x" * 1000 for i in range(100)}
    with pytest.raises(ValueError, match="at most 65536 bytes"):
        write_container(Header({"model": "x"}, 1, 1, 1, Fraction(25), "p", "w", training=many), [])


def test_integers() -> None:
    for value in (0, 1, 127, 128, 300, 2**32, 2**63 - 1):
        assert Reader(varint(value), "x").varint() == value
        if value < 2**62:
            for signed in (value, -value):
                assert Reader(zigzag(signed), "x").zigzag() == signed
    assert varint(300) == b"\xac\x02"
    assert [zigzag(v) for v in (0, -1, 1, -2)] == [b"\0", b"\1", b"\2", b"\3"]
    for bad in (b"\x80\x00", b"\xff" * 9, b"\xff" * 20):
        with pytest.raises(InvalidBitstream, match="shortest form or too long"):
            Reader(bad, "x").varint()
    for cut in (b"", b"\x80"):
        with pytest.raises(TruncatedBitstream, match="x: needs 1 more"):
            Reader(cut, "x").varint()
    with pytest.raises(ValueError, match="must be in"):
        varint(-1)
    assert inflate(deflate(b"abc" * 100), 300, "x") == b"abc" * 100
