"""The upsampling block in int8 on a GPU, beside the fused kernel, eager and torch.compile in float16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hflfnerv import ops
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference

from ..device import Machine
from ..registry import Contender, Point
from .bench_conv_pixel_shuffle_gelu import COMPILED, flops, operands, stage_points


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the block's forward pass in int8: every tile, with pixels of 8 and of 16 channels."""
    for name, stage, batch in stage_points(machine, "int8", seconds=40, stages=("s5", "s4", "s3")):
        with machine.room(name), torch.inference_mode():
            yield from _measure(machine, name, stage, batch)


def _measure(machine: Machine, name: str, stage: str, batch: int) -> Iterator[dict[str, Any]]:
    x, weight, bias, _, r = operands(machine, stage, batch, torch.float16)
    rows, columns = x.shape[2:]
    padding = weight.shape[2] // 2
    of = ops.Int8Range.of(x.amin((0, 2, 3)), x.amax((0, 2, 3)))
    y = reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding)
    # The last stage hands floating point to the head.
    to = None if stage == "s5" else ops.Int8Range.of(y.amin((0, 2, 3)), y.amax((0, 2, 3)))
    block = ops.Int8Block.of(weight, bias, r, of, to)
    image = ops.quantize_int8(x, of, ops.int8_image(batch, rows, columns, of, halo=padding))

    def output() -> torch.Tensor:
        if to is None:
            return torch.empty_like(y, memory_format=torch.channels_last)
        return ops.int8_image(batch, rows * r, columns * r, to, halo=2)

    out = output()
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    if machine.dry:
        runs["int8 reference"] = lambda: ops.conv_pixel_shuffle_gelu_int8(image, block, out)
    else:
        runs |= _every_tile(image, block, out)
        runs["float16, auto"] = lambda: ops.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding)

    def eager() -> torch.Tensor:
        return reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding)

    runs |= {"eager float16": eager, COMPILED: machine.compile(eager)}
    expected = ops.conv_pixel_shuffle_gelu_int8(image, block, output(), impl="reference")

    def check() -> None:
        for run_name, run in runs.items():
            with machine.trying(run_name):
                out.copy_(output())  # not what the run before left
                made = run()
                if not run_name.startswith("int8"):
                    assert made.isfinite().all(), f"{name}, {run_name}: not finite"
                elif to is None:
                    torch.testing.assert_close(made, expected, rtol=2**-9, atol=1e-6)
                else:
                    difference = (made.int() - expected.int()).abs()
                    wrong = float((difference > 0).float().mean())
                    assert difference.max() <= 1, f"{name}, {run_name}: {int(difference.max())} steps off"
                    assert wrong < 1e-3, f"{name}, {run_name}: {wrong:.1e} of the values differ"

    work = flops(x, weight)
    point = Point(
        what="conv_pixel_shuffle_gelu_int8.forward",
        data=name,
        dtype="int8",
        shape=x.shape,
        unit="TFLOP/s",
        scale=1e12,
        contenders=[Contender(run_name, run, work) for run_name, run in runs.items()],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, share_of=("matmul", machine.matmul_tflop_per_second))


def _every_tile(image: torch.Tensor, block: ops.Int8Block, out: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a run for each tile that fits the device and each distance of the pixels of x."""
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu_int8 as kernels
    from hflfnerv.triton_kernels._tiles import device_limits

    batch, channels, rows, columns = image.shape
    _, _, *kernel = block.weight.shape
    pixels = batch * (rows - kernel[0] + 1) * (columns - kernel[1] + 1)
    width = kernels.run_of(block.out_channels) * block.r**2
    runs: dict[str, Callable[[], torch.Tensor]] = {}

    def run(x: torch.Tensor, packed: torch.Tensor, tile: Any) -> torch.Tensor:
        kernels.conv_pixel_shuffle_gelu_int8_fwd(
            x, packed, block.packed()[1], out, tuple(kernel), block.r, block.approximate, tile=tile
        )
        return out

    for pixel in sorted({channels + -channels % 8, channels + -channels % 16}):
        memory = image.new_zeros((batch, rows, columns, pixel))
        x = memory[..., :channels].permute(0, 3, 1, 2).copy_(image)
        packed = kernels.pack_weight(block.weight, block.r, pixel)
        for tile in kernels.tiles(pixels, width, device_limits(image.device.index)):
            size = f"{tile.block_m}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
            runs[f"int8 {size}, pixels of {pixel}"] = functools.partial(run, x, packed, tile)
    return runs
