"""hflfnerv.huffman: every implementation, every instruction set, good data and bad."""

from __future__ import annotations

import collections
import functools
import gc
import pathlib
import shutil
import subprocess
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hflfnerv import _ext, huffman
from hflfnerv.errors import (
    BackendUnavailable,
    BadMagic,
    BitstreamError,
    ChecksumMismatch,
    InvalidBitstream,
    InvalidCode,
    TruncatedBitstream,
    UnsupportedVersion,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
CSRC = pathlib.Path(__file__).parents[1] / "csrc"
needs_ext = pytest.mark.skipif(_ext.unavailable() is not None, reason=str(_ext.unavailable()))
IMPLS = [pytest.param("cpp", marks=needs_ext), "reference"]


def simd_levels() -> list[str]:
    return [] if _ext.unavailable() else _ext.load().simd_levels()


def laplace(size, scale, dtype, seed=0):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    centre = 100 if dtype == np.uint8 else 0
    return np.clip(np.rint(np.random.default_rng(seed).laplace(centre, scale, size)), low, high).astype(dtype)


def skewed(size, dtype):
    """Counts like Fibonacci numbers, so that the unlimited code would be longer than the limit."""
    counts = [1, 1]
    while sum(counts) < size:
        counts.append(counts[-1] + counts[-2])
    symbols = np.repeat(np.arange(len(counts)), counts)[:size].astype(dtype)
    return np.random.default_rng(1).permutation(symbols)


def dyadic(lengths, size, dtype):
    """Symbols whose optimal code has these lengths, and in the rest of the code up to 128 more; in random order."""
    counts = [2048 >> length for length in lengths]
    spare = 2048 - sum(counts)
    counts += [spare // 128 + (i < spare % 128) for i in range(min(spare, 128))]
    symbols = np.resize(np.repeat(np.arange(len(counts)), counts), size).astype(dtype)
    return np.random.default_rng(7).permutation(symbols)


CASES = {
    "empty": np.zeros((0, 3), np.uint8),
    "scalar": np.array(-300, np.int16),
    "one": np.array([[[255]]], np.uint8),
    "constant": np.full((40, 5), -1, np.int16),
    "two": (np.arange(300) % 7 == 0).astype(np.uint8),
    "uniform": np.random.RandomState(0).randint(0, 256, 300).astype(np.uint8),
    "ramp": (np.arange(900, dtype=np.int64) ** 2 // 4000).astype(np.uint8).reshape(30, 30),
    "wide": ((np.arange(700, dtype=np.int64) % 50) ** 3 // 9 - 3000).astype(np.int16),
}
MANY = [CASES["ramp"], CASES["ramp"][:9] // 2, CASES["wide"], CASES["empty"], CASES["constant"], CASES["two"]]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_golden_bytes(name, impl):
    data = huffman.encode(CASES[name], chunk_symbols=64, impl=impl)
    assert data == (GOLDEN / f"huffman_{name}.bin").read_bytes()
    for verify in (True, False):
        assert same(huffman.decode(data, impl=impl, verify=verify), CASES[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_list_round_trip_and_golden_bytes(impl):
    data = huffman.encode_many(MANY, chunk_symbols=64, impl=impl)
    assert data == (GOLDEN / "huffman_many.bin").read_bytes()
    for verify in (True, False):
        decoded = huffman.decode_many(data, impl=impl, verify=verify)
        assert len(decoded) == len(MANY)
        assert all(same(a, b) for a, b in zip(decoded, MANY, strict=True))
    assert huffman.decode_many(huffman.encode_many([], impl=impl), impl=impl) == []
    (single,) = huffman.decode_many(huffman.encode(MANY[0], impl=impl), impl=impl)
    assert same(single, MANY[0])


@needs_ext
@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize(
    "symbols",
    [
        *(laplace(size, scale, np.uint8) for size in (9_000, 130_001) for scale in (0.1, 0.5, 2, 6, 30)),
        *(laplace(50_001, scale, np.int16) for scale in (0.5, 40, 3000)),
        skewed(150_000, np.uint8),
        skewed(150_000, np.int16),
        np.random.default_rng(2).integers(-32768, 32768, 60_000).astype(np.int16),
        np.random.default_rng(3).integers(0, 256, 150_000).astype(np.uint8),
        np.random.default_rng(4).integers(0, 200, 65_536).astype(np.uint8),
        # Lengths of codes that lie apart, that are missing, and that crowd at the end of the code.
        *(
            dyadic(lengths, size, dtype)
            for lengths in (
                [1],
                [1, 3],
                [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
                [2, 2, 2, 6, 6],
                [3] * 7,
                [6] * 60 + [10] * 50,
            )
            for size, dtype in ((2048 * 70 + 1, np.uint8), (2048 * 9, np.int16))
        ),
    ],
    ids=lambda a: f"{a.dtype}-{a.size}-{len(np.unique(a))}",
)
def test_every_instruction_set_writes_and_reads_the_same_bytes(symbols, level):
    c = _ext.load()
    for chunk_symbols in (50, 127, 1920, 2**28):
        data = huffman.encode(symbols, chunk_symbols=chunk_symbols, impl="reference")
        assert c.huffman_encode([symbols], [0], False, chunk_symbols, level) == data
        for verify in (True, False):
            assert same(c.huffman_decode(data, False, symbols.size, verify, simd=level)[0], symbols)
    assert same(huffman.decode(huffman.encode(symbols), impl="reference"), symbols)


arrays = hnp.arrays(
    st.sampled_from([np.uint8, np.int16]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
    elements=st.integers(0, 255) | st.integers(0, 3),
    fill=st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(symbols=arrays, chunk_symbols=st.integers(1, 3000))
def test_property_round_trip(symbols, chunk_symbols):
    data = huffman.encode(symbols, chunk_symbols=chunk_symbols)
    assert data == huffman.encode(symbols, chunk_symbols=chunk_symbols, impl="reference")
    for verify in (True, False):
        assert same(huffman.decode(data, verify=verify), symbols)
        assert same(huffman.decode(data, impl="reference", verify=verify), symbols)


@settings(max_examples=30, deadline=None)
@given(st.lists(arrays, max_size=5))
def test_property_list_round_trip(symbols):
    data = huffman.encode_many(symbols)
    assert data == huffman.encode_many(symbols, impl="reference")
    for impl in ("auto", "reference"):
        assert all(same(a, b) for a, b in zip(huffman.decode_many(data, impl=impl), symbols, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_property_any_body_gives_arrays_or_a_bitstream_error(body):
    """A valid header round any bytes: every implementation agrees, down to the class of the error.

    And so they do, unverified, where the checksum in the header is wrong.
    """
    data = with_header(body)
    damaged = bytearray(data)
    damaged[7] ^= 1
    assert outcome_of(damaged) is ChecksumMismatch
    expected = outcome_of(data)
    assert outcome_of(data, impl="reference") == expected
    assert outcome_of(damaged, verify=False) == expected
    assert outcome_of(damaged, impl="reference", verify=False) == expected


def outcome_of(data, **options):
    """What the arrays are, or the class of the error."""
    try:
        return [(a.dtype, a.shape, a.tobytes()) for a in huffman.decode_many(data, max_symbols=10**5, **options)]
    except BitstreamError as error:
        return type(error)


def with_header(body):
    tail = len(body).to_bytes(6, "little") + body
    return b"HFLH\x01" + zlib.crc32(tail, zlib.crc32(b"HFLH\x01")).to_bytes(4, "little") + tail


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["empty", "constant", "two", "wide"])
def test_every_truncation_and_every_flipped_bit_is_refused(name, impl):
    data = (GOLDEN / f"huffman_{name}.bin").read_bytes()
    for size in range(len(data)):
        with pytest.raises(TruncatedBitstream):
            huffman.decode(data[:size], impl=impl)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            huffman.decode(damaged, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_flipped_bit_behind_a_valid_checksum_is_read_alike_or_refused(impl):
    body = (GOLDEN / "huffman_two.bin").read_bytes()[15:]
    outcomes = collections.Counter()
    for bit in range(8 * len(body)):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            huffman.decode(with_header(bytes(damaged)), impl=impl, max_symbols=10**6)
            outcomes["decoded"] += 1
        except BitstreamError as error:
            outcomes[type(error)] += 1
    assert outcomes[InvalidBitstream] > 0
    assert outcomes[InvalidCode] > 0
    assert outcomes["decoded"] > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["empty", "scalar", "constant", "two", "uniform", "wide"])
def test_unverified_damage_is_read_as_under_a_valid_checksum(name, impl):
    """Every flipped bit and every truncation, raw, constant and Huffman coded."""
    data = (GOLDEN / f"huffman_{name}.bin").read_bytes()
    good = outcome_of(data)
    outcomes = collections.Counter()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        outcome = outcome_of(damaged, impl=impl, verify=False)
        if 5 * 8 <= bit < 9 * 8:  # the checksum itself
            assert outcome == good
        elif bit < 15 * 8:  # what is in the header besides
            assert outcome in (BadMagic, UnsupportedVersion, TruncatedBitstream, InvalidBitstream)
        else:
            assert outcome == outcome_of(with_header(bytes(damaged[15:])))
            outcomes["error" if isinstance(outcome, type) else "decoded"] += 1
    assert outcomes["error"] > 0
    assert outcomes["decoded"] > 0
    for size in range(len(data)):
        assert outcome_of(data[:size], impl=impl, verify=False) is TruncatedBitstream


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_the_cause(impl):
    data = huffman.encode(CASES["ramp"], impl=impl)
    for bad, error in [
        (b"", TruncatedBitstream),
        (b"HF", TruncatedBitstream),
        (b"PK\x03\x04" + data[4:], BadMagic),
        (data[:4] + b"\x02" + data[5:], UnsupportedVersion),
        (data[:-1], TruncatedBitstream),
        (data + b"\0", InvalidBitstream),
        (data[:-1] + bytes([data[-1] ^ 1]), ChecksumMismatch),
    ]:
        with pytest.raises(error):
            huffman.decode(bad, impl=impl)
    with pytest.raises(InvalidBitstream, match="decode_many"):
        huffman.decode(huffman.encode_many(MANY, impl=impl), impl=impl)
    with pytest.raises(InvalidBitstream, match="decode_many"):
        huffman.decode_rows(huffman.encode_many(MANY, impl=impl), 0, 1, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_declared_sizes_are_bounded(impl):
    data = huffman.encode(np.zeros((1000, 1000), np.uint8), impl=impl)
    assert len(data) < 30
    with pytest.raises(InvalidBitstream, match="max_symbols"):
        huffman.decode(data, impl=impl, max_symbols=10**6 - 1)
    assert huffman.decode(data, impl=impl, max_symbols=10**6).size == 10**6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("chunk_symbols", [1, 7, 24, 100, None])
def test_decode_rows(dtype, chunk_symbols, impl):
    symbols = laplace((30, 4, 6), 2, dtype)
    data = huffman.encode(symbols, chunk_symbols=chunk_symbols, impl=impl)
    for start, stop in [(0, 30), (0, 0), (30, 30), (0, 1), (29, 30), (3, 17), (12, 13)]:
        assert same(huffman.decode_rows(data, start, stop, impl=impl), symbols[start:stop])
    for start, stop in [(-1, 2), (2, 1), (0, 31), (0, 2**70)]:
        with pytest.raises(ValueError, match="start"):
            huffman.decode_rows(data, start, stop, impl=impl)
    with pytest.raises(ValueError, match="0-d"):
        huffman.decode_rows(huffman.encode(CASES["scalar"], impl=impl), 0, 0, impl=impl)
    for constant in (CASES["constant"], CASES["empty"]):
        rows = huffman.decode_rows(huffman.encode(constant, impl=impl), 0, len(constant), impl=impl)
        assert same(rows, constant)


@pytest.mark.parametrize("impl", IMPLS)
def test_decode_rows_reads_only_the_chunks_it_needs(impl):
    """A damaged chunk does not disturb the rows in the other chunks (its checksum put right)."""
    symbols = laplace((20, 100), 3, np.uint8)
    body = bytearray(huffman.encode(symbols, chunk_symbols=100, impl=impl)[15:])
    middle = len(body) // 2
    body[middle : middle + 8] = bytes(255 - b for b in body[middle : middle + 8])
    data = with_header(bytes(body))
    wrong_checksum = data[:5] + bytes([data[5] ^ 1]) + data[6:]
    for readable, verify in [(data, True), (data, False), (wrong_checksum, False)]:
        assert same(huffman.decode_rows(readable, 0, 5, impl=impl, verify=verify), symbols[:5])
        assert same(huffman.decode_rows(readable, 16, 20, impl=impl, verify=verify), symbols[16:])
    with pytest.raises(ChecksumMismatch):
        huffman.decode_rows(wrong_checksum, 0, 5, impl=impl)


def test_noncontiguous_arrays_are_copied():
    symbols = laplace((40, 30), 4, np.int16)
    for view in (symbols.T, symbols[::2, ::-3], np.asfortranarray(symbols)):
        assert same(huffman.decode(huffman.encode(view)), np.ascontiguousarray(view))


@needs_ext
@pytest.mark.parametrize("verify", [True, False])
def test_without_a_copy_what_is_stored_is_a_view(verify):
    random = np.random.default_rng(5)
    stored = random.integers(0, 256, (40, 50), dtype=np.uint8)
    words = random.integers(-(2**15), 2**15, 31, dtype=np.int16)
    for symbols in (stored, words):
        storage = huffman.encode(symbols)
        # At an even and at an odd address.
        for before in (0, 1):
            buffer = np.frombuffer(bytearray(before) + storage, np.uint8)[before:]
            array = huffman.decode(buffer, verify=verify, copy=False)
            at = buffer.ctypes.data + len(storage) - symbols.nbytes
            assert same(array, symbols)
            assert np.shares_memory(array, buffer) == (at % symbols.itemsize == 0)
            assert array.flags.writeable == bool(at % symbols.itemsize)
            rows = huffman.decode_rows(buffer, 7, 19, verify=verify, copy=False)
            assert same(rows, symbols[7:19])
            assert np.shares_memory(rows, buffer) == np.shares_memory(array, buffer)
    # What does not shrink, what does, nothing, and two arrays that share a group.
    many = [stored, CASES["ramp"], stored[:0], stored[::-1].copy(), CASES["constant"]]
    storage = bytearray(huffman.encode_many(many))
    arrays = huffman.decode_many(storage, verify=verify, copy=False)
    assert all(same(a, b) for a, b in zip(arrays, many, strict=True))
    shared = [np.shares_memory(array, np.frombuffer(storage, np.uint8)) for array in arrays]
    assert shared == [True, False, False, True, False]
    with pytest.raises(BufferError):  # the views keep it as it is
        storage.clear()
    data = huffman.encode(stored)
    array = huffman.decode(data, verify=verify, copy=False)
    expected, place = data[:], array.ctypes.data
    del data
    gc.collect()
    assert array.tobytes() == expected[-array.size :]
    assert array.ctypes.data == place
    assert same(huffman.decode(expected, verify=verify, copy=False, impl="reference"), stored)


@needs_ext
def test_a_view_is_verified_first():
    data = bytearray(huffman.encode(CASES["uniform"]))
    data[-1] ^= 1
    for decode in (huffman.decode, huffman.decode_many, functools.partial(huffman.decode_rows, start=0, stop=3)):
        with pytest.raises(ChecksumMismatch):
            decode(data, copy=False)


def test_data_may_be_any_contiguous_buffer():
    data = huffman.encode(CASES["ramp"])
    for buffer in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert same(huffman.decode(buffer), CASES["ramp"])
    with pytest.raises(ValueError, match="contiguous"):
        huffman.decode(memoryview(data + data)[::2])


def test_rejects():
    ok = CASES["two"]
    for call, error, match in [
        (lambda: huffman.encode([1, 2]), TypeError, "NumPy array, got list"),
        (lambda: huffman.encode(np.zeros(3)), TypeError, "uint8 or int16, got float64"),
        (lambda: huffman.encode(np.zeros(3, ">i2")), TypeError, "uint8 or int16"),
        (lambda: huffman.encode_many([ok, np.zeros(3, np.int8)]), TypeError, r"arrays\[1\]"),
        (lambda: huffman.encode(ok, chunk_symbols=0), ValueError, "chunk_symbols must be in"),
        (lambda: huffman.encode(ok, chunk_symbols=2**28 + 1), ValueError, "chunk_symbols must be in"),
        (lambda: huffman.encode(ok, chunk_symbols=1.5), TypeError, "integer"),
        (lambda: huffman.encode(ok, impl="cuda"), ValueError, "impl must be one of"),
        (lambda: huffman.encode(np.zeros((0, 2**41), np.uint8)), ValueError, "elements"),
        (lambda: huffman.decode("text"), TypeError, "data must be bytes"),
        (lambda: huffman.decode(huffman.encode(ok), max_symbols=-1), ValueError, "max_symbols"),
        (lambda: huffman.code_lengths([1.0], 3), TypeError, "counts must hold integers"),
        (lambda: huffman.code_lengths([[1]], 3), ValueError, "one-dimensional"),
        (lambda: huffman.code_lengths([-1], 3), ValueError, r"counts must be in \[0"),
        (lambda: huffman.code_lengths([1] * 9, 3), ValueError, "max_bits must be at least 4"),
        (lambda: huffman.code_lengths([1], 21), ValueError, "max_bits must be in"),
        (lambda: huffman.payload_bits(np.zeros(1)), TypeError, "symbols must have dtype"),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_missing_extension_is_named_and_never_replaced(monkeypatch):
    monkeypatch.setattr(_ext, "_module", lambda: (None, "it was never built; install a compiler"))
    with pytest.raises(BackendUnavailable, match="never built"):
        huffman.encode(CASES["two"], impl="cpp")
    assert huffman.decode(huffman.encode(CASES["two"])).size == CASES["two"].size


# --- optimality ---


def entropy_coded_bits(counts):
    """The cost of an optimal prefix code: the sum of the weights of the inner nodes of Huffman's tree."""
    weights, total = sorted(c for c in counts if c), 0
    while len(weights) > 1:
        a, b, *weights = weights
        total += a + b
        weights = sorted([*weights, a + b])
    return total


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(5))
def test_code_lengths_are_optimal_and_complete(seed, impl):
    counts = np.random.default_rng(seed).geometric(0.02 + 0.1 * seed, 40) - 1
    lengths = huffman.code_lengths(counts, 20, impl=impl)
    assert int(counts @ lengths.astype(int)) == entropy_coded_bits(counts.tolist())
    assert (lengths[counts == 0] == 0).all()
    assert sum(2.0 ** -int(length) for length in lengths if length) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_limited_code_lengths_are_optimal(impl):
    """Against an exhaustive search over all complete codes of 7 symbols."""
    counts = [1, 2, 4, 8, 16, 32, 64]

    def best(symbols, kraft, limit):
        if symbols == 0:
            return 0 if kraft == 0 else None
        options = []
        for length in range(1, limit + 1):
            if 2 ** (limit - length) <= kraft:
                rest = best(symbols - 1, kraft - 2 ** (limit - length), limit)
                if rest is not None:
                    options.append(rest + counts[symbols - 1] * length)
        return min(options, default=None)

    for limit in (3, 4, 5, 6):
        lengths = huffman.code_lengths(counts, limit, impl=impl)
        assert lengths.max() <= limit
        assert int(np.array(counts) @ lengths.astype(int)) == best(7, 2**limit, limit)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("symbols", [[], [3], [3, 3], [3, 4], [1, 1, 2, 2, 3, 3], list(range(50)) * 2], ids=len)
def test_payload_bits_equals_dahuffman(symbols, dtype):
    check_payload_bits(np.array(symbols, dtype))


@pytest.mark.parametrize("scale", [0.3, 2, 20])
def test_payload_bits_equals_dahuffman_on_noise(scale):
    check_payload_bits(laplace(5000, scale, np.uint8))
    check_payload_bits(laplace(3000, 30 * scale, np.int16))


def check_payload_bits(symbols):
    dahuffman = pytest.importorskip("dahuffman")
    if symbols.size == 0:
        assert huffman.payload_bits(symbols) == 0
        return
    counts = collections.Counter(symbols.tolist())
    table = dahuffman.HuffmanCodec.from_frequencies(counts).get_code_table()
    assert huffman.payload_bits(symbols) == sum(n * table[s][0] for s, n in counts.items())


@pytest.mark.shared_data
def test_real_weights(shared_data):
    """The sizes that the published HNeRV 1.5M model is to reach, and its symbols back."""
    torch = pytest.importorskip("torch")
    checkpoint = torch.load(shared_data / "hnerv_bunny_1.5m.pth", weights_only=True, map_location="cpu")
    parts = []

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "quant" and torch.is_tensor(item):
                    parts.append(item.numpy().astype(np.uint8))
                else:
                    walk(item)

    walk(checkpoint)
    symbols = np.concatenate([part.ravel() for part in parts])
    assert symbols.size == 1_505_172
    assert -(-huffman.payload_bits(symbols) // 8) == 1_434_725
    data = huffman.encode(symbols)
    assert len(data) <= 1_434_725 * 1.0025
    assert same(huffman.decode(data), symbols)
    many = huffman.encode_many(parts)
    assert len(many) < len(data)
    assert all(same(a, b) for a, b in zip(huffman.decode_many(many), parts, strict=True))


def test_lists_share_tables_where_that_pays():
    alike = [laplace(400, 3, np.uint8, seed) for seed in range(6)]
    together = huffman.encode_many(alike)
    assert len(together) < sum(len(huffman.encode(a)) for a in alike)
    different = [laplace(20_000, 1, np.uint8), laplace(20_000, 60, np.uint8)]
    assert len(huffman.encode_many(different)) < len(huffman.encode(np.concatenate(different))) - 1000
    # More arrays than are compared pair by pair.
    many = [laplace(50, 1 + i % 2, np.uint8, i) for i in range(150)]
    assert all(same(a, b) for a, b in zip(huffman.decode_many(huffman.encode_many(many)), many, strict=True))


# --- the core's own tests, with sanitizers ---


@pytest.mark.slow
def test_core_with_sanitizers(tmp_path):
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make")
    result = subprocess.run(
        ["make", "-s", "-j2", "test", "CXX=g++", f"BUILD={tmp_path}"],
        cwd=CSRC,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all good" in result.stdout


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("offset", [0, 1, 17])
def test_large_raw_arrays_are_checked_while_they_are_copied(offset, dtype):
    # Above 1 MiB the AVX-512 path computes the checksum during the copy; any size, any alignment, any damage.
    rng = np.random.default_rng(3)
    symbols = rng.integers(0, 1 << 16, (1 << 20) + offset).astype(np.uint16).astype(dtype)
    data = huffman.encode(symbols)
    assert len(data) > symbols.nbytes  # stored as it is
    for verify in (True, False):
        assert same(huffman.decode(data, verify=verify), symbols)
    for array in (huffman.decode_many(huffman.encode_many([symbols[:0], symbols])),):
        assert np.array_equal(array[1], symbols)
    for at in [0, 5, 8, len(data) // 2, len(data) - 1, *rng.integers(0, len(data), 20).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(BitstreamError):
            huffman.decode(bytes(damaged))
        if at > 100:
            assert np.count_nonzero(huffman.decode(bytes(damaged), verify=False) != symbols) == 1
