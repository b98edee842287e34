"""The parameter budget: from a total size to the width of every layer.

The formulas are those of the HNeRV code base, which the paper keeps. They count convolution weights and no biases, and
take the widths before rounding and before a least width: a network's true size is within a few per cent of the size
asked for where that is a million and more, as published, and may be half or twice as large where it is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..config import PRESETS
from .layout import Layout
from .spec import DetailSpec, ModelSpec, StreamSpec

__all__ = [
    "detail_stream",
    "embedding_count",
    "grid_stream",
    "hfd_stream",
    "keeps_size",
    "lfd_stream",
    "nerv_stream",
    "parameter_count",
    "plan_or_explain",
    "width_for_budget",
]

_LOWEST_WIDTH = 12


def block_kernels(first: int, largest: int, stages: int) -> tuple[int, ...]:
    """Kernel sizes that grow by two from block to block: ``min(first + 2 i, largest)``."""
    return tuple(min(first + 2 * i, largest) for i in range(stages))


def block_widths(first: int, reduction: float, stages: int, lowest: int = 1) -> tuple[int, ...]:
    """Channel widths, stem first, each the rounded quotient of the one before and not under ``lowest``."""
    widths = [first]
    for _ in range(stages):
        widths.append(max(round(widths[-1] / reduction), lowest))
    return tuple(widths)


def width_for_budget(
    budget: float, strides: Sequence[int], kernels: Sequence[int], reduction: float, stem_weights_per_channel: float
) -> int:
    """Return the stem width C that spends ``budget`` weights.

    The floor of the positive root of ``a C^2 + b C = budget`` with
    ``a = sum_i s_i^2 k_i^2 / reduction^(2 i + 1)`` over the blocks and ``b`` the stem's weights per channel: the
    formula of the HNeRV code base, which the paper keeps. Zero where not even one channel is affordable.
    """
    a = sum(s * s * k * k / reduction ** (2 * i + 1) for i, (s, k) in enumerate(zip(strides, kernels, strict=True)))
    b = stem_weights_per_channel
    if budget <= 0:
        return 0
    return int((-b + math.sqrt(b * b + 4 * a * budget)) / (2 * a))


def embedding_count(frames: int, channels: int, layout: Layout) -> int:
    """Number of embedding values of all frames."""
    return frames * channels * layout.cells


def hfd_stream(budget: float, layout: Layout, embedding_channels: int) -> StreamSpec | None:
    """HNeRV's decoder, and the paper's HFD: kernels 1, 3, 5, 5, 5, widths divided by 1.2 and not under 12.

    None where the budget does not pay for the lowest width.
    """
    kernels = block_kernels(1, 5, len(layout.strides))
    first = width_for_budget(budget, layout.strides, kernels, 1.2, 9 * embedding_channels)
    if first < _LOWEST_WIDTH:
        return None
    return StreamSpec(layout.grid, block_widths(first, 1.2, len(kernels), _LOWEST_WIDTH), layout.strides, kernels)


def detail_stream(budget: float, layout: Layout, embedding_channels: int, channels: int) -> StreamSpec | None:
    """HNeRV's decoder where an embedding of ``channels`` channels joins after the first block. None as there."""
    stream = hfd_stream(budget, layout, embedding_channels)
    if stream is None:
        return None
    fine, detail = layout.after_first(), DetailSpec(channels, stream.widths[0], layout.strides[0])
    return StreamSpec(fine.grid, stream.widths[1:], fine.strides, stream.kernels[1:], detail=detail)


def lfd_stream(budget: float, layout: Layout, time_features: int) -> StreamSpec | None:
    """The paper's LFD1 and LFD2: kernels 3, 5, 5, 5, widths divided by 1.2. None below one channel."""
    kernels = block_kernels(3, 5, len(layout.strides))
    first = width_for_budget(budget, layout.strides, kernels, 1.2, layout.cells * (time_features + 1))
    if first < 1:
        return None
    return StreamSpec(layout.grid, block_widths(first, 1.2, len(kernels)), layout.strides, kernels)


def grid_stream(budget: float, layout: Layout, knots: int) -> StreamSpec | None:
    """The low-frequency stream of ``"best"``: learned maps, kernels 1, 3, 3, 3, widths divided by 1.2. None below 1."""
    kernels = block_kernels(1, 3, len(layout.strides))
    first = width_for_budget(budget, layout.strides, kernels, 1.2, knots * layout.cells)
    if first < 1:
        return None
    return StreamSpec(layout.grid, block_widths(first, 1.2, len(kernels)), layout.strides, kernels, knots)


def nerv_stream(budget: float, layout: Layout, time_features: int) -> StreamSpec | None:
    """NeRV's decoder: kernels 3, widths halved and not under 12. None where the budget does not pay for that."""
    kernels = block_kernels(3, 3, len(layout.strides))
    first = width_for_budget(budget, layout.strides, kernels, 2.0, layout.cells * time_features)
    if first < _LOWEST_WIDTH:
        return None
    return StreamSpec(layout.grid, block_widths(first, 2.0, len(kernels), _LOWEST_WIDTH), layout.strides, kernels)


def parameter_count(spec: ModelSpec) -> int:
    """Return the number of coded parameters of a network: embeddings of all frames, weights and biases."""
    levels = spec.time.levels if spec.time else 0
    features = {"lfd1": 2 * spec.time_split, "lfd2": 2 * (levels - spec.time_split)}
    shape = spec.embedding_shape
    count = spec.frames * math.prod(shape) if shape else 0
    for name, stream in spec.streams.items():
        first, cells = stream.widths[0], stream.layout.cells
        if stream.knots:
            count += stream.knots * first * cells
        elif stream.detail is not None:
            detail, upsampled = stream.detail, first * stream.detail.stride**2
            count += detail.width * (spec.embedding_channels + 1) + upsampled * (detail.width + 1)
            count += first * detail.channels
        elif spec.embedding_channels and name not in features:
            count += first * (spec.embedding_channels + 1)
        else:
            count += first * cells * (features.get(name, 2 * levels) + 1)
        for c_in, c_out, s, k in zip(
            stream.widths[:-1], stream.widths[1:], stream.strides, stream.kernels, strict=True
        ):
            count += c_out * s * s * (c_in * k * k + 1)
        count += 3 * (9 * stream.widths[-1] + 1)
    return count


def keeps_size(preset: str) -> bool:
    """Return whether networks of a preset have at most the size asked for, rather than that of published formulas.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be {' or '.join(PRESETS)}, got {preset!r}")
    return preset == "best"


def plan_or_explain(
    model: str,
    size: int,
    frames: int,
    height: int,
    width: int,
    spec_for: Callable[[int], ModelSpec | None],
    *,
    exact: bool = False,
) -> ModelSpec:
    """Return ``spec_for(size)``, or raise a ValueError that names the least size that gives a network.

    With ``exact`` it is the largest ``spec_for(n)`` of at most ``size`` parameters, and widths of its first stream are
    one larger where that is then still affordable: the formulas leave out biases and round widths down.
    """
    for name, value in (("size", size), ("frames", frames), ("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    def count(nominal: int) -> int:
        spec = spec_for(nominal)
        return 0 if spec is None else parameter_count(spec)

    spec = spec_for(_least(lambda nominal: count(nominal) > size) - 1 if exact else size)
    if spec is not None:
        return _widened(spec, size) if exact else spec
    smallest = _least(lambda nominal: count(nominal) > 0)
    raise ValueError(
        f"size must be at least {count(smallest) if exact else smallest} parameters for {frames} frames of "
        f"{height} x {width} with model {model!r} (embeddings of all frames and the smallest decoders), got {size}"
    )


def _widened(spec: ModelSpec, size: int) -> ModelSpec:
    name, stream = next(iter(spec.streams.items()))
    for i, width in enumerate(stream.widths):
        wider = replace(stream, widths=(*stream.widths[:i], width + 1, *stream.widths[i + 1 :]))
        candidate = replace(spec, streams={**spec.streams, name: wider})
        if parameter_count(candidate) <= size:
            spec, stream = candidate, wider
    return spec


def _least(condition: Callable[[int], bool]) -> int:
    """Return the least positive number that fulfils a condition, which all larger ones fulfil too."""
    low, high = 0, 1
    while not condition(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high
