"""Devices and precisions by name."""

from __future__ import annotations

import torch

from .errors import BackendUnavailable

__all__ = ["autocast_dtype", "resolve_device"]

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
            reason = "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device was found"
            raise BackendUnavailable(f"device {text!r} cannot be used: {reason}; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendUnavailable(f"device {text!r} cannot be used: there are {torch.cuda.device_count()}")
    return device


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the compute type of a precision name, None for float32."""
    if precision not in _DTYPES:
        raise ValueError(f"precision must be one of {', '.join(_DTYPES)}, got {precision!r}")
    return _DTYPES[precision]
