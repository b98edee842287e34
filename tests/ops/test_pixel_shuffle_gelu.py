"""pixel_shuffle_gelu: every implementation against the float64 reference."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from hflfnerv import _ext, ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import PIXEL_SHUFFLE_GELU
from hflfnerv.ops._triton import rejects_tensor
from hflfnerv.reference import pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    implementations,
    make_tensor,
    poisoned_empty,
    threads,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ODD_SHAPES = [(2, 3, 2, 5, 7), (1, 33, 2, 3, 9), (1, 5, 3, 4, 5), (2, 2, 5, 3, 1), (1, 4, 1, 3, 3), (1, 1, 4, 1, 1)]
# Rows and channels that just fill vectors of 8 and 16, or do not; several blocks of rows; rows of several pieces.
VECTOR_SHAPES = [(2, 9, 2, 17, 40), (1, 16, 4, 3, 16), (1, 20, 2, 5, 23), (1, 12, 4, 9, 19), (2, 3, 3, 9, 700)]
# No shuffle; squares of channels and places, which fill vectors or do not.
VECTOR_SHAPES += [(2, 20, 1, 17, 23), (1, 3, 1, 9, 1100), (2, 16, 3, 4, 9), (1, 33, 5, 3, 7)]
# Those for any dtype and layout; "cuda" has a file of its own.
ANY = [of for of in implementations(PIXEL_SHUFFLE_GELU) if of.id != "cuda"]
BY_IMPL = pytest.mark.parametrize(("impl", "device"), ANY)
OP = torch.ops.hflfnerv.pixel_shuffle_gelu
CPP = next(entry for entry in PIXEL_SHUFFLE_GELU if entry.name == "cpp")
needs_cpp = pytest.mark.skipif(CPP.unavailable() is not None, reason=f"cpp: {CPP.unavailable()}")


def run(x, r, bias, dy, approximate, dtype=None, impl=None):
    """Result and gradients: of the reference in ``dtype``, or of the public function with ``impl``."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias) if t is not None]
    if impl is None:
        y = reference.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate)
    else:
        y = ops.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate, impl=impl)
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def compare(shape, dtype, device, layout, approximate, impl, with_bias=True):
    batch, channels, r, height, width = shape
    x = make_tensor(batch, channels * r * r, height, width, dtype=dtype, device=device, layout=layout, scale=2)
    bias = make_tensor(channels * r * r, dtype=dtype, device=device, seed=1) if with_bias else None
    dy = make_tensor(batch, channels, height * r, width * r, dtype=dtype, device=device, seed=2)
    with poisoned_empty():
        y, gradients = run(x, r, bias, dy, approximate, impl=impl)
    expected, expected_gradients = run(x, r, bias, dy, approximate, dtype=torch.float64)
    same, same_gradients = run(x, r, bias, dy, approximate, dtype=dtype)
    assert_close_to_reference(y, expected, same)
    # The gradient of the bias is a sum over that of x.
    magnitudes = [None, expected_gradients[0].abs().sum(dim=(0, 2, 3))][: len(gradients)]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


def test_reference_is_the_formula():
    x, bias = make_tensor(2, 18, 4, 5, dtype=torch.float64), make_tensor(18, dtype=torch.float64, seed=1)
    y = ops.pixel_shuffle_gelu(x, 3, bias)
    for b, c, h, w, i, j in [(0, 0, 0, 0, 0, 0), (1, 1, 3, 4, 2, 1), (0, 1, 2, 1, 1, 2)]:
        channel = c * 9 + i * 3 + j
        z = (x[b, channel, h, w] + bias[channel]).item()
        exact = z * torch.distributions.Normal(0, 1).cdf(torch.tensor(z, dtype=torch.float64)).item()
        assert y[b, c, h * 3 + i, w * 3 + j].item() == pytest.approx(exact, rel=1e-13)


@BY_IMPL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(impl, device, dtype, approximate, layout):
    compare((2, 6, 2, 8, 12), dtype, device, layout, approximate, impl)
    compare((2, 6, 2, 8, 12), dtype, device, layout, approximate, impl, with_bias=False)


@BY_IMPL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes(impl, device, shape, layout):
    compare(shape, torch.float32, device, layout, "none", impl)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors(dtype, shape, layout):
    compare(shape, dtype, "cpu", layout, "none", "cpp")


@BY_IMPL
def test_noncontiguous(impl, device):
    compare((2, 3, 2, 5, 7), torch.float32, device, "strided", "none", impl)
    x = make_tensor(1, 8, 4, 6, device=device)
    torch.testing.assert_close(
        ops.pixel_shuffle_gelu(x.transpose(2, 3), 2, impl=impl),
        ops.pixel_shuffle_gelu(x.transpose(2, 3).contiguous(), 2, impl=impl),
        rtol=0,
        atol=0,
    )
    # A gradient of stride 0, as sum() gives.
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.pixel_shuffle_gelu(x, 2, impl=impl).sum(), x)
    (expected,) = torch.autograd.grad(F.gelu(F.pixel_shuffle(x, 2)).sum(), x)
    torch.testing.assert_close(gradient, expected)


@BY_IMPL
def test_empty_batch(impl, device):
    # Forward only: the gradient of PyTorch's own pixel_shuffle fails here. Those of the kernels are in interpreted.py.
    x, bias = torch.zeros(0, 8, 3, 4, device=device), torch.zeros(8, device=device)
    assert ops.pixel_shuffle_gelu(x, 2, bias, impl=impl).shape == (0, 2, 6, 8)


@BY_IMPL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_deterministic(impl, device, layout):
    x, bias = make_tensor(2, 28, 33, 37, device=device, layout=layout), make_tensor(28, device=device, seed=1)
    dy = make_tensor(2, 7, 66, 74, device=device, seed=2)
    first, second = (run(x, 2, bias, dy, "none", impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_and_batches_change_nothing(layout):
    x, bias = make_tensor(3, 60, 41, 67, layout=layout), make_tensor(60, seed=1)
    dy = make_tensor(3, 15, 82, 134, seed=2)
    results = []
    for number in (1, 2, 7):
        with threads(number):
            y, (dx, dbias) = run(x, 2, bias, dy, "none", impl="cpp")
            results.append((y, dx, dbias))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for image in range(3):
        alone, (dx, _) = run(x[image : image + 1], 2, bias, dy[image : image + 1], "none", impl="cpp")
        assert torch.equal(alone[0], results[0][0][image])
        assert torch.equal(dx[0], results[0][1][image])


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "avx512"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_instruction_set(monkeypatch, level, approximate):
    # Not the same bits: where vectors are short, GELU is an exponential and a quotient, elsewhere it is a table.
    module, levels = _ext.load(), []
    if level not in module.simd_levels():
        pytest.skip(f"this machine has no {level}")
    for name in ("pixel_shuffle_gelu_fwd", "pixel_shuffle_gelu_bwd"):
        function = functools.partial(getattr(module, name), simd=level)
        monkeypatch.setattr(module, name, lambda *a, f=function, **k: levels.append(f.keywords["simd"]) or f(*a, **k))
    shapes = [*ODD_SHAPES, *VECTOR_SHAPES, (2, 17, 2, 5, 19), (1, 19, 4, 3, 21)]
    for shape, layout in itertools.product(shapes, ("contiguous", "channels_last")):
        compare(shape, torch.float32, "cpu", layout, approximate, "cpp")
    for dtype, layout in itertools.product(DTYPES[1:], ("contiguous", "channels_last")):
        compare((2, 17, 2, 5, 19), dtype, "cpu", layout, approximate, "cpp")
    assert levels == [level] * 2 * (2 * len(shapes) + 4)


@needs_cpp
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_exact_as_promised(approximate):
    x = torch.cat([torch.linspace(-9, 9, 65520), torch.logspace(-30, 38, 8), -torch.logspace(-30, 38, 8)])
    x = x.view(1, 1, 64, 1024)
    y, (dx,) = run(x, 1, None, torch.ones_like(x), approximate, impl="cpp")
    expected, (slope,) = run(x, 1, None, torch.ones_like(x), approximate, dtype=torch.float64)
    assert ((y - expected).abs() <= 1e-7 + 1.2e-7 * expected.abs()).all()
    assert (dx - slope).abs().max() <= 2e-7
    special = torch.tensor([float("nan"), float("inf"), 0.0, -0.0]).repeat(8).view(1, 1, 1, 32)
    y, (dx,) = run(special, 1, None, torch.ones_like(special), approximate, impl="cpp")
    assert y[..., ::4].isnan().all()
    assert dx[..., ::4].isnan().all()
    assert (y[..., 1::4] == float("inf")).all()
    assert (y[..., 2:4] == 0).all()
    assert (dx[..., 2:4] == 0.5).all()


@needs_cpp
def test_auto_depends_on_the_size_of_one_image():
    small, large = make_tensor(64, 8, 8, 8), make_tensor(1, 8, 64, 64)
    for x, name in (small, "reference"), (large, "cpp"):
        y = ops.pixel_shuffle_gelu(x, 2)
        assert torch.equal(y, ops.pixel_shuffle_gelu(x, 2, impl=name))
        assert not torch.equal(y, ops.pixel_shuffle_gelu(x, 2, impl="reference" if name == "cpp" else "cpp"))


def test_cpp_says_why_not(monkeypatch):
    assert "the tensors are on meta" in CPP.rejects(X.to("meta"), 2, None, "none")
    assert "dtype torch.float64 is not one of" in CPP.rejects(X.double(), 2, None, "none")
    monkeypatch.setattr("hflfnerv.ops._cpp._machine", lambda: "needs AVX2: this CPU has none")
    with pytest.raises(BackendUnavailable, match="impl='cpp' cannot run: needs AVX2: this CPU has none"):
        ops.pixel_shuffle_gelu(X, 2, impl="cpp")
    x = make_tensor(1, 8, 64, 64)
    assert torch.equal(ops.pixel_shuffle_gelu(x, 2), ops.pixel_shuffle_gelu(x, 2, impl="reference"))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, approximate):
    x = make_tensor(2, 8, 3, 2, dtype=torch.float64, layout=layout, requires_grad=True)
    bias = make_tensor(8, dtype=torch.float64, seed=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: OP(x, 2, b, approximate, "reference"), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: ops.pixel_shuffle_gelu(x, 2, b, approximate=approximate), (x, bias))
    assert torch.autograd.gradcheck(lambda x: OP(x, 2, None, approximate, "reference"), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_opcheck(impl, layout, with_bias):
    x = make_tensor(2, 12, 3, 5, layout=layout, requires_grad=True)
    bias = make_tensor(12, seed=1, requires_grad=True) if with_bias else None
    torch.library.opcheck(OP.default, (x, 2, bias, "none", impl))
    dy = make_tensor(2, 3, 6, 10, seed=2)
    # Second derivatives are refused, see test_double_backward.
    backward = torch.ops.hflfnerv.pixel_shuffle_gelu_backward.default
    torch.library.opcheck(backward, (dy, x.detach(), 2, None if bias is None else bias.detach(), "none", impl))


def test_double_backward():
    x = make_tensor(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.pixel_shuffle_gelu(x, 2, impl="reference"), (x,))
    (gradient,) = torch.autograd.grad(OP(x, 2, None, "none", "reference").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        gradient.sum().backward()


@BY_IMPL
def test_compile(impl, device):
    x = make_tensor(2, 12, 3, 5, device=device, requires_grad=True)
    bias = make_tensor(12, device=device, seed=1, requires_grad=True)

    def function(x, bias):
        return ops.pixel_shuffle_gelu(x, 2, bias, impl=impl) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), function(x, bias))
    actual = torch.autograd.grad(compiled(x, bias).sum(), (x, bias))
    expected = torch.autograd.grad(function(x, bias).sum(), (x, bias))
    torch.testing.assert_close(actual, expected)


def test_compile_of_the_registered_operation():
    compiled = torch.compile(
        lambda x, b: OP(x, 2, b, "none", "reference"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    bias = make_tensor(12, seed=1, requires_grad=True)
    for height, layout in ((3, "contiguous"), (6, "contiguous"), (6, "channels_last")):
        x = make_tensor(2, 12, height, 5, layout=layout)
        y = compiled(x, bias)
        torch.testing.assert_close(y, ops.pixel_shuffle_gelu(x, 2, bias))
        (gradient,) = torch.autograd.grad(y.sum(), bias)
        torch.testing.assert_close(gradient, torch.autograd.grad(ops.pixel_shuffle_gelu(x, 2, bias).sum(), bias)[0])


def test_autocast():
    x, bias = make_tensor(1, 8, 3, 3, dtype=torch.bfloat16), make_tensor(8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.pixel_shuffle_gelu(x, 2, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.pixel_shuffle_gelu(x, 2, bias.bfloat16()))


X = torch.zeros(1, 8, 2, 2)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([[1.0]], 2), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((X.int(), 2), {}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ((X[0], 2), {}, ValueError, "x must be [B, C r², H, W], got shape (8, 2, 2)"),
        ((X, 3), {}, ValueError, "x must have a multiple of r² = 9 channels, got 8"),
        ((X, 0), {}, ValueError, "r must be at least 1, got 0"),
        ((X, -2), {}, ValueError, "r must be at least 1, got -2"),
        ((X, 2.0), {}, TypeError, "r must be an int, got 2.0 (float)"),
        ((X, True), {}, TypeError, "r must be an int, got True (bool)"),
        ((X, 2, 1.0), {}, TypeError, "bias must be a torch.Tensor, got float"),
        ((X, 2, torch.zeros(7)), {}, ValueError, "bias must have shape (8,), one value per channel of x, got (7,)"),
        ((X, 2, torch.zeros(8).half()), {}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
        ((X, 2, torch.zeros(8, device="meta")), {}, ValueError, "bias must be on x's device cpu, got meta"),
        ((X, 2), {"approximate": "erf"}, ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
        (
            (X, 2),
            {"impl": "metal"},
            ValueError,
            f"impl must be one of {('auto', *PIXEL_SHUFFLE_GELU.names)}, got 'metal'",
        ),
    ],
)
def test_rejects(args, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.pixel_shuffle_gelu(*args, **kwargs)


def test_triton_says_why_not():
    with pytest.raises(BackendUnavailable, match=r"impl='triton' cannot run: .+"):
        ops.pixel_shuffle_gelu(X, 2, impl="triton")
    assert "the tensors are on cpu" in rejects_tensor(torch.device("cpu"), torch.float32)
    assert "dtype torch.float64 is not one of" in rejects_tensor(torch.device("cuda", 0), torch.float64)
    triton = next(entry for entry in PIXEL_SHUFFLE_GELU if entry.name == "triton")
    assert "the tensors are on cpu" in triton.rejects(X, 2, None, "none")


def test_interpreter(interpreter):
    assert " passed" in interpreter("pixel_shuffle_gelu")


# C, r, H, W of the decoders' blocks: HFD of the 1.5 M network, and widths that no tile divides; of an encoder's block.
BLOCKS = [(50, 5, 2, 4), (42, 4, 10, 20), (35, 4, 40, 80), (29, 2, 160, 320), (24, 2, 320, 640), (33, 2, 9, 33)]
BLOCKS += [(256, 1, 128, 256)]
CONFIGURATIONS = [(capability, torch.bfloat16, "none", BLOCKS) for capability in (80, 90, 100)]
CONFIGURATIONS += [(90, torch.float16, "tanh", BLOCKS[1::3]), (90, torch.float32, "none", BLOCKS[1::3])]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("capability", "dtype", "approximate", "blocks"), CONFIGURATIONS)
def test_ahead_of_time(compile_launch, capability, dtype, approximate, blocks, layout):
    from hflfnerv.triton_kernels import pixel_shuffle_gelu as kernels

    def launch():
        for channels, r, height, width in blocks:
            x = make_tensor(1, channels * r * r, 1, 1, dtype=dtype).expand(-1, -1, height, width)
            x = x.contiguous(
                memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
            )
            bias = make_tensor(channels * r * r, dtype=dtype)
            y = kernels.pixel_shuffle_gelu_fwd(x, r, bias, approximate)
            kernels.pixel_shuffle_gelu_bwd(y, x, r, bias, approximate)

    for compiled in compile_launch(kernels, launch, capability):
        assert compiled.stack_bytes == compiled.local_bytes == 0, compiled
        assert compiled.registers <= 128, compiled


def test_ahead_of_time_sees_spills(compile_launch):
    from hflfnerv.triton_kernels import pixel_shuffle_gelu as kernels

    x = make_tensor(1, 112, 8, 64, layout="channels_last")
    (compiled,) = compile_launch(
        kernels, lambda: kernels.pixel_shuffle_gelu_bwd(x.reshape(1, 28, 16, 128), x, 2, None, "none"), 90, maxnreg=32
    )
    assert compiled.stack_bytes > 0
