"""Training with quantised weights: steps by what they cost in error and in bits, and rounding in the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._log_step import MAX_BITS, MAX_EXPONENT, MAX_ZERO_POINT, MIN_EXPONENT, STEPS_PER_OCTAVE, Levels, log_steps
from ..models import VideoNetwork
from .clip import Clip, embed_all

__all__ = ["EMBEDDINGS", "Quantization", "QuantizationConfig", "StepChooser", "fake_quantize"]

#: The name under which the step of the embeddings is kept beside those of the weights.
EMBEDDINGS = "embeddings"

_PROBES = 16
_ITERATIONS = 30


@dataclass(frozen=True)
class QuantizationConfig:
    """How a network is trained for quantisation.

    Attributes:
        epochs: the last so many epochs run with quantised weights and embeddings; 0 to choose the steps alone, for a
            network that was trained without.
        rate_weight: w of ``ln(mean squared error) + w ln(bits)``, of which the steps are the optimum: one per cent of
            the file is worth w per cent of the error. 0 for steps between the extremes.
        weight_bits: no step is finer than so many bits between the extremes that a tensor's values have when steps are
            chosen. Without a rate weight no weight has more bits either; with it they may go on to grow, as far as a
            file has bits for them.
        embedding_bits: the same for the embeddings.
    """

    epochs: int
    rate_weight: float
    weight_bits: int
    embedding_bits: int


class _StraightThrough(torch.autograd.Function):
    """``clip(round(x / step), low, high) * step``, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        levels = torch.round(x / step)
        ctx.save_for_backward((levels >= low) & (levels <= high))
        return levels.clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def fake_quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Return what a decoder will read for ``x``: its values rounded to whole steps, half to even, within a range.

    Args:
        x: float32, any shape.
        step: float32 ``[]``.
        low: the least number of steps.
        high: the largest.

    Returns:
        float32 in the shape of ``x``; its gradient is that of the identity (the straight-through estimator) within the
        range, and zero beyond it: what nothing holds back would grow there without end.

    Numerics:
        One division and one multiplication, as :func:`hflfnerv.codec.quantization.quantize_to_levels` and the file.
    """
    out: Tensor = _StraightThrough.apply(x, step, low, high)  # type: ignore[no-untyped-call]
    return out


class StepChooser:
    """Chooses a step for each tensor so that ``ln(error) + w ln(bits)`` of the whole file is least.

    Rounding to steps of ``s`` adds ``h s^2 / 24`` to the error of the clip for each value, with ``h`` the second
    derivative of the mean squared error by that value, and saves ``log2 s`` bits. So at the optimum
    ``s^2 = 12 w E / (R h ln 2)`` with the error E and the file's bits R: one step for each tensor, from the mean of
    ``h`` over its values. ``h`` is that of Gauss and Newton, ``2 / n |df / dx|^2``, estimated on some of the frames
    from the gradient of a sum with random signs (Hutchinson).

    Args:
        model: the network, its encoder included.
        clip: frames and encoder inputs.
        seed: of the random signs.

    Attributes:
        error: E, the mean squared error on the frames that were looked at.
        values: what is to be quantised, by name: the coded parameters, and the embeddings of all frames.
        curvatures: ``h`` of each, mean over its values.
    """

    def __init__(self, model: VideoNetwork, clip: Clip, *, seed: int) -> None:
        device = clip.frames.device
        parameters = model.coded_parameters()
        squares = dict.fromkeys(parameters, 0.0)
        errors, embedding_square = [], 0.0
        chosen = np.unique(np.linspace(0, len(clip) - 1, _PROBES).round().astype(int)).tolist()
        generator = torch.Generator().manual_seed(seed)
        for frame in chosen:
            index = torch.tensor([frame], device=device)
            inputs = clip.inputs(index)
            embedding = None if inputs is None else model.embed(inputs).detach().float().requires_grad_()
            image = model.decode(embedding, index)
            signs = torch.randint(0, 2, image.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(image)
            wanted = [*parameters.values(), *([] if embedding is None else [embedding])]
            gradients = torch.autograd.grad((image * signs).sum(), wanted)
            for name, gradient in zip(parameters, gradients, strict=False):
                squares[name] += float(gradient.square().mean())
            if embedding is not None:
                embedding_square += float(gradients[-1].square().mean())
            errors.append(float((image.detach() - clip.targets(index)).square().mean()))
        scale = 2.0 / (clip.frames[0].numel() * len(chosen))
        self.error = float(np.mean(errors))
        self.values: dict[str, NDArray[np.float32]] = {
            name: parameter.detach().cpu().numpy() for name, parameter in parameters.items()
        }
        self.curvatures = {name: scale * square for name, square in squares.items()}
        made = embed_all(model, clip)
        if made is not None:
            self.values[EMBEDDINGS] = made.numpy()
            # One frame's embedding changes the error of that frame alone.
            self.curvatures[EMBEDDINGS] = scale * embedding_square / len(clip)

    def choose(self, config: QuantizationConfig) -> dict[str, Levels]:
        """Return the levels of each tensor: with a rate weight as many as a file can have, its own in the middle."""
        bits_of = {name: config.embedding_bits if name == EMBEDDINGS else config.weight_bits for name in self.values}
        finest = {name: _finest(value, bits_of[name]) for name, value in self.values.items()}
        exponents = finest
        if config.rate_weight:
            # Fewer bits make each of them worth more, and that makes the steps coarser: from fine to coarse until it
            # holds, at half speed, since the bits follow the steps.
            bits = self.bits(finest)
            for _ in range(_ITERATIONS):
                bit_worth = config.rate_weight * self.error / bits
                exponents = {name: self._exponent(name, bit_worth, finest[name]) for name in finest}
                bits = math.sqrt(bits * max(self.bits(exponents), 1.0))
            bits_of = dict.fromkeys(bits_of, MAX_BITS)  # of which a tensor takes those that its values need
        return {name: _levels(self.values[name], exponents[name], bits_of[name]) for name in exponents}

    def bits(self, exponents: Mapping[str, int]) -> float:
        """Return the bits of all symbols with the given steps: order-0 entropy of each tensor.

        That of the embeddings is the entropy of their differences from frame to frame, where it is less.
        """
        total = 0.0
        for name, exponent in exponents.items():
            symbols = np.rint(self.values[name] / log_steps(np.array(exponent))).astype(np.int64)
            each = _entropy(symbols)
            if name == EMBEDDINGS and len(symbols) > 1:
                each = min(each, _entropy(np.diff(symbols, axis=0)))
            total += symbols.size * each
        return total

    def _exponent(self, name: str, bit_worth: float, finest: int) -> int:
        # The quadratic model ends where steps are as large as the values: about two bits each. Without this a network
        # that has learned little yet, whose error no weight changes by much, would lose them all.
        coarsest = max(finest, _exponent_of(float(np.sqrt(np.square(self.values[name], dtype=np.float64).mean()))))
        curvature = self.curvatures[name]
        if curvature <= 0:
            return coarsest
        return min(max(_exponent_of(math.sqrt(12 * bit_worth / (curvature * math.log(2)))), finest), coarsest)


def _entropy(symbols: NDArray[np.int64]) -> float:
    """Return the order-0 entropy in bits a symbol."""
    counts = np.bincount(symbols.ravel() - symbols.min())
    counts = counts[counts > 0]
    return float((counts * np.log2(symbols.size / counts)).sum()) / symbols.size


def _exponent_of(step: float) -> int:
    """Return the exponent of the step of the grid that is nearest; the least for 0."""
    if step <= 0:
        return MIN_EXPONENT
    return min(max(round(math.log2(step) * STEPS_PER_OCTAVE), MIN_EXPONENT), MAX_EXPONENT)


def _finest(values: NDArray[np.float32], bits: int) -> int:
    """Return the exponent of the least step that takes a tensor to at most ``2**bits`` levels."""
    low, high = float(values.min()), float(values.max())
    exponent = _exponent_of(max((high - low) / 2**bits, max(-low, high, 0.0) / MAX_ZERO_POINT))
    while exponent < MAX_EXPONENT:
        first, last = _extremes(values, exponent)
        if last - first < 2**bits and max(-first, last) <= MAX_ZERO_POINT:
            break
        exponent += 1
    return exponent


def _levels(values: NDArray[np.float32], exponent: int, bits: int) -> Levels:
    """Return ``2**bits`` levels, or what there is of them, with the tensor's own in the middle."""
    first, last = _extremes(values, exponent)
    low = max(first - (2**bits - 1 - (last - first)) // 2, -MAX_ZERO_POINT)
    return Levels(exponent, low, min(low + 2**bits - 1, MAX_ZERO_POINT))


def _extremes(values: NDArray[np.float32], exponent: int) -> tuple[int, int]:
    step = log_steps(np.array(exponent))
    return round(float(np.rint(values.min() / step))), round(float(np.rint(values.max() / step)))


class Quantization:
    """Shows a network its weights and embeddings as the file will hold them.

    The weights are rounded to whole steps for the forward and the backward pass, and the gradient goes to the weights
    themselves (straight through). All of it is operations on tensors, which a CUDA graph can hold.

    Args:
        model: the network.
        levels: by parameter and :data:`EMBEDDINGS`.
    """

    def __init__(self, model: VideoNetwork, levels: Mapping[str, Levels]) -> None:
        parameters = model.coded_parameters()
        device = next(iter(parameters.values())).device
        steps = torch.from_numpy(log_steps(np.array([of.exponent for of in levels.values()]))).to(device)
        self.levels = dict(levels)
        self._parameters: list[Tensor] = list(parameters.values())
        self._exact = [torch.empty_like(parameter) for parameter in self._parameters]
        sizes = dict(zip(levels, steps.tolist(), strict=True))
        self._sizes = [sizes[name] for name in parameters]
        self._lows = [levels[name].low * sizes[name] for name in parameters]
        self._highs = [levels[name].high * sizes[name] for name in parameters]
        self._embeddings = steps[list(levels).index(EMBEDDINGS)] if EMBEDDINGS in levels else None

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights in their place, as :func:`fake_quantize` does; :meth:`restore_weights` brings them back.

        Weights beyond their range are moved to its end, and stay there: their gradients are those of the end, and would
        take them further with each step.
        """
        # A few kernels for all of them, where each would take five of its own.
        torch._foreach_clamp_min_(self._parameters, self._lows)
        torch._foreach_clamp_max_(self._parameters, self._highs)
        torch._foreach_copy_(self._exact, self._parameters)
        torch._foreach_div_(self._parameters, self._sizes)
        torch._foreach_round_(self._parameters)
        torch._foreach_mul_(self._parameters, self._sizes)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Undo the rounding of :meth:`round_weights`."""
        torch._foreach_copy_(self._parameters, self._exact)

    def round_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return embeddings ``[B, C, h, w]`` as the file will hold them, float32."""
        levels = self.levels[EMBEDDINGS]
        assert self._embeddings is not None
        return fake_quantize(embeddings.float(), self._embeddings, levels.low, levels.high)
