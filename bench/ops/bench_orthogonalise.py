"""The matrices of Muon on a GPU: all those of a network, as a training step has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hflfnerv._concurrent import side_by_side
from hflfnerv.models import MODELS
from hflfnerv.ops._orthogonalise import SMALL_ROWS, orthogonalise_all

from ..device import Machine
from ..networks import network_of
from ..registry import Contender, Point

_QUINTIC = 3.4445, -4.7750, 2.0315
_STEPS = 5


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the orthogonalisation of all matrices of both networks of the preset ``best``."""
    for name in ("hnerv", "hflf"):
        network = network_of(machine, MODELS[name], with_encoder=True, preset="best")
        data = f"{name} 1.5M best, the matrices of a step"
        if machine.wants(data, seconds=30):
            with machine.room(data):
                yield from _measure(machine, data, [weight.flatten(1).shape for weight in network.hidden_weights()])


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Return the steps in bfloat16, as the authors of Muon write them."""
    a, b, c = _QUINTIC
    x = x.bfloat16()
    wide = x.mT if x.shape[0] > x.shape[1] else x
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT if x.shape[0] > x.shape[1] else wide


def _distance(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made.double() - expected).norm() / expected.norm())


def _measure(machine: Machine, data: str, shapes: Sequence[torch.Size]) -> Iterator[dict[str, Any]]:
    matrices = [torch.randn(shape, device=machine.device) for shape in shapes]
    # As the optimiser hands them over: large ones in bfloat16.
    mixed = [x.bfloat16() if min(x.shape) > SMALL_ROWS else x for x in matrices]

    def plain() -> list[torch.Tensor]:
        return [newton_schulz(x).float() for x in matrices]

    def auto() -> list[torch.Tensor]:
        with side_by_side():
            return orthogonalise_all(mixed)

    runs: dict[str, Callable[[], list[torch.Tensor]]] = {
        "auto": auto,
        "reference": lambda: orthogonalise_all(matrices, impl="reference"),
        "eager": plain,
    }

    def check() -> None:
        exact = orthogonalise_all([x.double() for x in matrices], impl="reference")
        peer = plain()
        for name in ("auto", "reference"):
            with machine.trying(name):
                for x, made, expected, in_half in zip(matrices, runs[name](), exact, peer, strict=True):
                    # An error in small eigenvalues of the Gram matrix grows by a^2 in each of four steps; in bfloat16
                    # it may be twice that of the same steps by PyTorch, and a rounding.
                    bound = 2 * _QUINTIC[0] ** 8 * 3 * 2**-22
                    if made.dtype != torch.float32:
                        bound = 2 * _distance(in_half, expected) + 2**-8
                    error = _distance(made, expected)
                    assert error <= bound, f"{data}, {name}, {tuple(x.shape)}: error {error:.3g} above {bound:.3g}"

    point = Point(
        what="orthogonalise",
        data=data,
        dtype="float32",
        shape=(len(shapes),),
        unit="calls/s",
        scale=1.0,
        contenders=[Contender(name, run, 1) for name, run in runs.items()],
        baseline="eager",
        check=check,
    )
    yield from machine.measure(point)
