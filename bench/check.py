"""Every operation against its float64 reference on the device, forward and backward; nothing is timed."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import conv_pixel_shuffle_gelu as conv_reference
from hflfnerv.reference import highpass as highpass_reference
from hflfnerv.reference import output_stage as stage_reference
from hflfnerv.reference import pixel_shuffle_gelu as shuffle_reference
from hflfnerv.reference import stream_loss as loss_reference

from .device import Machine, cuda_kernels, require_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# C_in, C_out, r, kernel, H, W
BLOCKS = [(33, 28, 2, 5, 65, 127), (40, 33, 2, 5, 40, 81), (48, 40, 4, 5, 20, 33), (57, 48, 4, 3, 10, 20)]
BLOCKS += [(24, 24, 2, 3, 33, 17), (60, 7, 3, 1, 5, 9), (12, 5, 1, 7, 19, 23), (16, 64, 5, 1, 2, 4)]


# Neighbouring cases share kernels, and go to one process.
_RUN = 4


class CheckFailed(Exception):
    """Some results were wrong; the message names them."""


def points(machine: Machine, processes: int | None = None) -> Iterator[dict[str, Any]]:
    """Compare every operation, implementation, dtype and layout; raise at the end if one was wrong.

    Nearly all of the time goes into compiling hundreds of kernels, so on a device several processes share the cases.

    Args:
        machine: the device.
        processes: how many; None for one in a dry run, and up to eight otherwise.
    """
    count = processes or (1 if machine.dry else min(8, os.cpu_count() or 1))
    failures = []
    for row in _share(machine, 0, 1) if count == 1 else _shares(machine, count):
        if isinstance(row, str):
            failures.append(row)
        else:
            yield row | machine.environment()
    if failures:
        raise CheckFailed(f"{len(failures)} wrong results:\n  " + "\n  ".join(failures))


def _share(machine: Machine, index: int, count: int) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of one of ``count`` shares of the cases, and what is wrong in words."""
    # Float32 products in float32, where an error of a kernel cannot hide in TF32's rounding; and no search for the
    # fastest of cuDNN's algorithms, since each is used once.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    for number, (name, facts, run) in enumerate(_cases(machine)):
        if number // _RUN % count != index or not machine.wants(name, seconds=5):
            continue
        try:
            error = run()
        except Exception as failure:  # a failing kernel must not hide what the others do
            traceback.print_exc()
            yield f"{name}: {type(failure).__name__}: {str(failure)[:200]}"
            continue
        yield {**facts, "data": name, "metric": "relative error", "unit": "", "p50": error}


def _shares(machine: Machine, count: int) -> Iterator[dict[str, Any] | str]:
    """Yield what the shares yield, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    options = {name: getattr(machine, name) for name in ("dry", "deadline", "only")}
    workers = [
        context.Process(target=_work, args=(options, index, count, results), daemon=True) for index in range(count)
    ]
    for worker in workers:
        worker.start()
    left = set(range(count))
    while left:
        try:
            index, result = results.get(timeout=5)
        except queue.Empty:
            for index in [index for index in left if not workers[index].is_alive()]:
                left.remove(index)
                yield f"share {index} of {count}: the process ended with {workers[index].exitcode}, its rest is unknown"
            continue
        if isinstance(result, list):
            machine.left_out += result
            left.remove(index)
        else:
            yield result


def _work(options: dict[str, Any], index: int, count: int, results: Any) -> None:
    from . import checkout  # noqa: F401  before anything asks for the kernels

    torch.set_num_threads(1)
    machine = Machine(**options, seconds=0.0)
    for result in _share(machine, index, count):
        results.put((index, result))
    results.put((index, machine.left_out))


Run = Callable[[torch.dtype, str], list[torch.Tensor]]  # dtype, implementation -> y and gradients


def _compare(name: str, run: Run, dtype: torch.dtype, impl: str, terms: Sequence[int] = ()) -> float:
    """Compare a result and its gradients, sums of so many terms, with float64's; return the largest error."""
    actual, expected, same = run(dtype, impl), run(torch.float64, "reference"), run(dtype, "reference")
    return max(
        require_close(f"{name}, result {part} of y and its gradients", *three, terms=terms[part] if terms else 0)
        for part, three in enumerate(zip(actual, expected, same, strict=True))
    )


def _gradients(y: torch.Tensor, leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _shuffle(z: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, r: int, approximate: str) -> Run:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (z, bias)]
        if impl == "reference":
            y = shuffle_reference.pixel_shuffle_gelu(leaves[0], r, leaves[1], approximate=approximate)
        else:
            y = ops.pixel_shuffle_gelu(leaves[0], r, leaves[1], approximate=approximate, impl=impl)
        return _gradients(y, leaves, dy)

    return run


def _block(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, r: int, approximate: str
) -> Run:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        padding = weight.shape[2] // 2
        if impl == "reference":
            y = conv_reference.conv_pixel_shuffle_gelu(
                leaves[0], leaves[1], leaves[2], r, padding=padding, approximate=approximate
            )
        elif impl == "triton":
            # With the gradients by kernels whatever the shape; PyTorch's convolutions need no check.
            y = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
                *leaves, None, r, approximate, True, "triton", "triton", "triton"
            )[0]
        else:
            y = ops.conv_pixel_shuffle_gelu(
                leaves[0], leaves[1], leaves[2], r, padding=padding, approximate=approximate, impl=impl
            )
        return _gradients(y, leaves, dy)

    return run


def _loss(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None, dloss: torch.Tensor) -> Run:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (low, high) if t is not None]
        if impl == "reference":
            y = loss_reference.stream_loss(leaves[0], target, *leaves[1:])
        else:
            y = ops.stream_loss(leaves[0], target, *leaves[1:], impl=impl)
        return _gradients(y, leaves, dloss)

    return run


def _stage(features: list[torch.Tensor], weights: list[torch.Tensor], bias: torch.Tensor) -> Run:
    groups, scales = ((0,), (0.5,)) if len(features) == 1 else ((0, 1, 1), (1.0, 0.5))
    crop = (features[0].shape[2] - 1, features[0].shape[3] - 2)

    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        tensors = [[t.to(dtype) for t in of] for of in (features, weights)]
        if impl == "reference":
            # Without a bias for the last features of a group: one for each group.
            link: dict[str, Any] = {"groups": groups, "scales": scales, "offset": 0.5, "crop": crop}
            sums = bias.to(dtype).expand(len(scales), 3)
            frame = stage_reference.output_stage(*tensors, sums, **link, as_bytes=False)
            return [frame if dtype == torch.float64 else frame.float()]
        biases = [bias.to(dtype) if groups.index(g) == i else None for i, g in enumerate(groups)]
        frame = ops.output_stage(*tensors, biases, groups=groups, scales=scales, crop=crop, as_bytes=False, impl=impl)
        return [frame]

    return run


def _head(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> Run:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        return _gradients(ops.conv2d(*leaves, impl=impl), leaves, dy)

    return run


def _int8(block: tuple[int, ...], generator: torch.Generator, impl: str) -> float:
    """Compare a block in int8 with its definition; return the share of the values that are a step off."""
    channels, out_channels, r, kernel, height, width = block
    device = generator.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    of, to = (
        ops.Int8Range.of(torch.full((c,), -0.2, device=device), random(c).abs() + 1) for c in (channels, out_channels)
    )
    weight = random(out_channels * r * r, channels, kernel, kernel) * (channels * kernel**2) ** -0.5
    packed = ops.Int8Block.of(weight, random(len(weight)), r, of, to)
    results = []
    x = random(2, channels, height, width)
    for name in (impl, "reference"):
        image = ops.quantize_int8(x, of, ops.int8_image(2, height, width, of, halo=kernel // 2), impl=name)
        out = ops.int8_image(2, height * r, width * r, to, halo=1)
        results.append(ops.conv_pixel_shuffle_gelu_int8(image, packed, out, impl=name).int())
    difference = (results[0] - results[1]).abs()
    wrong = float((difference > 0).double().mean())
    # A value of x that is rounded to the other side moves all that it reaches, most of it by less than a step.
    if difference.max() > 1 or wrong > 0.01:
        raise AssertionError(f"{int(difference.max())} steps off, {wrong:.1e} of the values differ")
    return wrong


def _filter(x: torch.Tensor) -> Run:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        if impl == "reference":
            work = dtype if dtype == torch.float64 else torch.float32
            return [highpass_reference.highpass(x.to(work), 0.8).to(dtype)]
        return [ops.highpass(x.to(dtype), 0.8, impl=impl)]

    return run


def _cases(machine: Machine) -> Iterator[tuple[str, dict[str, Any], Callable[[], float]]]:
    """Yield the name, the row's first fields and the comparison of each case."""
    generator = torch.Generator(machine.device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=machine.device, generator=generator)

    def case(op: str, what: str, run: Run, dtype: torch.dtype, impl: str, terms: Sequence[int] = ()) -> Any:
        name = f"{op}, {what}, {str(dtype)[6:]}, {impl}"
        facts = {"what": f"check.{op}", "implementation": impl, "dtype": str(dtype)[6:]}
        return name, facts, functools.partial(_compare, name, run, dtype, impl, terms)

    kernels = ["reference"] if machine.dry else ["triton"]
    cuda = [] if machine.dry else cuda_kernels()
    convolutions = ["reference"] if machine.dry else ["triton", "conv2d+triton", *cuda]
    filters = ["fft"] if machine.dry else ["triton", "fft"]
    blocks = [(5, 3, 2, 3, 7, 9)] if machine.dry else BLOCKS
    for dtype, layout, block, approximate in itertools.product(DTYPES, LAYOUTS, blocks, ("none", "tanh")):
        channels, out_channels, r, kernel, height, width = block
        n = out_channels * r * r
        x = random(2, channels, height, width).to(dtype).contiguous(memory_format=layout)
        z = random(2, n, height, width).to(dtype).contiguous(memory_format=layout)
        weight = (random(n, channels, kernel, kernel) * (channels * kernel**2) ** -0.5).to(dtype)
        bias, dy = random(n).to(dtype), random(2, out_channels, height * r, width * r).to(dtype)
        what = f"r {r}, {height}x{width}, {approximate}, {str(layout)[6:]}"
        run = _shuffle(z, bias, dy, r, approximate)
        for impl in [*kernels, *cuda]:
            if impl == "cuda" and (dtype == torch.float32 or layout == torch.contiguous_format):
                continue
            yield case("pixel_shuffle_gelu", f"{out_channels} channels, {what}", run, dtype, impl)
        run = _block(x, weight, bias, dy, r, approximate)
        pixels, taps = 2 * height * width, kernel**2
        terms = [channels * taps, n * taps, pixels, pixels]
        for impl in convolutions:
            if impl == "cuda" and dtype == torch.float32:
                continue
            size = f"{channels} to {out_channels} channels, kernel {kernel}"
            yield case("conv_pixel_shuffle_gelu", f"{size}, {what}", run, dtype, impl, terms)
    for block, impl in itertools.product(blocks, kernels):
        channels, out_channels, r, kernel, height, width = block
        name = f"conv_pixel_shuffle_gelu_int8, {channels} to {out_channels} channels, kernel {kernel}, r {r}, {impl}"
        facts = {"what": "check.conv_pixel_shuffle_gelu_int8", "implementation": impl, "dtype": "int8"}
        yield name, facts, functools.partial(_int8, block, generator, impl)
    for dtype, shape, impl in itertools.product(DTYPES, ((2, 3, 64, 96), (3, 63, 95), (1, 640, 1280)), filters):
        yield case("highpass", "x".join(map(str, shape)), _filter(random(*shape).to(dtype)), dtype, impl)
    for dtype, (height, width), both, impl in itertools.product(DTYPES, ((64, 96), (63, 95)), (True, False), kernels):
        low, high = (random(3, 3, 64, 96).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        target = torch.randint(0, 256, (3, height, width, 3), device=machine.device, generator=generator)
        run = _loss(low, target.byte(), high if both else None, random(3))
        yield case("stream_loss", f"{height}x{width} of 64x96, {1 + both} streams", run, dtype, impl)
    for dtype, channels, layout, impl in itertools.product(DTYPES, (5, 10, 28, 33, 64), LAYOUTS, [*kernels, *cuda]):
        if impl == "cuda" and dtype == torch.float32:
            continue
        x = random(2, channels, 37, 83).to(dtype).contiguous(memory_format=layout)
        weight = (random(3, channels, 3, 3) * (9 * channels) ** -0.5).to(dtype)
        run = _head(x, weight, random(3).to(dtype), random(2, 3, 37, 83).to(dtype))
        terms = [9 * channels, 27, 2 * 37 * 83, 2 * 37 * 83]
        yield case("conv2d", f"{channels} to 3 channels, 37x83, {str(layout)[6:]}", run, dtype, impl, terms)
    for dtype, channels, impl in itertools.product(DTYPES, ((28,), (24, 5, 10), (64,)), [*kernels, *cuda]):
        if impl == "cuda" and dtype == torch.float32:
            continue
        features = [random(2, c, 37, 83).to(dtype).contiguous(memory_format=torch.channels_last) for c in channels]
        weights = [(random(3, c, 3, 3) * (9 * c) ** -0.5).to(dtype) for c in channels]
        run = _stage(features, weights, random(3).to(dtype))
        yield case("output_stage", f"{channels} channels, 36x81 of 37x83", run, dtype, impl)
