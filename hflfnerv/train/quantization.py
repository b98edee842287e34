"""Training with quantised weights: steps by what they cost in error and in bits, rounding in the step, a rate term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._log_step import MAX_EXPONENT, MAX_ZERO_POINT, MIN_EXPONENT, STEPS_PER_OCTAVE, log_steps
from ..models import VideoNetwork
from .clip import Clip

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
        rate_weight: w of ``ln(mean squared error) + w ln(bits)``, which the steps and the rate term go down: one per
            cent of the file is worth w per cent of the error. 0 for steps between the extremes, and no rate term.
        weight_bits: no step of a weight is finer than that of so many bits between the extremes.
        embedding_bits: the same for the embeddings.
    """

    epochs: int
    rate_weight: float
    weight_bits: int
    embedding_bits: int


class _StraightThrough(torch.autograd.Function):
    """``round(x / step) * step``, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(x: Tensor, step: Tensor) -> Tensor:
    """Return what a decoder will read for ``x``: its values rounded to whole steps, half to even.

    Args:
        x: float32, any shape.
        step: float32 ``[]``.

    Returns:
        float32 in the shape of ``x``; its gradient is that of the identity (the straight-through estimator).

    Numerics:
        One division and one multiplication, as :func:`hflfnerv.codec.quantization.quantize_with_step` and the file.
    """
    out: Tensor = _StraightThrough.apply(x, step)  # type: ignore[no-untyped-call]
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
        values: what is to be quantised, by name: the coded parameters, and the embeddings of these frames.
        counts: how many values of each the file has.
        curvatures: ``h`` of each, mean over its values.
    """

    def __init__(self, model: VideoNetwork, clip: Clip, *, seed: int) -> None:
        device = clip.frames.device
        parameters = model.coded_parameters()
        squares = dict.fromkeys(parameters, 0.0)
        errors, embeddings, embedding_square = [], [], 0.0
        chosen = np.unique(np.linspace(0, len(clip) - 1, _PROBES).round().astype(int)).tolist()
        generator = torch.Generator().manual_seed(seed)
        for frame in chosen:
            index = torch.tensor([frame], device=device)
            inputs = clip.inputs(index)
            embedding = None if inputs is None else model.embed(inputs).detach().float().requires_grad_()
            image = model.decode(embedding, index)
            signs = torch.randint(0, 2, image.shape, generator=generator).mul_(2).sub_(1).to(image)
            wanted = [*parameters.values(), *([] if embedding is None else [embedding])]
            gradients = torch.autograd.grad((image * signs).sum(), wanted)
            for name, gradient in zip(parameters, gradients, strict=False):
                squares[name] += float(gradient.square().mean())
            if embedding is not None:
                embedding_square += float(gradients[-1].square().mean())
                embeddings.append(embedding.detach().cpu().numpy())
            errors.append(float((image.detach() - clip.targets(index)).square().mean()))
        scale = 2.0 / (clip.frames[0].numel() * len(chosen))
        self.error = float(np.mean(errors))
        self.values: dict[str, NDArray[np.float32]] = {
            name: parameter.detach().cpu().numpy() for name, parameter in parameters.items()
        }
        self.counts = {name: value.size for name, value in self.values.items()}
        self.curvatures = {name: scale * square for name, square in squares.items()}
        if embeddings:
            self.values[EMBEDDINGS] = np.concatenate(embeddings)
            self.counts[EMBEDDINGS] = len(clip) * embeddings[0].size
            # One frame's embedding changes the error of that frame alone.
            self.curvatures[EMBEDDINGS] = scale * embedding_square / len(clip)

    def choose(self, config: QuantizationConfig) -> tuple[dict[str, int], float]:
        """Return the exponents of the steps, and what one bit is worth in mean squared error."""
        finest = {
            name: _finest(value, config.embedding_bits if name == EMBEDDINGS else config.weight_bits)
            for name, value in self.values.items()
        }
        exponents, bit_worth = finest, 0.0
        if config.rate_weight:
            # Fewer bits make each of them worth more, and that makes the steps coarser: from fine to coarse until it
            # holds, at half speed, since the bits follow the steps.
            bits = self.bits(finest)
            for _ in range(_ITERATIONS):
                bit_worth = config.rate_weight * self.error / bits
                exponents = {name: self._exponent(name, bit_worth, finest[name]) for name in finest}
                bits = math.sqrt(bits * max(self.bits(exponents), 1.0))
        return exponents, bit_worth

    def bits(self, exponents: Mapping[str, int]) -> float:
        """Return the bits of all symbols with the given steps: order-0 entropy of each tensor."""
        total = 0.0
        for name, exponent in exponents.items():
            symbols = np.rint(self.values[name] / log_steps(np.array(exponent))).astype(np.int64)
            counts = np.unique(symbols, return_counts=True)[1]
            total += self.counts[name] * float((counts * np.log2(symbols.size / counts)).sum()) / symbols.size
        return total

    def _exponent(self, name: str, bit_worth: float, finest: int) -> int:
        # The quadratic model ends where steps are as large as the values: about two bits each. Without this a network
        # that has learned little yet, whose error no weight changes by much, would lose them all.
        coarsest = max(finest, _exponent_of(float(np.sqrt(np.square(self.values[name], dtype=np.float64).mean()))))
        curvature = self.curvatures[name]
        if curvature <= 0:
            return coarsest
        return min(max(_exponent_of(math.sqrt(12 * bit_worth / (curvature * math.log(2)))), finest), coarsest)


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
        step = float(log_steps(np.array(exponent)))
        if round(high / step) - round(low / step) < 2**bits and abs(round(low / step)) <= MAX_ZERO_POINT:
            break
        exponent += 1
    return exponent


class Quantization:
    """Shows a network its weights and embeddings as the file will hold them, and what they cost.

    The weights are rounded to whole steps for the forward and the backward pass, and the gradient goes to the weights
    themselves (straight through). The rate term is ``bit_worth sum_i n_i log2(1 + 2 e m_i / s_i)``, close to the
    entropy of n Laplace-distributed values of mean magnitude m in steps of s, and none where all are zero.

    All of it is operations on tensors, which a CUDA graph can hold.

    Args:
        model: the network.
        exponents: of the steps, by parameter and :data:`EMBEDDINGS`.
        bit_worth: what a bit is worth in mean squared error.
        frames: number of frames T.
    """

    def __init__(self, model: VideoNetwork, exponents: Mapping[str, int], bit_worth: float, *, frames: int) -> None:
        parameters = model.coded_parameters()
        device = next(iter(parameters.values())).device
        steps = torch.from_numpy(log_steps(np.array([*exponents.values()]))).to(device)
        self.exponents = dict(exponents)
        self.bit_worth = bit_worth
        self._parameters: list[Tensor] = list(parameters.values())
        self._steps = dict(zip(exponents, steps.unbind(), strict=True))
        self._weight_steps = [self._steps[name] for name in parameters]
        self._exact = [torch.empty_like(parameter) for parameter in self._parameters]
        self._frames = frames

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights in their place; :meth:`restore_weights` brings them back."""
        torch._foreach_copy_(self._exact, self._parameters)
        for parameter, step in zip(self._parameters, self._weight_steps, strict=True):
            parameter.copy_(fake_quantize(parameter, step))

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Undo :meth:`round_weights`."""
        torch._foreach_copy_(self._parameters, self._exact)

    def round_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return embeddings ``[B, C, h, w]`` as the file will hold them, float32."""
        return fake_quantize(embeddings.float(), self._steps[EMBEDDINGS])

    def rate(self, embeddings: Tensor | None) -> Tensor:
        """Return the rate term, float32 ``[]``, of the weights as they are and of a batch of embeddings."""
        terms = [self._bits(p, step, p.numel()) for p, step in zip(self._parameters, self._weight_steps, strict=True)]
        if embeddings is not None:
            count = self._frames * embeddings[0].numel()
            terms.append(self._bits(embeddings.float(), self._steps[EMBEDDINGS], count))
        return self.bit_worth * torch.stack(terms).sum()

    @staticmethod
    def _bits(values: Tensor, step: Tensor, count: int) -> Tensor:
        return count * torch.log2(1 + 2 * math.e * values.abs().mean() / step)
