from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflfnerv.codec.quantization import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    LogStep,
    MinMax,
    QuantizedTensor,
    dequantize,
    quantize,
    quantize_tensors,
)

_FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)
_TENSORS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=9), elements=_FLOATS)


@settings(max_examples=300, deadline=None)
@given(_TENSORS, st.integers(2, 12), st.sampled_from([0.02, 1.0]))
def test_log_error_is_at_most_half_a_step(values: np.ndarray, bits: int, ratio: float) -> None:
    q = quantize(values, bits, max_pair_ratio=ratio)
    assert isinstance(q.step, LogStep)
    error = np.abs(dequantize(q).astype(np.float64) - values)
    # Half a step, and the rounding of the float32 product.
    assert (error <= q.step.steps.astype(np.float64) / 2 + np.abs(values) * 2.0**-24 * 1.001).all()


@settings(max_examples=300, deadline=None)
@given(_TENSORS, st.integers(2, 12))
def test_log_steps_are_as_fine_as_the_grid_allows(values: np.ndarray, bits: int) -> None:
    q = quantize(values, bits, max_pair_ratio=0)
    assert isinstance(q.step, LogStep)
    low, high = float(values.min()), float(values.max())
    needed = max((high - low) / (2**bits - 1), max(abs(low), abs(high)) / 32767, 2.0**-126)
    if low != high:
        assert float(q.step.steps) <= needed * 2 ** (1.01 / 16)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=9), elements=st.floats(-1e3, 1e3, width=32)),
    st.integers(2, 8),
    st.sampled_from([0.02, 1.0]),
)
def test_minmax_is_hnervs_arithmetic(values: np.ndarray, bits: int, ratio: float) -> None:
    q = quantize(values, bits, scheme="minmax", max_pair_ratio=ratio)
    assert isinstance(q.step, MinMax)
    t = torch.from_numpy(values)
    if q.step.axis is None:
        t_min, t_max = t.min(), t.max()
        scale = (t_max - t_min) / (2**bits - 1)
    else:
        t_min, t_max = t.min(q.step.axis, keepdim=True)[0], t.max(q.step.axis, keepdim=True)[0]
        scale = ((t_max - t_min) / (2**bits - 1)).half()
        t_min = t_min.half()
    assert (q.step.minimum.dtype, q.step.scale.dtype) == (t_min.numpy().dtype, scale.numpy().dtype)
    assert np.array_equal(q.step.minimum, t_min.numpy())
    assert np.array_equal(q.step.scale, scale.numpy())
    symbols = torch.where(scale > 0, ((t - t_min) / scale).round().clamp(0, 2**bits - 1), 0.0)
    assert (torch.from_numpy(q.symbols) == symbols).all()
    assert (torch.from_numpy(dequantize(q)) == t_min.float() + scale.float() * symbols).all()


def test_steps_are_exact_and_normal() -> None:
    exponent = np.arange(MIN_EXPONENT, MAX_EXPONENT + 1, dtype=np.int16).reshape(1, -1)
    steps = LogStep(exponent, np.zeros_like(exponent), 0).steps.ravel()
    assert steps.dtype == np.float32
    assert steps[0] == 2.0**-126
    assert np.isfinite(steps).all()
    exact = np.exp2(exponent.ravel() / 16.0)
    assert (np.abs(steps - exact) <= exact * 2.0**-24).all()
    assert (steps[16:] == 2 * steps[:-16]).all()


@pytest.mark.parametrize("scheme", ["log", "minmax"])
@pytest.mark.parametrize("bits", [2, 5, 8, 9, 12])
def test_chooses_the_axis_with_less_error(scheme: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 5, 3)) * rng.uniform(0.1, 10, size=(1, 5, 3))
    whole = quantize(values, bits, scheme=scheme, max_pair_ratio=0)  # type: ignore[arg-type]
    best = quantize(values, bits, scheme=scheme)  # type: ignore[arg-type]
    assert (whole.step.axis, whole.pairs) == (None, 1)
    assert (best.step.axis, best.pairs) == (0, 15)
    assert np.abs(dequantize(best) - values).mean() < np.abs(dequantize(whole) - values).mean()
    assert best.symbols.dtype == (np.uint8 if bits <= 8 else np.int16)


@pytest.mark.parametrize("scheme", ["log", "minmax"])
def test_constants_and_zeros(scheme: str) -> None:
    for value in (0.0, 1.0, -3.7, 1e-30, 2.0**99):
        values = np.full((4, 6), value, dtype=np.float32)
        restored = dequantize(quantize(values, 8, scheme=scheme))  # type: ignore[arg-type]
        assert np.abs(restored - values).max() <= abs(value) * 2e-5
    one_row_zero = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    one_row_zero[1] = 0
    q = quantize(one_row_zero, 8, scheme=scheme)  # type: ignore[arg-type]
    assert q.step.axis == 1
    assert (dequantize(q)[1] == 0).all()
    if isinstance(q.step, LogStep):
        assert q.step.exponent.max() - q.step.exponent.min() < 16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rejects_values_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        quantize(np.array([0.0, bad], dtype=np.float32), 8)


def test_rejects() -> None:
    values = np.ones((2, 2), dtype=np.float32)
    with pytest.raises(ValueError, match=r"bits must be in 2\.\.12, got 1"):
        quantize(values, 1)
    with pytest.raises(TypeError, match="bits must be an integer"):
        quantize(values, 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheme must be one of"):
        quantize(values, 8, scheme="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no empty one"):
        quantize(values[:0], 8)
    with pytest.raises(ValueError, match="1 to 8 axes"):
        quantize(np.float32(1), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below 2"):
        quantize(values * 2.0**100, 8)
    step = quantize(values, 4).step
    with pytest.raises(ValueError, match=r"symbols must be in 0\.\.15"):
        QuantizedTensor(np.full((2, 2), 16, dtype=np.uint8), 4, step)
    with pytest.raises(TypeError, match="must be int16"):
        QuantizedTensor(np.zeros((2, 2), dtype=np.uint8), 9, step)
    with pytest.raises(ValueError, match="needs pairs of shape"):
        QuantizedTensor(np.zeros((2, 2), dtype=np.uint8), 4, LogStep(step.arrays[0], step.arrays[1], 0))


def test_budget_keeps_side_information_small() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"{i}": rng.normal(size=(c_out, c_in, 3, 3)) * rng.uniform(0.2, 5, size=(1, c_in, 3, 3))
        for i, (c_out, c_in) in enumerate([(60, 20), (200, 30), (64, 64)])
    }
    free = quantize_tensors(tensors, 8, side_limit=math.inf)
    assert all(free[name].pairs == quantize(tensor, 8).pairs > 1 for name, tensor in tensors.items())
    limited = quantize_tensors(tensors, 8, side_limit=0.01)
    elements = sum(tensor.size for tensor in tensors.values())
    assert 9.5 * sum(q.pairs for q in limited.values()) <= 0.0101 * 8 * elements
    assert any(q.pairs > 1 for q in limited.values())
    single = quantize_tensors(tensors, 8, side_limit=0)
    assert all(q.pairs == 1 for q in single.values())
