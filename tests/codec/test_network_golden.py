"""Coded networks of every structure decode to the frames that they decoded to when they were written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from network_golden import EXPECTED_FRAMES, SPECS, exact_frames

from hflfnerv.codec import Decoder
from hflfnerv.codec.engine import ModuleEngine, make_engine
from hflfnerv.models import ModelSpec

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(params=SPECS)
def coded(request: pytest.FixtureRequest) -> tuple[bytes, np.ndarray]:
    """A golden file, and the frames that it decodes to."""
    path = GOLDEN / f"v1-network-{request.param}.hflf"
    data = path.read_bytes()
    assert ModelSpec.from_dict(Decoder(data, device="cpu").header.model) == SPECS[request.param]
    spec = SPECS[request.param]
    frames = np.array(json.loads(path.with_suffix(".json").read_text()))
    return data, frames.reshape(len(EXPECTED_FRAMES), 3, spec.height, spec.width)


def test_definitions_make_the_golden_frames(coded: tuple[bytes, np.ndarray]) -> None:
    data, expected = coded
    # Seven decimals; the encoding of the time is rounded to float32, of a sine that may be another machine's.
    assert np.abs(exact_frames(data) - expected).max() <= 1e-6


@pytest.mark.parametrize("engine", ["auto", "module"])
def test_engines_make_the_golden_frames(coded: tuple[bytes, np.ndarray], engine: str) -> None:
    data, expected = coded
    decoder = Decoder(data, device="cpu", precision="fp32")
    made = make_engine if engine == "auto" else ModuleEngine
    frames = torch.stack(
        list(made(decoder.model, decoder.embeddings, decoder.device, "fp32").float_frames(EXPECTED_FRAMES))
    )
    # Two blocks and a head, each within a few times 1e-6 of its size; the images are of size 1.
    assert np.abs(frames.numpy() - expected).max() <= 2e-5
    rounded = decoder.frames(EXPECTED_FRAMES).transpose(0, 3, 1, 2)
    assert np.abs(rounded - 255 * expected.clip(0, 1)).max() <= 0.5 + 255 * 2e-5
