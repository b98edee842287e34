"""conv2d: every implementation on the CPU against the float64 reference."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from winograd_method import channels_last, gradient_sums, sums

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import CONV2D, _cpp
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
    rounded_in_the_end,
    threads,
)

BY_IMPL = pytest.mark.parametrize(
    "impl",
    [
        pytest.param(
            entry.name, marks=pytest.mark.skipif(entry.unavailable() is not None, reason=str(entry.unavailable()))
        )
        for entry in CONV2D
        if entry.name not in ("cuda", "triton")  # which have tests of their own
    ],
)
DIRECT = next(entry for entry in CONV2D if entry.name == "direct")
# B, C_in, C_out, H, W, kernel: heads, an odd number of everything, several blocks of tiles.
SHAPES = [
    *[(1, 28, 3, 37, 50, 3), (2, 13, 3, 12, 18, 3), (1, 2, 3, 35, 33, 3), (2, 17, 3, 1, 1, 3)],
    *[(1, 9, 17, 21, 11, 5), (2, 3, 64, 19, 30, 3)],
]


def operands(shape, with_bias=True):
    batch, channels, n, height, width, kernel = shape
    x = make_tensor(batch, channels, height, width)
    weight = make_tensor(n, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5, seed=1)
    return channels_last(x), channels_last(weight), make_tensor(n, seed=2) if with_bias else None


def run(tensors, dy, impl, dtype=torch.float32):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors if t is not None]
    y = ops.conv2d(*leaves, impl=impl)
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def magnitudes(x, weight, dy):
    size, terms, slopes = (t.detach().double().abs() for t in (x, weight, dy))
    return sums(size, terms, weight.shape[2]), *gradient_sums(size, terms, slopes), slopes.sum(dim=(0, 2, 3))


@BY_IMPL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_backward(impl, shape, with_bias):
    tensors = operands(shape, with_bias)
    batch, _, n, height, width, kernel = shape
    if impl == "direct" and (n, kernel) != (3, 3):
        with pytest.raises(BackendUnavailable, match="is not that of a 3x3 kernel with three output channels"):
            ops.conv2d(*tensors, impl=impl)
        return
    dy = make_tensor(batch, n, height, width, seed=3)
    with poisoned_empty():
        y, gradients = run(tensors, dy, impl)
    expected, true = run(tensors, dy, "reference", torch.float64)
    same, rounded = run(tensors, dy, "reference")
    size, *sizes = magnitudes(*tensors[:2], dy)
    assert_close_to_reference(y, expected, same, magnitude=size)
    for actual, wanted, other, terms in zip(gradients, true, rounded, sizes, strict=False):
        assert_gradient_close_to_reference(actual, wanted, other, magnitude=terms)


@pytest.mark.skipif(DIRECT.unavailable() is not None, reason=str(DIRECT.unavailable()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_16_bits(shape, dtype):
    tensors = [t.to(dtype) for t in operands(shape)]
    batch, _, n, height, width, _ = shape
    dy = make_tensor(batch, n, height, width, seed=3).to(dtype)
    with poisoned_empty():
        y, gradients = run(tensors, dy, "direct", dtype)
    expected, true = run(tensors, dy, "reference", torch.float64)
    same, rounded = run(tensors, dy, "reference", dtype)
    size, *sizes = magnitudes(*tensors[:2], dy)
    results = [(y, expected, same, size), *zip(gradients, true, rounded, sizes, strict=True)]
    for actual, wanted, other, terms in results:  # float32 sums, rounded once
        assert actual.dtype == dtype
        magnitude = rounded_in_the_end(wanted, terms, dtype)
        assert_gradient_close_to_reference(actual, wanted, other, magnitude=magnitude)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bounds_see_one_per_cent(shape):
    tensors = operands(shape)
    batch, _, n, height, width, _ = shape
    dy = make_tensor(batch, n, height, width, seed=3)
    results = [run(tensors, dy, "reference", dtype) for dtype in (torch.float64, torch.float32)]
    expected, same = ([y, *gradients] for y, gradients in results)
    for true, rounded, size in zip(expected, same, magnitudes(*tensors[:2], dy), strict=True):
        noise = make_tensor(*true.shape, seed=4) * true.square().mean().sqrt().float()
        for wrong in (1.01 * rounded, rounded + 0.01 * noise):
            with pytest.raises(AssertionError, match="error"):
                assert_gradient_close_to_reference(wrong, true, rounded, magnitude=size)


@pytest.mark.skipif(DIRECT.unavailable() is not None, reason=str(DIRECT.unavailable()))
@pytest.mark.parametrize(("shape", "times"), [((1, 33, 112, 64, 64, 5), 5), ((1, 24, 96, 64, 64, 3), 9)])
def test_errors_are_a_few_times_those_of_the_definition(shape, times):
    # A rounding to a mantissa that is spread evenly over its octave has a mean square of u² / 5.5. A sum of K products,
    # one after the other, rounds K partial sums, which have half of its mean square on average; weights and images are
    # independent and normal, so the definition's own error is that for the sum of the squares.
    tensors = operands(shape)
    batch, channels, n, height, width, kernel = shape
    dy = make_tensor(batch, n, height, width, seed=3)
    y, (dx, dweight, _) = run(tensors, dy, "winograd")
    expected, true = run(tensors, dy, "reference", torch.float64)
    x, weight, slopes = (t.double().square() for t in (*tensors[:2], dy))
    padding = [kernel // 2] * 2
    squares = [
        F.conv2d(x, weight, padding=padding),
        *torch.ops.aten.convolution_backward(
            slopes, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2],
    ]
    terms = [channels * kernel**2, n * kernel**2, batch * height * width]
    for actual, exact, square, count in zip((y, dx, dweight), (expected, *true[:2]), squares, terms, strict=True):
        definition = 2**-24 * (count / 2 / 5.5 * square.sum()).sqrt()
        assert (actual - exact).norm() <= times * definition


@BY_IMPL
def test_only_the_gradients_that_are_wanted(impl):
    tensors = operands(SHAPES[0])
    dy = make_tensor(1, 3, 37, 50, seed=3)
    _, expected = run(tensors, dy, impl)
    for position in range(3):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        (gradient,) = torch.autograd.grad(ops.conv2d(*leaves, impl=impl), leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@BY_IMPL
def test_compile(impl):
    tensors = [t.requires_grad_() for t in operands(SHAPES[0])]

    def function(x, weight, bias):
        return ops.conv2d(x, weight, bias, impl=impl) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    actual, expected = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


@BY_IMPL
def test_opcheck(impl):
    tensors = [t.requires_grad_() for t in operands(SHAPES[0])]
    torch.library.opcheck(torch.ops.hflfnerv.conv2d.default, (*tensors, impl))
    torch.library.opcheck(torch.ops.hflfnerv.conv2d.default, (*tensors[:2], None, impl))


def test_gradcheck():
    tensors = [
        make_tensor(*size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 3, 4), (3, 2, 3, 3), (3,))
    ]
    assert torch.autograd.gradcheck(ops.conv2d, tensors)


def test_what_auto_is():
    x, weight, bias = operands(SHAPES[0])
    fast = DIRECT.unavailable() is None
    direct, winograd = ("direct", "winograd") if fast else ("reference", "reference")
    assert torch.equal(ops.conv2d(x, weight, bias), ops.conv2d(x, weight, bias, impl=direct))
    assert ops.conv2d(x, weight, bias).is_contiguous(memory_format=torch.channels_last)
    plain = ops.conv2d(x.contiguous(), weight.contiguous(), bias)
    assert plain.is_contiguous()
    assert torch.equal(plain, ops.conv2d(x.contiguous(), weight.contiguous(), bias, impl=direct))
    x, more = make_tensor(1, 28, 50, 60), make_tensor(8, 28, 3, 3)
    assert torch.equal(ops.conv2d(x, more), ops.conv2d(x, more, impl=winograd))
    small = x[..., :6, :6]
    assert torch.equal(ops.conv2d(small, weight, bias), F.conv2d(small, weight, bias, padding=1))
    wide = make_tensor(3, 28, 9, 9)
    assert torch.equal(ops.conv2d(x, wide), F.conv2d(x, wide, padding=4))
    # Not measured against matrix units, which PyTorch uses for 16 bits.
    half = [t.bfloat16() for t in (x, weight, bias)]
    impl = "direct" if fast and _cpp.unavailable_amx() is not None else "reference"
    assert torch.equal(ops.conv2d(*half), ops.conv2d(*half, impl=impl))


@pytest.mark.skipif(DIRECT.unavailable() is not None, reason=str(DIRECT.unavailable()))
def test_direct_is_the_same_on_any_number_of_threads_and_in_any_batch():
    tensors, dy = operands((3, 13, 3, 40, 21, 3)), make_tensor(3, 3, 40, 21, seed=3)
    with threads(1):
        y, gradients = run(tensors, dy, "direct")
    with threads(3):
        again, same = run(tensors, dy, "direct")
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    one, (dx, *_) = run((tensors[0][1:2], *tensors[1:]), dy[1:2], "direct")
    assert torch.equal(one, y[1:2])
    assert torch.equal(dx, gradients[0][1:2])


def test_memory_for_a_gradient_is_no_copy():
    tensors = operands(SHAPES[0])
    x = tensors[0].contiguous(memory_format=torch.channels_last)
    module = importlib.import_module("hflfnerv.ops.conv2d")
    with torch.profiler.profile() as profile:
        dx, *_ = module._backward_fake(x[:, :3], x, tensors[1], [True] * 3, "triton")
    assert dx.stride() == x.stride()
    assert not {event.name for event in profile.events()} & {"aten::copy_", "aten::clone"}


X, WEIGHT = torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 3, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1, WEIGHT), TypeError, "x must be a torch.Tensor, got int"),
        ((X, WEIGHT.half()), TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
        ((X[0], WEIGHT), ValueError, r"x must be \[B, C_in, H, W\], got shape \(3, 4, 4\)"),
        ((X, WEIGHT[:, :2]), ValueError, "with x's C_in = 3 and an odd kernel"),
        ((X, WEIGHT[..., :2]), ValueError, r"an odd kernel, got shape \(8, 3, 3, 2\)"),
        ((X[:, :0], WEIGHT[:, :0]), ValueError, r"must not be empty but in the batch, got shapes \(1, 0, 4, 4\) and"),
        ((X, WEIGHT[:0]), ValueError, r"must not be empty but in the batch, got shapes \(1, 3, 4, 4\) and \(0, 3,"),
        ((X[..., :0], WEIGHT), ValueError, r"must not be empty but in the batch, got shapes \(1, 3, 4, 0\) and"),
        ((X, WEIGHT, torch.zeros(3)), ValueError, r"bias must have shape \(8,\), got \(3,\)"),
    ],
)
def test_rejects_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.conv2d(*args)
