"""Huffman coding of 8-bit symbols, one thread, against zstandard, dahuffman and constriction on the same symbols."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hflfnerv import _ext, huffman

from ..registry import Contender, Point, Skipped, suite

Symbols = npt.NDArray[np.uint8]

COUNT = 1_500_000
BASELINE = "zstandard level 1"
CHECKED = "zstandard level 1, checksum"  # zstandard computes one if it is asked to, hflfnerv.huffman unless told not to
FEW = 100_000  # symbols for baselines that take seconds for all
ROOT = pathlib.Path(__file__).resolve().parents[2]


def quantised_tensors(value: Any) -> Iterator[Symbols]:
    """Yield the arrays named "quant" of an HNeRV checkpoint, in order."""
    for key, item in value.items():
        if key == "quant":
            yield item.numpy().astype(np.uint8).ravel()
        elif isinstance(item, dict):
            yield from quantised_tensors(item)


def real_symbols() -> Symbols | None:
    """Return the symbols of a published HNeRV 1.5M, or None where the file is not at hand."""
    folder = pathlib.Path(os.environ.get("HFLFNERV_SHARED_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "hnerv_bunny_1.5m.pth"
    if not path.is_file():
        print(f"no {path} (set HFLFNERV_SHARED_DATA): synthetic symbols only")
        return None
    import torch

    return np.concatenate(list(quantised_tensors(torch.load(path, weights_only=True, map_location="cpu"))))


def inputs() -> Iterator[tuple[str, Symbols]]:
    """Yield the inputs with their names."""
    real = real_symbols()
    if real is not None:
        yield "real HNeRV 1.5M weights", real
    random = np.random.default_rng(0)

    def rounded(values: npt.NDArray[np.float64]) -> Symbols:
        return np.clip(np.rint(128 + values), 0, 255).astype(np.uint8)

    yield "Laplacian, scale 20", rounded(random.laplace(0, 20, COUNT))
    yield "Laplacian, scale 1", rounded(random.laplace(0, 1, COUNT))
    yield "Gaussian, sigma 30", rounded(random.normal(0, 30, COUNT))
    yield "two symbols, 10:90", (random.random(COUNT) < 0.1).astype(np.uint8)
    yield "one symbol", np.full(COUNT, 7, np.uint8)
    yield "uniform", random.integers(0, 256, COUNT).astype(np.uint8)


@suite("huffman")
def points() -> Iterable[Point]:
    """Encoding and decoding of every input."""
    if _ext.unavailable():
        raise Skipped(str(_ext.unavailable()))
    for name, symbols in inputs():
        yield from points_of(name, symbols)


def points_of(name: str, symbols: Symbols) -> Iterator[Point]:
    """Yield the points of one input: encode, decode."""
    import constriction
    import dahuffman
    import zstandard

    c = _ext.load()
    raw = symbols.tobytes()
    few = symbols[:FEW]
    data = huffman.encode(symbols)
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    zstd = compressor.compress(raw)
    checked_compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    checked_zstd = checked_compressor.compress(raw)
    codec = dahuffman.HuffmanCodec.from_data(few.tobytes())
    dahuffman_data = codec.encode(few.tobytes())
    counts = np.bincount(symbols, minlength=256)
    indices = symbols.astype(np.int32)
    few_note = f"{few.size} symbols only"

    def ans_encode() -> Any:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(indices, model)
        return coder.get_compressed()

    model = constriction.stream.model.Categorical(counts / symbols.size, perfect=False)
    ans = ans_encode()
    tree = constriction.symbol.huffman.EncoderHuffmanTree(counts / symbols.size)
    decoder_tree = constriction.symbol.huffman.DecoderHuffmanTree(counts / symbols.size)
    few_list = few.tolist()

    def queue_encode() -> Any:
        coder = constriction.symbol.QueueEncoder()
        for symbol in few_list:
            coder.encode_symbol(symbol, tree)
        return coder.get_compressed()

    queue, _ = queue_encode()

    def queue_decode() -> list[int]:
        coder = constriction.symbol.QueueDecoder(queue)
        return [coder.decode_symbol(decoder_tree) for _ in range(FEW)]

    def check() -> None:
        assert data == huffman.encode(symbols, impl="reference")
        for level in c.simd_levels():
            assert c.huffman_encode([symbols], [0], False, huffman.DEFAULT_CHUNK_SYMBOLS, level) == data
            assert (c.huffman_decode(data, False, 2**28, simd=level)[0] == symbols).all()
        assert (huffman.decode(data, verify=False) == symbols).all()
        assert decompressor.decompress(zstd) == decompressor.decompress(checked_zstd) == raw
        assert codec.decode(dahuffman_data) == few.tobytes()
        assert (constriction.stream.stack.AnsCoder(ans).decode(model, symbols.size) == indices).all()
        assert queue_decode() == few_list

    facts = {
        "bytes": len(data),
        "payload_bytes": -(-huffman.payload_bits(symbols) // 8),
        "zstandard_bytes": len(zstd),
        "ans_bytes": 4 * len(ans),
    }
    lower = c.simd_levels()[:-1]
    common = {"data": name, "dtype": "uint8", "shape": symbols.shape, "unit": "MB/s", "scale": 1e6, "facts": facts}
    ours = f"chunks of {huffman.DEFAULT_CHUNK_SYMBOLS} symbols"
    chunk = huffman.DEFAULT_CHUNK_SYMBOLS
    n = symbols.size
    yield Point(
        what="huffman.encode",
        contenders=[
            Contender(f"cpp ({c.simd_levels()[-1]})", lambda: huffman.encode(symbols), n, ours),
            *(
                Contender(
                    f"cpp ({level})", functools.partial(c.huffman_encode, [symbols], [0], False, chunk, level), n, ours
                )
                for level in lower
            ),
            Contender(BASELINE, lambda: compressor.compress(raw), n),
            Contender(CHECKED, lambda: checked_compressor.compress(raw), n),
            Contender("dahuffman", lambda: codec.encode(few.tobytes()), few.size, few_note),
            Contender("constriction ANS", ans_encode, n, "one categorical model, given"),
            Contender("constriction Huffman", queue_encode, few.size, f"symbol by symbol, {few_note}"),
        ],
        baseline=BASELINE,
        check=check,
        **common,
    )
    is_stored = np.shares_memory(huffman.decode(data, copy=False), np.frombuffer(data, np.uint8))
    without_copy = [
        Contender(
            f"cpp ({c.simd_levels()[-1]}), unverified, no copy",
            lambda: huffman.decode(data, verify=False, copy=False),
            n,
            "a read-only view of the data, which are stored as they are",
        )
    ]
    yield Point(
        what="huffman.decode",
        contenders=[
            Contender(f"cpp ({c.simd_levels()[-1]})", lambda: huffman.decode(data), n, ours),
            Contender(
                f"cpp ({c.simd_levels()[-1]}), unverified",
                lambda: huffman.decode(data, verify=False),
                n,
                f"{ours}, no checksum computed",
            ),
            *(without_copy if is_stored else []),
            *(
                Contender(
                    f"cpp ({level})", functools.partial(c.huffman_decode, data, False, 2**28, simd=level), n, ours
                )
                for level in lower
            ),
            Contender(BASELINE, lambda: decompressor.decompress(zstd), n),
            Contender(CHECKED, lambda: decompressor.decompress(checked_zstd), n),
            Contender("dahuffman", lambda: codec.decode(dahuffman_data), few.size, few_note),
            Contender(
                "constriction ANS",
                lambda: constriction.stream.stack.AnsCoder(ans).decode(model, n),
                n,
                "one categorical model, given",
            ),
            Contender("constriction Huffman", queue_decode, few.size, f"symbol by symbol, {few_note}"),
        ],
        baseline=BASELINE,
        check=check,
        **common,
    )
