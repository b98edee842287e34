"""Argument checks that the operations share. Messages read "`<arg>` must `<rule>`, got `<value>`", then the remedy."""

from __future__ import annotations

import torch

__all__ = [
    "check_approximate",
    "check_like",
    "check_tensor",
    "check_upscale_factor",
    "compute_dtype",
    "half_padding",
    "has_channels_last_pixels",
    "lie_alike",
    "memory_format_of",
]


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a real floating-point tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; convert it with {name}.float()")


def check_like(name: str, value: torch.Tensor, other: torch.Tensor, other_name: str = "x") -> None:
    """Raise unless ``value`` is on the other's device, and in its dtype unless autocast is on, which mixes dtypes."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {other.device}, got {value.device}; "
            f"move it with .to({other_name}.device)"
        )
    if value.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise TypeError(
            f"{name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}; "
            "cast one of them, or use torch.autocast"
        )


def check_upscale_factor(r: object) -> None:
    """Raise unless ``r`` is an int of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {r!r} ({type(r).__name__})")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")


def check_approximate(approximate: object) -> None:
    """Raise ValueError unless ``approximate`` names a form of GELU."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which an operation on x computes: autocast's where that is on, else x's own."""
    # Of "meta", PyTorch before 2.13 does not know whether autocast is on.
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def half_padding(weight: torch.Tensor) -> tuple[int, int]:
    """Return the padding that keeps the size of an image under an odd kernel."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def _strides_of_pixels(x: torch.Tensor, pixel: int) -> tuple[int, int, int, int]:
    height, width = x.shape[2:]
    return height * width * pixel, 1, width * pixel, pixel


def _has_strides_of_pixels(x: torch.Tensor) -> bool:
    return x.stride(3) >= x.shape[1] and x.stride() == _strides_of_pixels(x, x.stride(3))


def has_channels_last_pixels(x: torch.Tensor) -> bool:
    """Return whether x is channels-last, also if there are gaps between its pixels, as the CUDA kernels leave them."""
    return _has_strides_of_pixels(x) or x.is_contiguous(memory_format=torch.channels_last)


def channels_last_pixels(x: torch.Tensor) -> torch.Tensor:
    """Return x channels-last, its pixels ``x.stride(3)`` elements apart: x itself where it is that already."""
    if _has_strides_of_pixels(x):
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    # PyTorch does not look at the strides of axes of size 1, which may be anything.
    return x.as_strided(x.shape, _strides_of_pixels(x, x.shape[1]))


def lie_alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether two tensors have one shape and one order in memory, whatever the strides of axes of size 1 are."""
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.shape == y.shape and all(a == b for size, a, b in strides if size > 1)


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """Return channels-last where x is that and nothing else, contiguous otherwise."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
