"""The upsampling block on a GPU: cuDNN's convolutions alone, the gradients, and the block fused, eager and compiled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hflfnerv import ops
from hflfnerv.ops import _cuda
from hflfnerv.ops._conv_pixel_shuffle_gelu import conv2d_gradients
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference

from ..device import Machine, cuda_kernels, require_close, without_autotuning
from ..registry import Contender, Point

# C_in, output channels, r, kernel, height and width of the input: the large blocks of the 1.5 M network at 640x1280.
STAGES = {
    "s5": (33, 28, 2, 5, 320, 640),
    "s4": (40, 33, 2, 5, 160, 320),
    "s3": (48, 40, 4, 5, 40, 80),
    "s2": (57, 48, 4, 3, 10, 20),
}
# Of the decoders for low frequencies of the dual stream as published, at the same size and resolution.
SMALL_STAGES = {
    "lfd2, block 4": (12, 10, 2, 5, 320, 640),
    "lfd2, block 3": (15, 12, 4, 5, 80, 160),
    "lfd2, block 2": (18, 15, 4, 5, 20, 40),
    "lfd1, block 4": (6, 5, 2, 5, 320, 640),
}
TINY = (5, 3, 2, 3, 4, 6)
COMPILED = "torch.compile max-autotune"


def operands(machine: Machine, stage: str, batch: int, dtype: torch.dtype, channels: int | None = None) -> Any:
    """Return x, weight, bias, dy and r of one block; ``channels`` instead of the true number of input channels."""
    true, out_channels, r, kernel, height, width = machine.shape((STAGES | SMALL_STAGES)[stage], TINY)
    channels = channels or true
    n = out_channels * r * r
    generator = torch.Generator(machine.device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, device=machine.device, generator=generator) * scale
        return values.to(dtype).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values.to(dtype)

    x = random(batch, channels, height, width)
    weight = random(n, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5)
    return x, weight, random(n), random(batch, out_channels, height * r, width * r), r


def flops(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the operations of the convolution without any padding of channels."""
    return 2 * weight.numel() * x.shape[0] * x.shape[2] * x.shape[3]


def stage_points(
    machine: Machine, dtype: str, *, seconds: float, stages: Iterable[str] = STAGES, batches: Sequence[int] = (8, 1)
) -> Iterator[tuple[str, str, int]]:
    """Yield name, stage and batch of each point that is wanted and has the time that it takes."""
    for batch, stage in itertools.product(batches, stages):
        name = f"{stage}, batch {batch}, {dtype}, channels_last"
        if machine.wants(name, seconds=seconds):
            yield name, stage, batch


def library_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the convolutions of PyTorch (cuDNN): forward and both gradients, with true and padded channels."""
    for name, stage, batch in stage_points(machine, "bfloat16", seconds=30, batches=(1, 8)):
        with machine.room(name):
            yield from _measure_library(machine, name, stage, batch)


def _measure_library(machine: Machine, name: str, stage: str, batch: int) -> Iterator[dict[str, Any]]:
    true = machine.shape(STAGES[stage], TINY)[0]
    widths = [true, *(c for c in (40, 48, 64) if c > true)] if not machine.dry else [true, 8]
    x, weight, *_ = operands(machine, stage, batch, torch.bfloat16)
    work, shape = flops(x, weight), x.shape
    padding = weight.shape[2] // 2
    runs: dict[str, list[tuple[int, Callable[[], Any]]]] = {"forward": [], "dgrad": [], "wgrad": []}
    for channels in widths:
        x, weight, *_ = operands(machine, stage, batch, torch.bfloat16, channels)
        dz = torch.randn_like(F.conv2d(x, weight, padding=padding))

        def backward(mask: list[bool], x: Any = x, weight: Any = weight, dz: Any = dz) -> Any:
            return torch.ops.aten.convolution_backward(
                dz, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, mask
            )

        runs["forward"].append((channels, functools.partial(F.conv2d, x, weight, padding=padding)))
        runs["dgrad"].append((channels, functools.partial(backward, [True, False, False])))
        runs["wgrad"].append((channels, functools.partial(backward, [False, True, False])))
    for what, of in runs.items():

        def check(of: Any = of, what: str = what) -> None:
            # The library is not on trial; only what it returned is looked at.
            for channels, run in of:
                with machine.trying(f"C_in = {channels}"):
                    made = run()
                    results = [t for t in (made if isinstance(made, tuple) else [made]) if t is not None]
                    assert all(t.isfinite().all() for t in results), f"{what}, {channels} channels: not finite"

        point = Point(
            what=f"conv2d.{what}",
            data=name,
            dtype="bfloat16",
            shape=shape,
            unit="TFLOP/s",
            scale=1e12,
            contenders=[Contender(f"C_in = {channels}", run, work, "TFLOP/s of the true C_in") for channels, run in of],
            baseline=f"C_in = {true}",
            check=check,
        )
        yield from machine.measure(point, share_of=("matmul", machine.matmul_tflop_per_second))


def gradient_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the gradients of x and weight: every tile of the kernels against cuDNN, to tell which to use by shape.

    Each with all it takes in a backward pass: packing the weight, padding x, summing up the shares.
    """
    for name, stage, batch in stage_points(machine, "bfloat16", seconds=40):
        with machine.room(name), torch.inference_mode():
            yield from _measure_gradients(machine, name, stage, batch)


def stream_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure blocks of few channels, forward and their gradients."""
    for name, stage, batch in stage_points(machine, "bfloat16", seconds=40, stages=SMALL_STAGES):
        with machine.room(name), torch.inference_mode():
            yield from _measure_forward(machine, name, stage, batch, torch.bfloat16)
            yield from _measure_gradients(machine, name, stage, batch)


def _measure_gradients(machine: Machine, name: str, stage: str, batch: int) -> Iterator[dict[str, Any]]:
    x, weight, _, _, r = operands(machine, stage, batch, torch.bfloat16)
    n = weight.shape[0]
    dz = torch.randn(batch, n, *x.shape[2:], device=machine.device).bfloat16()
    dz = F.pad(dz, (0, 0, 0, 0, 0, -n % 8)).contiguous(memory_format=torch.channels_last)
    for index, which in enumerate(("dgrad", "wgrad")):
        wanted = [index == 0, index == 1]

        def library(to: torch.dtype = torch.bfloat16, index: int = index, wanted: Any = wanted) -> torch.Tensor:
            gradient = conv2d_gradients(*(t.to(to) for t in (dz, x, weight)), r, wanted)[index]
            assert gradient is not None
            return gradient

        runs: dict[str, Callable[[], torch.Tensor]] = (
            {} if machine.dry else _every_gradient_tile(which, x, dz, weight, r)
        )
        if which == "dgrad" and cuda_kernels():
            runs["cuda"] = functools.partial(_cuda.conv_pixel_shuffle_gelu_dgrad, dz, weight, r)
        runs["conv2d"] = library

        def check(runs: Any = runs, library: Any = library, which: str = which) -> None:
            with without_autotuning():
                expected = library(torch.float64)
            same = library()
            for run_name, run in runs.items():
                with machine.trying(run_name):
                    require_close(f"{name}, {which}, {run_name}", run(), expected, same)

        work = flops(x, weight)
        point = Point(
            what=f"conv_pixel_shuffle_gelu.{which}",
            data=name,
            dtype="bfloat16",
            shape=x.shape,
            unit="TFLOP/s",
            scale=1e12,
            contenders=[Contender(run_name, run, work) for run_name, run in runs.items()],
            baseline="conv2d",
            check=check,
        )
        yield from machine.measure(point, share_of=("matmul", machine.matmul_tflop_per_second))


def _every_gradient_tile(
    which: str, x: torch.Tensor, dz: torch.Tensor, weight: torch.Tensor, r: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a run for each tile that fits the device, the preferred one first."""
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels
    from hflfnerv.triton_kernels._tiles import device_limits

    limits = device_limits(x.device.index)
    n, channels, rows, columns = weight.shape
    if which == "dgrad":
        found = kernels.tiles(x.shape[0] * x.shape[2] * x.shape[3], channels, x.dtype, limits)
        gradient = functools.partial(kernels.conv_pixel_shuffle_gelu_dgrad, dz, weight, r)
    else:
        found = kernels.wgrad_tiles(rows * columns * (channels + -channels % 8), n, x.dtype, limits)
        gradient = functools.partial(kernels.conv_pixel_shuffle_gelu_wgrad, x, dz, weight, r)
    return {
        f"triton {t.block_m} pixels, depth {t.block_k}, {t.num_warps} warps, {t.num_stages} stages": functools.partial(
            gradient, tile=t
        )
        for t in found
    }


def _blocks(machine: Machine, *, training: bool) -> Iterator[tuple[str, str, int, torch.dtype]]:
    for dtype in (torch.bfloat16, torch.float16):
        for name, stage, batch in stage_points(machine, str(dtype)[6:], seconds=60 if training else 40):
            yield name, stage, batch, dtype


def forward_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the block's forward pass: every tile of the fused kernel, and what it competes with."""
    for name, stage, batch, dtype in _blocks(machine, training=False):
        with machine.room(name), torch.inference_mode():
            yield from _measure_forward(machine, name, stage, batch, dtype)


def _measure_forward(
    machine: Machine, name: str, stage: str, batch: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    x, weight, bias, _, r = operands(machine, stage, batch, dtype)
    padding = weight.shape[2] // 2

    def eager() -> torch.Tensor:
        return reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding)

    def ours(impl: str) -> Callable[[], torch.Tensor]:
        return lambda: ops.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding, impl=impl)

    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for impl in ("reference",) if machine.dry else ("triton", "conv2d+triton", *cuda_kernels()):
        runs[impl] = ours(impl)
    if not machine.dry:
        runs |= _every_tile(x, weight, bias, r)
        if cuda_kernels():
            runs["cuda, packed, pixels of x as the kernel reads them"] = _cuda_prepared(x, weight, bias, r)
    runs |= {"eager": eager, COMPILED: machine.compile(eager)}

    def check() -> None:
        with without_autotuning():
            doubles = [t.double() for t in (x, weight, bias)]
            expected = reference.conv_pixel_shuffle_gelu(doubles[0], doubles[1], doubles[2], r, padding=padding)
        same = eager()
        for run_name, run in runs.items():
            with machine.trying(run_name):
                require_close(f"{name}, {run_name}", run(), expected, same)

    work = flops(x, weight)
    point = Point(
        what="conv_pixel_shuffle_gelu.forward",
        data=name,
        dtype=str(dtype)[6:],
        shape=x.shape,
        unit="TFLOP/s",
        scale=1e12,
        contenders=[Contender(run_name, run, work) for run_name, run in runs.items()],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, share_of=("matmul", machine.matmul_tflop_per_second))


def _every_tile(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, r: int) -> dict[str, Callable[[], Any]]:
    """Return a run for each tile that fits the device, with a weight that was packed before, as for inference."""
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels
    from hflfnerv.triton_kernels._tiles import column_blocks, device_limits

    packed = kernels.pack_weight(weight, r)
    limits = device_limits(x.device.index)
    found = kernels.tiles(x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0], x.dtype, limits)

    def run(tile: Any) -> Callable[[], torch.Tensor]:
        kernel_size = (weight.shape[2], weight.shape[3])
        return lambda: kernels.conv_pixel_shuffle_gelu_fwd(
            x, packed, bias, weight.shape[0], kernel_size, r, "none", tile=tile
        )[0]

    columns = "+".join(str(c) for c in column_blocks(weight.shape[0]) if c)
    return {
        f"triton {t.block_m}x{columns}x{t.block_k}, {t.num_warps} warps, {t.num_stages} stages, packed": run(t)
        for t in found
    }


def _cuda_prepared(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, r: int) -> Callable[[], torch.Tensor]:
    """Return a run as between two blocks of a network: the weight was packed before, and x is read in place."""
    from hflfnerv.ops import _cuda

    packed = _cuda.pack_weight(x, weight, r, False)
    batch, channels, height, width = x.shape
    memory = x.new_empty((batch, height, width, channels + -channels % 8))
    pixels = memory[..., :channels].permute(0, 3, 1, 2).copy_(x)
    operation = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
    return lambda: operation(pixels, weight, bias, packed, r, "none", False, "cuda", "conv2d", "conv2d")[0]


def training_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the block's forward and backward pass together."""
    for name, stage, batch, dtype in _blocks(machine, training=True):
        with machine.room(name):
            yield from _measure_training(machine, name, stage, batch, dtype)


def _measure_training(
    machine: Machine, name: str, stage: str, batch: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    x, weight, bias, dy, r = operands(machine, stage, batch, dtype)
    padding = weight.shape[2] // 2

    def block(impl: str) -> Callable[..., torch.Tensor]:
        return lambda x, w, b: ops.conv_pixel_shuffle_gelu(x, w, b, r, padding=padding, impl=impl)

    def with_gradients(dgrad: str, wgrad: str) -> Callable[..., torch.Tensor]:
        """The fused kernel, with a choice of what makes the gradients instead of the one by shape."""
        operation = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
        return lambda x, w, b: operation(x, w, b, None, r, "none", True, "triton", dgrad, wgrad)[0]

    def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return reference.conv_pixel_shuffle_gelu(x, w, b, r, padding=padding)

    def step(function: Callable[..., torch.Tensor], to: torch.dtype = dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(to))]

    functions = {"reference": block("reference")} if machine.dry else {"conv2d+triton": block("conv2d+triton")}
    if not machine.dry:
        for dgrad, wgrad in itertools.product(("triton", "conv2d"), repeat=2):
            functions[f"triton, dgrad {dgrad}, wgrad {wgrad}"] = with_gradients(dgrad, wgrad)
        functions |= {impl: block(impl) for impl in cuda_kernels()}
    functions |= {"eager": eager, COMPILED: machine.compile(eager)}

    def check() -> None:
        with without_autotuning():
            expected = step(eager, torch.float64)
        same = step(eager)
        for function_name, function in functions.items():
            with machine.trying(function_name):
                for actual, true, rounded, what in zip(
                    step(function), expected, same, ("y", "dx", "dweight", "dbias"), strict=True
                ):
                    require_close(f"{name}, {function_name}, {what}", actual, true, rounded)

    work = 3 * flops(x, weight)
    point = Point(
        what="conv_pixel_shuffle_gelu.forward_backward",
        data=name,
        dtype=str(dtype)[6:],
        shape=x.shape,
        unit="TFLOP/s",
        scale=1e12,
        contenders=[
            Contender(function_name, functools.partial(step, function), work)
            for function_name, function in functions.items()
        ],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, share_of=("matmul", machine.matmul_tflop_per_second))
