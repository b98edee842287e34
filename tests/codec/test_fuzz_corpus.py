"""The fuzz target on its corpus, and on mutations of it: the same function that atheris runs for longer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"


@pytest.fixture(scope="module")
def one_input() -> Callable[[bytes], None]:
    pytest.importorskip("constriction")
    spec = importlib.util.spec_from_file_location("container_input", FUZZ / "container_input.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target: Callable[[bytes], None] = module.one_input
    return target


def _corpus() -> list[bytes]:
    return [path.read_bytes() for path in sorted((FUZZ / "corpus").iterdir())]


def test_corpus(one_input: Callable[[bytes], None]) -> None:
    corpus = _corpus()
    assert {data[0] % 7 for data in corpus} == set(range(7))
    for data in corpus:
        one_input(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutations(one_input: Callable[[bytes], None], seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpus = _corpus()
    for _ in range(1500):
        data = bytearray(corpus[rng.integers(len(corpus))])
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(1, len(data)))
            match rng.integers(4):
                case 0:
                    data[at] = int(rng.integers(256))
                case 1:
                    data[at] ^= 1 << int(rng.integers(8))
                case 2:
                    del data[at : at + int(rng.integers(1, 9))]
                case _:
                    data[at:at] = rng.bytes(int(rng.integers(1, 9)))
            if len(data) < 2:
                break
        one_input(bytes(data))
