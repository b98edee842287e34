"""Devices and precisions by name."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import BackendUnavailable

__all__ = [
    "autocast_dtype",
    "cpu_flags",
    "device_failure",
    "exact_convolutions",
    "first_line",
    "not_enough_memory",
    "resolve_device",
    "training_precision",
]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device that ``name`` means; ``"auto"`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ValueError: the name is not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        BackendUnavailable: a CUDA device was asked for and is not there; says why.
    """
    text = str(name)
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendUnavailable(f"device {text!r} cannot be used: {_why_no_cuda()}; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendUnavailable(f"device {text!r} cannot be used: there are {torch.cuda.device_count()}")
    return device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)  # no driver, or one too old
    return "no CUDA device was found"


def device_failure(error: BaseException, *, decoding: bool = False) -> str | None:
    """Return in one line what failed where the device did, and what can be done; None for any other error."""
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "use --device cpu" if decoding else "fewer frames a step (--batch-size), smaller ones, --device cpu"
        return f"the GPU has not enough memory ({text}): {remedy}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return not_enough_memory(text, decoding=decoding)
    if isinstance(error, RuntimeError) and ("CUDA error" in text or "CUDA driver" in text or "cuDNN" in text):
        remedy = "" if decoding else "the same command goes on from the last checkpoint, or "
        return f"the GPU failed ({text}): {remedy}use --device cpu"
    return None


def not_enough_memory(what: str, *, decoding: bool) -> str:
    """Return in one line that memory is short, and what can be done: of a coded video the sizes are given."""
    if decoding:
        return f"not enough memory ({what}): the network of this file needs it for every frame, use a larger machine"
    remedy = "fewer frames a step (--batch-size), fewer in all (--frames), smaller ones (--resize)"
    return f"not enough memory ({what}): {remedy}"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the compute type of a precision name, None for float32."""
    if precision not in _DTYPES:
        raise ValueError(f"precision must be one of auto, {', '.join(_DTYPES)}, got {precision!r}")
    return _DTYPES[precision]


def training_precision(name: str, device: torch.device) -> str:
    """Return the precision that ``name`` means for training; ``"auto"`` is bf16 where the device multiplies in it.

    That is a CUDA device from compute capability 8.0 on, or a CPU with AMX or the AVX-512 instructions for bf16.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        multiplies = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        multiplies = not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
    return "bf16" if multiplies else "fp32"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return what Linux lists of the processor's instructions; nothing elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


class _ExactConvolutions:
    """Who is in :func:`exact_convolutions`: PyTorch has one setting for all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entered = 0
        self.before = ""


_EXACT = _ExactConvolutions()


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Let cuDNN convolve float32 in float32 meanwhile, in all threads; PyTorch's default is TF32, of 10 bits.

    The first to enter changes the setting, and the last to leave restores it.
    """
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _EXACT.lock:
        if _EXACT.entered == 0:
            _EXACT.before, conv.fp32_precision = conv.fp32_precision, "ieee"
        _EXACT.entered += 1
    try:
        yield
    finally:
        with _EXACT.lock:
            _EXACT.entered -= 1
            if _EXACT.entered == 0:
                conv.fp32_precision = _EXACT.before


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: those of CUDA and Triton go on for pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":. ")
