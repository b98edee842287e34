"""The upsampling block on the CPU in float32, and in bfloat16 where the processor multiplies in it, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv._device import training_precision
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU, PackedWeights, _winograd
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call
from hflfnerv.testing import assert_close_to_reference

from ..registry import Contender, Point, Skipped, suite

# Input and output channels, r, kernel, height and width: the blocks of the 1.5 M network at 640x1280, other odd widths,
# and a small grid.
SHAPES = [
    (33, 28, 2, 5, 320, 640),
    (40, 33, 2, 5, 160, 320),
    (48, 40, 4, 5, 40, 80),
    (57, 48, 4, 3, 10, 20),
    (29, 24, 2, 5, 160, 320),
    (24, 24, 2, 3, 320, 640),
    (28, 3, 1, 3, 640, 1280),
    (64, 64, 2, 1, 80, 160),
    (50, 42, 5, 3, 2, 4),
]
BASELINE = "PyTorch, three operations"
OURS = ("cpp", "winograd", "conv2d+cpp")
# In relation to the norm: tests/ops/test_conv_pixel_shuffle_gelu_winograd.py has the bound, and sees 1e-5 with 33
# channels; a wrong tap is 1e-3 and more.
WINOGRAD_ERROR = 3e-5
# Of tiles evaluated by Fourier transforms and multiplied as integers, which decoding takes for large images; see
# tests/ops/test_conv_pixel_shuffle_gelu_integer.py.
INTEGER, INTEGER_ERROR = "winograd, integer tiles", 3e-4


def require_near(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Raise unless the difference is a small part of the expected values, in their norm."""
    error = (actual - expected).float().norm() / expected.float().norm()
    assert error <= allowed, f"relative error {error:.2e} is over {allowed:.0e}"


@suite("conv_pixel_shuffle_gelu_cpu")
def points() -> Iterable[Point]:
    """Yield inference at every shape, and training at the large ones; bfloat16 where the processor multiplies in it."""
    entry = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "conv2d+cpp")
    if entry.unavailable() is not None:
        raise Skipped(str(entry.unavailable()))
    has_bf16 = training_precision("auto", torch.device("cpu")) == "bf16"
    dtypes = (torch.bfloat16, torch.float32) if has_bf16 else (torch.float32,)
    for dtype in dtypes:
        for shape in SHAPES:
            yield inference(*shape, dtype)
        for shape in SHAPES[:6]:
            yield training(*shape, dtype)


def operands(
    in_channels: int, channels: int, r: int, kernel: int, height: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weight and bias, channels-last."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    weight = random(channels * r * r, in_channels, kernel, kernel, scale=(in_channels * kernel**2) ** -0.5)
    x = random(1, in_channels, height, width)
    return (
        x.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
        random(channels * r * r),
    )


def describe(in_channels: int, channels: int, r: int, kernel: int, height: int, width: int) -> tuple[str, float]:
    """Return the shape in words, and the floating-point operations of the convolution."""
    text = f"{in_channels} -> {channels}*{r * r}, k = {kernel}, {height} x {width}"
    return text, 2.0 * in_channels * kernel**2 * channels * r * r * height * width


def runnable(call: Call) -> list[str]:
    """Return our implementations on the CPU that can run a call, and "auto": PyTorch's operations for small images."""
    entries = {entry.name: entry for entry in CONV_PIXEL_SHUFFLE_GELU}
    return [*(name for name in OURS if entries[name].why_not(call) is None), "auto"]


def inference(
    in_channels: int, channels: int, r: int, kernel: int, height: int, width: int, dtype: torch.dtype
) -> Point:
    """Return the block without gradients; weights are packed once, and tiles are large, as the decoder does."""
    shape = (in_channels, channels, r, kernel, height, width)
    x, *parameters = operands(*shape, dtype)
    weight, bias = (torch.nn.Parameter(t, requires_grad=False) for t in parameters)
    text, operations = describe(*shape)
    large, integer = PackedWeights(tiles="large"), PackedWeights(tiles="integer")

    def run(name: str) -> torch.Tensor:
        packed, impl = (integer, "winograd") if name == INTEGER else (large, name)
        with torch.inference_mode(), packed:
            return ops.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=kernel // 2, impl=impl)

    call = Call(x, weight, bias, r, (kernel // 2, kernel // 2), "none")
    names = runnable(call)
    if "winograd" in names and _winograd.takes_integers(x, weight):
        names.insert(-1, INTEGER)

    def check() -> None:
        exact = ops.conv_pixel_shuffle_gelu(
            x.double(), weight.double(), bias.double(), r, padding=kernel // 2, impl="reference"
        )
        for name in names:
            if name == INTEGER:
                require_near(run(name), exact.float(), INTEGER_ERROR + torch.finfo(dtype).eps / 2)
            elif name == "winograd" or (name == "auto" and "winograd" in names):  # which may be winograd
                # Float32 sums, rounded once.
                require_near(run(name), exact.float(), WINOGRAD_ERROR + torch.finfo(dtype).eps / 2)
            else:
                assert_close_to_reference(run(name), exact, run("reference"))

    name, threads = str(dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads, channels-last"
    return Point(
        what="conv_pixel_shuffle_gelu.inference",
        data=f"{text}, {name}",
        dtype=name,
        shape=x.shape,
        unit="TFLOP/s",
        scale=1e12,
        contenders=[
            *(Contender(name, lambda name=name: run(name), operations, threads) for name in names),
            Contender(BASELINE, lambda: run("reference"), operations, threads),
        ],
        baseline=BASELINE,
        check=check,
        facts={"threads": torch.get_num_threads()},
    )


def training(
    in_channels: int, channels: int, r: int, kernel: int, height: int, width: int, dtype: torch.dtype
) -> Point:
    """Return the block's forward and backward pass."""
    shape = (in_channels, channels, r, kernel, height, width)
    leaves = [t.requires_grad_() for t in operands(*shape, dtype)]
    text, operations = describe(*shape)
    dy = torch.randn(1, channels, height * r, width * r, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def run(impl: str) -> tuple[Any, ...]:
        y = ops.conv_pixel_shuffle_gelu(*leaves, r, padding=kernel // 2, impl=impl)
        return y, *torch.autograd.grad(y, leaves, dy)

    names = runnable(Call(*leaves, r, (kernel // 2, kernel // 2), "none"))

    def check() -> None:
        expected = run("reference")
        for impl in names:
            for ours, theirs in zip(run(impl), expected, strict=True):
                require_near(ours, theirs, WINOGRAD_ERROR if dtype == torch.float32 else 2e-2)

    name, threads = str(dtype).removeprefix("torch."), f"{torch.get_num_threads()} threads, channels-last"
    return Point(
        what="conv_pixel_shuffle_gelu.training",
        data=f"{text}, {name}",
        dtype=name,
        shape=leaves[0].shape,
        unit="TFLOP/s",
        scale=1e12,
        contenders=[
            *(Contender(impl, lambda impl=impl: run(impl), 3 * operations, threads) for impl in names),
            Contender(BASELINE, lambda: run("reference"), 3 * operations, threads),
        ],
        baseline=BASELINE,
        check=check,
        facts={"threads": torch.get_num_threads()},
    )
