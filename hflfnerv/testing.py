"""What the tests of the operations share, for this package and for those who add an operation of their own.

Needs pytest (``pip install 'hflfnerv[test]'``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ._impl import ImplementationTable

__all__ = [
    "assert_close_to_reference",
    "assert_gradient_close_to_reference",
    "convolution_magnitudes",
    "implementations",
    "layer_norm_magnitudes",
    "make_tensor",
    "poisoned_empty",
    "requires",
    "rounded_in_the_end",
    "threads",
]


def requires(what: str) -> bool:
    """Return whether ``HFLFNERV_REQUIRE`` (comma separated) names ``what``: its absence is then a failure, no skip."""
    return what in os.environ.get("HFLFNERV_REQUIRE", "").split(",")


def implementations(table: ImplementationTable) -> list[Any]:
    """Return a pytest parameter ``(impl, device)`` for each entry of ``table``.

    Entries that run Triton or CUDA get ``"cuda"``, others ``"cpu"``. An entry that this machine cannot run is skipped
    with its own reason, unless it is for ``"cuda"`` and ``HFLFNERV_REQUIRE=cuda``: then it is left to fail.
    """
    parameters = []
    for entry in table:
        reason = entry.unavailable()
        device = "cuda" if "triton" in entry.name or entry.name == "cuda" else "cpu"
        runs = reason is None or (device == "cuda" and requires("cuda"))
        skip = [] if runs else [pytest.mark.skip(reason=f"{entry.name}: {reason}")]
        parameters.append(pytest.param(entry.name, device, id=entry.name, marks=skip))
    return parameters


def make_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    scale: float = 1.0,
    seed: int = 0,
    requires_grad: bool = False,
) -> torch.Tensor:
    """Return a normally distributed tensor, the same values on every device and in every layout.

    Args:
        shape: its sizes.
        dtype: its dtype; the values are drawn in float64 and rounded once.
        device: where it is.
        layout: ``"contiguous"``, ``"channels_last"`` (four axes) or ``"strided"`` (every second column of a wider one).
        scale: standard deviation.
        seed: of its own generator.
        requires_grad: whether it is a leaf that gradients go to.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") * scale
    x = values.to(dtype).to(device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        wide = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"), dtype=dtype, device=device)
        wide[..., ::2] = x
        x = wide[..., ::2]
    elif layout != "contiguous":
        raise ValueError(f"layout must be 'contiguous', 'channels_last' or 'strided', got {layout!r}")
    return x.requires_grad_(requires_grad)


def convolution_magnitudes(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, r: int, padding: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """Return the sums of absolute terms behind y, dx, dweight and dbias of ``conv_pixel_shuffle_gelu``, in float64.

    They are the ``magnitude`` of the assertions below for a kernel that sums in an order of its own. GELU is not larger
    than its argument, and its derivative is about 1 at most; the bias is left out.
    """
    size, terms, slopes = (t.detach().double().abs() for t in (x, weight, F.pixel_unshuffle(dy, r)))
    y = F.pixel_shuffle(F.conv2d(size, terms, padding=padding), r)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        slopes, size, terms, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return y, dx, dweight, slopes.sum(dim=(0, 2, 3))


def layer_norm_magnitudes(
    x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """Return the sums of absolute terms behind y, dx, dgain and dbias of LayerNorm over the last axis, in float64.

    A mean that is taken away is a term of its own, so a normalised value is as exact as the terms of that difference
    are, and so is each product with one: to first order that is its error times the other factors.
    """
    x, gain, bias, dy = (t.detach().double() for t in (x, gain, bias, dy))

    def mean(t: torch.Tensor) -> torch.Tensor:
        return t.mean(dim=-1, keepdim=True)

    rstd = (mean((x - mean(x)).square()) + eps).rsqrt()
    normal, terms = ((x - mean(x)) * rstd).abs(), (x.abs() + mean(x.abs())) * rstd
    slopes = (dy * gain).abs()
    dx = rstd * (slopes + mean(slopes) + terms * mean(slopes * normal) + normal * mean(slopes * terms))
    dgain, dbias = ((dy.abs() * t).flatten(0, -2).sum(dim=0) for t in (terms, torch.ones_like(x)))
    return terms * gain.abs() + bias.abs(), dx, dgain, dbias


def rounded_in_the_end(expected: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the ``magnitude`` of what is computed in float32 and rounded to a dtype once.

    Args:
        expected: the result in float64.
        terms: the sums of its absolute terms.
        dtype: of the result.
    """
    return expected.detach().abs() + terms * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch, and with it the C++ kernels, use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an element a kernel forgets cannot pass for a result."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _flatten(actual: torch.Tensor, expected: torch.Tensor, same_dtype: torch.Tensor) -> list[torch.Tensor]:
    assert expected.dtype == torch.float64, "the expected values are computed in float64"
    assert actual.dtype == same_dtype.dtype, f"dtype {actual.dtype}, expected {same_dtype.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), "the result is not finite"
    return [t.detach().to("cpu", torch.float64).flatten() for t in (actual, expected, same_dtype)]


def assert_close_to_reference(
    actual: torch.Tensor,
    expected: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Assert that ``actual`` is as near to the truth as can be asked of its dtype.

    ``max |actual - expected| <= 2 max |same_dtype - expected| + u max magnitude``, where u is the unit roundoff.

    Args:
        actual: the result under test.
        expected: the reference's result in float64, from the same (rounded) inputs.
        same_dtype: the reference's result in the dtype of ``actual``.
        magnitude: what is rounded once, ``|expected|`` unless given. For sums, the sum of the absolute terms: each of
            them is rounded, and the order of the sum is free.
    """
    a, e, s = _flatten(actual, expected, same_dtype)
    if e.numel() == 0:
        return
    rounded = e.abs() if magnitude is None else magnitude.detach().to("cpu", torch.float64).flatten()
    unit = torch.finfo(actual.dtype).eps / 2
    error, allowed = (a - e).abs().max(), 2 * (s - e).abs().max() + unit * rounded.max()
    assert error <= allowed, f"error {error:.3e} is over {allowed:.3e}, at element {int((a - e).abs().argmax())}"


def assert_gradient_close_to_reference(
    actual: torch.Tensor,
    expected: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Assert :func:`assert_close_to_reference`, and the same over the whole vector, where a systematic bias shows.

    With ``rel(v) = ‖v - expected‖ / ‖expected‖`` and ``q = u ‖magnitude‖ / ‖expected‖``:
    ``rel(actual) <= 2 rel(same_dtype) + q`` and, of the angles to ``expected``,
    ``1 - cos(actual) <= 4 (1 - cos(same_dtype)) + q²``. Arguments as there.
    """
    assert_close_to_reference(actual, expected, same_dtype, magnitude=magnitude)
    a, e, s = _flatten(actual, expected, same_dtype)
    if not e.any():
        return
    rounded = e if magnitude is None else magnitude.detach().to("cpu", torch.float64).flatten()
    quantum = torch.finfo(actual.dtype).eps / 2 * rounded.norm() / e.norm()
    error, allowed = (a - e).norm() / e.norm(), 2 * (s - e).norm() / e.norm() + quantum
    assert error <= allowed, f"relative L2 error {error:.3e} is over {allowed:.3e}"

    def angle(v: torch.Tensor) -> torch.Tensor:
        # 1 - cos as half the squared distance of the unit vectors, which does not cancel.
        distance: torch.Tensor = v / v.norm() - e / e.norm()
        return distance.square().sum() / 2

    turn, allowed = angle(a), 4 * angle(s) + quantum**2
    assert turn <= allowed, f"1 - cosine {turn:.3e} is over {allowed:.3e}"
