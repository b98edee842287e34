"""The encoder's layers against the operations of PyTorch that they stand for."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from hflfnerv.models import convnext
from hflfnerv.models.convnext import ChannelNorm, ConvNeXtEncoder, PatchConv, use_pytorch
from hflfnerv.ops import _inverted_bottleneck
from hflfnerv.testing import assert_close_to_reference, assert_gradient_close_to_reference, make_tensor, requires


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


def encoder():
    torch.manual_seed(0)
    model = ConvNeXtEncoder((4, 3, 2), channels=16, embedding_channels=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains, biases and scales that show where they are left out.
            if parameter.dim() == 1:
                parameter.copy_(make_tensor(*parameter.shape, seed=len(name)))
    return model


def by_formula(model, x):
    for downsample, (block,) in zip(model.downsample_layers, model.stages, strict=True):
        for layer in downsample:
            if isinstance(layer, ChannelNorm):
                x = F.layer_norm(x.permute(0, 2, 3, 1), layer.weight.shape, layer.weight, layer.bias, 1e-6)
                x = x.permute(0, 3, 1, 2)
            else:
                x = layer(x)
        y = block.norm(block.dwconv(x).permute(0, 2, 3, 1))
        y = block.gamma * block.pwconv2(block.act(block.pwconv1(y)))
        x = x + y.permute(0, 3, 1, 2)
    return x


def results_of(function, model, x, autocast):
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = function(x)
    dy = make_tensor(*y.shape, dtype=y.dtype, device=x.device.type, seed=1)
    return [y.detach(), *torch.autograd.grad(y, list(model.parameters()), dy)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_encoder_on_the_cpu_is_the_formula(layout, autocast):
    model, x = encoder(), make_tensor(2, 3, 48, 72, layout=layout)
    plain = copy.deepcopy(model)
    use_pytorch(plain)
    for (block,) in model.stages:
        block.impl = "reference"  # which "auto" is but for bfloat16 with AMX
    for of in (model, plain):
        expected = results_of(functools.partial(by_formula, of), of, x, autocast)
        for actual, true in zip(results_of(of, of, x, autocast), expected, strict=True):
            assert actual.dtype == true.dtype
            assert torch.equal(actual, true)


def test_encoder_in_bfloat16_is_near_the_formula():
    """With AMX as well, whose kernel rounds less often than PyTorch's operations."""
    model, x = encoder(), make_tensor(2, 3, 48, 72, layout="channels_last")
    exact = copy.deepcopy(model).double()
    expected = results_of(functools.partial(by_formula, exact), exact, x.double(), False)
    same = results_of(functools.partial(by_formula, model), model, x, True)
    for actual, true, rounded in zip(results_of(model, model, x, True), expected, same, strict=True):
        assert actual.dtype == rounded.dtype
        assert (actual - true).norm() <= 2 * (rounded - true).norm() + 2**-8 * true.norm()


def test_biases_apart_change_nothing(monkeypatch):
    model, x = encoder(), make_tensor(2, 3, 48, 72)
    exact = copy.deepcopy(model).double()
    expected = results_of(exact, exact, x.double(), False)
    same = results_of(model, model, x, False)
    taken = []

    def record(*tensors, **options):
        taken.append(tensors[3])
        return scale_residual(*tensors, **options)

    scale_residual = convnext.scale_residual
    monkeypatch.setattr(convnext, "scale_residual", record)
    monkeypatch.setattr(convnext, "_biases_apart", lambda x: True)
    results = results_of(model, model, x, False)
    assert [bias is block.pwconv2.bias for bias, (block,) in zip(taken, model.stages, strict=True)] == [True] * 3
    # Rounding alone: a bias that is left out, or added twice, or whose gradient is, changes all of it.
    for actual, true, rounded in zip(results, expected, same, strict=True):
        assert (actual - true).norm() <= 4 * (rounded - true).norm() + 1e-6 * true.norm()
    use_pytorch(model)
    plain = results_of(model, model, x, False)
    assert len(taken) == 3
    for actual, true in zip(plain, expected, strict=True):
        assert (actual - true).norm() <= 1e-5 * true.norm()


def test_gradients_of_branches_are_added():
    x = make_tensor(2, 3, 4, 5, layout="channels_last", requires_grad=True)
    cast, same = convnext._Branches.apply(x, torch.bfloat16)
    assert (cast.dtype, same.dtype) == (torch.bfloat16, torch.float32)
    of_cast, of_x = make_tensor(*x.shape, dtype=torch.bfloat16, seed=1), make_tensor(*x.shape, seed=2)
    (dx,) = torch.autograd.grad([cast, same], x, [of_cast, of_x])
    assert torch.equal(dx, of_x + of_cast.float())


def test_norms_that_a_product_takes_have_its_dtype(monkeypatch):
    made = []

    def record(*tensors, out_dtype, **options):
        made.append(out_dtype)
        return channel_norm(*tensors, out_dtype=out_dtype, **options)

    channel_norm = convnext.channel_norm
    for module in (convnext, _inverted_bottleneck):
        monkeypatch.setattr(module, "channel_norm", record)
    model = encoder()
    for (block,) in model.stages:
        block.impl = "reference"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(make_tensor(1, 3, 24, 24))
    # Behind the first patches follows what blocks add to.
    assert made == [None, torch.bfloat16] + 2 * [torch.bfloat16, torch.bfloat16]


def test_use_pytorch():
    model = encoder()
    use_pytorch(model)
    assert model.downsample_layers[0][0].forward.args == (model.downsample_layers[0][0],)
    assert {m.impl for m in model.modules() if hasattr(m, "impl")} == {"reference"}
    assert ChannelNorm.impl == "auto"


@pytest.mark.skipif(not torch.cuda.is_available() and not requires("cuda"), reason="PyTorch sees no CUDA device")
def test_encoder_on_a_gpu():
    model, x = encoder().cuda(), make_tensor(2, 3, 96, 144, device="cuda", layout="channels_last")
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    use_pytorch(plain)
    use_pytorch(exact)
    results, same = results_of(model, model, x, True), results_of(plain, plain, x, True)
    expected = results_of(exact, exact, x.double(), False)
    assert [t.dtype for t in results] == [t.dtype for t in same]

    def distance(tensors):
        """Return the distance to the truth, of all tensors in units of their own size."""
        parts = [(a - e).norm() / e.norm() for a, e in zip(tensors, expected, strict=True)]
        return float(torch.stack(parts).square().mean().sqrt())

    assert distance(results) <= 2 * distance(same) + torch.finfo(torch.bfloat16).eps / 2
