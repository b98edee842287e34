"""conv_pixel_shuffle_gelu: every implementation against the float64 reference."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    implementations,
    make_tensor,
)

# "cpp" and "cuda" compute in half precision alone, "winograd" in float32: see the files that are named after them.
BY_IMPL = pytest.mark.parametrize(
    ("impl", "device"),
    [case for case in implementations(CONV_PIXEL_SHUFFLE_GELU) if case.id not in ("cpp", "cuda", "winograd")],
)
# B, C_in, C_out, r, H, W, kernel, padding
ODD_SHAPES = [
    (1, 3, 5, 2, 5, 7, (1, 1), 0),
    (2, 5, 3, 3, 4, 5, (3, 3), 1),
    (1, 7, 1, 4, 3, 6, (5, 5), 2),
    (1, 2, 4, 1, 5, 4, (3, 1), (1, 0)),
    (1, 2, 3, 2, 6, 5, (5, 3), (0, 2)),
]


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """Float32 without TF32, whose rounding is not that of the dtype the tolerances are made of."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(tensors, dy, r, padding, approximate, dtype=None, impl=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors if t is not None]
    x, weight, bias = [*leaves, None][:3]
    function = ops.conv_pixel_shuffle_gelu if impl else reference.conv_pixel_shuffle_gelu
    y = function(x, weight, bias, r, padding=padding, approximate=approximate, **({"impl": impl} if impl else {}))
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def compare(shape, dtype, device, layout, approximate, impl, with_bias=True):
    batch, in_channels, channels, r, height, width, kernel, padding = shape
    pad = padding if isinstance(padding, tuple) else (padding, padding)
    x = make_tensor(batch, in_channels, height, width, dtype=dtype, device=device, layout=layout)
    weight = make_tensor(channels * r * r, in_channels, *kernel, dtype=dtype, device=device, scale=0.3, seed=1)
    bias = make_tensor(channels * r * r, dtype=dtype, device=device, seed=2) if with_bias else None
    rows, columns = (size + 2 * p - k + 1 for size, p, k in zip((height, width), pad, kernel, strict=True))
    dy = make_tensor(batch, channels, rows * r, columns * r, dtype=dtype, device=device, seed=3)

    tensors = (x, weight, bias)
    entry = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == impl)
    if entry.rejects(Call(x, weight, bias, r, pad, approximate)) is not None:
        # The one thing that a kernel may refuse here: a padding that is not half of an odd kernel.
        assert impl == "triton"
        assert pad != tuple(size // 2 for size in kernel)
        with pytest.raises(BackendUnavailable, match="changes the size of the image"):
            run(tensors, dy, r, padding, approximate, impl=impl)
        return
    y, gradients = run(tensors, dy, r, padding, approximate, impl=impl)
    expected, expected_gradients = run(tensors, dy, r, padding, approximate, dtype=torch.float64)
    same, same_gradients = run(tensors, dy, r, padding, approximate, dtype=dtype)
    size, *magnitudes = convolution_magnitudes(x, weight, dy, r, pad)
    if impl != "triton":
        # The convolutions are those that the rounded reference runs; the gradient of the bias alone is not.
        size, magnitudes[:2] = None, [None, None]
    assert_close_to_reference(y, expected, same, magnitude=size)
    magnitudes = magnitudes[: len(gradients)]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@BY_IMPL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_and_backward(impl, device, dtype, approximate, layout):
    shape = (2, 6, 4, 2, 6, 10, (3, 3), 1)
    compare(shape, dtype, device, layout, approximate, impl)
    compare(shape, dtype, device, layout, approximate, impl, with_bias=False)


@BY_IMPL
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes(impl, device, shape):
    compare(shape, torch.float32, device, "contiguous", "none", impl)


@BY_IMPL
def test_noncontiguous(impl, device):
    compare((2, 5, 3, 2, 5, 7, (3, 3), 1), torch.float32, device, "strided", "none", impl)


@BY_IMPL
def test_deterministic(impl, device):
    tensors = make_tensor(1, 6, 9, 11, device=device), make_tensor(12, 6, 3, 3, device=device), None
    dy = make_tensor(1, 3, 18, 22, device=device)
    first, second = (run(tensors, dy, 2, 1, "none", impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


def test_reference_is_the_three_operations():
    x, weight = make_tensor(1, 3, 5, 6, dtype=torch.float64), make_tensor(8, 3, 3, 3, dtype=torch.float64)
    bias = make_tensor(8, dtype=torch.float64)
    expected = F.gelu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2))
    assert torch.equal(ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=1), expected)


def test_gradcheck():
    tensors = [
        make_tensor(*size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 3, 4), (8, 2, 3, 3), (8,))
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: ops.conv_pixel_shuffle_gelu(x, w, b, 2, padding=1), tensors)


@BY_IMPL
def test_compile(impl, device):
    tensors = [make_tensor(*size, device=device, requires_grad=True) for size in ((1, 3, 5, 6), (8, 3, 3, 3), (8,))]

    def function(x, weight, bias):
        return ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=1, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    actual, expected = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


@BY_IMPL
def test_autocast(impl, device):
    tensors = [make_tensor(*size, device=device, requires_grad=True) for size in ((1, 3, 5, 6), (8, 3, 3, 3), (8,))]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.conv_pixel_shuffle_gelu(*tensors, 2, padding=1, impl=impl)
    assert y.dtype == torch.bfloat16
    halves = [t.bfloat16() for t in tensors]
    torch.testing.assert_close(y, ops.conv_pixel_shuffle_gelu(*halves, 2, padding=1, impl=impl), rtol=0, atol=0)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), tensors))


X, WEIGHT = torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 3, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1, WEIGHT, None, 2), {}, TypeError, "x must be a torch.Tensor, got int"),
        ((X, None, None, 2), {}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ((X, WEIGHT.half(), None, 2), {}, TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
        ((X[0], WEIGHT, None, 2), {}, ValueError, "x must be [B, C_in, H, W], got shape (3, 4, 4)"),
        ((X, WEIGHT[:, :2], None, 2), {}, ValueError, "with x's C_in = 3, got shape (8, 2, 3, 3)"),
        ((X, WEIGHT, None, 3), {}, ValueError, "weight must have a multiple of r² = 9 output channels, got 8"),
        ((X, WEIGHT, None, 0), {}, ValueError, "r must be at least 1, got 0"),
        ((X[:, :0], WEIGHT[:, :0], None, 2), {}, ValueError, "weight must not be empty, got shape (8, 0, 3, 3)"),
        ((X, WEIGHT[:0], None, 2), {}, ValueError, "weight must not be empty, got shape (0, 3, 3, 3)"),
        ((X, WEIGHT, torch.zeros(2), 2), {}, ValueError, "bias must have shape (8,)"),
        ((X, WEIGHT.to("meta"), None, 2), {}, ValueError, "weight must be on x's device cpu, got meta"),
        ((X, WEIGHT, None, 2), {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ((X, WEIGHT, None, 2), {"padding": "same"}, TypeError, "padding must be an int or a pair of ints, got 'same'"),
        ((X, WEIGHT, None, 2), {"padding": (1, 1, 1)}, TypeError, "padding must be an int or a pair of ints"),
        (
            (X[:, :, :2], WEIGHT, None, 2),
            {"padding": 0},
            ValueError,
            "x must be at least as large as the kernel (3, 3)",
        ),
        ((X, WEIGHT, None, 2), {"approximate": "fast"}, ValueError, "approximate must be 'none' or 'tanh', got 'fast'"),
        (
            (X, WEIGHT, None, 2),
            {"impl": "metal"},
            ValueError,
            f"impl must be one of {('auto', *CONV_PIXEL_SHUFFLE_GELU.names)}, got 'metal'",
        ),
    ],
)
def test_rejects(args, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.conv_pixel_shuffle_gelu(*args, **{"padding": 1, **kwargs})


def test_conv2d_cpp_says_why_not():
    entry = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "conv2d+cpp")
    assert "dtype torch.float64 is not one of" in entry.rejects(
        Call(X.double(), WEIGHT.double(), None, 2, (1, 1), "none")
    )
    assert "the tensors are on meta" in entry.rejects(Call(X.to("meta"), WEIGHT.to("meta"), None, 2, (1, 1), "none"))
    assert ops.conv_pixel_shuffle_gelu(X.to("meta"), WEIGHT.to("meta"), None, 2, padding=1).shape == (1, 2, 8, 8)


def test_triton_says_why_not():
    with pytest.raises(BackendUnavailable, match=r"impl='conv2d\+triton' cannot run: .+"):
        ops.conv_pixel_shuffle_gelu(X, WEIGHT, None, 2, padding=1, impl="conv2d+triton")
    entry = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "conv2d+triton")
    assert "the tensors are on cpu" in entry.rejects(Call(X, WEIGHT, None, 2, (1, 1), "none"))
