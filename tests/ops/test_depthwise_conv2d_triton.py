"""depthwise_conv2d by Triton: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from hflfnerv.ops._depthwise_conv2d import DEPTHWISE_CONV2D, depthwise_conv2d
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
    requires,
)

ENTRY = next(entry for entry in DEPTHWISE_CONV2D if entry.name == "triton")
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"triton: {ENTRY.unavailable()}"
)


def test_interpreter(interpreter):
    assert " passed" in interpreter("depthwise")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 128, 256), (64, 64, 128), (32, 40, 80)], ids=str)
def test_ahead_of_time(compile_launch, capability, dtype, size):
    from hflfnerv.triton_kernels import depthwise_conv2d as kernels

    channels, height, width = size

    def launch():
        x = torch.zeros(1, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(7, 7, 1, channels).permute(3, 2, 0, 1)
        y = kernels.depthwise_conv2d_fwd(x, weight, torch.zeros(channels, dtype=dtype))
        kernels.depthwise_conv2d_bwd(y, x, weight, torch.empty_like(x), sums=True)

    found = compile_launch(kernels, launch, capability)
    assert len(found) == 3
    for kernel in found:
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
        # Sixteen warps on a multiprocessor, and with them every program of the largest stage at the same time.
        assert kernel.registers <= 128, kernel


def test_programs_fill_the_device_and_small_images_take_few(monkeypatch):
    from hflfnerv.triton_kernels import depthwise_conv2d as kernels

    programs = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: programs.append(grid[0] * grid[1])

    monkeypatch.setattr(kernels, "depthwise_conv2d_fwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "depthwise_conv2d_bwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "sum_shares", lambda *tensors: None)
    for size in ((1, 64, 128, 256), (8, 64, 128, 256), (1, 512, 64, 64), (1, 16, 2, 4)):
        x = torch.zeros(size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(size[1], 1, 7, 7, dtype=torch.bfloat16)
        kernels.depthwise_conv2d_fwd(x, weight, None)
        kernels.depthwise_conv2d_bwd(x, x, weight, None, sums=True)
    forward, backward = programs[::2], programs[1::2]
    assert min(forward[:3]) >= 132
    # Each of them writes the sums of all taps, which are read again.
    assert all(132 <= count <= 2 * 132 for count in backward[:3])
    assert forward[3] == backward[3] == 1


@pytest.mark.parametrize(
    ("x", "weight", "padding", "message"),
    [
        ((1, 4, 5, 6), (4, 1, 3, 3), (1, 1), "the tensors are on meta"),
        ((1, 4, 5, 6), (4, 1, 3, 3), (1, 0), r"padding \(1, 0\) is not half of an odd kernel"),
        ((1, 4, 5, 6), (4, 1, 3, 4), (1, 2), r"padding \(1, 2\) is not half of an odd kernel"),
        ((0, 4, 5, 6), (4, 1, 3, 3), (1, 1), "is empty"),
        ((1, 4, 9, 9), (4, 1, 3, 9), (1, 4), "more than 512 channels or a kernel of more than 7x7"),
        ((1, 513, 5, 6), (513, 1, 3, 3), (1, 1), "more than 512 channels or a kernel of more than 7x7"),
        ((1, 512, 2048, 2049), (512, 1, 3, 3), (1, 1), "too many elements for offsets of 32 bits"),
        ((4096, 1, 1024, 512), (1, 1, 3, 3), (1, 1), "too many elements for offsets of 32 bits"),
    ],
)
def test_what_it_rejects(x, weight, padding, message, monkeypatch):
    from hflfnerv.ops import _depthwise_conv2d

    if "meta" not in message:
        monkeypatch.setattr(_depthwise_conv2d, "rejects_tensor", lambda device, dtype: None)
    operands = (torch.empty(x, device="meta"), torch.empty(weight, device="meta"), None, padding)
    assert re.search(message, ENTRY.rejects(*operands))


def run(function, tensors, dy, to, *, absolute=False):
    leaves = [t.detach().to(to) for t in tensors]
    leaves = [(t.abs() if absolute else t).requires_grad_() for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, (dy.abs() if absolute else dy).to(y.dtype))


def operands(shape, kernel, dtype, *, layout="channels_last", with_bias=True):
    channels = shape[1]
    x = make_tensor(*shape, dtype=dtype, device="cuda", layout=layout)
    scale = (kernel[0] * kernel[1]) ** -0.5
    weight = make_tensor(channels, 1, *kernel, dtype=dtype, device="cuda", scale=scale, seed=1)
    bias = [make_tensor(channels, dtype=dtype, device="cuda", seed=2)] if with_bias else []
    return [x, weight, *bias], make_tensor(*shape, dtype=dtype, device="cuda", seed=3)


def ours(x, weight, bias=None, impl="triton"):
    return depthwise_conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), impl=impl)


def pytorch(x, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel", "layout", "with_bias"),
    [
        ((1, 64, 128, 256), (7, 7), "channels_last", True),
        ((2, 64, 32, 64), (7, 7), "channels_last", False),
        ((1, 32, 40, 80), (7, 7), "contiguous", True),
        ((1, 16, 2, 4), (7, 7), "channels_last", True),
        ((3, 33, 17, 29), (5, 7), "channels_last", True),
        ((1, 200, 9, 7), (3, 3), "strided", True),
        ((2, 1, 19, 70), (3, 5), "contiguous", False),
        ((1, 512, 4, 8), (1, 1), "channels_last", True),
    ],
)
def test_forward_and_backward(shape, kernel, layout, with_bias, dtype):
    tensors, dy = operands(shape, kernel, dtype, layout=layout, with_bias=with_bias)
    with poisoned_empty():
        results = run(ours, tensors, dy, dtype)
    assert results[0].stride() == pytorch(*tensors).stride()
    expected, same = (run(pytorch, tensors, dy, to) for to in (torch.float64, dtype))
    # Sums, in an order that is free: what each rounds is the sum of the absolute terms.
    sizes = run(pytorch, tensors, dy, torch.float64, absolute=True)
    assert_close_to_reference(results[0], expected[0], same[0], magnitude=sizes[0])
    for actual, true, rounded, size in zip(results[1:], expected[1:], same[1:], sizes[1:], strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@needs_gpu
def test_only_the_gradients_that_are_wanted():
    tensors, dy = operands((2, 20, 13, 21), (7, 7), torch.bfloat16)
    _, *expected = run(ours, tensors, dy, torch.bfloat16)
    for position in range(3):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        (gradient,) = torch.autograd.grad(ours(*leaves), leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@needs_gpu
def test_deterministic():
    tensors, dy = operands((1, 64, 128, 256), (7, 7), torch.bfloat16)
    first, second = (run(ours, tensors, dy, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
def test_what_auto_is():
    for dtype, impl in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "reference")):
        tensors, _ = operands((1, 32, 40, 80), (7, 7), dtype)
        assert torch.equal(ours(*tensors, impl="auto"), ours(*tensors, impl=impl))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = ours(*tensors, impl="auto")
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, ours(*tensors))


@needs_gpu
def test_compile_and_graph():
    tensors, dy = operands((1, 32, 40, 80), (7, 7), torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True)
    wanted = run(ours, tensors, dy, torch.bfloat16)
    for actual, expected in zip(run(compiled, tensors, dy, torch.bfloat16), wanted, strict=True):
        assert torch.equal(actual, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ours(*tensors)
    graph.replay()
    assert torch.equal(y, wanted[0])


@needs_gpu
def test_opcheck():
    tensors, _ = operands((1, 20, 9, 11), (3, 5), torch.bfloat16)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hflfnerv.depthwise_conv2d.default, (*leaves, "triton"))
