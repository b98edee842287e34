"""``scale_residual`` on the CPU, where it is PyTorch's, and its operation as PyTorch is told of it."""

from __future__ import annotations

import pytest
import torch

from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops._scale_residual import SCALE_RESIDUAL, scale_residual
from hflfnerv.testing import make_tensor


def operands(*dtypes, shape=(2, 5, 7, 12)):
    sizes = (shape, shape[-1:], shape, shape[-1:])[: len(dtypes) or 4]
    dtypes = dtypes or (torch.float32,) * 4
    return [make_tensor(*s, dtype=d, seed=i) for i, (s, d) in enumerate(zip(sizes, dtypes, strict=True))]


def run(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, make_tensor(*out.shape, dtype=out.dtype, seed=4))


def pytorch(x, gamma, y, bias=None):
    return x + gamma * (y if bias is None else y + bias)


def assert_equal(results, expected):
    for actual, true in zip(results, expected, strict=True):
        assert actual.dtype == true.dtype
        assert torch.equal(actual, true)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [3, 4])
def test_is_pytorchs(dtype, impl, count):
    tensors = operands(*[dtype] * count)
    assert_equal(run(lambda *t: scale_residual(*t, impl=impl), tensors), run(pytorch, tensors))


def test_autocast():
    tensors = operands(torch.float32, torch.float32, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(run(scale_residual, tensors), run(pytorch, tensors))


@pytest.mark.parametrize("x", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_opcheck(x, gamma, y, bias):
    tensors = operands(x, gamma, y, *([] if bias is None else [bias]))
    padded = [*tensors, None][:4]
    assert torch.ops.hflfnerv.scale_residual(*padded, "reference").dtype == pytorch(*padded).dtype
    for wanted in ([0], [1], [2], [3], [0, 1, 2, 3]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        if any(leaf.requires_grad for leaf in leaves):
            torch.library.opcheck(torch.ops.hflfnerv.scale_residual.default, (*[*leaves, None][:4], "reference"))


def test_compile():
    def function(*tensors):
        return scale_residual(*tensors) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, operands()), run(function, operands()))


def test_gradcheck():
    tensors = [t.requires_grad_() for t in operands(*[torch.float64] * 4, shape=(2, 3, 5))]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.hflfnerv.scale_residual(*t, "reference"), tensors)


def test_no_second_derivative_is_better_than_a_wrong_one():
    x, gamma, y, bias = (t.requires_grad_() for t in operands())
    out = torch.ops.hflfnerv.scale_residual(x, gamma, y, bias, "reference")
    (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in its kernels; use impl='reference'"):
        dy.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: [1]}, TypeError, "x must be a torch.Tensor, got list"),
        ({0: torch.tensor(1.0)}, ValueError, r"x must be \[..., C\], got a scalar"),
        ({1: torch.zeros(12).double()}, TypeError, "gamma must have x's dtype torch.float32"),
        ({1: torch.zeros(11)}, ValueError, r"gamma must have shape \(12,\), got \(11,\)"),
        ({2: torch.zeros(2, 5, 1, 12)}, ValueError, r"y must have shape \(2, 5, 7, 12\), got \(2, 5, 1, 12\)"),
        ({3: torch.zeros(1)}, ValueError, r"bias must have shape \(12,\), got \(1,\)"),
        ({2: torch.zeros(2, 5, 7, 12, device="meta")}, ValueError, "y must be on x's device cpu, got meta"),
    ],
)
def test_rejects(change, error, message):
    given = [change.get(i, t) for i, t in enumerate(operands())]
    with pytest.raises(error, match=message):
        scale_residual(*given)


def test_rejects_implementations():
    reason = SCALE_RESIDUAL.entries[0].unavailable() or "the tensors are on cpu"
    with pytest.raises(BackendUnavailable, match=f"scale_residual: impl='triton' cannot run: {reason}"):
        scale_residual(*operands(), impl="triton")
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'cpp'"):
        scale_residual(*operands(), impl="cpp")
