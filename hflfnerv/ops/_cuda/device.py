"""Why the CUDA kernels cannot run here, or on a tensor, in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch

from ... import _ext
from .._device_checks import device_checks

__all__ = ["DTYPES", "checks", "rejects_float32", "rejects_tensor", "unavailable"]

#: What the kernels call the dtypes of 16 bits.
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def _machine() -> str | None:
    reason = _ext.unavailable_cuda()
    if reason is not None:
        return reason
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


@functools.cache
def _capability(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found != (9, 0):
        return f"compute capability {found[0]}.{found[1]} of cuda:{index} is not 9.0 (Hopper), for which the kernel is"
    module = _ext.load()
    if "90a" not in module.cuda_architectures.split(","):
        return f"the extension was built for {module.cuda_architectures} (HFLFNERV_CUDA_ARCHITECTURES), not for 90a"
    with torch.cuda.device(index):  # the caller's is the current one again afterwards
        reason: str | None = module.cuda_device_unavailable(index)
    return reason


def checks(
    dtypes: Collection[torch.dtype],
) -> tuple[Callable[[], str | None], Callable[[torch.device, torch.dtype], str | None]]:
    """Return ``unavailable()`` and ``rejects_tensor(device, dtype)`` of kernels for these dtypes."""
    return device_checks("the CUDA kernels", dtypes, _machine, _capability)


unavailable, rejects_tensor = checks(DTYPES)
_, rejects_float32 = checks([torch.float32])
