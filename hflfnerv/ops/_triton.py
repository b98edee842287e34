"""Why the Triton kernels cannot run here, or on a tensor, in words."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil

import torch

from ._device_checks import device_checks

__all__ = ["rejects_rows", "rejects_tensor", "unavailable"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_VERSION = (3, 5)
_MIN_CAPABILITY = (8, 0)
_MAX_CHANNELS = 1024
_MAX_ROWS = 2**31 - 4096


@functools.cache
def _machine() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'hflfnerv[triton]'"
    import triton

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < _MIN_VERSION:
        return f"Triton {triton.__version__} is older than {_MIN_VERSION[0]}.{_MIN_VERSION[1]}"
    if importlib.util.find_spec("hflfnerv.triton_kernels") is None:
        return "hflfnerv.triton_kernels is not on the path: install the package (pip install -e . in its source tree)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if not os.environ.get("CC") and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton compiles with a C compiler, and there is neither gcc nor clang: install one, or set CC"
    return None


@functools.cache
def _capability(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, _MIN_CAPABILITY))
        return f"compute capability {found} of cuda:{index} is below {needed}"
    return None


unavailable, rejects_tensor = device_checks("Triton kernels", _DTYPES, _machine, _capability)


def rejects_rows(x: torch.Tensor, *dtypes: torch.dtype) -> str | None:
    """Return why kernels that keep a row ``[C]`` of x in registers cannot run, with x and others of these dtypes."""
    for dtype in (x.dtype, *dtypes):
        reason = rejects_tensor(x.device, dtype)
        if reason is not None:
            return reason
    if x.numel() == 0:
        return f"x of shape {tuple(x.shape)} is empty"
    if x.shape[-1] > _MAX_CHANNELS:
        return f"x of shape {tuple(x.shape)} has more than {_MAX_CHANNELS} channels"
    if x.numel() // x.shape[-1] > _MAX_ROWS:
        return f"x of shape {tuple(x.shape)} has too many rows for offsets of 32 bits"
    return None
