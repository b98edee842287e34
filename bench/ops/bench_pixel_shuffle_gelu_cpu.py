"""PixelShuffle and GELU on the CPU: the fused kernels against PyTorch's two operations, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hflfnerv import ops
from hflfnerv.ops import PIXEL_SHUFFLE_GELU
from hflfnerv.reference import pixel_shuffle_gelu as reference
from hflfnerv.testing import assert_close_to_reference, assert_gradient_close_to_reference

from ..registry import Contender, Point, Skipped, suite

# Input channels, r, height and width: the three large blocks of the 1.5 M network at 640x1280; a small, odd one; r = 5
# with as many channels as networks have; and the activation alone, of an encoder's block.
SHAPES = [
    (112, 2, 320, 640),
    (132, 2, 160, 320),
    (640, 4, 40, 80),
    (75, 5, 61, 90),
    (1000, 5, 32, 64),
    (256, 1, 64, 128),
]
BASELINE = "PyTorch, two operations"


@suite("pixel_shuffle_gelu_cpu")
def points() -> Iterable[Point]:
    """Yield every shape in float32 and bfloat16, contiguous and channels-last."""
    entry = next(entry for entry in PIXEL_SHUFFLE_GELU if entry.name == "cpp")
    if entry.unavailable() is not None:
        raise Skipped(str(entry.unavailable()))
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                yield from points_of(*shape, dtype, layout)


def points_of(
    channels: int, r: int, height: int, width: int, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[Point]:
    """Yield forward and backward of one input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, height, width, generator=generator).to(dtype).contiguous(memory_format=layout)
    dy = torch.randn(1, channels // r**2, height * r, width * r, generator=generator).to(dtype)
    dy = dy.contiguous(memory_format=layout)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.pixel_shuffle(x, r))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ops.pixel_shuffle_gelu(x, r, impl="cpp")

    def forward(function: Any) -> torch.Tensor:
        with torch.inference_mode():
            y: torch.Tensor = function(x)
            return y

    graphs = {function: function(leaf) for function in (eager, ours)}

    def backward(function: Any) -> torch.Tensor:
        (dx,) = torch.autograd.grad(graphs[function], leaf, dy, retain_graph=True)
        return dx

    def check() -> None:
        exact = reference.pixel_shuffle_gelu(x.double(), r)
        assert_close_to_reference(forward(ours), exact, forward(eager))
        slope, _ = reference.pixel_shuffle_gelu_backward(dy.double(), x.double(), r)
        assert_gradient_close_to_reference(backward(ours), slope, backward(eager))

    where = "channels-last" if layout == torch.channels_last else "contiguous"
    name, threads = str(dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads"
    for what, run in (("forward", forward), ("backward", backward)):
        yield Point(
            what=f"pixel_shuffle_gelu.{what}",
            data=f"{channels} x {height} x {width}, r = {r}, {name}, {where}",
            dtype=name,
            shape=x.shape,
            unit="Gvalue/s",
            scale=1e9,
            contenders=[
                Contender("cpp", lambda run=run: run(ours), x.numel(), threads),
                Contender(BASELINE, lambda run=run: run(eager), x.numel(), threads),
            ],
            baseline=BASELINE,
            check=check,
            facts={"threads": torch.get_num_threads()},
        )
