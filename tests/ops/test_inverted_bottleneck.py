"""``inverted_bottleneck`` on the CPU: PyTorch's operations, and the AMX kernel against them and float64."""

from __future__ import annotations

import pytest
import torch

from hflfnerv.errors import BackendUnavailable
from hflfnerv.models.convnext import ConvNeXtBlock, use_pytorch
from hflfnerv.ops._inverted_bottleneck import INVERTED_BOTTLENECK, Bottleneck, inverted_bottleneck
from hflfnerv.testing import assert_gradient_close_to_reference, make_tensor, poisoned_empty, threads

AMX = next(entry for entry in INVERTED_BOTTLENECK if entry.name == "amx")
needs_amx = pytest.mark.skipif(AMX.unavailable() is not None, reason=f"amx: {AMX.unavailable()}")
EPS = 1e-6
OP = torch.ops.hflfnerv.inverted_bottleneck
# Pixels, C, N: the encoders' widths, channels that fill no vector, one and several blocks and parts of pixels, the
# last of them not full.
SHAPES = [
    ((2, 15, 17), 64, 256),
    ((1, 3, 3), 16, 64),
    ((4,), 1, 4),
    ((513,), 33, 132),
    ((1, 64, 65), 32, 128),
    ((255,), 5, 7),
    ((257,), 100, 31),
    ((1, 1, 2), 4, 16),
]


def operands(shape, dtype=torch.float32):
    """x and u, of values that bfloat16 has, and parameters likewise."""
    pixels, channels, hidden = shape
    sizes = [(channels,), (channels,), (hidden, channels), (hidden,), (channels, hidden), (channels,), (channels,)]
    scales = [0.3, 0.3, channels**-0.5, 0.3, hidden**-0.5, 0.3, 0.5]
    parameters = [
        make_tensor(*size, scale=scale, seed=i) for i, (size, scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    parameters[0] = parameters[0] + 1
    tensors = [make_tensor(*pixels, channels, seed=10), make_tensor(*pixels, channels, seed=11), *parameters]
    return [t.bfloat16().to(dtype) for t in tensors]


def run(tensors, impl, *, autocast=True, u_dtype=None):
    """The result and the gradients of all tensors; u may come in another dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, u, *parameters = leaves
    u = u if u_dtype is None else u.to(u_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = inverted_bottleneck(x, u, Bottleneck(*parameters), eps=EPS, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, make_tensor(*y.shape, seed=12).bfloat16().to(y.dtype))]


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape):
    tensors = operands(shape)
    expected = run([t.double() for t in tensors], "reference", autocast=False)
    # With u in float32 PyTorch sums the norm's gradients in float32, as the kernel does.
    same = run(tensors, "reference")
    with poisoned_empty():
        results = run(tensors, "amx", u_dtype=torch.bfloat16)
    for i, (actual, true, rounded) in enumerate(zip(results, expected, same, strict=True)):
        assert actual.dtype == torch.float32
        if shape[1] == 1 and i in (2, 3):  # of one channel the norm is nothing but its shift
            assert not actual.any()
            continue
        # Roundings are those of PyTorch's operations but for some that are left out; one of the result's kind more.
        magnitude = true.abs() * (torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=magnitude)


@needs_amx
def test_the_bound_sees_what_is_left_out():
    tensors = operands(SHAPES[0])
    expected = run([t.double() for t in tensors], "reference", autocast=False)
    same = run(tensors, "reference")
    without = [*tensors[:5], torch.zeros_like(tensors[5]), *tensors[6:]]  # the first bias
    for i, (wrong, true, rounded) in enumerate(zip(run(without, "amx"), expected, same, strict=True)):
        if i in (1, 8):  # the gradients of x and of the second bias do not depend on it
            continue
        magnitude = true.abs() * (torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)
        with pytest.raises(AssertionError, match="error"):
            assert_gradient_close_to_reference(wrong, true, rounded, magnitude=magnitude)


@needs_amx
def test_x_in_bfloat16():
    tensors = operands(SHAPES[3])
    expected = run(tensors, "amx")
    halves = [tensors[0].bfloat16(), *tensors[1:]]
    results = run(halves, "amx")
    assert (results[0].dtype, results[1].dtype) == (torch.float32, torch.bfloat16)
    for actual, wide in zip(results, expected, strict=True):
        assert torch.equal(actual.float(), wide)  # the gradient of x is one that bfloat16 has
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others = run(halves, "reference")
    assert [t.dtype for t in results] == [t.dtype for t in others]


@needs_amx
def test_deterministic_whatever_the_threads():
    tensors = operands(((3, 33, 20), 24, 96))
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(run(tensors, "amx"))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_amx
def test_only_the_gradients_that_are_wanted():
    x, u, *parameters = operands(SHAPES[1])
    parameters[2].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inverted_bottleneck(x, u, Bottleneck(*parameters), eps=EPS, impl="amx")
    (alone,) = torch.autograd.grad(y, parameters[2], make_tensor(*y.shape, seed=12).bfloat16().float())
    assert torch.equal(alone, run([x, u, *parameters], "amx")[5])
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inverted_bottleneck(x, u, Bottleneck(*[p.detach() for p in parameters]), eps=EPS, impl="amx")
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


@needs_amx
def test_a_nan_stays_in_its_pixel():
    x, u, *parameters = operands(((300,), 16, 64))
    u[123, 4] = float("nan")
    y, _, du, *_ = run([x, u, *parameters], "amx")
    for t in (y, du):
        assert t[123].isnan().all()
        assert t.isnan().sum() == 16


@needs_amx
def test_opcheck():
    x, u, *parameters = operands(SHAPES[1])
    parameters = [p.bfloat16() if p.dim() == 2 else p for p in parameters]
    tensors = [t.requires_grad_() for t in (x, u.bfloat16(), *parameters)]
    torch.library.opcheck(OP.default, (*tensors, EPS))


@needs_amx
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    tensors = operands(SHAPES[1])

    def function(x, u, *parameters):
        return inverted_bottleneck(x, u, Bottleneck(*parameters), eps=EPS, impl="amx") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*tensors), function(*tensors))


@needs_amx
def test_blocks_of_encoders_take_it(monkeypatch):
    calls = []
    load = torch.ops.hflfnerv.inverted_bottleneck

    def spy(*arguments):
        calls.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(torch.ops.hflfnerv, "inverted_bottleneck", spy)
    block, x = ConvNeXtBlock(16), make_tensor(1, 16, 9, 11)
    for precision, expected in ((torch.bfloat16, 1), (None, 0)):
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
            block(x).sum().backward()
        assert len(calls) == expected
    use_pytorch(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    assert not calls


def test_reference_is_the_block():
    block, x = ConvNeXtBlock(12), make_tensor(2, 12, 8, 7)
    torch.nn.init.normal_(block.gamma)
    y = block.dwconv(x).permute(0, 2, 3, 1)
    y = block.pwconv2(block.act(block.pwconv1(block.norm(y))))
    torch.testing.assert_close(block(x), x + (block.gamma * y).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, u: (x, u), "dtype torch.float32 is not torch.bfloat16"),
        (lambda x, u: (x.double(), u.bfloat16()), "of dtypes torch.float64 and torch.float32 are not added in"),
        (lambda x, u: (x.to("meta"), u.to("meta")), "the tensors are on meta"),
        (lambda x, u: (x[:0], u[:0].bfloat16()), "is empty"),
    ],
)
def test_rejects(change, reason):
    x, u, *parameters = operands(SHAPES[2])
    assert reason in AMX.rejects(*change(x, u), Bottleneck(*parameters), EPS)


@needs_amx
def test_says_why_not():
    x, u, *parameters = operands(SHAPES[2])
    with pytest.raises(BackendUnavailable, match=r"impl='amx' cannot run: dtype torch\.float32"):
        inverted_bottleneck(x, u, Bottleneck(*parameters), eps=EPS, impl="amx")
