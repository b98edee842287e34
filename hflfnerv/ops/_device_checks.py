"""Why a backend of kernels for CUDA devices cannot run here, or on a tensor, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

__all__ = ["device_checks"]


def device_checks(
    kernels: str,
    dtypes: Collection[torch.dtype],
    machine: Callable[[], str | None],
    device_with_index: Callable[[int], str | None],
) -> tuple[Callable[[], str | None], Callable[[torch.device, torch.dtype], str | None]]:
    """Return a backend's ``unavailable()`` and ``rejects_tensor(device, dtype)``; each returns a reason, or None.

    Args:
        kernels: what they are called in a reason.
        dtypes: what they take.
        machine: why this machine cannot run them.
        device_with_index: why that CUDA device cannot run them. It is asked for a device that is there.
    """
    # torch.compile takes the answers of these two as constants instead of tracing into imports and driver calls.

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def unavailable() -> str | None:
        return machine()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def rejects_device(index: int) -> str | None:
        return device_with_index(index)

    def rejects_tensor(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"the tensors are on {device}, and {kernels} run on CUDA devices"
        if dtype not in dtypes:
            return f"dtype {dtype} is not one of {', '.join(map(str, dtypes))}"
        reason: str | None = rejects_device(device.index or 0)
        return reason

    return unavailable, rejects_tensor
