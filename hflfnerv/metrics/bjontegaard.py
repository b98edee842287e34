"""Bjontegaard deltas: the average gap between two rate-distortion curves, as one number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "bd_psnr", "bd_rate"]

#: ``(rate, quality)`` points of one codec, in any order; rates in one unit throughout, qualities in dB.
Curve = Sequence[tuple[float, float]]

Floats = NDArray[np.float64]


def bd_rate(anchor: Curve, test: Curve) -> float:
    """Average difference in rate at equal quality (Bjontegaard, VCEG-M33, 2001).

    ``100 (10^d - 1)`` with ``d`` the mean of ``log10 R_test(q) - log10 R_anchor(q)`` over the qualities in common. The
    curves between the points are monotone piecewise cubics (Fritsch and Carlson 1980, with the slopes of Fritsch and
    Butland 1984), as in the spreadsheets of JCT-VC and JVET, instead of the one cubic of the original, which swings
    between points that are not four and evenly spaced.

    Args:
        anchor: at least two ``(rate, quality in dB)`` points of the codec compared with.
        test: of the codec in question.

    Returns:
        Percent; negative where ``test`` needs less rate.

    Raises:
        ValueError: a curve has fewer than two points, a rate that is not positive, a value that is not finite, or a
            quality that does not rise with the rate; or the curves have no quality in common.

    Numerics:
        float64; the cubics are integrated exactly.

    Example:
        >>> anchor = [(0.1, 30.0), (0.2, 33.0), (0.4, 36.0), (0.8, 39.0)]
        >>> round(bd_rate(anchor, [(rate / 2, quality) for rate, quality in anchor]), 6)
        -50.0
    """
    (anchor_rate, anchor_quality), (test_rate, test_quality) = _points("anchor", anchor), _points("test", test)
    low, high = _common("quality", "dB", anchor_quality, test_quality)
    gap = _mean(test_quality, test_rate, low, high) - _mean(anchor_quality, anchor_rate, low, high)
    return float(100 * (10**gap - 1))


def bd_psnr(anchor: Curve, test: Curve) -> float:
    """Average difference in quality at equal rate (Bjontegaard, VCEG-M33, 2001).

    The mean over the common range of ``log10 R`` of ``Q_test - Q_anchor``, on the curves of :func:`bd_rate`.

    Args:
        anchor: at least two ``(rate, quality in dB)`` points of the codec compared with.
        test: of the codec in question.

    Returns:
        dB; positive where ``test`` is better.

    Raises:
        ValueError: as for :func:`bd_rate`; or the curves have no rate in common.

    Numerics:
        float64; the cubics are integrated exactly.

    Example:
        >>> anchor = [(0.1, 30.0), (0.2, 33.0), (0.4, 36.0), (0.8, 39.0)]
        >>> round(bd_psnr(anchor, [(rate, quality + 1.5) for rate, quality in anchor]), 6)
        1.5
    """
    (anchor_rate, anchor_quality), (test_rate, test_quality) = _points("anchor", anchor), _points("test", test)
    low, high = _common("rate", "(log10)", anchor_rate, test_rate)
    return _mean(test_rate, test_quality, low, high) - _mean(anchor_rate, anchor_quality, low, high)


def _points(name: str, curve: Curve) -> tuple[Floats, Floats]:
    """Return ``log10`` of the rates, ascending, and the qualities."""
    if len(curve) < 2:
        raise ValueError(f"{name} must have at least two points, got {len(curve)}")
    rate, quality = np.array(sorted(curve), dtype=np.float64).T
    if not (np.isfinite(rate).all() and np.isfinite(quality).all() and rate[0] > 0):
        raise ValueError(f"{name} must have finite qualities and finite positive rates, got {sorted(curve)}")
    if (np.diff(rate) <= 0).any() or (np.diff(quality) <= 0).any():
        raise ValueError(f"{name} must rise in quality with the rate, got {sorted(curve)}: leave out the other points")
    return np.log10(rate), quality


def _common(what: str, unit: str, anchor: Floats, test: Floats) -> tuple[float, float]:
    low, high = max(anchor[0], test[0]), min(anchor[-1], test[-1])
    if low >= high:
        raise ValueError(
            f"anchor and test must overlap in {what}, got {anchor[0]:.3f}..{anchor[-1]:.3f} and "
            f"{test[0]:.3f}..{test[-1]:.3f} {unit}: measure more points"
        )
    return float(low), float(high)


def _mean(x: Floats, y: Floats, low: float, high: float) -> float:
    """Return the mean over ``low..high`` of the monotone piecewise cubic through the points."""
    width = np.diff(x)
    slope = _slopes(x, y)
    # Piece i, with u = (x - x_i) / width, is y_i + width (m_i u + square u^2 + cube u^3); integrated between the cuts.
    rise = np.diff(y) / width
    square, cube = 3 * rise - 2 * slope[:-1] - slope[1:], slope[:-1] + slope[1:] - 2 * rise
    begin, end = ((np.clip(cut, x[:-1], x[1:]) - x[:-1]) / width for cut in (low, high))

    def integral(u: Floats) -> Floats:
        inner = slope[:-1] * u**2 / 2 + square * u**3 / 3 + cube * u**4 / 4
        result: Floats = width * (y[:-1] * u + width * inner)
        return result

    return float((integral(end) - integral(begin)).sum() / (high - low))


def _slopes(x: Floats, y: Floats) -> Floats:
    """Return the derivatives at the points that keep a piecewise cubic monotone; ``y`` must be rising."""
    width, rise = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return np.repeat(rise, 2)
    left, right = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    inner = (left + right) / (left / rise[:-1] + right / rise[1:])

    def end(near: float, far: float, near_rise: float, far_rise: float) -> float:
        # Of the parabola through the last three points, limited to what stays monotone.
        slope = ((2 * near + far) * near_rise - near * far_rise) / (near + far)
        return min(max(slope, 0.0), 3 * near_rise)

    first = end(width[0], width[1], rise[0], rise[1])
    last = end(width[-1], width[-2], rise[-1], rise[-2])
    return np.array([first, *inner, last])
