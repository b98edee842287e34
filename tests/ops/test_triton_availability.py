"""Why the Triton kernels cannot run on a machine, in words."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from hflfnerv.ops import _triton
from hflfnerv.ops._device_checks import device_checks


@pytest.fixture
def machine(monkeypatch):
    """A machine that has everything, from which the tests take one thing each."""
    triton = types.ModuleType("triton")
    triton.__version__ = "3.9.0"
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    return triton


def test_everything_is_there(machine):
    assert _triton._machine.__wrapped__() is None


def test_no_triton(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert "Triton is not installed: pip install" in _triton._machine.__wrapped__()


def test_old_triton(machine):
    machine.__version__ = "3.1.0"
    assert "Triton 3.1.0 is older than" in _triton._machine.__wrapped__()


def test_no_device(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in _triton._machine.__wrapped__()


def test_no_compiler(machine, monkeypatch):
    monkeypatch.setattr(_triton.shutil, "which", lambda name: None)
    assert "there is neither gcc nor clang" in _triton._machine.__wrapped__()
    monkeypatch.setenv("CC", "/opt/cc")
    assert _triton._machine.__wrapped__() is None


def test_the_compiler_takes_the_answers_as_constants(monkeypatch):
    asked = []

    def machine():
        return asked.append("machine")

    def device(index):
        torch.cuda.get_device_properties(index)  # what it does is not traced
        return asked.append(index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: print(index))
    unavailable, rejects_tensor = device_checks("the kernels", (torch.float16,), machine, device)

    def choose(x):
        refused = unavailable() or rejects_tensor(torch.device("cuda", 3), torch.float16)
        return x - 1 if refused else x + 1

    torch.compiler.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == compiled(torch.zeros(())) == 1
    assert asked == ["machine", 3]
    assert rejects_tensor(torch.device("cpu"), torch.float16) == (
        "the tensors are on cpu, and the kernels run on CUDA devices"
    )
    assert rejects_tensor(torch.device("cuda"), torch.float32) == "dtype torch.float32 is not one of torch.float16"
