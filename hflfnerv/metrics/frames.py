"""The one way in which every metric takes its frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Frames", "per_frame", "unit_planes"]

#: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1].
Frames: TypeAlias = "Tensor | NDArray[np.uint8] | NDArray[np.floating]"


def per_frame(a: Frames, b: Frames, metric: Callable[[Tensor, Tensor], Tensor], reduction: str) -> Tensor:
    """Apply a metric of one pair of frames to each pair.

    Args:
        a: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1]; array or tensor.
        b: frames of the same kind, shape and device.
        metric: takes two frames as they were given (``[H, W, 3]`` uint8 or ``[3, H, W]`` floating point) and returns a
            scalar.
        reduction: ``"none"`` or ``"mean"``.

    Returns:
        float64 on the CPU: ``[T]``, or a scalar with ``"mean"``.

    Raises:
        TypeError: the frames are neither uint8 nor floating point, or not both the same.
        ValueError: the shapes are not as stated or differ, there is no frame, or ``reduction`` is something else.
    """
    if reduction not in ("none", "mean"):
        raise ValueError(f"reduction must be none or mean, got {reduction!r}")
    first, second = _as_batch("a", a), _as_batch("b", b)
    if first.is_floating_point() != second.is_floating_point():
        raise TypeError(f"a and b must both be uint8 or both floating point, got {first.dtype} and {second.dtype}")
    if first.shape != second.shape:
        raise ValueError(f"a and b must have the same shape, got {list(first.shape)} and {list(second.shape)}")
    if not first.numel():
        raise ValueError(f"a and b must not be empty, got {list(first.shape)}")
    with torch.no_grad():
        values = torch.stack([metric(x, y).double().cpu() for x, y in zip(first, second, strict=True)])
    return values.mean() if reduction == "mean" else values


def unit_planes(frame: Tensor) -> Tensor:
    """Return one frame as float32 ``[1, 3, H, W]`` in [0, 1]."""
    if frame.is_floating_point():
        return frame[None].float()
    return frame.permute(2, 0, 1)[None].float().div_(255)


def _as_batch(name: str, frames: Frames) -> Tensor:
    tensor = frames if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
    if tensor.dtype == torch.uint8:
        if tensor.ndim == 3:
            tensor = tensor[None]
        if tensor.ndim != 4 or tensor.shape[-1] != 3:
            raise ValueError(f"{name} must be [T, H, W, 3] or [H, W, 3] for uint8, got {list(tensor.shape)}")
    elif tensor.is_floating_point():
        if tensor.ndim != 4 or tensor.shape[1] != 3:
            raise ValueError(f"{name} must be [N, 3, H, W] for floating point, got {list(tensor.shape)}")
    else:
        raise TypeError(f"{name} must be uint8 or floating point, got {tensor.dtype}")
    return tensor
