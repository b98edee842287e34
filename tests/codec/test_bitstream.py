from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bitstream_golden import contents, describe

from hflfnerv import huffman
from hflfnerv.codec._bytes import deflate, varint, zigzag
from hflfnerv.codec.bitstream import Bitstream, Header, write_bitstream
from hflfnerv.codec.container import Section, write_container
from hflfnerv.codec.entropy import HuffmanCoder, entropy_coder
from hflfnerv.codec.quantization import (
    LogStep,
    QuantizedTensor,
    dequantize,
    pair_shape,
    quantize,
    quantize_tensors,
)
from hflfnerv.codec.sections import MAX_ELEMENTS, TensorSection, encode_tensors
from hflfnerv.errors import BitstreamError, ChecksumMismatch, InvalidBitstream

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

Weights = dict[str, QuantizedTensor]


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return (
        a.bits == b.bits
        and a.step.axis == b.step.axis
        and type(a.step) is type(b.step)
        and a.symbols.dtype == b.symbols.dtype
        and np.array_equal(a.symbols, b.symbols)
        and all(
            x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
            for x, y in zip(a.step.arrays, b.step.arrays, strict=True)
        )
    )


def test_round_trip(
    header: Header, weights: Weights, embeddings: QuantizedTensor, entropy: str, tmp_path: Path
) -> None:
    data = write_bitstream(header, weights, embeddings, entropy=entropy)
    path = tmp_path / "a.hflf"
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path)):
        with Bitstream.open(source) as stream:
            assert stream.header == header
            assert stream.entropy == entropy
            assert stream.embedding_shape == (2, 1, 3)
            read = stream.read_weights({name: tensor.shape for name, tensor in weights.items()})
            assert list(read) == list(weights)
            assert all(_same(read[name], weights[name]) for name in weights)
            assert _same(stream.read_quantized_embeddings(), embeddings)
            assert np.array_equal(stream.read_embeddings(), dequantize(embeddings))
            assert sum(stream.section_bytes.values()) == stream.size == len(data)


@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_any_frame_alone_equals_that_frame_of_the_whole(
    header: Header, weights: Weights, entropy: str, axis: int | None
) -> None:
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 64, (90, 4, 2, 40)).astype(np.uint8)
    pairs = pair_shape(symbols.shape, axis)
    step = LogStep(rng.integers(-90, -20, pairs).astype(np.int16), rng.integers(-9, 70, pairs).astype(np.int16), axis)
    embeddings = QuantizedTensor(symbols, 6, step)
    stream = Bitstream.open(write_bitstream(replace(header, frames=90), weights, embeddings, entropy=entropy))
    whole = stream.read_embeddings()
    assert np.array_equal(whole, dequantize(embeddings))
    for frame in range(90):
        assert np.array_equal(stream.read_embeddings([frame]), whole[frame : frame + 1])
    for frames in ([89, 0, 0, 41], np.arange(30, 60), range(5, 80, 7), [88, 89]):
        assert np.array_equal(stream.read_embeddings(frames), whole[np.asarray(frames)])
    assert stream.read_embeddings([]).shape == (0, 4, 2, 40)
    for frames in ([90], [-1]):
        with pytest.raises(IndexError, match=r"indices must be in 0\.\.89"):
            stream.read_embeddings(frames)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges of rows that the Huffman coder is asked for."""
    ranges: list[tuple[int, int]] = []
    original = huffman.decode_rows

    def spy(data: bytes, start: int, stop: int, **options: int) -> np.ndarray:
        ranges.append((start, stop))
        return original(data, start, stop, **options)

    monkeypatch.setattr(huffman, "decode_rows", spy)
    return ranges


def test_one_frame_decodes_one_frame(header: Header, weights: Weights, asked: list[tuple[int, int]]) -> None:
    embeddings = quantize(np.random.default_rng(0).normal(size=(5, 16, 2, 4)), 6)
    stream = Bitstream.open(write_bitstream(header, weights, embeddings))
    stream.read_embeddings([3, 1, 2])
    assert asked == [(1, 4)]


@pytest.mark.parametrize("bits", [2, 6, 8, 9, 12])
def test_rows_alike_are_coded_as_differences(header: Header, weights: Weights, entropy: str, bits: int) -> None:
    rng = np.random.default_rng(1)
    # A walk of small steps, which leaves the range at both ends and comes in at the other.
    walk = rng.integers(0, 1 << bits, (1, 3, 2, 40)) + np.cumsum(rng.integers(-1, 2, (100, 3, 2, 40)), axis=0)
    symbols = (walk % (1 << bits)).astype(np.uint8 if bits <= 8 else np.int16)
    step = LogStep(np.array(-81, np.int16), np.array(5, np.int16), None)
    noise = rng.permutation(symbols.ravel()).reshape(symbols.shape)
    sizes = []
    for values in (symbols, noise):
        embeddings = QuantizedTensor(values, bits, step)
        stream = Bitstream.open(write_bitstream(replace(header, frames=100), weights, embeddings, entropy=entropy))
        assert _same(stream.read_quantized_embeddings(), embeddings)
        for frames in ([0], [31], [32], [99], [50, 3, 96, 64, 50]):
            assert np.array_equal(stream.read_embeddings(frames), dequantize(embeddings)[frames])
        sizes.append(stream.section_bytes["EMBD"])
    # No worse than two bits for each of the three differences, and for the four key rows the fourth code of two bits
    # with the plain symbol behind it; and the model.
    bound = (96 * 240 * 2 + 4 * 240 * (2 + bits)) / 8 + 2**bits + 600
    if bits > 2:  # a plain symbol takes 2 bits, too
        assert sizes[0] < bound < sizes[1]


def test_a_frame_is_read_from_its_key_row_on(header: Header, weights: Weights, asked: list[tuple[int, int]]) -> None:
    symbols = np.tile(np.arange(64, dtype=np.uint8), (100, 1)).reshape(100, 8, 2, 4)
    step = LogStep(np.array(-81, np.int16), np.array(5, np.int16), None)
    embeddings = QuantizedTensor(symbols, 6, step)
    stream = Bitstream.open(write_bitstream(replace(header, frames=100), weights, embeddings))
    for frames, runs in [([40], [(32, 41)]), ([99, 31, 5], [(0, 32), (96, 100)]), ([64], [(64, 65)])]:
        assert np.array_equal(stream.read_embeddings(frames), dequantize(embeddings)[frames])
        assert asked == runs
        asked.clear()


def test_hostile_differences() -> None:
    table = np.arange(12, dtype=np.uint8).reshape(3, 4)
    record = [_description(bits=3, sizes=[3, 4])]
    for interval in (1, 2, 255):
        good = _section(record, key_interval=interval, symbols=HuffmanCoder().encode_rows(table % 8))
        assert TensorSection(good, "section EMBD", rows=True).read_rows([2]).symbols.max() < 8
        bad = _section(record, key_interval=interval, symbols=HuffmanCoder().encode_rows(table))
        with pytest.raises(InvalidBitstream, match="does not fit 3 bits"):
            TensorSection(bad, "section EMBD", rows=True).read_rows([2])


def test_networks_without_embeddings(header: Header, weights: Weights, entropy: str) -> None:
    stream = Bitstream.open(write_bitstream(header, weights, None, entropy=entropy))
    assert stream.embedding_shape is None
    assert set(stream.section_bytes) == {"directory", "HEAD", "WGTS"}
    with pytest.raises(InvalidBitstream, match="no embeddings"):
        stream.read_embeddings([0])
    assert stream.accounting().embedding_values == 0


def test_weights_must_be_the_networks(header: Header, weights: Weights) -> None:
    stream = Bitstream.open(write_bitstream(header, weights, None))
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    assert list(stream.read_weights(dict(reversed(shapes.items())))) == list(weights)
    for wrong in (
        {**shapes, "stem.bias": (7,)},
        {**shapes, "more": (1,)},
        {name: shape for name, shape in shapes.items() if name != "head.bias"},
        {},
    ):
        with pytest.raises(InvalidBitstream, match="must fit the network"):
            stream.read_weights(wrong)


def test_embeddings_must_be_the_headers(header: Header, weights: Weights, embeddings: QuantizedTensor) -> None:
    with pytest.raises(ValueError, match=r"embeddings must be \[6, C, h, w\]"):
        write_bitstream(replace(header, frames=6), weights, embeddings)
    coder = HuffmanCoder()
    section = Section("EMBD", encode_tensors({"embeddings": embeddings}, coder, rows=True))
    data = write_container(replace(header, frames=6), [Section("WGTS", encode_tensors(weights, coder)), section])
    with pytest.raises(InvalidBitstream, match="must be one tensor"):
        _ = Bitstream.open(data).embedding_shape


def test_accounting(header: Header, weights: Weights, embeddings: QuantizedTensor, entropy: str) -> None:
    dahuffman = pytest.importorskip("dahuffman")
    data = write_bitstream(header, weights, embeddings, entropy=entropy)
    account = Bitstream.open(data).accounting()
    tensors = [*weights.values(), embeddings]
    symbols = np.concatenate([tensor.symbols.ravel() for tensor in tensors]).tolist()
    table = dahuffman.HuffmanCodec.from_data(symbols).get_code_table()
    assert account.paper_symbol_bits == sum(table[symbol][0] for symbol in symbols)
    assert account.paper_bits == account.paper_symbol_bits + 32 * sum(tensor.pairs for tensor in tensors)
    assert account.file_bytes == len(data) == sum(account.section_bytes.values())
    assert account.bits_per_pixel == 8 * len(data) / (5 * 17 * 31)
    assert account.parameters == sum(tensor.symbols.size for tensor in weights.values())
    assert account.embedding_values == embeddings.symbols.size
    assert account.entropy == entropy
    tensor_bytes = account.section_bytes["WGTS"] + account.section_bytes["EMBD"]
    assert account.side_information_bytes + account.symbol_bytes < tensor_bytes


# --- hostile input ---


def _read_all(data: bytes) -> tuple[object, ...]:
    """Everything a decoder reads, in a form that compares; each frame alone too."""
    stream = Bitstream.open(data)
    weights = {name: (dequantize(w).tobytes(), w.shape) for name, w in stream.read_weights().items()}
    if stream.embedding_shape is None:
        return stream.header, weights
    frames = [stream.read_embeddings([index]).tobytes() for index in range(stream.header.frames)]
    assert stream.read_embeddings().tobytes() == b"".join(frames)
    return stream.header, weights, stream.embedding_shape, frames


@pytest.fixture
def small(header: Header, weights: Weights, embeddings: QuantizedTensor, entropy: str) -> bytes:
    return write_bitstream(header, weights, embeddings, entropy=entropy)


def test_every_truncation_is_an_error(small: bytes) -> None:
    for length in range(len(small)):
        with pytest.raises(BitstreamError):
            _read_all(small[:length])


def test_every_bit_flip_is_an_error(small: bytes) -> None:
    for bit in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            _read_all(bytes(damaged))


def _repaired(data: bytes) -> bytes:
    """The same bytes with checksums that match, as an attacker would write them."""
    out = bytearray(data)
    (count,) = struct.unpack_from("<H", out, 10)
    offset = 16 + 20 * count
    for entry in range(12, 12 + 20 * count, 20):
        (length,) = struct.unpack_from("<Q", out, entry + 8)
        struct.pack_into("<I", out, entry + 16, zlib.crc32(out[offset : offset + length]))
        offset += length
    struct.pack_into("<I", out, 12 + 20 * count, zlib.crc32(out[: 12 + 20 * count]))
    return bytes(out)


def test_every_bit_flip_under_matching_checksums_is_read_or_an_error(small: bytes) -> None:
    first = 12 + 20 * struct.unpack_from("<H", small, 10)[0] + 4
    outcomes = set()
    for bit in range(8 * first, 8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            _read_all(_repaired(bytes(damaged)))
            outcomes.add("read")
        except BitstreamError:
            outcomes.add("error")
    assert outcomes == {"read", "error"}


def _description(**changes: object) -> bytes:
    fields = {"name": b"a", "bits": 8, "scheme": 2, "axis": 255, "sizes": [4], "planes": [(0, 0), (0, 0)], **changes}
    out = varint(len(fields["name"])) + fields["name"]  # type: ignore[arg-type,operator]
    out += bytes([fields["bits"], fields["scheme"], fields["axis"], fields.get("rank", len(fields["sizes"]))])  # type: ignore
    out += b"".join(varint(size) for size in fields["sizes"])  # type: ignore[attr-defined]
    return out + b"".join(zigzag(offset) + bytes([mode]) for offset, mode in fields["planes"])  # type: ignore[attr-defined]


def _section(
    tensors: list[bytes], *, count: int | None = None, size: int | None = None, coder: int = 0, key_interval: int = 0,
    raw: bytes = b"", planes: bytes = b"", symbols: bytes | None = None,
) -> bytes:  # fmt: skip
    text = varint(len(tensors) if count is None else count) + b"".join(tensors)
    deflated = deflate(text)
    if symbols is None:
        symbols = HuffmanCoder().encode_arrays([np.arange(4, dtype=np.uint8)] * len(tensors))
    declared = len(text) if size is None else size
    return struct.pack("<BBIIII", coder, key_interval, declared, len(deflated), len(raw), len(planes)) + (
        deflated + raw + planes + symbols
    )


def test_tensor_sections_written_by_hand() -> None:
    read = TensorSection(_section([_description()]), "section WGTS").read()
    assert dequantize(read["a"]).tolist() == [0, 1, 2, 3]


_CODER = HuffmanCoder()
_NINES = _CODER.encode_arrays([np.full(4, 9, dtype=np.uint8)])
_ONES = _CODER.encode_arrays([np.ones(4, dtype=np.uint8)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "needs 18 more bytes"),
        (lambda: _section([_description()], key_interval=1), "interval of key rows must be 0"),
        (lambda: _section([_description()], coder=7), "entropy coder must be"),
        (lambda: _section([_description()], size=1 << 24), "the limit is"),
        (lambda: _section([_description()], size=5), "must give the 5 bytes"),
        (lambda: _section([], count=0), "must be 1 to 4096, got 0"),
        (lambda: _section([_description()], count=2**40), "must be 1 to 4096"),
        (lambda: _section([_description()], count=2), "needs 1 more"),
        (lambda: _section([_description() + b"\0"]), "1 bytes too many"),
        (lambda: _section([_description()] * 2), "the same name"),
        (lambda: _section([_description(name=b"\xff")]), "not UTF-8"),
        (lambda: _section([_description(name=b"\x1b]0;x\x07")]), r"must be printable, .*, got '\\x1b"),
        (lambda: _section([_description(name="\u202e".encode())]), r"must be printable, .*, got '\\u202e"),
        (lambda: _section([_description(name=b"x" * 256)]), "of at most 255 bytes"),
        (lambda: _section([_description(bits=1)]), "bits must be in"),
        (lambda: _section([_description(bits=13)]), "bits must be in"),
        (lambda: _section([_description(bits=2, sizes=[4])]), None),
        (lambda: _section([_description(scheme=3)]), "scheme must be"),
        (lambda: _section([_description(axis=1)]), "1 axes and pairs along axis 1"),
        (lambda: _section([_description(sizes=[])]), "0 axes"),
        (lambda: _section([_description(sizes=[1] * 9)]), "9 axes"),
        (lambda: _section([_description(sizes=[0])]), "is empty or over"),
        (lambda: _section([_description(sizes=[MAX_ELEMENTS + 1])]), "is empty or over"),
        (lambda: _section([_description(sizes=[2**62] * 8)]), "is empty or over"),
        (
            lambda: _section([_description(sizes=[MAX_ELEMENTS]), _description(name=b"b", sizes=[1])]),
            "elements, the limit is",
        ),
        # Steps that take no byte: one for each element.
        (lambda: _section([_description(axis=1, sizes=[1 << 23, 1])]), "declare 8388608 steps, the limit is 4194304"),
        (lambda: _section([_description(planes=[(2**17 + 1, 0), (0, 0)])]), "has offset"),
        (lambda: _section([_description(planes=[(0, 12), (0, 0)])]), "mode 12"),
        (lambda: _section([_description(planes=[(2048, 0), (0, 0)])]), "exponent must be in"),
        (lambda: _section([_description(planes=[(0, 0), (40000, 0)])]), "does not fit 16 bits"),
        (lambda: _section([_description(planes=[(0, 0), (-32768, 0)])]), "zero_point must be in"),
        (lambda: _section([_description(scheme=1, planes=[(70000, 0), (0, 0)])]), "not a float16"),
        (lambda: _section([_description(scheme=1, planes=[(0x7C00, 0), (0x7C00, 0)])]), "must be finite"),
        (lambda: _section([_description(scheme=1, planes=[(-2, 0), (0, 0)])]), "scale not negative"),
        (lambda: _section([_description(scheme=0, planes=[])]), "needs 4 more bytes"),
        (lambda: _section([_description(scheme=0, planes=[])], raw=struct.pack("<ff", 0, np.nan)), "must be finite"),
        (lambda: _section([_description(scheme=0, planes=[])], raw=bytes(9)), "1 bytes too many"),
        (lambda: _section([_description()], raw=b"\0"), "1 bytes too many"),
        (lambda: _section([_description()], planes=_ONES), "belongs to no tensor"),
        (lambda: _section([_description(planes=[(0, 1), (0, 0)])]), "the data ends"),
        (lambda: _section([_description(axis=0, sizes=[4, 2], planes=[(0, 4), (0, 0)])], planes=_ONES), "not those"),
        (lambda: _section([_description(sizes=[5])]), "not those"),
        (lambda: _section([_description(sizes=[MAX_ELEMENTS])]), "not those that the section describes"),
        (lambda: _section([_description(bits=12)]), "not those that the section describes"),
        (lambda: _section([_description(bits=2)], symbols=_NINES), "symbols must be"),
        (lambda: _section([_description()], symbols=b""), "the data ends"),
    ],
)  # fmt: skip
def test_hostile_tensor_sections(make: Callable[[], bytes], message: str | None) -> None:
    if message is None:
        assert TensorSection(make(), "section WGTS").read()["a"].bits == 2
        return
    with pytest.raises(BitstreamError, match=message):
        TensorSection(make(), "section WGTS").read()


def test_hostile_range_coded_rows() -> None:
    pytest.importorskip("constriction")
    coder = entropy_coder("range")
    table = np.arange(40, dtype=np.uint8).reshape(10, 4)
    good = coder.encode_rows(table)
    wanted = np.arange(10)
    assert np.array_equal(coder.decode_rows(good, (10, 4), np.dtype(np.uint8), wanted), table)
    assert good[:2] == bytes([40, *varint(512)[:1]])
    for data, message in [
        (varint(0) + good[1:], "alphabet"),
        (varint(257) + good[1:], "alphabet"),
        (good[:1] + varint(0) + good[3:], "1 to 2048 rows"),
        (good[:1] + varint(4096) + good[3:], "1 to 2048 rows"),
        (good[:3] + varint(100) + good[4:], "fixed total"),
        (good[:3] + varint(0) + good[4:], "fixed total"),
        (good[:3] + varint(2**63 - 1) + varint(2**63 - 1) + good[5:], "fixed total"),
        (good[:-12] + varint(2**63 - 1), "groups need|needs 1 more"),
        (good + b"\0", "groups need"),
        (good + bytes(4), "groups need"),
        (good[:-4], "groups need"),
        (b"", "needs 1 more"),
    ]:
        with pytest.raises(BitstreamError, match=message):
            coder.decode_rows(data, (10, 4), np.dtype(np.uint8), wanted)


def test_writer_rejects(weights: Weights) -> None:
    tensor = weights["stem.bias"]
    for tensors, message in [
        ({}, "tensors must be 1 to 4096, got 0"),
        ({str(i): tensor for i in range(4097)}, "got 4097"),
        ({"x" * 256: tensor}, "at most 255 bytes"),
        ({"\x1b": tensor}, "must be printable"),
        ({f"{i:0255}": tensor for i in range(4096)}, "must fit 1048576 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_tensors(tensors, HuffmanCoder())
    with pytest.raises(ValueError, match="tensors must be 1 to 1, got 4"):
        encode_tensors(weights, HuffmanCoder(), rows=True)


# --- golden files ---


@pytest.mark.parametrize("rows", ["", "differences-"])
@pytest.mark.parametrize("entropy", ["huffman", "range"], indirect=True)
def test_golden_files_are_read_as_they_were_written(entropy: str, rows: str) -> None:
    data = (GOLDEN / f"v1-{rows}{entropy}.hflf").read_bytes()
    assert describe(data) == json.loads((GOLDEN / f"v1-{rows}{entropy}.json").read_text())


@pytest.mark.parametrize("entropy", ["huffman", "range"], indirect=True)
def test_golden_contents_give_the_golden_bytes(entropy: str) -> None:
    """Of the parts whose bytes this format fixes: deflate and Huffman leave the encoder choices, the rest does not."""
    golden = Bitstream.open((GOLDEN / f"v1-differences-{entropy}.hflf").read_bytes())
    written = Bitstream.open(write_bitstream(*contents(), entropy=entropy))
    assert written.header.to_json() == golden.header.to_json()
    for tag in ("_weights", "_embeddings"):
        ours, theirs = getattr(written, tag), getattr(golden, tag)
        assert ours.records == theirs.records
        for part in ("_raw", "key_interval") if entropy == "huffman" else ("_raw", "_planes", "_symbols"):
            assert getattr(ours, part) == getattr(theirs, part)
    # Where differences do not pay: the rows as they are, which the older files have.
    if entropy == "range":
        older = Bitstream.open((GOLDEN / "v1-range.hflf").read_bytes())
        table = contents()[2].symbols.reshape(4, -1)
        assert entropy_coder(entropy).encode_rows(table) == older._embeddings._symbols


def test_golden_file_with_a_damaged_part_still_gives_the_others() -> None:
    data = bytearray((GOLDEN / "v1-huffman.hflf").read_bytes())
    data[-1] ^= 1
    stream = Bitstream.open(bytes(data))
    assert len(stream.read_weights()) == 4
    with pytest.raises(ChecksumMismatch, match="section EMBD"):
        stream.read_embeddings([0])


def test_side_information_is_small() -> None:
    """Of networks as ``encode`` makes them: the paper's three streams at two sizes, and their embeddings."""
    rng = np.random.default_rng(0)
    for widths in ((60, 50, 42, 35, 29, 24), (26, 22, 18, 15, 12, 12)):
        tensors = {"stem": rng.normal(size=(widths[0], 16, 1, 1))}
        for i, (s, k) in enumerate(zip((5, 4, 4, 2, 2), (1, 3, 5, 5, 5), strict=True)):
            shape = (widths[i + 1] * s * s, widths[i], k, k)
            tensors[f"{i}"] = rng.normal(size=shape) * rng.uniform(0.7, 1.5, (shape[0], 1, k, k))
            tensors[f"{i}"] *= rng.uniform(0.7, 1.5, (1, shape[1], k, k))
        quantized = quantize_tensors(tensors, 8)
        assert sum(tensor.pairs > 1 for tensor in quantized.values()) >= 3
        section = TensorSection(encode_tensors(quantized, HuffmanCoder()), "section WGTS")
        assert section.side_bytes < 0.012 * (section.side_bytes + section.symbol_bytes)
