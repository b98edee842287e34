"""Devices that are not there, that fail, or that have too little memory."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hflfnerv import _device
from hflfnerv._device import device_failure, exact_convolutions, first_line, resolve_device, training_precision
from hflfnerv.errors import BackendUnavailable

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\nMore lines."
)


def without_cuda(monkeypatch, *, version="13.0", error=None):
    def init():
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        (None, None, "this build of torch has no CUDA; use --device cpu"),
        (
            "13.0",
            RuntimeError(OLD_DRIVER),
            "too old (found version 11040). Please update your GPU driver; use",
        ),
        ("13.0", RuntimeError("Found no NVIDIA driver on your system."), "Found no NVIDIA driver on your system; use"),
        ("13.0", None, "no CUDA device was found; use --device cpu"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, version, error, message):
    without_cuda(monkeypatch, version=version, error=error)
    with pytest.raises(BackendUnavailable) as caught:
        resolve_device("cuda")
    assert message in str(caught.value)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it.\nmore"),
            "the GPU has not enough memory",
        ),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), "the GPU failed"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the GPU failed"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 9 bytes."
            ),
            "not enough memory",
        ),
    ],
)
@pytest.mark.parametrize("decoding", [False, True])
def test_a_failure_is_one_line(error, message, decoding):
    text = device_failure(error, decoding=decoding)
    assert text.startswith(message)
    assert "\n" not in text
    assert "more" not in text
    # A coded video has the size it has, and decodes one frame at a time.
    advice = ("--batch-size", "--resize", "--frames", "checkpoint")
    assert any(word in text for word in advice) != decoding


def test_the_cpus_own_message():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device_failure(caught.value).startswith("not enough memory")


def test_other_errors_are_not_the_devices():
    assert device_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert device_failure(ValueError("CUDA error")) is None


def test_first_line():
    assert first_line(RuntimeError("one.\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(("flags", "expected"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512f", "fp32")])
def test_training_precision_of_a_cpu(monkeypatch, flags, expected):
    _device.cpu_flags.cache_clear()
    monkeypatch.setattr(_device.Path, "read_text", lambda path: f"flags : {flags}\n")
    assert training_precision("auto", torch.device("cpu")) == expected
    monkeypatch.undo()
    _device.cpu_flags.cache_clear()
    assert training_precision("fp16", torch.device("cpu")) == "fp16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_training_precision_of_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert training_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_exact_convolutions(before):
    conv = torch.backends.cudnn.conv
    default = conv.fp32_precision
    try:
        conv.fp32_precision = before
        with exact_convolutions():
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == before
    finally:
        conv.fp32_precision = default


def test_exact_convolutions_that_overlap():
    conv = torch.backends.cudnn.conv
    default = conv.fp32_precision
    try:
        conv.fp32_precision = "tf32"
        # Not one in the other: as two threads may be.
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        first.enter_context(exact_convolutions())
        second.enter_context(exact_convolutions())
        first.close()
        assert conv.fp32_precision == "ieee"
        second.close()
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = default
