"""highpass: the real-FFT forms against the literal definition, for even and odd sizes."""

from __future__ import annotations

import math
import re

import pytest
import torch

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import HIGHPASS
from hflfnerv.ops.highpass import half_spectrum_weights
from hflfnerv.reference import highpass as reference
from hflfnerv.testing import assert_close_to_reference, implementations, make_tensor, poisoned_empty

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
REMOVED = [0.0, 0.3, 0.5, 0.8, 0.95, 1.0]
BY_IMPL = pytest.mark.parametrize(("impl", "device"), implementations(HIGHPASS))
OP = torch.ops.hflfnerv.highpass


def literal(x, removed, unshift=torch.fft.ifftshift):
    """The paper's filter, step by step: transform, shift, zero, shift back, transform back, real part."""
    height, width = x.shape[-2:]
    rows, columns = int(removed * (height // 2)), int(removed * (width // 2))
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    for row in range(height // 2 - rows, height // 2 + rows):
        for column in range(width // 2 - columns, width // 2 + columns):
            spectrum[..., row, column] = 0
    return torch.fft.ifft2(unshift(spectrum, dim=(-2, -1))).real


@pytest.mark.parametrize("removed", REMOVED)
def test_every_form_is_the_literal_definition(removed):
    for height in SIZES:
        for width in SIZES:
            x = make_tensor(2, height, width, dtype=torch.float64)
            expected = literal(x, removed)
            for impl in ("reference", "fft"):
                error = (ops.highpass(x, removed, impl=impl) - expected).abs().max().item()
                assert error < 1e-14, (impl, height, width, error)


@pytest.mark.parametrize("removed", REMOVED)
def test_weights_are_the_mean_of_the_mask_and_its_mirror(removed):
    for height in SIZES:
        for width in SIZES:
            mask = reference.highpass_mask(height, width, removed).double()
            mirrored = mask.flip(0, 1).roll((1, 1), (0, 1))  # index -k modulo the size
            weights = half_spectrum_weights(height, width, removed, dtype=torch.float64)
            assert torch.equal(weights, ((mask + mirrored) / 2)[:, : width // 2 + 1]), (height, width)


def test_shifting_back_the_wrong_way_differs_for_odd_sizes_only():
    # Shifting back with fftshift, as can be seen in published code, is the same for even sizes and wrong for odd ones.
    for height, width, same in ((8, 12, True), (7, 12, False), (8, 11, False)):
        x = make_tensor(height, width, dtype=torch.float64)
        y = literal(x, 0.5, unshift=torch.fft.fftshift)
        assert torch.allclose(y, ops.highpass(x, 0.5), rtol=0, atol=1e-12) is same


@pytest.mark.parametrize(("height", "width"), [(16, 20), (15, 21)])
def test_waves(height, width):
    # n is 4 or 3 rows, and 5 columns: inside they vanish, outside they stay, on the rim of the lopsided box they are
    # halved.
    n = int(0.5 * (height // 2))
    assert (n, int(0.5 * (width // 2))) == ({16: 4, 15: 3}[height], 5)
    row, column = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    for u, v, kept in (
        (0, 0, 0),
        (1, 2, 0),
        (n - 1, 4, 0),
        (n + 1, 0, 1),
        (0, 6, 1),
        (n + 1, 6, 1),
        (n, 0, 0.5),
        (n, 3, 0.5),
    ):
        wave = torch.cos(2 * math.pi * (u * row / height + v * column / width) + 0.4)
        torch.testing.assert_close(ops.highpass(wave, 0.5), kept * wave, rtol=0, atol=1e-12)


@BY_IMPL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (5, 1), (9, 16), (16, 9), (15, 21), (32, 48)])
def test_forward_and_backward(impl, device, dtype, height, width):
    x = make_tensor(2, 3, height, width, dtype=dtype, device=device, requires_grad=True)
    dy = make_tensor(2, 3, height, width, dtype=dtype, device=device, seed=1)
    with poisoned_empty():
        y = ops.highpass(x, impl=impl)
        (dx,) = torch.autograd.grad(y, x, dy)
    for actual, source in ((y, x), (dx, dy)):
        source = source.detach()
        same = reference.highpass(source.float()).to(dtype)
        # What is rounded is the input: the result may be smaller by any factor.
        assert_close_to_reference(actual, reference.highpass(source.double()), same, magnitude=4 * source.abs())


@BY_IMPL
def test_noncontiguous(impl, device):
    x = make_tensor(2, 3, 9, 10, device=device)
    strided = make_tensor(2, 3, 9, 10, device=device, layout="strided")
    assert torch.equal(ops.highpass(strided, impl=impl), ops.highpass(x, impl=impl))
    frames = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(ops.highpass(frames, impl=impl), ops.highpass(x, impl=impl))


@BY_IMPL
def test_deterministic_and_frame_by_frame(impl, device):
    x = make_tensor(4, 3, 24, 36, device=device)
    y = ops.highpass(x, impl=impl)
    assert torch.equal(y, ops.highpass(x, impl=impl))
    for t in range(len(x)):
        torch.testing.assert_close(y[t], ops.highpass(x[t], impl=impl), rtol=0, atol=1e-6)


@BY_IMPL
def test_empty_batch(impl, device):
    assert ops.highpass(torch.zeros(0, 3, 4, 5, device=device), impl=impl).shape == (0, 3, 4, 5)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 8), (5, 7)])
@pytest.mark.parametrize("removed", [0.5, 1.0])
def test_gradcheck(height, width, removed):
    x = make_tensor(2, height, width, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: ops.highpass(x, removed, impl="fft"),
        lambda x: ops.highpass(x, removed, impl="reference"),
        lambda x: OP(x, removed, "fft"),
    ):
        assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(lambda x: OP(x, removed, "fft"), (x,))


@pytest.mark.parametrize(("height", "width"), [(12, 10), (11, 10), (9, 7)])
@pytest.mark.parametrize("removed", REMOVED)
def test_self_adjoint_always_idempotent_at_the_ends(height, width, removed):
    x = make_tensor(height, width, dtype=torch.float64)
    z = make_tensor(height, width, dtype=torch.float64, seed=1)
    y = ops.highpass(x, removed)
    torch.testing.assert_close((y * z).sum(), (x * ops.highpass(z, removed)).sum())
    everything = removed == 1 and height % 2 == width % 2 == 0
    nothing = 0 in (int(removed * (height // 2)), int(removed * (width // 2)))
    assert torch.allclose(ops.highpass(y, removed), y, rtol=0, atol=1e-12) is (everything or nothing)


def test_opcheck():
    x = make_tensor(2, 6, 7, requires_grad=True)
    torch.library.opcheck(OP.default, (x, 0.8, "fft"))
    torch.library.opcheck(OP.default, (make_tensor(2, 6, 8, layout="strided"), 0.8, "fft"))


@BY_IMPL
def test_compile(impl, device):
    compiled = torch.compile(
        lambda x: ops.highpass(x, impl=impl) + 1, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for height, width in ((9, 16), (10, 15)):
        x = make_tensor(2, 3, height, width, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(x), ops.highpass(x, impl=impl) + 1)
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad((ops.highpass(x, impl=impl) + 1).square().sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_autocast_does_not_change_the_dtype():
    x = make_tensor(1, 8, 8)
    expected = ops.highpass(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.highpass(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([[1.0]],), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((torch.zeros(3, 3, dtype=torch.uint8),), {}, TypeError, "x must be a floating-point tensor, got torch.uint8"),
        ((torch.zeros(3, 3, dtype=torch.complex64),), {}, TypeError, "x must be a floating-point tensor"),
        ((torch.zeros(5),), {}, ValueError, "x must be [..., H, W] with H and W at least 1, got shape (5,)"),
        ((torch.zeros(5, 0),), {}, ValueError, "x must be [..., H, W] with H and W at least 1, got shape (5, 0)"),
        ((torch.zeros(3, 3), -0.1), {}, ValueError, "removed must be in [0, 1], got -0.1"),
        ((torch.zeros(3, 3), 1.5), {}, ValueError, "removed must be in [0, 1], got 1.5"),
        ((torch.zeros(3, 3), math.nan), {}, ValueError, "removed must be in [0, 1], got nan"),
        ((torch.zeros(3, 3), "0.8"), {}, TypeError, "removed must be a number, got '0.8' (str)"),
        ((torch.zeros(3, 3),), {"impl": "dct"}, ValueError, "impl must be one of"),
    ],
)
def test_rejects(args, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.highpass(*args, **kwargs)


def test_triton_says_why_not():
    with pytest.raises(BackendUnavailable, match=r"impl='triton' cannot run: .+"):
        ops.highpass(torch.zeros(3, 3), impl="triton")


def test_interpreter(interpreter):
    assert " passed" in interpreter("highpass")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_ahead_of_time(compile_launch, capability):
    from hflfnerv.triton_kernels import highpass as kernels

    def launch():
        for height, width, n in ((640, 1280, 256), (45, 63, 17)):
            kernels.highpass_fwd(torch.zeros(3, height, width // 2 + 1, dtype=torch.complex64), width, n, n)

    for compiled in compile_launch(kernels, launch, capability):
        assert compiled.stack_bytes == compiled.local_bytes == 0, compiled
        assert compiled.registers <= 40, compiled
