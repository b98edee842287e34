"""The output stage on a GPU: head convolutions to frames of 8 bits in one kernel, against eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import output_stage as reference

from ..device import Machine, cuda_kernels, require_close, without_autotuning
from ..registry import Contender, Point

COMPILED = "torch.compile max-autotune"
# Channels of the features, groups, scales: the 1.5 M networks.
NETWORKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]] = {
    "hnerv": ((28,), (0,), (0.5,)),
    "hflf": ((24, 5, 10), (0, 1, 1), (1.0, 0.5)),
}


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure frames of 640x1280, as a share of the bandwidth of a copy."""
    for batch in (8, 1):
        for network in NETWORKS:
            for dtype in (torch.float16, torch.bfloat16):
                name = f"{network}, batch {batch}, {str(dtype)[6:]}, 640x1280"
                if machine.wants(name, seconds=40):
                    with machine.room(name), torch.inference_mode(), ops.PackedWeights():
                        yield from _measure(machine, name, network, batch, dtype)


def _measure(machine: Machine, name: str, network: str, batch: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    channels, groups, scales = NETWORKS[network]
    batch, height, width = machine.shape((batch, 640, 1280), (2, 5, 8))

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=machine.device) * scale).to(dtype)

    features = [random(batch, c, height, width).contiguous(memory_format=torch.channels_last) for c in channels]
    weights = [torch.nn.Parameter(random(3, c, 3, 3, scale=(9 * c) ** -0.5), requires_grad=False) for c in channels]
    biases = [random(3) for _ in channels]
    sums = torch.zeros(len(scales), 3, device=machine.device)
    for group, bias in zip(groups, biases, strict=True):
        sums[group] += bias

    def ours(impl: str, as_bytes: bool = True) -> torch.Tensor:
        return ops.output_stage(features, weights, biases, groups=groups, scales=scales, as_bytes=as_bytes, impl=impl)

    implementations = [machine.implementation, *([] if machine.dry else cuda_kernels())]

    def definition(to: torch.dtype = dtype, as_bytes: bool = True) -> torch.Tensor:
        tensors = [[t.to(to) for t in of] for of in (features, weights)]
        link: dict[str, Any] = {"groups": groups, "scales": scales, "offset": 0.5, "crop": (height, width)}
        return reference.output_stage(*tensors, sums.to(to), **link, as_bytes=as_bytes)

    runs: dict[str, Callable[[], torch.Tensor]] = {
        **{impl: functools.partial(ours, impl) for impl in implementations},
        "eager": definition,
        COMPILED: machine.compile(definition),
    }

    def check() -> None:
        with without_autotuning():
            expected = definition(torch.float64, False)
        for impl in implementations:
            with machine.trying(impl):
                require_close(f"{name}, {impl}", ours(impl, False), expected, definition(dtype, False).float())
        levels = (expected.clamp(0, 1) * 255).round()
        for run_name, run in runs.items():
            with machine.trying(run_name):
                difference = (run().double() - levels).abs()
                # A value near a half may fall on either side of it. PyTorch rounds the image to its dtype before.
                allowed = 1 if run_name in implementations else 8
                assert float(difference.max()) <= allowed, f"{name}, {run_name}: {difference.max()} levels off"

    moved = sum(x.numel() * x.element_size() for x in features) + batch * height * width * 3
    note = "GB/s of the fused kernel's bytes"
    point = Point(
        what="output_stage",
        data=name,
        dtype=str(dtype)[6:],
        shape=features[0].shape,
        unit="GB/s",
        scale=1e9,
        contenders=[Contender(run_name, run, moved, note) for run_name, run in runs.items()],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
