from __future__ import annotations

import bisect
import sys

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hflfnerv import huffman
from hflfnerv.codec.entropy import entropy_coder, entropy_coder_by_code
from hflfnerv.errors import BackendUnavailable, BitstreamError, ChecksumMismatch, InvalidBitstream

_ARRAYS = st.lists(
    st.one_of(
        hnp.arrays(np.uint8, st.integers(1, 300), elements=st.integers(0, 255)),
        hnp.arrays(np.uint8, st.integers(1, 300), elements=st.integers(0, 3)),
        hnp.arrays(np.int16, st.integers(1, 300), elements=st.integers(0, 4095)),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", ["huffman", "range"])
def test_arrays_round_trip(name: str) -> None:
    if name == "range":
        pytest.importorskip("constriction")
    coder = entropy_coder(name)

    @settings(max_examples=100, deadline=None)
    @given(_ARRAYS)
    def check(arrays: list[np.ndarray]) -> None:
        data = coder.encode_arrays(arrays)
        decoded = coder.decode_arrays(data, [a.size for a in arrays], [a.dtype for a in arrays])
        for array, other in zip(arrays, decoded, strict=True):
            assert array.dtype == other.dtype
            assert (array == other).all()

    check()


@pytest.mark.parametrize("name", ["huffman", "range"])
def test_rows_alone_equal_rows_of_the_whole(name: str) -> None:
    if name == "range":
        pytest.importorskip("constriction")
    coder = entropy_coder(name)

    @settings(max_examples=60, deadline=None)
    @given(st.data(), st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 64, 256, 4096]))
    def check(data: st.DataObject, rows: int, columns: int, alphabet: int) -> None:
        dtype = np.dtype(np.uint8 if alphabet <= 256 else np.int16)
        seed = data.draw(st.integers(0, 2**32 - 1))
        table = np.random.default_rng(seed).integers(0, alphabet, (rows, columns)).astype(dtype)
        coded = coder.encode_rows(table)
        wanted = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
        assert (coder.decode_rows(coded, (rows, columns), dtype, wanted) == table[wanted]).all()
        for row in range(rows):
            assert (coder.decode_rows(coded, (rows, columns), dtype, np.array([row])) == table[row]).all()

    check()


def test_decoding_what_is_not_described_is_an_error(entropy: str) -> None:
    coder = entropy_coder(entropy)
    arrays = [np.arange(200, dtype=np.uint8), np.arange(50, dtype=np.uint8)]
    data = coder.encode_arrays(arrays)
    dtypes = [np.dtype(np.uint8)] * 2
    for sizes in ([200, 10], [10, 10]):
        with pytest.raises(BitstreamError):
            coder.decode_arrays(data, sizes, dtypes)


@pytest.mark.parametrize("coded", [np.zeros((3, 4), np.uint8), np.zeros(12, np.uint8), np.uint8(0)], ids=str)
def test_a_table_that_is_not_described_is_an_error(coded: np.ndarray) -> None:
    data = huffman.encode(np.asarray(coded))
    for wanted in ([4], [0, 1, 2, 3, 4]):
        with pytest.raises(InvalidBitstream, match="not those that the section describes"):
            entropy_coder("huffman").decode_rows(data, (5, 4), np.dtype(np.uint8), np.array(wanted))


def test_cut_data_gives_an_error_or_symbols(entropy: str) -> None:
    """A range coder may not notice; the section's checksum does. Nothing else may happen."""
    coder = entropy_coder(entropy)
    data = coder.encode_arrays([np.arange(200, dtype=np.uint8)])
    outcomes = []
    for cut in range(len(data)):
        try:
            (decoded,) = coder.decode_arrays(data[:cut], [200], [np.dtype(np.uint8)])
            assert decoded.shape == (200,)
            outcomes.append(True)
        except BitstreamError:
            outcomes.append(False)
    assert not any(outcomes) or entropy == "range"


def test_checksums_are_the_containers_matter() -> None:
    """A section's checksum was compared before a coder sees it; Huffman's own, over the same bytes, is not needed."""
    coder = entropy_coder("huffman")
    table = np.random.default_rng(0).integers(0, 9, (20, 30)).astype(np.uint8)

    def with_wrong_checksum(data: bytes) -> bytes:
        damaged = data[:5] + bytes([data[5] ^ 1]) + data[6:]
        with pytest.raises(ChecksumMismatch):
            huffman.decode_many(damaged)
        return damaged

    coded = with_wrong_checksum(coder.encode_arrays([table.ravel()]))
    (array,) = coder.decode_arrays(coded, [table.size], [table.dtype])
    assert (array == table.ravel()).all()
    coded = with_wrong_checksum(coder.encode_rows(table))
    wanted = np.array([3, 4, 9])
    assert (coder.decode_rows(coded, (20, 30), table.dtype, wanted) == table[wanted]).all()


def test_range_coder_follows_the_specification() -> None:
    """An independent decoder, written from FORMAT.md in integers only."""
    pytest.importorskip("constriction")
    coder = entropy_coder("range")
    rng = np.random.default_rng(3)
    arrays = [
        np.minimum(rng.geometric(0.05, 9000), 200).astype(np.uint8),
        np.zeros(70, dtype=np.uint8),
        rng.integers(0, 2, 100).astype(np.uint8),
        rng.integers(0, 4096, 500).astype(np.int16),
    ]
    data = coder.encode_arrays(arrays)

    position, alphabets = 0, []
    for _ in arrays:
        value, shift = 0, 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        alphabets.append(value)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(position, len(data), 4)]
    mask = 2**64 - 1
    low, width, point, used = 0, mask, words[0] << 32 | words[1], 2
    for array, alphabet in zip(arrays, alphabets, strict=True):
        counts = [0] * alphabet
        block, left, decoded = 64, 64, []
        intervals: list[int] = []
        while alphabet > 1 and len(decoded) < array.size:
            if not intervals:
                total = sum(counts)
                f = [1 + (c + 1) * (65536 - alphabet) // (total + alphabet) for c in counts]
                f[f.index(max(f))] += 65536 - sum(f)
                intervals = [i + sum(f[:i]) * (2**24 - alphabet) // 65536 for i in range(alphabet)] + [2**24]
            scale = width >> 24
            quantile = ((point - low) & mask) // scale
            assert quantile < 2**24
            symbol = bisect.bisect_right(intervals, quantile) - 1
            low = (low + scale * intervals[symbol]) & mask
            width = scale * (intervals[symbol + 1] - intervals[symbol])
            if width < 2**32:
                low, width = low << 32 & mask, width << 32
                point = (point << 32 & mask) | (words[used] if used < len(words) else 0)
                used += 1
            decoded.append(symbol)
            left -= 1
            if left == 0:
                for seen in decoded[-block:]:
                    counts[seen] += 1
                block = left = min(2 * block, 4096)
                intervals = []
        assert (decoded or [0] * array.size) == array.tolist()
    assert used >= len(words)


def test_range_coder_is_smaller_on_tensors_of_different_shape() -> None:
    pytest.importorskip("constriction")
    rng = np.random.default_rng(0)
    arrays = [np.clip(np.rint(rng.normal(128, sigma, 20000)), 0, 255).astype(np.uint8) for sigma in (0.3, 5, 50)]
    sizes = {name: len(entropy_coder(name).encode_arrays(arrays)) for name in ("huffman", "range")}
    assert sizes["range"] < sizes["huffman"]


def test_names_and_codes() -> None:
    pytest.importorskip("constriction")
    for name in ("huffman", "range"):
        assert entropy_coder_by_code(entropy_coder(name).code).name == name
    with pytest.raises(ValueError, match="entropy must be one of"):
        entropy_coder("zip")
    with pytest.raises(InvalidBitstream, match="entropy coder"):
        entropy_coder_by_code(2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'hflfnerv\[range\]'"):
        entropy_coder("range")
