"""scale_residual by Triton: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from hflfnerv.ops import _triton
from hflfnerv.ops._scale_residual import SCALE_RESIDUAL, scale_residual
from hflfnerv.testing import (
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
    requires,
    rounded_in_the_end,
)

# Of x, of gamma, of y; the first two are the encoders'.
DTYPES = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32),
]
ENTRY = next(entry for entry in SCALE_RESIDUAL if entry.name == "triton")
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"triton: {ENTRY.unavailable()}"
)


def test_interpreter(interpreter):
    assert " passed" in interpreter("scale_residual")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 70, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ahead_of_time(compile_launch, capability, dtypes, channels, with_bias):
    from hflfnerv.triton_kernels import scale_residual as kernels

    def launch():
        x, gamma, y = (
            torch.zeros(*size, channels, dtype=dtype)
            for size, dtype in zip(((1, 128, 256), (), (1, 128, 256)), dtypes, strict=True)
        )
        bias = torch.zeros(channels, dtype=y.dtype) if with_bias else None
        out = kernels.scale_residual_fwd(x, gamma, y, bias, (x + gamma * y).dtype)
        dx = torch.empty_like(x) if x.dtype != out.dtype else None
        kernels.scale_residual_bwd(out, gamma, y, bias, dx, torch.empty_like(y), sums=True)

    forward, backward = compile_launch(kernels, launch, capability)
    for kernel in (forward, backward):
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
    # Forty-eight warps on a multiprocessor, and back thirty-two.
    assert forward.registers <= 40, forward
    assert backward.registers <= 64, backward


def test_programs_fill_the_device_and_small_images_take_few(monkeypatch):
    from hflfnerv.triton_kernels import scale_residual as kernels

    programs = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: programs.append(grid[0])

    monkeypatch.setattr(kernels, "scale_residual_fwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "scale_residual_bwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "sum_shares", lambda *tensors: None)
    for size in ((1, 128, 256, 64), (8, 128, 256, 64), (1, 128, 256, 16), (1, 2, 4, 16)):
        x, gamma = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size[-1])
        kernels.scale_residual_fwd(x, gamma, x, gamma, torch.float32)
        kernels.scale_residual_bwd(x, gamma, x, gamma, None, None, sums=True)
    forward, backward = programs[::2], programs[1::2]
    assert min(forward[:3]) >= 132
    # Each of them writes sums, which are read again.
    assert all(132 <= count <= 4 * 132 for count in backward[:3])
    assert forward[3] == backward[3] == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 6, 4), "the tensors are on meta"),
        ((0, 5, 6, 4), "is empty"),
        ((1, 5, 6, 1025), "more than 1024 channels"),
        ((2048, 1024, 1024, 1), "too many rows for offsets of 32 bits"),
    ],
)
def test_what_it_rejects(shape, message, monkeypatch):
    if "meta" not in message:
        monkeypatch.setattr(_triton, "rejects_tensor", lambda device, dtype: None)
    x, gamma = torch.empty(shape, device="meta"), torch.empty(shape[-1], device="meta")
    assert re.search(message, ENTRY.rejects(x, gamma, x, gamma))


def operands(shape, dtypes, *, layout="contiguous"):
    sizes = shape, shape[-1:], shape, shape[-1:]
    tensors = [
        make_tensor(*size, dtype=dtype, device="cuda", layout=layout, seed=seed)
        for seed, (size, dtype) in enumerate(zip(sizes, (*dtypes, dtypes[2]), strict=True))
    ]
    x, gamma, y, bias = tensors
    return tensors, make_tensor(*shape, dtype=(x + gamma * (y + bias)).dtype, device="cuda", layout=layout, seed=4)


def run(tensors, dout, impl="triton", to=None, change=lambda t: t, function=torch.ops.hflfnerv.scale_residual):
    leaves = [change(t.detach().to(to or t.dtype)).requires_grad_() for t in tensors]
    out = function(*leaves, impl)
    return out.detach(), *torch.autograd.grad(out, leaves, change(dout.to(out.dtype)))


@needs_gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 128, 256, 64), "contiguous"),
        ((2, 17, 29, 70), "strided"),
        ((1, 40, 80, 32), "contiguous"),
        ((1, 2, 4, 16), "contiguous"),
        ((3, 33, 7, 3), "strided"),
        ((5, 1), "contiguous"),
        ((41, 1024), "contiguous"),
    ],
)
def test_forward_and_backward(shape, layout, dtypes):
    tensors, dout = operands(shape, dtypes, layout=layout)
    with poisoned_empty():
        results = run(tensors, dout)
    expected, same = run(tensors, dout, "reference", torch.float64), run(tensors, dout, "reference")
    sizes = run(tensors, dout, "reference", torch.float64, torch.abs)
    for actual, true, rounded, size in zip(results, expected, same, sizes, strict=True):
        magnitude = rounded_in_the_end(true, size, actual.dtype)
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=magnitude)


@needs_gpu
def test_only_the_gradients_that_are_wanted():
    tensors, dout = operands((2, 13, 21, 20), DTYPES[0])
    _, *expected = run(tensors, dout)
    for position in range(4):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        out = torch.ops.hflfnerv.scale_residual(*leaves, "triton")
        (gradient,) = torch.autograd.grad(out, leaves[position], dout)
        assert torch.equal(gradient, expected[position])


@needs_gpu
def test_deterministic():
    tensors, dout = operands((1, 128, 256, 64), DTYPES[0])
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, dout), run(tensors, dout), strict=True))


@needs_gpu
def test_what_auto_is():
    for dtype, impl in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "reference")):
        tensors, _ = operands((1, 40, 80, 32), (dtype, dtype, dtype))
        assert torch.equal(scale_residual(*tensors), scale_residual(*tensors, impl=impl))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for dtypes in (DTYPES[0], DTYPES[4]):
            tensors, _ = operands((1, 40, 80, 32), dtypes)
            assert torch.equal(scale_residual(*tensors), scale_residual(*tensors, impl="triton"))


@needs_gpu
def test_compile_and_graph():
    tensors, dout = operands((1, 40, 80, 32), DTYPES[0])

    def function(*operands):
        return torch.ops.hflfnerv.scale_residual(*operands)

    wanted = run(tensors, dout)
    compiled = run(tensors, dout, function=torch.compile(function, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = function(*tensors, "triton")
    graph.replay()
    assert torch.equal(out, wanted[0])


@needs_gpu
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_opcheck(dtypes):
    tensors, _ = operands((1, 9, 11, 20), dtypes)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hflfnerv.scale_residual.default, (*leaves, "triton"))
