"""The CUDA kernels of pixel_shuffle_gelu: in an emulation of a GPU, and on one."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hflfnerv import _ext, ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import PIXEL_SHUFFLE_GELU, _cuda
from hflfnerv.reference import pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
    requires,
)

CSRC = Path(__file__).parents[2] / "csrc"
MODULE = importlib.import_module("hflfnerv.ops.pixel_shuffle_gelu")
ENTRY = next(entry for entry in PIXEL_SHUFFLE_GELU if entry.name == "cuda")
OP = torch.ops.hflfnerv.pixel_shuffle_gelu
DTYPES = [torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"cuda: {ENTRY.unavailable()}"
)
# B, C, r, H, W: vectors of eight elements, in pairs of channels and not, of two and of one; widths that tiles cut.
SHAPES = [
    (2, 28, 2, 17, 80),
    (2, 33, 2, 16, 160),
    (2, 40, 4, 20, 80),
    (1, 33, 2, 9, 37),
    (2, 7, 3, 11, 41),
    (1, 3, 2, 5, 7),
    (1, 5, 3, 4, 5),
    (2, 2, 5, 3, 1),
    (1, 4, 1, 3, 3),
    (1, 1, 4, 1, 1),
    (1, 2, 32, 2, 3),
    (1, 200, 4, 3, 5),
]
LARGE = [(2, 28, 2, 320, 640), (2, 33, 2, 160, 320), (8, 40, 4, 40, 80)]


def operands(shape, dtype, device="cuda", *, with_bias=True):
    batch, channels, r, height, width = shape
    options = {"dtype": dtype, "device": device}
    x = make_tensor(batch, channels * r * r, height, width, **options, layout="channels_last", scale=2)
    dy = make_tensor(batch, channels, height * r, width * r, **options, layout="channels_last", seed=2)
    return x, make_tensor(channels * r * r, **options, seed=1) if with_bias else None, dy


def run(x, r, bias, dy, approximate="none", dtype=None, impl=None):
    """Result and gradients: of the reference in ``dtype``, or of the public function with ``impl``."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias) if t is not None]
    if impl is None:
        y = reference.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate)
    else:
        y = ops.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate, impl=impl)
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def compare(x, r, bias, dy, approximate="none"):
    with poisoned_empty():
        y, gradients = run(x, r, bias, dy, approximate, impl="cuda")
    expected, expected_gradients = run(x, r, bias, dy, approximate, dtype=torch.float64)
    same, same_gradients = run(x, r, bias, dy, approximate, dtype=x.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_reference(y, expected, same)
    magnitudes = [None, expected_gradients[0].abs().sum(dim=(0, 2, 3))][: len(gradients)]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


# ---- Without a GPU ----


def test_says_why_not(monkeypatch):
    x = make_tensor(1, 8, 2, 4, dtype=torch.float16, layout="channels_last")
    assert "the tensors are on cpu" in ENTRY.rejects(x, 2, None, "none")
    monkeypatch.setattr(_cuda, "rejects_tensor", lambda device, dtype: None)
    assert ENTRY.rejects(x, 2, None, "none") is None
    assert ENTRY.rejects(x[:0], 2, None, "none") is None
    assert ENTRY.rejects(x.contiguous(), 2, None, "none") == "x is not channels-last"
    assert "r = 33 is more than 32" in ENTRY.rejects(
        torch.empty(1, 33 * 33, 2, 2, device="meta").to(memory_format=torch.channels_last), 33, None, "none"
    )
    with pytest.raises(BackendUnavailable, match="impl='cuda' cannot run: x is not channels-last"):
        OP(x.contiguous(), 2, None, "none", "cuda")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        *((shape, None) for shape in SHAPES),
        ((1, 2048, 2, 4, 4), None),
        ((1, 2049, 2, 4, 4), "8196 channels, which with rows of y that are multiples of 16 bytes take 4098 threads"),
        ((1, 256, 2, 1, 1), None),
        ((1, 515, 2, 4, 4), "x has 2060 channels, which with rows of y that are multiples of 16 bytes take 1030"),
        ((1, 1027, 1, 5, 1), "x has 1027 channels, which with rows of y that are multiples of 2 bytes take 1027"),
        ((2, 1, 1, 2**15, 2**15), "x has 2147483648 pixels, more than 1073741824"),
    ],
)
def test_rejects_shapes(shape, reason):
    batch, channels, r, height, width = shape
    actual = _cuda.rejects_shuffle(batch, channels, r, height, width)
    assert actual is None if reason is None else reason in (actual or "")


def test_compile_asks_for_reasons(monkeypatch):
    monkeypatch.setattr(_cuda, "rejects_tensor", lambda device, dtype: None)

    def function(x):
        return x + (1 if MODULE._cuda_rejects(x, 2, None, "none") is None else 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (4, 6):
        x = torch.zeros(2, 8, 3, width)
        assert (compiled(x.contiguous(memory_format=torch.channels_last)) == 1).all()
        assert (compiled(x) == 2).all()


def test_what_the_kernels_are_told(monkeypatch):
    calls = []

    def called(name, result=None):
        return lambda *args: calls.append((name, args)) or result

    module = SimpleNamespace(
        pixel_shuffle_gelu_cuda_fwd=called("fwd"),
        pixel_shuffle_gelu_cuda_sums=called("sums", 24),
        pixel_shuffle_gelu_cuda_bwd=called("bwd"),
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    x, bias, dy = operands((2, 3, 2, 5, 7), torch.bfloat16, "cpu")
    y = OP(x, 2, bias, "tanh", "cuda")
    dx, dbias = torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy, x, 2, bias, "none", "cuda")
    (_, forward), (_, sums), (_, backward) = calls
    head = ([2, 3, 2, 5, 7], None, "bfloat16")
    assert forward == (*head, True, x.data_ptr(), bias.data_ptr(), y.data_ptr(), 77)
    assert sums == (*head, dy.data_ptr(), x.data_ptr(), dx.data_ptr())
    assert backward[:8] == (*head, False, dy.data_ptr(), x.data_ptr(), bias.data_ptr(), dx.data_ptr())
    assert backward[9:] == (dbias.data_ptr(), 77)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))
    assert dbias.dtype == torch.bfloat16
    # Without a bias nothing is summed; what is not aligned is copied; what is empty is not launched.
    calls.clear()
    memory = torch.zeros(x.numel() + 8, dtype=x.dtype)
    beside = memory[1 : 1 + x.numel()].view(2, 5, 7, 12).permute(0, 3, 1, 2)
    dx, dbias = torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy, beside, 2, None, "none", "cuda")
    ((name, told),) = calls
    assert name == "bwd"
    assert told[5] not in (0, beside.data_ptr())
    assert told[5] % 16 == 0
    assert (told[6], told[8:10], dbias.numel()) == (0, (0, 0), 0)
    calls.clear()
    assert OP(x[:0], 2, bias, "none", "cuda").shape == (0, 3, 10, 14)
    assert not torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy[:0], x[:0], 2, bias, "none", "cuda")[1].any()
    assert not calls


@pytest.mark.parametrize("with_bias", [True, False])
def test_fake(with_bias):
    x, bias, dy = (None if t is None else t.to("meta") for t in operands(SHAPES[0], torch.float16, "cpu"))
    bias = bias if with_bias else None
    y = OP(x, 2, bias, "none", "cuda")
    dx, _ = torch.ops.hflfnerv.pixel_shuffle_gelu_backward(dy, x, 2, bias, "none", "cuda")
    assert (y.shape, y.stride(), y.dtype) == (dy.shape, dy.stride(), dy.dtype)
    assert (dx.shape, dx.stride()) == (x.shape, x.stride())


# ---- On a GPU ----


@needs_gpu
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, approximate):
    x, bias, dy = operands(shape, dtype)
    if x.is_contiguous():
        pytest.skip("both layouts are one")
    compare(x, shape[2], bias, dy, approximate)
    compare(x, shape[2], None, dy, approximate)


@needs_gpu
@pytest.mark.parametrize("shape", LARGE)
def test_many_tiles(shape):
    # Rings of shared memory go round; rows of sums are more than warps that add them up.
    x, bias, dy = operands(shape, torch.bfloat16)
    compare(x, shape[2], bias, dy)


@needs_gpu
@pytest.mark.parametrize("shape", [*SHAPES[:4], *LARGE])
def test_deterministic(shape):
    x, bias, dy = operands(shape, torch.float16)
    y, gradients = run(x, shape[2], bias, dy, impl="cuda")
    for _ in range(3):
        again, others = run(x, shape[2], bias, dy, impl="cuda")
        assert torch.equal(y, again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@needs_gpu
def test_noncontiguous():
    x, bias, dy = operands(SHAPES[0], torch.float16)
    memory = torch.zeros(x.numel() + 8, dtype=x.dtype, device="cuda")
    for offset in (1, 2, 4):
        batch, channels, height, width = x.shape
        beside = memory[offset : offset + x.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(x)
        compare(beside, 2, bias, dy)
    compare(x, 2, bias, dy.contiguous())
    compare(x, 2, bias, dy.mean(dim=1, keepdim=True).expand_as(dy))


@needs_gpu
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extremes(approximate):
    limits = [float("inf"), 1e30, 100.0, 9.5, 0.0, -0.0, -9.5, -100.0, -1e30, float("-inf"), float("nan")]
    x = torch.tensor(limits, device="cuda", dtype=torch.bfloat16).view(1, 1, 1, -1).expand(1, 8, 2, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    y, (dx,) = run(x, 1, None, torch.ones_like(x), approximate, impl="cuda")
    assert (y[..., :4] == x[..., :4]).all()
    assert (y[..., 4:9] == 0).all()
    assert (dx[..., :4] == 1).all()
    assert (dx[..., 4:6] == 0.5).all()
    assert (dx[..., 6:10].abs() < 1e-16).all()
    assert y[..., 10].isnan().all()
    assert dx[..., 10].isnan().all()


@needs_gpu
def test_empty_batch():
    x, bias, dy = operands(SHAPES[0], torch.float16)
    y, (dx, dbias) = run(x[:0], 2, bias, dy[:0], impl="cuda")
    assert (y.shape, dx.shape) == (dy[:0].shape, x[:0].shape)
    assert (dbias == 0).all()


@needs_gpu
def test_opcheck():
    x, bias, dy = operands(SHAPES[3], torch.float16)
    torch.library.opcheck(OP.default, (x.requires_grad_(), 2, bias.requires_grad_(), "none", "cuda"))
    backward = torch.ops.hflfnerv.pixel_shuffle_gelu_backward.default
    torch.library.opcheck(backward, (dy, x.detach(), 2, bias.detach(), "none", "cuda"))
    torch.library.opcheck(backward, (dy, x.detach(), 2, None, "none", "cuda"))


@needs_gpu
def test_compile_and_graphs():
    x, bias, dy = operands(SHAPES[1], torch.bfloat16)
    compiled = torch.compile(lambda x, b: ops.pixel_shuffle_gelu(x, 2, b), fullgraph=True)
    assert torch.equal(compiled(x, bias), ops.pixel_shuffle_gelu(x, 2, bias, impl="cuda"))
    arguments = (dy, x, 2, bias, "none", "cuda")
    backward = torch.ops.hflfnerv.pixel_shuffle_gelu_backward
    backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = backward(*arguments)
    for seed in range(3):  # other values in the same place, each right at once
        dy.copy_(make_tensor(*dy.shape, seed=seed))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, backward(*arguments), strict=True))


@needs_gpu
def test_auto_and_names():
    x, bias, _ = operands(SHAPES[0], torch.float16)
    assert PIXEL_SHUFFLE_GELU.select("auto", x, 2, bias, "none").name == "cuda"
    assert PIXEL_SHUFFLE_GELU.select("auto", x.contiguous(), 2, bias, "none").name == "triton"
    for wrong, reason in ((x.float(), "dtype torch.float32 is not one of"), (x.contiguous(), "not channels-last")):
        with pytest.raises(BackendUnavailable, match=f"impl='cuda' cannot run: .*{re.escape(reason)}"):
            ops.pixel_shuffle_gelu(wrong, 2, impl="cuda")
