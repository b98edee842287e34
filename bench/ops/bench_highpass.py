"""The FFT high-pass filter on a GPU: real FFT and one mask kernel against the complex FFT of the definition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import highpass as reference

from ..device import Machine, require_close
from ..registry import Contender, Point

COMPILED = "torch.compile max-autotune"


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure frames of 640x1280, alone and in a batch, and a frame with odd sizes."""
    for batch, height, width in ((32, 640, 1280), (1, 640, 1280), (8, 639, 1277)):
        name = f"batch {batch}, {height}x{width}"
        if machine.wants(name, seconds=40):
            with machine.room(name):
                yield from _measure(machine, name, *machine.shape((batch, 3, height, width), (2, 3, 5 + batch % 2, 8)))


def _measure(machine: Machine, name: str, *shape: int) -> Iterator[dict[str, Any]]:
    x = torch.rand(shape, device=machine.device)

    def definition() -> torch.Tensor:
        return reference.highpass(x, 0.8)

    compiled = machine.compile(definition)
    implementations = ["fft"] if machine.dry else ["triton", "fft"]
    runs: dict[str, Callable[[], torch.Tensor]] = {
        impl: functools.partial(ops.highpass, x, 0.8, impl=impl) for impl in implementations
    }

    def check() -> None:
        expected, same = reference.highpass(x.double(), 0.8), definition()
        for run_name, run in (*runs.items(), (COMPILED, compiled)):
            with machine.trying(run_name):
                require_close(name, run(), expected, same)

    moved = 2 * x.numel() * x.element_size()
    point = Point(
        what="highpass",
        data=name,
        dtype="float32",
        shape=shape,
        unit="GB/s",
        scale=1e9,
        contenders=[
            *(Contender(impl, run, moved) for impl, run in runs.items()),
            Contender("eager", definition, moved),
            Contender(COMPILED, compiled, moved),
        ],
        baseline="eager",
        check=check,
        facts={"bytes_counted": "the image once in and once out"},
    )
    yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
