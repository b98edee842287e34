"""The modules: names, initialisation, and the PyTorch lines their docstrings give."""

from __future__ import annotations

import copy
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hflfnerv.errors import BackendUnavailable
from hflfnerv.nn import HighPass, PixelShuffleGELU, UpsampleBlock
from hflfnerv.ops import highpass
from hflfnerv.testing import make_tensor


def plain(in_channels, out_channels, r, kernel_size, approximate="none", bias=True):
    padding = (kernel_size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels * r**2, kernel_size, padding=padding, bias=bias),
        nn.PixelShuffle(r),
        nn.GELU(approximate),
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("r", "kernel_size"), [(2, 1), (3, 3), (2, 5)])
def test_upsample_block_is_the_plain_lines(r, kernel_size, bias, approximate):
    torch.manual_seed(3)
    block = UpsampleBlock(3, 5, r, kernel_size, bias=bias, approximate=approximate)
    torch.manual_seed(3)
    expected = plain(3, 5, r, kernel_size, approximate, bias)
    assert list(block.state_dict()) == (["conv.weight", "conv.bias"] if bias else ["conv.weight"])
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), expected.parameters(), strict=True))
    x = make_tensor(2, 3, 4, 6)
    assert torch.equal(block(x), expected(x))
    block(x).square().sum().backward()
    expected(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(block.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_upsample_block_compiles_and_copies(autocast):
    block = UpsampleBlock(3, 4, 2, 3)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = make_tensor(1, 3, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, expected = compiled(x), block(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(y, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_upsample_block_through_inductor():
    torch.manual_seed(0)
    block = UpsampleBlock(2, 2, 2, 3)
    x = make_tensor(1, 2, 4, 4)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


def called(block):
    calls = []
    block.conv.register_forward_hook(lambda *_: calls.append("forward"))
    block.conv.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.conv.register_full_backward_hook(lambda *_: calls.append("backward"))
    return calls


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_upsample_block_calls_the_hooks_of_its_convolution(impl):
    block, x = UpsampleBlock(3, 4, 2, 3, impl=impl), make_tensor(1, 3, 5, 6, requires_grad=True)
    expected = block(x)
    calls = called(block)
    y = block(x)
    y.sum().backward()
    assert calls == ["before", "forward", "backward"]
    assert torch.equal(y, expected)


def double(conv):
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)


class Adapted(nn.Module):
    """What stands in for a convolution that it holds, and hands on its weight."""

    def __init__(self, conv):
        super().__init__()
        self.inner, self.weight, self.bias, self.kernel_size = conv, conv.weight, conv.bias, conv.kernel_size

    def forward(self, x):
        return 2 * self.inner(x)


def adapt(block):
    block.conv = Adapted(block.conv)


ON_CONV = {
    "pruning": lambda block: prune.l1_unstructured(block.conv, "weight", 0.5),
    "spectral norm": lambda block: torch.nn.utils.spectral_norm(block.conv),
    "parametrized": lambda block: torch.nn.utils.parametrizations.weight_norm(block.conv),
    "own forward": lambda block: double(block.conv),
    "another class": adapt,
}


@pytest.mark.parametrize("case", ON_CONV)
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_upsample_block_trains_with_what_is_put_on_its_convolution(case):
    def build():
        torch.manual_seed(3)
        block = UpsampleBlock(3, 4, 2, 3)
        ON_CONV[case](block)
        return block

    block, plain, x = build(), nn.Sequential(build().conv, nn.PixelShuffle(2), nn.GELU()), make_tensor(2, 3, 5, 6)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (block, plain)]
    for _ in range(3):
        outputs = [model(x) for model in (block, plain)]
        assert torch.equal(*outputs)
        for y, optimiser in zip(outputs, optimisers, strict=True):
            optimiser.zero_grad()
            y.square().mean().backward()
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), plain.parameters(), strict=True))


def test_upsample_block_does_not_skip_hooks_for_a_named_implementation():
    block = UpsampleBlock(3, 4, 2, 3, impl="conv2d+cpp")
    called(block)
    with pytest.raises(BackendUnavailable, match=r"impl='conv2d\+cpp' cannot run: conv has a forward pre-hook"):
        block(make_tensor(1, 3, 5, 6))


def test_upsample_block_compiles_with_a_hook():
    block, x = UpsampleBlock(3, 4, 2, 3), make_tensor(1, 3, 5, 6)
    block.conv.register_forward_hook(lambda _module, _arguments, y: 2 * y)
    torch.compiler.reset()  # hooks are nothing that torch.compile compiles again for
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.parametrize(
    ("r", "kernel_size", "message"),
    [
        (2, 4, "kernel_size must be odd and at least 1, got 4"),
        (2, 0, "kernel_size must be odd and at least 1, got 0"),
        (0, 3, "upscale_factor must be at least 1, got 0"),
    ],
)
def test_upsample_block_rejects(r, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        UpsampleBlock(3, 4, r, kernel_size)


def test_upsample_block_takes_integers_of_numpy_alone():
    assert UpsampleBlock(3, 4, np.int64(2), np.int64(3))(torch.zeros(1, 3, 5, 6)).shape == (1, 4, 10, 12)
    with pytest.raises(TypeError, match="float"):
        UpsampleBlock(3, 4, 2, 3.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("side", [4, 96])  # small ones are PyTorch's, on a CPU without matrix units
def test_upsample_block_is_traced(side):
    block, x = UpsampleBlock(4, 2, 2, 3).eval(), make_tensor(1, 4, side, side)
    with torch.no_grad():
        traced = torch.jit.trace(block, x, check_trace=False)
        torch.testing.assert_close(traced(x), block(x), rtol=0, atol=0)


def test_modules_without_parameters():
    x = make_tensor(2, 12, 3, 5)
    assert torch.equal(PixelShuffleGELU(2)(x), nn.Sequential(nn.PixelShuffle(2), nn.GELU())(x))
    assert torch.equal(
        PixelShuffleGELU(2, approximate="tanh")(x), nn.Sequential(nn.PixelShuffle(2), nn.GELU("tanh"))(x)
    )
    assert torch.equal(HighPass(0.5)(x), highpass(x, 0.5))
    assert not PixelShuffleGELU(2).state_dict()
    assert not HighPass().state_dict()


def test_repr_shows_the_settings():
    assert "upscale_factor=2, approximate='tanh', impl='auto'" in repr(UpsampleBlock(3, 4, 2, 3, approximate="tanh"))
    assert repr(PixelShuffleGELU(2)) == "PixelShuffleGELU(2, approximate='none', impl='auto')"
    assert repr(HighPass()) == "HighPass(removed=0.8, impl='auto')"
