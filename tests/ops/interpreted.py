"""The Triton kernels through their registered operations, on the CPU under Triton's interpreter.

Run by the ``interpreter`` fixture (TRITON_INTERPRET=1), not collected by itself. float32 and float16 only: the
interpreter truncates where it should round to bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from hflfnerv import ops
from hflfnerv.reference import highpass as highpass_reference
from hflfnerv.reference import pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    make_tensor,
    poisoned_empty,
)

torch.set_num_threads(1)

# B, C, r, H, W: sizes of one, odd sizes, channels that fill no tile, r that is no power of two.
SHAPES = [(2, 3, 2, 5, 7), (1, 9, 2, 3, 5), (1, 5, 3, 4, 5), (2, 2, 5, 3, 1), (1, 4, 1, 3, 3), (1, 1, 4, 1, 70)]
SHAPES += [(1, 1, 2, 2, 1100)]  # more than one tile a row in every layout


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "with_bias"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_pixel_shuffle_gelu(shape, with_bias, dtype, layout, approximate):
    batch, channels, r, height, width = shape
    x = make_tensor(batch, channels * r * r, height, width, dtype=dtype, layout=layout, scale=2, requires_grad=True)
    dy = make_tensor(batch, channels, height * r, width * r, dtype=dtype, seed=1)
    bias = make_tensor(channels * r * r, dtype=dtype, seed=2, requires_grad=True) if with_bias else None
    inputs = [x] if bias is None else [x, bias]

    with poisoned_empty():
        y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, r, bias, approximate, "triton")
        gradients = torch.autograd.grad(y, inputs, dy)
    assert y.stride() == torch.empty_like(y, memory_format=ops_layout(x)).stride()
    assert gradients[0].stride() == torch.empty_like(x, memory_format=ops_layout(x)).stride()

    def run(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = reference.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate)
        return y, torch.autograd.grad(y, leaves, dy.to(dtype))

    (expected, expected_gradients), (same, same_gradients) = run(torch.float64), run(dtype)
    assert_close_to_reference(y, expected, same)
    # The gradient of the bias is a sum over that of x.
    magnitudes = [None, expected_gradients[0].abs().sum(dim=(0, 2, 3))][: len(gradients)]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


def ops_layout(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_pixel_shuffle_gelu_extremes(approximate):
    # The tails of GELU and of its derivative, where intermediate powers overflow, and a NaN that has to stay one.
    values = [-1e30, -60.0, -14.5, -8.9, 0.0, 8.9, 14.5, 60.0, 1e30, float("nan")]
    x = torch.tensor(values).reshape(1, 1, 1, -1).requires_grad_()
    y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, 1, None, approximate, "triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 8.9, 14.5, 60.0, 1e30, float("nan")]).reshape(x.shape)
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, float("nan")]).reshape(x.shape)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-15, equal_nan=True)
    torch.testing.assert_close(dx, slopes, rtol=1e-7, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixel_shuffle_gelu_empty(layout):
    x = torch.empty(0, 8, 3, 4).contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    x, bias = x.requires_grad_(), torch.ones(8, requires_grad=True)
    y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, 2, bias, "none", "triton")
    y.sum().backward()
    assert y.shape == (0, 2, 6, 8)
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros(8))


@pytest.mark.parametrize("removed", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("height", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [1, 2, 7, 10, 1400])
def test_highpass(height, width, removed):
    x = make_tensor(2, height, width, requires_grad=True)
    dy = make_tensor(2, height, width, seed=1)
    with poisoned_empty():
        y = torch.ops.hflfnerv.highpass(x, removed, "triton")
        (dx,) = torch.autograd.grad(y, x, dy)
    for actual, source in ((y, x), (dx, dy)):
        expected, same = (
            highpass_reference.highpass(source.detach().to(d), removed) for d in (torch.float64, torch.float32)
        )
        # Results that cancel to nothing have no size of their own: what is rounded is the input.
        unit = torch.finfo(torch.float32).eps / 2
        assert (actual - expected).abs().max() <= 2 * (same - expected).abs().max() + 4 * unit * source.abs().max()


def test_highpass_keeps_half_precision():
    x = make_tensor(3, 6, 9, dtype=torch.float16)
    y = torch.ops.hflfnerv.highpass(x, 0.8, "triton")
    assert_close_to_reference(y, highpass_reference.highpass(x.double()), ops.highpass(x, impl="reference"))
