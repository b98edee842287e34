"""A small coded video, for tests that go through every byte of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hflfnerv.codec.bitstream import Color, Header, Source
from hflfnerv.codec.quantization import QuantizedTensor, quantize


@pytest.fixture(scope="session")
def header() -> Header:
    return Header(
        model={"model": "hnerv", "widths": [4, 3]},
        frames=5,
        height=17,
        width=31,
        fps=Fraction(30000, 1001),
        preset="paper",
        writer="test",
        sample_aspect_ratio=Fraction(4, 3),
        color=Color(matrix="bt709", range="limited"),
        source=Source(height=48, width=64, crop=(1, 2, 17, 31)),
        training={"epochs": 300, "lr": 0.001},
    )


@pytest.fixture(scope="session")
def weights() -> dict[str, QuantizedTensor]:
    """One tensor for each way to store steps: per axis and whole, logarithmic, float16 and float32."""
    rng = np.random.default_rng(1)
    return {
        "stem.weight": quantize(rng.normal(size=(6, 4, 1, 1)), 8, max_pair_ratio=0.5),
        "stem.bias": quantize(rng.normal(size=6), 8),
        "head.weight": quantize(rng.normal(size=(3, 5)), 6, scheme="minmax", max_pair_ratio=0.5),
        "head.bias": quantize(rng.normal(size=3), 8, scheme="minmax"),
    }


@pytest.fixture(scope="session")
def embeddings() -> QuantizedTensor:
    rng = np.random.default_rng(2)
    values = rng.normal(size=(5, 2, 1, 3)) * rng.uniform(0.5, 3, size=(1, 2, 1, 3))
    return quantize(values, 6, max_pair_ratio=0.5)


@pytest.fixture(params=["huffman", "range"])
def entropy(request: pytest.FixtureRequest) -> str:
    if request.param == "range":
        pytest.importorskip("constriction")
    return str(request.param)
