"""The learning-rate schedule."""

from __future__ import annotations

import math

import pytest

from hflfnerv.train import SCHEDULES, TrainConfig, learning_rate_factor


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.1), (0.05, 0.55), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0), (0.325, 0.5 + 0.5 * math.sqrt(0.5))],
)
def test_warm_up_then_cosine(progress, factor):
    assert learning_rate_factor(progress) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("progress", "factor"), [(0.05, 0.55), (0.1, 1.0), (0.55, 0.5), (0.325, 0.75), (1.0, 0.0)])
def test_warm_up_then_linear(progress, factor):
    assert learning_rate_factor(progress, "linear") == pytest.approx(factor, abs=1e-12)


def test_unknown_schedules_are_refused():
    for make in (lambda: learning_rate_factor(0.5, "step"), lambda: TrainConfig(1, 1e-3, 1, 0, schedule="step")):
        with pytest.raises(ValueError, match="schedule must be one of cosine, linear, got 'step'"):
            make()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rises_then_falls(schedule):
    values = [learning_rate_factor(i / 1000, schedule) for i in range(1000)]
    peak = values.index(max(values))
    assert peak == 100
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
