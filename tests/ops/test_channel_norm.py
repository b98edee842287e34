"""``channel_norm`` on the CPU, where it is PyTorch's layer norm, and its operation as PyTorch is told of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops._channel_norm import CHANNEL_NORM, channel_norm
from hflfnerv.testing import make_tensor

EPS = 1e-6


def operands(dtype=torch.float32, of_weights=None, shape=(2, 5, 7, 12)):
    x = make_tensor(*shape, dtype=dtype)
    return [x, *(make_tensor(shape[-1], dtype=of_weights or dtype, seed=seed) for seed in (1, 2, 4))]


def run(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, make_tensor(*y.shape, dtype=y.dtype, seed=3))


def assert_equal(results, expected):
    for actual, true in zip(results, expected, strict=True):
        assert actual.dtype == true.dtype
        assert torch.equal(actual, true)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
def test_is_pytorchs(dtype, out_dtype, impl):
    def pytorch(x, gain, bias, shift=None):
        y = F.layer_norm(x if shift is None else x + shift, x.shape[-1:], gain, bias, EPS)
        return y if out_dtype is None else y.to(out_dtype)

    for tensors in (operands(dtype)[:3], operands(dtype)):
        results = run(lambda *t: channel_norm(*t, eps=EPS, out_dtype=out_dtype, impl=impl), tensors)
        assert_equal(results, run(pytorch, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    tensors = operands(dtype, torch.float32)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(lambda *t: channel_norm(*t, eps=EPS), tensors)
        expected = run(lambda x, *weights: F.layer_norm(x, x.shape[-1:], *weights, EPS), tensors)
    assert_equal(results, expected)


def test_compile():
    def function(*tensors):
        return channel_norm(*tensors, eps=EPS) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, operands()), run(function, operands()))


@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(of_weights, out_dtype):
    for wanted in ([0], [1], [2], [3], [0, 1, 2, 3]):
        for count in (3, 4):
            tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(operands(torch.bfloat16, of_weights))][
                :count
            ]
            if any(t.requires_grad for t in tensors):
                arguments = (*[*tensors, None][:4], EPS, out_dtype, "reference")
                torch.library.opcheck(torch.ops.hflfnerv.channel_norm.default, arguments)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in operands(torch.float64, shape=(2, 3, 5))]
    assert torch.autograd.gradcheck(
        lambda *t: torch.ops.hflfnerv.channel_norm(*t, EPS, torch.float64, "reference"), tensors
    )


def test_no_second_derivative_is_better_than_a_wrong_one():
    x, gain, bias, shift = (t.requires_grad_() for t in operands())
    y = torch.ops.hflfnerv.channel_norm(x, gain, bias, shift, EPS, torch.float32, "reference")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in its kernels; use impl='reference'"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: [1]}, TypeError, "x must be a torch.Tensor, got list"),
        ({0: torch.tensor(1.0)}, ValueError, r"x must be \[..., C\], got a scalar"),
        ({1: torch.zeros(12).double()}, TypeError, "gain must have x's dtype torch.float32"),
        ({1: torch.zeros(11)}, ValueError, r"gain must have shape \(12,\), got \(11,\)"),
        ({2: torch.zeros(12, device="meta")}, ValueError, "bias must be on x's device cpu, got meta"),
    ],
)
def test_rejects(change, error, message):
    given = [change.get(i, t) for i, t in enumerate(operands())]
    with pytest.raises(error, match=message):
        channel_norm(*given, eps=EPS)


def test_rejects_implementations():
    reason = CHANNEL_NORM.entries[0].unavailable() or "the tensors are on cpu"
    with pytest.raises(BackendUnavailable, match=f"channel_norm: impl='triton' cannot run: {reason}"):
        channel_norm(*operands(), eps=EPS, impl="triton")
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'cpp'"):
        channel_norm(*operands(), eps=EPS, impl="cpp")
