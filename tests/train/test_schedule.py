"""The learning-rate schedule."""

from __future__ import annotations

import math

import pytest

from hflfnerv.train import learning_rate_factor


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.1), (0.05, 0.55), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0), (0.325, 0.5 + 0.5 * math.sqrt(0.5))],
)
def test_warm_up_then_cosine(progress, factor):
    assert learning_rate_factor(progress) == pytest.approx(factor, abs=1e-12)


def test_rises_then_falls():
    values = [learning_rate_factor(i / 1000) for i in range(1000)]
    peak = values.index(max(values))
    assert peak == 100
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
