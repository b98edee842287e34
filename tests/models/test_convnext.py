"""The encoder's layers against the operations of PyTorch that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hflfnerv.models.convnext import PatchConv
from hflfnerv.testing import assert_close_to_reference, assert_gradient_close_to_reference, make_tensor


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "height", "width"), [(4, 12, 20), (5, 13, 19), (1, 3, 2), (3, 3, 3)])
def test_patches_are_a_convolution(size, height, width, layout):
    layer = PatchConv(3, 8, size).to(memory_format=layout)
    x = make_tensor(2, 3, height, width).contiguous(memory_format=layout).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    y = layer(x)
    dy = make_tensor(*y.shape, seed=1)
    gradients = torch.autograd.grad(y, leaves, dy)

    def convolve(dtype, change=lambda t: t):
        tensors = [change(t.detach().to(dtype)).requires_grad_() for t in leaves]
        result = F.conv2d(*tensors, stride=size)
        return result, torch.autograd.grad(result, tensors, change(dy.to(dtype)))

    (exact, exact_gradients), (same, same_gradients) = convolve(torch.float64), convolve(torch.float32)
    magnitude, magnitudes = convolve(torch.float64, torch.abs)
    assert_close_to_reference(y, exact, same, magnitude=magnitude)
    for four in zip(gradients, exact_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(*four[:3], magnitude=four[3])
