from __future__ import annotations

import math

import numpy as np
import pytest

from hflfnerv.metrics import bd_psnr, bd_rate

ANCHOR = [(0.0125, 23.88), (0.025, 25.78), (0.045, 27.73), (0.082, 29.71), (0.149, 31.68), (0.271, 33.58)]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_a_constant_factor_in_rate_is_that_many_percent(factor: float) -> None:
    # The common range is cut inside the pieces; a shifted curve has the same shape there.
    test = [(factor * rate, quality) for rate, quality in ANCHOR]
    assert bd_rate(ANCHOR, test) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_a_constant_gap_in_quality_is_that_gap() -> None:
    assert bd_psnr(ANCHOR, [(rate, quality - 0.75) for rate, quality in ANCHOR]) == pytest.approx(-0.75, abs=1e-12)


def test_straight_lines_in_closed_form() -> None:
    # Quality a + b log10 R: cubics through points of a line are that line, wherever the points are.
    def line(offset: float, slope: float, rates: list[float]) -> list[tuple[float, float]]:
        return [(rate, offset + slope * math.log10(rate)) for rate in rates]

    anchor = line(40, 10, [0.01, 0.03, 0.1, 1.0])
    test = line(42, 12, [0.02, 0.05, 0.2, 0.5, 0.9])
    # Rates in common: log10 0.02 .. log10 0.9; the gap is 2 + 2 log10 R, so its mean is the value in the middle.
    assert bd_psnr(anchor, test) == pytest.approx(2 + math.log10(0.02) + math.log10(0.9), abs=1e-12)
    # Qualities in common: test's least, up to anchor's greatest, 40. The gap is (q - 42) / 12 - (q - 40) / 10.
    middle = (test[0][1] + 40) / 2
    expected = 100 * (10 ** ((middle - 42) / 12 - (middle - 40) / 10) - 1)
    assert bd_rate(anchor, test) == pytest.approx(expected, rel=1e-12)


def test_two_points_make_a_line() -> None:
    assert bd_psnr([(0.1, 30), (1.0, 40)], [(0.1, 31), (1.0, 43)]) == pytest.approx(2.0, abs=1e-12)


def test_order_of_the_points_does_not_matter_and_roles_change_the_sign() -> None:
    test = [(0.9 * rate**1.1, quality + 0.3) for rate, quality in ANCHOR]
    assert bd_rate(ANCHOR[::-1], test) == bd_rate(ANCHOR, test)
    assert bd_psnr(test, ANCHOR) == pytest.approx(-bd_psnr(ANCHOR, test), abs=1e-12)
    there, back = bd_rate(ANCHOR, test) / 100, bd_rate(test, ANCHOR) / 100
    assert (1 + there) * (1 + back) == pytest.approx(1, abs=1e-12)


def test_the_interpolation_is_scipys() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    random = np.random.default_rng(1)
    for _ in range(20):
        curves = [
            list(zip(np.cumsum(random.uniform(0.01, 0.3, n)), 25 + np.cumsum(random.uniform(0.05, 3, n)), strict=True))
            for n in (5, 7)
        ]
        logs = [(np.log10([r for r, _ in curve]), np.array([q for _, q in curve])) for curve in curves]
        low, high = max(x[0] for x, _ in logs), min(x[-1] for x, _ in logs)
        means = [interpolate.PchipInterpolator(x, y).integrate(low, high) / (high - low) for x, y in logs]
        assert bd_psnr(*curves) == pytest.approx(means[1] - means[0], abs=1e-9)


@pytest.mark.parametrize("delta", [bd_rate, bd_psnr])
def test_rejects(delta) -> None:
    with pytest.raises(ValueError, match="anchor must have at least two points, got 1"):
        delta(ANCHOR[:1], ANCHOR)
    with pytest.raises(ValueError, match="test must have finite qualities"):
        delta(ANCHOR, [(0.0, 20.0), (1.0, 30.0)])
    with pytest.raises(ValueError, match="test must have finite qualities"):
        delta(ANCHOR, [(0.1, 20.0), (1.0, math.inf)])
    with pytest.raises(ValueError, match="test must rise in quality with the rate"):
        delta(ANCHOR, [(0.1, 30.0), (0.2, 29.0)])
    with pytest.raises(ValueError, match="test must rise in quality with the rate"):
        delta(ANCHOR, [(0.1, 30.0), (0.1, 31.0)])


def test_curves_that_do_not_overlap() -> None:
    with pytest.raises(ValueError, match=r"must overlap in quality, got 23.880..33.580 and 40.000..50.000 dB"):
        bd_rate(ANCHOR, [(0.1, 40.0), (0.2, 50.0)])
    with pytest.raises(ValueError, match="must overlap in rate"):
        bd_psnr(ANCHOR, [(1.0, 24.0), (2.0, 33.0)])
    # Touching at one point is no range.
    with pytest.raises(ValueError, match="must overlap in quality"):
        bd_rate([(0.1, 20.0), (0.2, 30.0)], [(0.3, 30.0), (0.4, 40.0)])
