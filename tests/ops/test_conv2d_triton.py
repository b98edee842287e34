"""conv2d by Triton: in the interpreter and compiled ahead of time; and all of its kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import triton_version

from hflfnerv import ops
from hflfnerv.ops import CONV2D
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    make_tensor,
    requires,
)

ENTRY = next(entry for entry in CONV2D if entry.name == "triton")
needs_gpu = pytest.mark.parametrize(
    "impl",
    [
        pytest.param(
            entry.name,
            marks=pytest.mark.skipif(
                entry.unavailable() is not None and not requires("cuda"), reason=f"{entry.name}: {entry.unavailable()}"
            ),
        )
        for entry in CONV2D
        if entry.name in ("triton", "cuda")
    ],
)


def test_interpreter(interpreter):
    assert " passed" in interpreter("conv2d")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [28, 64])
def test_ahead_of_time(compile_launch, capability, dtype, channels):
    from hflfnerv.triton_kernels import conv2d as kernels

    def launch():
        x = torch.zeros(1, channels, 640, 1280, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(3, channels, 3, 3, dtype=dtype)
        y = kernels.conv2d_fwd(x, weight, torch.zeros(3, dtype=dtype))
        kernels.conv2d_bwd(y, x, weight, torch.empty_like(x), sums=True)

    found = compile_launch(kernels, launch, capability)
    assert len(found) == 2
    for kernel in found:
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
        # Twelve warps and more on a multiprocessor; eleven by Triton before 3.7.
        assert kernel.registers <= (160 if triton_version() >= (3, 7) else 176), kernel
        assert kernel.matrix_instructions, kernel


def test_what_it_rejects():
    x, weight = torch.zeros(1, 4, 5, 6, device="meta"), torch.zeros(3, 4, 3, 3, device="meta")
    assert "meta" in ENTRY.rejects(x, weight, None)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "gap"),
    [
        ((2, 28, 37, 50), 0),
        ((1, 5, 12, 18), 3),
        ((1, 128, 9, 7), 0),
        ((2, 26, 40, 64), 6),
        ((1, 10, 300, 130), 6),
        ((3, 41, 21, 5), 0),
        ((1, 64, 9, 70), 2),
        ((1, 28, 640, 1280), 0),
    ],
)
def test_forward_and_backward(impl, shape, gap, dtype):
    if impl == "cuda" and shape[1] > 64:
        pytest.skip("64 channels at most")
    batch, channels, height, width = shape
    memory = torch.full((batch, height, width, channels + gap), float("nan"), dtype=dtype, device="cuda")
    x = memory[..., :channels].permute(0, 3, 1, 2).copy_(make_tensor(*shape, dtype=dtype)).requires_grad_()
    weight = make_tensor(3, channels, 3, 3, scale=(9 * channels) ** -0.5, seed=1, dtype=dtype, device="cuda")
    bias = make_tensor(3, seed=2, dtype=dtype, device="cuda")
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    dy = make_tensor(batch, 3, height, width, seed=3, dtype=dtype, device="cuda")
    y = ops.conv2d(*leaves, impl=impl)
    gradients = torch.autograd.grad(y, leaves, dy)

    def run(to):
        tensors = [t.detach().to(to).requires_grad_() for t in leaves]
        of = F.conv2d(*tensors, padding=1)
        return of, torch.autograd.grad(of, tensors, dy.to(to))

    (expected, expected_gradients), (same, same_gradients) = run(torch.float64), run(dtype)
    assert_close_to_reference(y, expected, same)
    magnitudes = convolution_magnitudes(x, weight, dy, 1, (1, 1))[1:]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@needs_gpu
def test_compile_and_graph(impl):
    x = make_tensor(1, 28, 16, 24, dtype=torch.bfloat16, device="cuda", layout="channels_last", requires_grad=True)
    weight = make_tensor(3, 28, 3, 3, dtype=torch.bfloat16, device="cuda", seed=1, requires_grad=True)
    function = lambda x, weight: ops.conv2d(x, weight, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)(x, weight)
    assert torch.equal(compiled, function(x, weight))
    wanted = torch.autograd.grad(function(x, weight).float().sum(), [x, weight])
    for actual, expected in zip(torch.autograd.grad(compiled.float().sum(), [x, weight]), wanted, strict=True):
        assert torch.equal(actual, expected)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_layouts_and_what_is_wanted(impl, layout):
    """The gradient of the result comes as it is, and only what is wanted is made; the same bits every time."""
    leaves = [make_tensor(2, 12, 19, 33, device="cuda"), make_tensor(2, 12, 3, 3, seed=1, device="cuda")]
    leaves = [t.half().requires_grad_() for t in (*leaves, make_tensor(2, seed=2, device="cuda"))]
    dy = make_tensor(2, 2, 19, 33, seed=3, device="cuda").half()
    dy = dy[:, :1].expand(-1, 2, -1, -1) if layout == "expanded" else dy
    y = ops.conv2d(*leaves, impl=impl)
    gradients = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    expected = torch.autograd.grad(F.conv2d(*(t.double() for t in leaves), padding=1), leaves, dy.double())
    for actual, true, leaf in zip(gradients, expected, leaves, strict=True):
        assert actual.stride() == leaf.stride()
        assert (actual.double() - true).norm() <= 1e-3 * true.norm()
        (alone,) = torch.autograd.grad(y, [leaf], dy, retain_graph=True)
        assert torch.equal(alone, actual)


@needs_gpu
def test_opcheck(impl):
    x = make_tensor(1, 12, 9, 11, dtype=torch.bfloat16, device="cuda", layout="channels_last", requires_grad=True)
    weight = make_tensor(3, 12, 3, 3, dtype=torch.bfloat16, device="cuda", seed=1, requires_grad=True)
    bias = make_tensor(3, dtype=torch.bfloat16, device="cuda", seed=2, requires_grad=True)
    torch.library.opcheck(torch.ops.hflfnerv.conv2d.default, (x, weight, bias, impl))
    torch.library.opcheck(torch.ops.hflfnerv.conv2d.default, (x, weight, None, impl))
