"""What the golden files hold, as plain JSON; run as a script to write files for a new version of the format.

    python tests/codec/bitstream_golden.py tests/golden

Files of an existing version never change: a reader that reads them differently is broken.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hflfnerv.codec.bitstream import Bitstream, Color, Header, Source, write_bitstream
from hflfnerv.codec.quantization import LogStep, MinMax, QuantizedTensor, dequantize

# Those named v1-huffman and v1-range hold the same, and are from before embeddings were coded as differences.
_NAMES = {entropy: f"v1-differences-{entropy}.hflf" for entropy in ("huffman", "range")}


def contents() -> tuple[Header, dict[str, QuantizedTensor], QuantizedTensor]:
    """The video of the golden files, made of integers only, so that it is the same everywhere."""
    header = Header(
        model={"model": "hnerv", "widths": [3, 2]},
        frames=4,
        height=480,
        width=854,
        fps=Fraction(24000, 1001),
        preset="paper",
        writer="hflfnerv 0.1.0",
        sample_aspect_ratio=Fraction(8, 9),
        color=Color(matrix="bt709", range="limited", primaries="bt709"),
        source=Source(height=1080, width=1920, first_frame=7, resize=(480, 854)),
        training={"epochs": 300, "seed": 1},
    )
    ramp = np.arange(10 * 3 * 3 * 3, dtype=np.int64)
    symbols = (128 + (ramp * 7919 % 61) * (ramp * 104729 % 13) // 8 - 46).astype(np.uint8).reshape(10, 3, 3, 3)
    pairs = np.arange(27, dtype=np.int16).reshape(1, 3, 3, 3)
    half = np.linspace(-2, 1, 6).astype(np.float16)[:, None]
    weights = {
        "decoder.stem.weight": QuantizedTensor(symbols, 8, LogStep(pairs * 5 - 140, pairs * 9, 0)),
        "decoder.stem.bias": QuantizedTensor(
            np.array([0, 7, 3], dtype=np.uint8), 3, LogStep(np.array(-81, np.int16), np.array(-900, np.int16), None)
        ),
        "decoder.head.weight": QuantizedTensor(
            symbols.ravel()[:60].reshape(6, 10), 8, MinMax(half, np.abs(half) / np.float16(64), 1)
        ),
        "decoder.head.bias": QuantizedTensor(
            (ramp[:5] * 500).astype(np.int16), 11, MinMax(np.array(-0.1, np.float32), np.array(3e-4, np.float32), None)
        ),
    }
    embeddings = QuantizedTensor(
        (ramp[:96] * 37 % 64).astype(np.uint8).reshape(4, 3, 2, 4),
        6,
        LogStep((ramp[:24] - 70).astype(np.int16).reshape(1, 3, 2, 4), np.full((1, 3, 2, 4), 31, np.int16), 0),
    )
    return header, weights, embeddings


def describe(data: bytes) -> dict[str, Any]:
    """Everything that a file holds; floats as the hexadecimal form of their bits."""
    stream = Bitstream.open(data)
    embeddings = stream.read_embeddings()
    return {
        "bytes": len(data),
        "header": json.loads(stream.header.to_json()),
        "entropy": stream.entropy,
        "weights": {
            name: {
                "shape": list(tensor.shape),
                "bits": tensor.bits,
                "axis": tensor.step.axis,
                "symbols": tensor.symbols.ravel().tolist(),
                "step": [array.ravel().tobytes().hex() for array in tensor.step.arrays],
                "values": dequantize(tensor).astype("<f4").tobytes().hex(),
            }
            for name, tensor in stream.read_weights().items()
        },
        "embeddings": {"shape": list(embeddings.shape), "values": embeddings.astype("<f4").tobytes().hex()},
    }


def main(folder: Path) -> None:
    """Write the golden files and what they hold."""
    for entropy, name in _NAMES.items():
        data = write_bitstream(*contents(), entropy=entropy)
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".json").write_text(json.dumps(describe(data), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
