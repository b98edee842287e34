"""conv2d's CUDA kernels: in an emulation, and what they are told. Those of a GPU are in test_conv2d_triton.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hflfnerv import _ext
from hflfnerv.ops import CONV2D, _cuda

CSRC = Path(__file__).parents[2] / "csrc"
ENTRY = next(entry for entry in CONV2D if entry.name == "cuda")


@pytest.fixture
def calls(monkeypatch):
    """What the extension is told, by function."""
    told = {}
    module = SimpleNamespace(
        conv2d_cuda_fwd=lambda *args: told.update(fwd=args),
        conv2d_cuda_bwd=lambda *args: told.update(bwd=args),
        conv2d_cuda_partial_floats=lambda sizes, device: 5,
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return told


def test_what_the_forward_kernel_is_told(calls):
    memory = torch.zeros(2, 6, 7, 8).half()
    x, weight, bias = memory[..., :5].permute(0, 3, 1, 2), torch.zeros(3, 5, 3, 3).half(), torch.zeros(3).half()
    y = torch.ops.hflfnerv.conv2d(x, weight, bias, "cuda")
    # x as it is, its pixels eight elements apart.
    sizes, of_weight = [2, 5, 6, 7, 3, 8], (weight.data_ptr(), [45, 9, 3, 1])
    expected = (sizes, None, "float16", memory.data_ptr(), *of_weight, bias.data_ptr(), y.data_ptr(), 77)
    assert calls["fwd"] == expected
    assert y.shape == (2, 3, 6, 7)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.ops.hflfnerv.conv2d(x, weight, None, "cuda")
    assert calls["fwd"][6] == 0


@pytest.mark.parametrize("wanted", [[True, True, True], [True, False, False], [False, True, False]], ids=str)
def test_what_the_backward_kernel_is_told(calls, wanted):
    memory = torch.zeros(2, 6, 7, 8).half()
    x, weight = memory[..., :5].permute(0, 3, 1, 2), torch.zeros(2, 5, 3, 3).half()
    weight = weight.contiguous(memory_format=torch.channels_last)
    dy = torch.zeros(2, 1, 6, 7).half().expand(-1, 2, -1, -1)
    gradients = torch.ops.hflfnerv.conv2d_backward(dy, x, weight, wanted, "cuda")
    sizes, strides = [2, 5, 6, 7, 2, 8], [45, 1, 15, 5]
    told = calls["bwd"]
    assert told[:6] == (sizes, None, "float16", memory.data_ptr(), weight.data_ptr(), strides)
    # dy as it is too, though its outputs lie in the same memory.
    assert told[6:8] == (dy.data_ptr(), [42, 0, 7, 1])
    dx, dweight, dbias = (t.data_ptr() if want else 0 for t, want in zip(gradients, wanted, strict=True))
    assert told[8:10] == (dx, 8 if wanted[0] else 0)
    assert told[10:13] == (dweight, strides if wanted[1] else [0] * 4, dbias)
    assert (told[13] != 0) == any(wanted[1:])
    assert told[14] == 77
    shapes = ((2, 5, 6, 7), (2, 5, 3, 3), (2,))
    assert [t.shape for t in gradients] == [s if want else (0,) for s, want in zip(shapes, wanted, strict=True)]
    if wanted[0]:
        assert gradients[0].stride() == x.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_has_the_layout_of_x(calls, layout):
    x, weight = torch.zeros(2, 5, 6, 7).half().contiguous(memory_format=layout), torch.zeros(3, 5, 3, 3).half()
    dx, _, _ = torch.ops.hflfnerv.conv2d_backward(torch.zeros(2, 3, 6, 7).half(), x, weight, [True] * 3, "cuda")
    assert dx.stride() == x.stride()
    assert calls["bwd"][9] == 5


def test_what_it_rejects(monkeypatch):
    x, weight = torch.zeros(1, 4, 5, 6).half(), torch.zeros(3, 4, 3, 3).half()
    assert "the CUDA kernels run on CUDA devices" in ENTRY.rejects(x, weight, None)
    monkeypatch.setattr(_cuda, "rejects_tensor", lambda device, dtype: None)
    assert ENTRY.rejects(x, weight, None) is None
    assert "at most 64 input channels" in ENTRY.rejects(torch.zeros(1, 65, 5, 6), torch.zeros(3, 65, 3, 3), None)
    assert "at most three output channels" in ENTRY.rejects(x, torch.zeros(4, 4, 3, 3), None)
    assert "is empty" in ENTRY.rejects(x[:0], weight, None)
    large = torch.zeros(1, 4, 1, 1, device="meta").expand(2**16, 4, 2**15, 1)
    assert "too many elements" in ENTRY.rejects(large, weight, None)
