"""``depthwise_conv2d`` against PyTorch's convolution, on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import _cpp
from hflfnerv.ops._depthwise_conv2d import DEPTHWISE_CONV2D, depthwise_conv2d
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
    threads,
)


class ConvolutionGradients(TorchDispatchMode):
    """Notes the groups and the mask of every gradient of a convolution."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.calls.append((args[9], list(args[10])))
        return function(*args, **(kwargs or {}))


KERNELS = pytest.mark.skipif(_cpp.unavailable() is not None, reason=str(_cpp.unavailable()))
LAYOUTS = (torch.channels_last, torch.contiguous_format)
BY_IMPL = pytest.mark.parametrize(
    "impl",
    [
        pytest.param(
            entry.name, marks=pytest.mark.skipif(entry.unavailable() is not None, reason=str(entry.unavailable()))
        )
        for entry in DEPTHWISE_CONV2D
        if entry.name != "triton"  # which has tests of its own
    ],
)


def operands(dtype, channels=32, size=(9, 13), kernel=(7, 7), layout=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=generator).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels, 1, *kernel, generator=generator).to(dtype)
    return x, weight, torch.randn(channels, generator=generator).to(dtype)


def run(function, operands, dtype, padding, *, absolute=False):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in operands]
    y = function(*leaves, padding=padding)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    dy = dy.abs() if absolute else dy
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)
    return y.detach(), gradients


def pytorch(x, weight, bias, padding):
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def check(results, given, dtype, padding):
    """Compare a result and its gradients with PyTorch's; there may be one less, without the bias."""
    y, gradients = results
    given = given if len(gradients) == 3 else (*given[:2], None)
    exact, exact_gradients = run(pytorch, given, torch.float64, padding)
    same, same_gradients = run(pytorch, given, dtype, padding)
    # Sums, in an order that is free: what each rounds is the sum of the absolute terms.
    terms = [None if t is None else t.abs() for t in given]
    size, magnitudes = run(pytorch, terms, torch.float64, padding, absolute=True)
    assert_close_to_reference(y, exact, same, magnitude=size)
    for four in zip(gradients, exact_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(*four[:3], magnitude=four[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [16, 32, 20, 1, 4])
@pytest.mark.parametrize(("kernel", "padding"), [((7, 7), (3, 3)), ((3, 5), (1, 0))])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_backward(dtype, layout, channels, kernel, padding, with_bias):
    given = operands(dtype, channels, kernel=kernel, layout=layout)
    check(run(depthwise_conv2d, given if with_bias else (*given[:2], None), dtype, padding), given, dtype, padding)


def test_gradients_that_are_not_wanted_are_left_out():
    by_groups, given = functools.partial(depthwise_conv2d, impl="groups"), operands(torch.bfloat16)
    _, expected = run(by_groups, given, torch.bfloat16, (3, 3))
    # The groups of each convolution_backward, and which gradients it makes.
    for position, groups in enumerate([32, 2, 2]):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(given)]
        y = by_groups(*leaves, padding=(3, 3))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
        with ConvolutionGradients() as made:
            (gradient,) = torch.autograd.grad(y, leaves[position], dy)
        assert made.calls == [(groups, [i == position for i in range(3)])]
        torch.testing.assert_close(gradient, expected[position])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    given = operands(dtype)
    kernels = functools.partial(depthwise_conv2d, impl="cpp")
    y, gradients = run(kernels, given, dtype, (3, 3))
    leaves = [t.float().requires_grad_() for t in given]
    wide = kernels(*leaves, padding=(3, 3))
    assert torch.equal(y, wide.to(dtype))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).float()
    exact = torch.autograd.grad(wide, leaves, dy)
    for actual, expected in zip(gradients, exact, strict=True):
        assert torch.equal(actual, expected.to(dtype))


@KERNELS
def test_kernels_make_the_gradients_that_are_wanted_and_call_nothing_of_pytorch():
    given = operands(torch.float32)
    _, expected = run(depthwise_conv2d, given, torch.float32, (3, 3))
    for position in range(3):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(given)]
        with ConvolutionGradients() as made:
            y = depthwise_conv2d(*leaves, padding=(3, 3))
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
            (gradient,) = torch.autograd.grad(y, leaves[position], dy)
        assert not made.calls
        assert torch.equal(gradient, expected[position])


@KERNELS
@pytest.mark.parametrize("size", [(1, 1), (2, 4), (8, 10), (9, 14), (33, 27)])
def test_kernels_at_any_size_on_any_number_of_threads_and_in_any_batch(size):
    given = operands(torch.float32, channels=21, size=size)
    with threads(1), poisoned_empty():
        y, gradients = run(depthwise_conv2d, given, torch.float32, (3, 3))
    check((y, gradients), given, torch.float32, (3, 3))
    with threads(3):
        again, same = run(depthwise_conv2d, given, torch.float32, (3, 3))
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(depthwise_conv2d(given[0][1:], *given[1:], padding=(3, 3)), y[1:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: [1]}, TypeError, "x must be a torch.Tensor, got list"),
        ({0: torch.zeros(32, 9, 13)}, ValueError, r"x must be \[B, C, H, W\], got shape \(32, 9, 13\)"),
        ({1: torch.zeros(32, 2, 7, 7)}, ValueError, r"weight must be \[32, 1, K_h, K_w\], got shape \(32, 2, 7, 7\)"),
        ({1: torch.zeros(32, 1, 7, 7).double()}, TypeError, "weight must have x's dtype torch.float32"),
        ({2: torch.zeros(31)}, ValueError, r"bias must have shape \(32,\), got \(31,\)"),
        ({2: torch.zeros(32, device="meta")}, ValueError, "bias must be on x's device cpu, got meta"),
    ],
)
def test_rejects(change, error, message):
    given = [change.get(i, t) for i, t in enumerate(operands(torch.float32))]
    with pytest.raises(error, match=message):
        depthwise_conv2d(*given, padding=(3, 3))


def test_float64_is_exact():
    leaves = [t[:1, :2].double().requires_grad_() if t.dim() == 4 else t for t in operands(torch.float32)[:1]]
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, None, padding=(1, 1)), (*leaves, weight))


def test_autocast():
    leaves = [t.requires_grad_() for t in operands(torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv2d(*leaves, padding=(3, 3))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_deterministic():
    given = operands(torch.bfloat16)
    first, second = (run(depthwise_conv2d, given, torch.bfloat16, (3, 3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_compile():
    given = operands(torch.float32)
    compiled = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)
    # Without the kernels: it is made of PyTorch's operations.
    check(run(compiled, given, torch.float32, (3, 3)), given, torch.float32, (3, 3))


@BY_IMPL
def test_compile_an_implementation(impl):
    def function(x, weight, bias, padding):
        return depthwise_conv2d(x, weight, bias, padding=padding, impl=impl) * 2

    given = operands(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (y, gradients), (expected, true) = (run(f, given, torch.float32, (3, 3)) for f in (compiled, function))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, true)


@BY_IMPL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_implementation(impl, layout, with_bias):
    given = operands(torch.float32, layout=layout)
    given = given if with_bias else (*given[:2], None)
    with poisoned_empty():
        results = run(functools.partial(depthwise_conv2d, impl=impl), given, torch.float32, (3, 3))
    assert results[0].stride() == results[1][0].stride() == given[0].stride()
    check(results, given, torch.float32, (3, 3))


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=KERNELS)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(impl, layout):
    x, weight, bias = (t.requires_grad_() for t in operands(torch.float32, channels=5, kernel=(3, 5), layout=layout))
    torch.library.opcheck(torch.ops.hflfnerv.depthwise_conv2d.default, (x, weight, bias, impl))
    torch.library.opcheck(torch.ops.hflfnerv.depthwise_conv2d.default, (x, weight, None, impl))


def test_gradcheck():
    sizes = ((2, 3, 4, 5), (3, 1, 3, 5), (3,))
    tensors = [make_tensor(*size, seed=i, dtype=torch.float64, requires_grad=True) for i, size in enumerate(sizes)]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.hflfnerv.depthwise_conv2d(*t, "reference"), tensors)


@KERNELS
def test_no_second_derivative_is_better_than_a_wrong_one():
    x, weight, bias = (t.requires_grad_() for t in operands(torch.float32))
    y = depthwise_conv2d(x, weight, bias, padding=(3, 3))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in its kernels; use impl='reference'"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "impl", "reason"),
    [
        ({}, "triton", ""),
        pytest.param({"dtype": torch.float64}, "cpp", "dtype torch.float64 is not one of", marks=KERNELS),
        pytest.param({"kernel": (6, 7)}, "cpp", "is not half of an odd kernel", marks=KERNELS),
        pytest.param({"kernel": (7, 5)}, "cpp", r"padding \(3, 3\) is not half of an odd kernel", marks=KERNELS),
        ({"channels": 20}, "groups", "20 channels are no multiple of 16"),
        ({"dtype": torch.float64}, "groups", "is for exact gradients"),
    ],
)
def test_what_implementations_reject(change, impl, reason):
    if impl == "triton" and DEPTHWISE_CONV2D.entries[0].unavailable() is None:
        reason = "the tensors are on cpu"
    with pytest.raises(BackendUnavailable, match=f"depthwise_conv2d: impl='{impl}' cannot run: .*{reason}"):
        depthwise_conv2d(*operands(**{"dtype": torch.float32, **change}), padding=(3, 3), impl=impl)


def test_rejects_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'fft'"):
        depthwise_conv2d(*operands(torch.float32), padding=(3, 3), impl="fft")


@KERNELS
@pytest.mark.parametrize(
    ("change", "padding", "impl"),
    [
        ({}, (3, 3), "cpp"),
        ({"channels": 20}, (3, 3), "cpp"),
        ({}, (3, 2), "groups"),
        ({"channels": 20}, (3, 2), "reference"),
        ({"dtype": torch.bfloat16}, (3, 3), "cpp"),
        # Large images are for matrix units.
        (
            {"dtype": torch.bfloat16, "size": (64, 128)},
            (3, 3),
            "cpp" if _cpp.unavailable_amx() is not None else "groups",
        ),
        ({"dtype": torch.float64}, (3, 3), "reference"),
    ],
)
def test_what_auto_is(change, padding, impl, monkeypatch):
    chosen, select = [], DEPTHWISE_CONV2D.select
    monkeypatch.setattr(DEPTHWISE_CONV2D, "select", lambda *call: chosen.append(entry := select(*call)) or entry)
    depthwise_conv2d(*operands(**{"dtype": torch.float32, **change}), padding=padding)
    assert [entry.name for entry in chosen] == [impl]
