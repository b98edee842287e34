"""channel_norm by Triton: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from hflfnerv.ops import _triton
from hflfnerv.ops._channel_norm import CHANNEL_NORM, channel_norm
from hflfnerv.testing import (
    assert_gradient_close_to_reference,
    layer_norm_magnitudes,
    make_tensor,
    poisoned_empty,
    requires,
    rounded_in_the_end,
)

EPS = 1e-6
# Of x, of gain and bias, of the result. The first three are the encoders': in a block, behind the first patches, and in
# front of the others.
DTYPES = [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float32),
]
ENTRY = next(entry for entry in CHANNEL_NORM if entry.name == "triton")
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"triton: {ENTRY.unavailable()}"
)


def test_interpreter(interpreter):
    assert " passed" in interpreter("channel_norm")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 70, 1024])
@pytest.mark.parametrize("with_shift", [False, True])
def test_ahead_of_time(compile_launch, capability, dtypes, channels, with_shift):
    from hflfnerv.triton_kernels import channel_norm as kernels

    dtype, of_weights, out_dtype = dtypes

    def launch():
        x, gain = torch.zeros(1, 128, 256, channels, dtype=dtype), torch.zeros(channels, dtype=of_weights)
        shift = torch.zeros(channels, dtype=dtype) if with_shift else None
        y = kernels.channel_norm_fwd(x, gain, gain, shift, EPS, out_dtype)
        kernels.channel_norm_bwd(y, x, gain, shift, torch.empty_like(x), EPS, sums=True)

    forward, backward = compile_launch(kernels, launch, capability)
    for kernel in (forward, backward):
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
    # Forty-eight warps on a multiprocessor, forty with a shift, and back twenty-four.
    assert forward.registers <= (48 if with_shift else 40), forward
    assert backward.registers <= 80, backward


def test_programs_fill_the_device_and_small_images_take_few(monkeypatch):
    from hflfnerv.triton_kernels import channel_norm as kernels

    programs = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: programs.append(grid[0])

    monkeypatch.setattr(kernels, "channel_norm_fwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "channel_norm_bwd_kernel", Recorder())
    monkeypatch.setattr(kernels, "sum_shares", lambda *tensors: None)
    for size in ((1, 128, 256, 64), (8, 128, 256, 64), (1, 128, 256, 16), (1, 2, 4, 16)):
        x, gain = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size[-1])
        kernels.channel_norm_fwd(x, gain, gain, gain, EPS, torch.bfloat16)
        kernels.channel_norm_bwd(x, x, gain, gain, None, EPS, sums=True)
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
    x, gain = torch.empty(shape, device="meta"), torch.empty(shape[-1], device="meta")
    assert re.search(message, ENTRY.rejects(x, gain, gain, gain, EPS, None))


def operands(shape, dtypes, *, layout="contiguous"):
    dtype, of_weights, out_dtype = dtypes
    x = make_tensor(*shape, dtype=dtype, device="cuda", layout=layout)
    weights = [
        make_tensor(shape[-1], dtype=of, device="cuda", layout=layout, seed=seed)
        for seed, of in ((1, of_weights), (2, of_weights), (4, dtype))
    ]
    return [x, *weights], make_tensor(*shape, dtype=out_dtype, device="cuda", layout=layout, seed=3)


def run(tensors, dy, impl="triton", to=None, function=torch.ops.hflfnerv.channel_norm):
    leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves, EPS, to or dy.dtype, impl)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


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
        ((1, 64, 128, 4), "contiguous"),
        ((5, 1), "contiguous"),
        ((41, 1024), "contiguous"),
    ],
)
def test_forward_and_backward(shape, layout, dtypes):
    tensors, dy = operands(shape, dtypes, layout=layout)
    with poisoned_empty():
        results = run(tensors, dy)
    expected, same = run(tensors, dy, "reference", torch.float64), run(tensors, dy, "reference")
    x, gain, bias, shift = tensors
    sizes = layer_norm_magnitudes(x.double() + shift, gain, bias, dy, EPS)
    sizes = [*sizes, sizes[1].flatten(0, -2).sum(dim=0)]
    for actual, true, rounded, size in zip(results, expected, same, sizes, strict=True):
        assert actual.is_contiguous()
        magnitude = rounded_in_the_end(true, size, actual.dtype)
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=magnitude)


@needs_gpu
def test_only_the_gradients_that_are_wanted():
    tensors, dy = operands((2, 13, 21, 20), DTYPES[0])
    _, *expected = run(tensors, dy)
    for position in range(4):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        y = torch.ops.hflfnerv.channel_norm(*leaves, EPS, dy.dtype, "triton")
        (gradient,) = torch.autograd.grad(y, leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@needs_gpu
def test_deterministic():
    tensors, dy = operands((1, 128, 256, 64), DTYPES[0])
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, dy), run(tensors, dy), strict=True))


@needs_gpu
def test_what_auto_is():
    for dtype, impl in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "reference")):
        tensors, _ = operands((1, 40, 80, 32), (dtype, dtype, dtype))
        assert torch.equal(channel_norm(*tensors, eps=EPS), channel_norm(*tensors, eps=EPS, impl=impl))
    (x, *weights, _), _ = operands((1, 40, 80, 32), DTYPES[0])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for of_x in (x, x.float()):
            for out_dtype in (None, torch.bfloat16):
                y = channel_norm(of_x, *weights, eps=EPS, out_dtype=out_dtype)
                assert torch.equal(y, channel_norm(of_x, *weights, eps=EPS, out_dtype=out_dtype, impl="triton"))
                pytorch = F.layer_norm(of_x, x.shape[-1:], *weights, EPS)
                assert y.dtype == (out_dtype or pytorch.dtype)


@needs_gpu
def test_compile_and_graph():
    tensors, dy = operands((1, 40, 80, 32), DTYPES[0])

    def function(*operands):
        return torch.ops.hflfnerv.channel_norm(*operands)

    wanted = run(tensors, dy)
    compiled = run(tensors, dy, function=torch.compile(function, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = function(*tensors, EPS, dy.dtype, "triton")
    graph.replay()
    assert torch.equal(y, wanted[0])


@needs_gpu
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_opcheck(dtypes):
    tensors, _ = operands((1, 9, 11, 20), dtypes)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hflfnerv.channel_norm.default, (*leaves, EPS, dtypes[2], "triton"))
