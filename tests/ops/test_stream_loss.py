"""stream_loss: every implementation against the float64 reference, and its kernels without a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import STREAM_LOSS, _cpp
from hflfnerv.reference import stream_loss as reference
from hflfnerv.testing import assert_close_to_reference, implementations, make_tensor, threads

BY_IMPL = pytest.mark.parametrize(("impl", "device"), implementations(STREAM_LOSS))
OP = torch.ops.hflfnerv.stream_loss
BACKWARD_OP = torch.ops.hflfnerv.stream_loss_backward


def operands(batch=2, size=(5, 7), image=(5, 7), dtype=torch.float32, layout="channels_last", device="cpu", both=True):
    low, high = (
        make_tensor(batch, 3, *image, dtype=dtype, layout=layout, device=device, seed=seed, requires_grad=True)
        for seed in (0, 1)
    )
    target = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return low, target.to(device), high if both else None


def run(low, target, high, dloss, dtype=None, impl=None):
    images = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (low, high) if t is not None]
    function = reference.stream_loss if impl is None else ops.stream_loss
    loss = function(images[0], target, *images[1:], **({} if impl is None else {"impl": impl}))
    return loss, torch.autograd.grad(loss, images, dloss.to(loss.dtype))


@BY_IMPL
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "image", "layout"),
    [
        ((5, 7), (5, 7), "channels_last"),
        ((6, 9), (8, 12), "contiguous"),
        ((1, 1), (3, 2), "channels_last"),
        ((3, 400), (4, 401), "strided"),
    ],
)
def test_forward_and_backward(impl, device, size, image, layout, dtype, both):
    low, target, high = operands(3, size, image, dtype, layout, device, both)
    dloss = make_tensor(3, device=device, seed=4)
    loss, gradients = run(low, target, high, dloss, impl=impl)
    expected, expected_gradients = run(low, target, high, dloss, dtype=torch.float64)
    same, same_gradients = run(low, target, high, dloss)
    # Triton's tanh is within 2e-7, its images within 3e-7 for both: off by mean(2 |e| 3e-7) <= 6e-7 sqrt(mean(e²)).
    inexact = 6e-7 * expected.sqrt() if impl == "triton" else torch.zeros_like(expected)
    assert_close_to_reference(loss, expected, same, magnitude=expected + inexact / (torch.finfo(loss.dtype).eps / 2))
    for actual, true, rounded in zip(gradients, expected_gradients, same_gradients, strict=True):
        assert_close_to_reference(actual, true, rounded)
        assert not actual[:, :, size[0] :].any()
        assert not actual[:, :, :, size[1] :].any()


def test_reference_is_the_formula():
    low, target, high = operands(dtype=torch.float64, image=(6, 8))
    image = (torch.tanh(high) + (torch.tanh(low) + 1) / 2)[:, :, :5, :7]
    expected = [F.mse_loss(one, goal.permute(2, 0, 1) / 255.0).item() for one, goal in zip(image, target, strict=True)]
    assert ops.stream_loss(low, target, high).tolist() == pytest.approx(expected, rel=1e-7)


@BY_IMPL
@pytest.mark.parametrize(("low_size", "high_size"), [((6, 9), (8, 7)), ((5, 7), (7, 12))])
def test_images_of_different_sizes(impl, device, low_size, high_size):
    low, target, _ = operands(2, (5, 7), low_size, device=device)
    high = make_tensor(2, 3, *high_size, layout="channels_last", device=device, seed=3)
    loss, gradients = run(low, target, high, torch.ones(2, device=device), impl=impl)
    cropped = [t.detach()[..., :5, :7] for t in (low, high)]
    expected, inner = run(cropped[0], target, cropped[1], torch.ones(2, device=device))
    torch.testing.assert_close(loss, expected)
    for gradient, true, image in zip(gradients, inner, (low, high), strict=True):
        padding = (0, image.shape[3] - 7, 0, image.shape[2] - 5)
        torch.testing.assert_close(gradient, F.pad(true, padding), rtol=1e-5, atol=1e-8)


@BY_IMPL
def test_deterministic(impl, device):
    operands_, dloss = operands(2, (65, 130), (66, 130), device=device), make_tensor(2, device=device)
    first, second = (run(*operands_, dloss, impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@BY_IMPL
def test_empty_batch(impl, device):
    low, target, high = operands(0, device=device)
    assert ops.stream_loss(low, target, high, impl=impl).shape == (0,)


@BY_IMPL
def test_small_gradients_survive_half_precision(impl, device):
    # The gradient of one value of a large image underflows in float16 unless the scale of the loss comes before it.
    low, target, _ = operands(1, (128, 256), (128, 256), torch.float16, device=device, both=False)
    (ops.stream_loss(low, target, impl=impl).mean() * 2.0**16).backward()
    exact = low.detach().double().requires_grad_()
    (reference.stream_loss(exact, target).sum() * 2.0**16).backward()
    # One rounding to float16, in steps of 2^-24 where it is subnormal; before it, the error is a difference of numbers
    # of at most 1, each within 2^-23, and its factor that of the loss.
    factor = 2.0**16 / (3 * 128 * 256)
    rounding = 2**-11 * exact.grad.abs() + 2**-25
    assert ((low.grad - exact.grad).abs() <= rounding + factor * 4 * 2**-23).all()
    assert exact.grad.abs().max() > 0.1


@pytest.mark.parametrize("both", [True, False])
def test_gradcheck(both):
    # The formula of the definition, and that of the registered operation.
    low, target, high = operands(2, (2, 3), (3, 4), torch.float64, both=both)
    images = [t for t in (low, high) if t is not None]
    assert torch.autograd.gradcheck(lambda a, *b: ops.stream_loss(a, target, *b), images)
    assert torch.autograd.gradcheck(lambda a, b=None: OP(a, target, b, "reference"), images)


@BY_IMPL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("both", [True, False])
def test_opcheck(both, layout, impl, device):
    low, target, high = operands(image=(6, 9), layout=layout, both=both, device=device)
    torch.library.opcheck(OP, (low, target, high, impl))
    low, high = (None if t is None else t.detach() for t in (low, high))
    torch.library.opcheck(BACKWARD_OP, (torch.ones(2, device=device), low, target, high, impl))


@pytest.mark.skipif(_cpp.unavailable() is not None, reason=str(_cpp.unavailable()))
def test_cpp_is_the_same_on_any_number_of_threads_and_in_any_batch():
    low, target, high = operands(3, (37, 21), (40, 21))
    with threads(1):
        loss, gradients = run(low, target, high, torch.ones(3), impl="cpp")
    with threads(3):
        again, same = run(low, target, high, torch.ones(3), impl="cpp")
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    one, alone = run(low[1:2], target[1:2], high[1:2], torch.ones(1), impl="cpp")
    assert torch.equal(one, loss[1:2])
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, gradients, strict=True))


@BY_IMPL
def test_what_is_not_finite(impl, device):
    low, target, high = operands(4, device=device)
    low.data[0, 1, 2, 3], low.data[1, 1, 2, 3], low.data[2, 1, 2, 3] = float("nan"), float("inf"), -float("inf")
    loss, (dlow, dhigh) = run(low, target, high, torch.ones(4, device=device), impl=impl)
    assert loss.isnan().tolist() == [True, False, False, False]
    assert (~dlow.isfinite()).nonzero().tolist() == [[0, 1, 2, 3]]
    assert (~dhigh.isfinite()).nonzero().tolist() == [[0, 1, 2, 3]]


def test_no_second_derivative():
    low, target, high = operands()
    (dlow,) = torch.autograd.grad(OP(low, target, high, "reference").sum(), low, create_graph=True)
    with pytest.raises(RuntimeError, match="stream_loss has no second derivative in its kernels"):
        dlow.sum().backward()


@BY_IMPL
def test_compile(impl, device):
    low, target, high = operands(image=(6, 9), device=device)

    def function(low, high):
        return ops.stream_loss(low, target, high, impl=impl).mean()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(low, high), function(low, high))
    actual, expected = (torch.autograd.grad(f(low, high), (low, high)) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


LOW, TARGET = torch.zeros(2, 3, 4, 6), torch.zeros(2, 4, 6, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1, TARGET), {}, TypeError, "low must be a torch.Tensor, got int"),
        ((LOW.byte(), TARGET), {}, TypeError, "low must be a floating-point tensor, got torch.uint8"),
        ((LOW, TARGET.float()), {}, TypeError, "target must be a uint8 tensor, got torch.float32"),
        ((LOW, None), {}, TypeError, "target must be a uint8 tensor, got NoneType"),
        ((LOW, TARGET[0]), {}, ValueError, "target must be [B, H, W, 3] with H and W at least 1, got shape (4, 6, 3)"),
        ((LOW, TARGET[:, :0]), {}, ValueError, "target must be [B, H, W, 3] with H and W at least 1"),
        ((LOW[:1], TARGET), {}, ValueError, "low must be [2, 3, H', W'] with H' at least the target's 4"),
        ((LOW[:, :, :3], TARGET), {}, ValueError, "low must be [2, 3, H', W']"),
        ((LOW, TARGET, LOW[..., :5]), {}, ValueError, "high must be [2, 3, H', W']"),
        ((LOW, TARGET, LOW.half()), {}, TypeError, "high must have low's dtype torch.float32, got torch.float16"),
        ((LOW.to("meta"), TARGET), {}, ValueError, "target must be on the device of low, meta, got cpu"),
        (
            (LOW, TARGET),
            {"impl": "cuda"},
            ValueError,
            "impl must be one of ('auto', 'triton', 'cpp', 'reference'), got",
        ),
    ],
)
def test_rejects(args, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.stream_loss(*args, **kwargs)


def test_triton_says_why_not():
    triton = next(entry for entry in STREAM_LOSS if entry.name == "triton")
    assert "the tensors are on cpu" in triton.rejects(LOW, TARGET, None)
    huge = torch.zeros(()).expand(1, 3, 2**15, 2**15)
    assert "one image has 3221225472 elements, more than 2147483647" in triton.rejects(huge, TARGET, None)
    with pytest.raises(BackendUnavailable, match=r"stream_loss: impl='triton' cannot run: .+"):
        ops.stream_loss(LOW, TARGET, impl="triton")


def test_interpreter(interpreter):
    assert " passed" in interpreter("stream_loss")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("both", [True, False])
def test_ahead_of_time(compile_launch, capability, both):
    from hflfnerv.triton_kernels import stream_loss as kernels

    def launch():
        low = torch.zeros(1, 3, 640, 1280, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        target, high = torch.zeros(1, 640, 1280, 3, dtype=torch.uint8), low if both else None
        kernels.stream_loss_fwd(low, target, high)
        kernels.stream_loss_bwd(torch.ones(1), low, target, high)

    found = compile_launch(kernels, launch, capability)
    assert len(found) == 2
    for kernel in found:
        assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
        assert kernel.registers <= 64, kernel
