"""Why the Triton kernels cannot run here, or on a tensor, in words."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil

import torch

__all__ = ["DTYPES", "rejects_tensor", "unavailable"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_VERSION = (3, 5)
_MIN_CAPABILITY = (8, 0)


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


# torch.compile takes the answers of these two as constants instead of tracing into imports and driver calls.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable() -> str | None:
    """Return why this machine cannot run Triton kernels, or None."""
    return _machine()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rejects_device(index: int) -> str | None:
    return _capability(index)


def rejects_tensor(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot take a tensor of ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}, and Triton kernels run on CUDA devices"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
    reason: str | None = _rejects_device(device.index or 0)
    return reason
