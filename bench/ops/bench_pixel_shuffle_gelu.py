"""Bias, PixelShuffle and GELU on a GPU: the fused kernels against eager PyTorch and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import pixel_shuffle_gelu as reference

from ..device import Machine, cuda_kernels, require_close
from ..registry import Contender, Point

# Output channels, r, height and width of the input: the three large blocks of the 1.5 M network at 640x1280.
STAGES = {"s5": (28, 2, 320, 640), "s4": (33, 2, 160, 320), "s3": (40, 4, 40, 80)}
TINY = (3, 2, 4, 5)
COMPILED = "torch.compile max-autotune"


def operands(machine: Machine, stage: str, batch: int, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    """Return x, bias and dy of one block."""
    channels, r, height, width = machine.shape(STAGES[stage], TINY)
    generator = torch.Generator(machine.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=machine.device, generator=generator).to(dtype)

    x = random(batch, channels * r * r, height, width).contiguous(memory_format=layout)
    dy = random(batch, channels, height * r, width * r).contiguous(memory_format=layout)
    return x, random(channels * r * r), dy, r


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure forward and backward at the shapes of the large blocks, as a share of the bandwidth of a copy."""
    for batch in (8, 1):
        for dtype in (torch.bfloat16, torch.float16):
            for stage in STAGES:
                layouts = [torch.channels_last]
                if dtype == torch.bfloat16 and batch == 8:
                    layouts.append(torch.contiguous_format)
                for layout in layouts:
                    name = f"{stage}, batch {batch}, {str(dtype)[6:]}, {str(layout)[6:]}"
                    if machine.wants(name, seconds=40):
                        with machine.room(name):
                            yield from _measure(machine, name, stage, batch, dtype, layout)


def _measure(
    machine: Machine, name: str, stage: str, batch: int, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[dict[str, Any]]:
    x, bias, dy, r = operands(machine, stage, batch, dtype, layout)
    channels_last = layout == torch.channels_last
    impls = [machine.implementation, *(cuda_kernels() if channels_last and not machine.dry else ())]

    def eager() -> torch.Tensor:
        return reference.pixel_shuffle_gelu(x, r, bias)

    def eager_backward() -> tuple[torch.Tensor, ...]:
        dx, dbias = reference.pixel_shuffle_gelu_backward(dy, x, r, bias)
        assert dbias is not None
        return dx, dbias

    def ours(impl: str) -> torch.Tensor:
        return ops.pixel_shuffle_gelu(x, r, bias, impl=impl)

    def ours_backward(impl: str) -> Any:
        return torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy, x, r, bias, "none", impl)

    forward = {impl: functools.partial(ours, impl) for impl in impls}
    backward = {impl: functools.partial(ours_backward, impl) for impl in impls}
    compiled, compiled_backward = machine.compile(eager), machine.compile(eager_backward)

    def check() -> None:
        expected = reference.pixel_shuffle_gelu(x.double(), r, bias.double())
        for run_name, run in {**forward, COMPILED: compiled}.items():
            with machine.trying(run_name):
                require_close(name, run(), expected, eager())

    def check_backward() -> None:
        expected = reference.pixel_shuffle_gelu_backward(dy.double(), x.double(), r, bias.double())
        for run_name, run in {**backward, COMPILED: compiled_backward}.items():
            with machine.trying(run_name):
                for actual, true, same in zip(run(), expected, eager_backward(), strict=True):
                    assert true is not None
                    require_close(f"{name}, backward", actual, true, same)

    size = x.numel() * x.element_size()
    parts = (
        ("forward", 2 * size, check, forward, eager, compiled),
        ("backward", 3 * size, check_backward, backward, eager_backward, compiled_backward),
    )
    for what, moved, verify, our_runs, eager_run, compiled_run in parts:
        source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=x.device) for _ in range(2))
        source.random_()
        point = Point(
            what=f"pixel_shuffle_gelu.{what}",
            data=name,
            dtype=str(dtype)[6:],
            shape=x.shape,
            unit="GB/s",
            scale=1e9,
            contenders=[
                *(Contender(impl, run, moved) for impl, run in our_runs.items()),
                Contender("eager", eager_run, moved, "GB/s of the fused kernel's bytes"),
                Contender(COMPILED, compiled_run, moved, "GB/s of the fused kernel's bytes"),
                Contender("copy of as many bytes", functools.partial(target.copy_, source), moved, "what is to be had"),
            ],
            baseline=COMPILED,
            check=verify,
        )
        yield from machine.measure(point, share_of=("copy", machine.copy_gb_per_second))
