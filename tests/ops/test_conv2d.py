"""conv2d: every implementation on the CPU against the float64 reference."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_within, results
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


def dtype_of(impl):
    """Return the dtype that an implementation is tested in where any will do."""
    return torch.bfloat16 if impl == "amx" else torch.float32


DIRECT, AMX = (next(entry for entry in CONV2D if entry.name == name) for name in ("direct", "amx"))
needs_amx = pytest.mark.skipif(AMX.unavailable() is not None, reason=str(AMX.unavailable()))
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
    if impl == "amx":
        with pytest.raises(BackendUnavailable, match=r"dtype torch\.float32 is not torch\.bfloat16"):
            ops.conv2d(*tensors, impl=impl)
        return
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
    tensors = [t.to(dtype_of(impl)) for t in operands(SHAPES[0])]
    dy = make_tensor(1, 3, 37, 50, dtype=dtype_of(impl), seed=3)
    _, expected = run(tensors, dy, impl, dtype_of(impl))
    for position in range(3):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        (gradient,) = torch.autograd.grad(ops.conv2d(*leaves, impl=impl), leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@BY_IMPL
def test_compile(impl):
    tensors = [t.to(dtype_of(impl)).requires_grad_() for t in operands(SHAPES[0])]

    def function(x, weight, bias):
        return ops.conv2d(x, weight, bias, impl=impl) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    actual, expected = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


@BY_IMPL
def test_opcheck(impl):
    tensors = [t.to(dtype_of(impl)).requires_grad_() for t in operands(SHAPES[0])]
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
    # Of small images, and of few channels, the matrix units make nothing faster than PyTorch does with them.
    half = [t.bfloat16() for t in (x, weight, bias)]
    impl = "direct" if fast and _cpp.unavailable_amx() is not None else "reference"
    assert torch.equal(ops.conv2d(*half), ops.conv2d(*half, impl=impl))


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        ((28, 128, 256), torch.bfloat16, "amx"),
        ((24, 1, 2**15), torch.bfloat16, "amx"),
        ((28, 127, 258), torch.bfloat16, "reference"),
        ((23, 128, 256), torch.bfloat16, "reference"),
        ((28, 128, 256), torch.float16, "reference"),
        ((28, 128, 256), torch.float32, "direct"),
    ],
)
def test_what_auto_is_on_matrix_units(monkeypatch, size, dtype, expected):
    """Also where there are none."""
    monkeypatch.setattr("hflfnerv.ops._cpp._machine", lambda: None)
    monkeypatch.setattr("hflfnerv.ops._cpp._amx", lambda: None)
    chosen = []
    entries = [dataclasses.replace(entry, run=lambda *_, name=entry.name: chosen.append(name)) for entry in CONV2D]
    monkeypatch.setattr(CONV2D, "entries", entries)
    x, weight = torch.zeros(2, *size, dtype=dtype), torch.zeros(3, size[0], 3, 3, dtype=dtype)
    ops.conv2d(x, weight)
    assert chosen == [expected]
    if expected == "amx":
        monkeypatch.setattr("hflfnerv.ops._cpp._amx", lambda: "needs AMX")
        ops.conv2d(x, weight)
        assert chosen == ["amx", "direct"]


@needs_amx
def test_auto_is_amx_for_large_images():
    x = make_tensor(1, 28, 128, 256, dtype=torch.bfloat16).requires_grad_()
    weight = make_tensor(3, 28, 3, 3, dtype=torch.bfloat16, scale=0.1, seed=1)
    results = [ops.conv2d(x, weight, impl=impl) for impl in ("auto", "amx", "reference")]
    assert results[0].grad_fn.name() == results[1].grad_fn.name() != results[2].grad_fn.name()
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in results]
    assert torch.equal(results[0], results[1])
    assert torch.equal(gradients[0], gradients[1])
    small = x[..., :-1]
    assert ops.conv2d(small, weight).grad_fn.name() == results[2].grad_fn.name()


# B, C_in, C_out, H, W, kernel: bands of rows and of columns, few and many channels, kernels that are not square.
LARGE = [
    *[(1, 28, 3, 90, 131, (3, 3)), (2, 64, 40, 19, 23, (3, 3)), (1, 130, 70, 11, 301, (5, 5)), (1, 1, 1, 9, 1, (3, 3))],
    *[
        (1, 24, 17, 33, 1037, (1, 1)),
        (2, 40, 33, 17, 9, (7, 7)),
        (1, 33, 57, 21, 40, (1, 5)),
        (3, 3, 24, 130, 531, (5, 3)),
    ],
]


def bfloat16_operands(shape, with_bias=True):
    batch, channels, n, height, width, kernel = shape
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    options = {"dtype": torch.bfloat16}
    x = make_tensor(batch, channels, height, width, **options)
    weight = make_tensor(n, channels, rows, columns, scale=(channels * rows * columns) ** -0.5, seed=1, **options)
    dy = make_tensor(batch, n, height, width, seed=3, **options)
    bias = make_tensor(n, seed=2, **options) if with_bias else None
    return (channels_last(x), channels_last(weight), bias), channels_last(dy), [rows // 2, columns // 2]


@needs_amx
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_amx(shape):
    for with_bias in (True, False):
        tensors, dy, padding = bfloat16_operands(shape, with_bias)
        with poisoned_empty():
            y, gradients = run(tensors, dy, "amx", torch.bfloat16)
        for actual, result in zip((y, *gradients), results(*tensors, dy, 1, padding), strict=False):
            assert_within(actual, result)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_the_bounds_of_amx_see_half_a_per_cent(shape):
    tensors, dy, padding = bfloat16_operands(shape)
    for result in results(*tensors, dy, 1, padding):
        assert_within(result.exact.bfloat16(), result)
        # Each element is rounded once, an error of 0.4 % at most.
        with pytest.raises(AssertionError, match="error"):
            assert_within((1.01 * result.exact).bfloat16(), result)
        if result.numbers >= 256:
            noise = make_tensor(*result.exact.shape, seed=4) * result.exact.square().mean().sqrt()
            with pytest.raises(AssertionError, match="error"):
                assert_within((result.exact + 0.005 * noise).bfloat16(), result)


@needs_amx
def test_amx_is_the_same_on_any_number_of_threads_and_in_any_batch():
    for shape in ((3, 33, 28, 61, 67, (3, 3)), LARGE[2]):
        tensors, dy, _ = bfloat16_operands(shape)
        made = []
        for number in (1, 2, 5):
            with threads(number):
                y, gradients = run(tensors, dy, "amx", torch.bfloat16)
                made.append((y, *gradients))
        for others in made[1:]:
            assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))
        for image in range(shape[0]):
            one, (dx, *_) = run(
                (tensors[0][image : image + 1], *tensors[1:]), dy[image : image + 1], "amx", torch.bfloat16
            )
            assert torch.equal(one[0], made[0][0][image])
            assert torch.equal(dx[0], made[0][1][image])


@needs_amx
def test_amx_in_other_layouts():
    (x, weight, bias), dy, _ = bfloat16_operands((2, 33, 12, 9, 14, 3))
    y, gradients = run((x, weight, bias), dy, "amx", torch.bfloat16)
    transposed = weight.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((2, 33, 9, 28), float("nan"), dtype=torch.bfloat16)
    wide[..., ::2] = x
    for tensors in (
        (x.contiguous(), weight, bias),
        (x, weight.contiguous(), bias),
        (x.contiguous(), weight.contiguous(), bias),
        (x, transposed, bias),
        (wide[..., ::2], weight, bias),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        again = ops.conv2d(*leaves, impl="amx")
        made = torch.autograd.grad(again, leaves, dy.contiguous())
        assert torch.equal(again, y)
        assert all(torch.equal(a, b) for a, b in zip(made, gradients, strict=True))
        assert made[0].is_contiguous() == (tensors[0] is not x)
    torch.library.opcheck(torch.ops.hflfnerv.conv2d.default, (x.contiguous().requires_grad_(), weight, bias, "amx"))


@needs_amx
@pytest.mark.parametrize("axes", [(0, 0), (2, 3), (0, 1)])
def test_gradients_of_amx_lie_as_torch_compile_is_told(axes):
    (x, weight, _), dy, _ = bfloat16_operands((2, 33, 12, 9, 14, 3))
    weight = weight.transpose(*axes).contiguous().transpose(*axes)  # as dense as any, and neither of the two formats
    torch.library.opcheck(torch.ops.hflfnerv.conv2d_backward.default, (dy, x, weight, [True] * 3, "amx"))


@needs_amx
@pytest.mark.parametrize("dynamic", [False, True])
def test_amx_compiles_with_any_size(dynamic):
    tensors, dy, _ = bfloat16_operands(SHAPES[0])
    tensors = [t.requires_grad_() for t in tensors]

    def function(x, weight, bias):
        return ops.conv2d(x, weight, bias, impl="amx") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, expected = compiled(*tensors), function(*tensors)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(t, tensors, dy) for t in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_amx
def test_amx_under_autocast():
    (x, weight, bias), _, _ = bfloat16_operands(SHAPES[0])
    wide = [t.float().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv2d(*wide, impl="amx")
    assert torch.equal(y, ops.conv2d(x, weight, bias, impl="amx"))
    assert [g.dtype for g in torch.autograd.grad(y.sum(), wide)] == [torch.float32] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: (x.float(), w.float()), "dtype torch.float32 is not torch.bfloat16, the one that AMX multiplies"),
        (lambda x, w: (x.to("meta"), w.to("meta")), "the tensors are on meta"),
        (lambda x, w: (x[:0], w), r"x of shape (0, 28, 37, 50) is empty"),
    ],
)
def test_amx_rejects(change, reason):
    (x, weight, _), _, _ = bfloat16_operands(SHAPES[0])
    assert reason in AMX.rejects(*change(x, weight), None)
    assert AMX.rejects(x, weight, None) is None


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
