"""Why the compiled kernels cannot run here, or on a tensor, in words; and what calling them takes."""

from __future__ import annotations

import functools

import torch

from .. import _ext
from ._check import compute_dtype

__all__ = [
    "address",
    "dtype_name",
    "empty_image",
    "float_bias",
    "load",
    "on_matrix_units",
    "rejects_amx_operand",
    "rejects_operand",
    "rejects_tensor",
    "simd",
    "unavailable",
    "unavailable_amx",
    "undo_shuffle_gelu",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
load = _ext.load


@functools.cache
def simd() -> str:
    """Return the vector instructions that the kernels use: ``"avx512"``, ``"avx2"`` or ``"scalar"``."""
    name: str = load().pixel_shuffle_gelu_simd()
    return name


@functools.cache
def _machine() -> str | None:
    reason = _ext.unavailable()
    if reason is None and simd() == "scalar":
        return "needs AVX2 with FMA and F16C, or AVX-512: this CPU, or this build, has neither"
    return reason


@functools.cache
def _amx() -> str | None:
    reason: str | None = _ext.unavailable() or load().amx_unavailable()
    return reason


# torch.compile takes the answers of these two as constants instead of tracing into the extension.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable() -> str | None:
    """Return why this machine cannot run the vector kernels, or None."""
    return _machine()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable_amx() -> str | None:
    """Return why this machine cannot run the matrix kernels, or None."""
    return _amx()


def rejects_tensor(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take a tensor of ``dtype`` on ``device``, or None."""
    if device.type != "cpu":
        return f"the tensors are on {device}, and the C++ kernels run on the CPU"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of {', '.join(map(str, _DTYPES))}"
    return None


def rejects_operand(x: torch.Tensor) -> str | None:
    """Return why the kernels cannot take x in the dtype that it is computed in, autocast's if that is on, or None."""
    return rejects_tensor(x.device, compute_dtype(x) if x.device.type == "cpu" else x.dtype)


def rejects_amx_operand(x: torch.Tensor) -> str | None:
    """Return why the matrix kernels cannot take x in the dtype that it is computed in, or None."""
    if x.device.type != "cpu":
        return rejects_tensor(x.device, x.dtype)
    if compute_dtype(x) != torch.bfloat16:
        return f"dtype {compute_dtype(x)} is not torch.bfloat16, the one that AMX multiplies"
    return None


def empty_image(dtype: torch.dtype, *size: int) -> torch.Tensor:
    """Return memory for an image or a weight as the kernels write it: channels-last."""
    return torch.empty(size, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def on_matrix_units(x: torch.Tensor) -> bool:
    """Return whether PyTorch's convolutions of x, on the CPU, run on matrix units.

    Kernels that compute in float32 were not measured against them.
    """
    return compute_dtype(x).itemsize == 2 and unavailable_amx() is None


def dtype_name(dtype: torch.dtype) -> str:
    """Return what the kernels call a dtype."""
    return str(dtype).removeprefix("torch.")


def float_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return the biases as the kernels take them: contiguous, float32."""
    return None if bias is None else bias.detach().float().contiguous()


def address(t: torch.Tensor | None, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> int:
    """Return where a tensor's data is, 0 for None, for a kernel that is told no more. The caller keeps the tensor.

    Raises:
        ValueError: the tensor is not what the kernel takes that for; it would read or write memory of others.
    """
    if t is None:
        return 0
    if t.device.type != "cpu" or t.dtype != dtype or not t.is_contiguous(memory_format=layout):
        raise ValueError(
            f"a tensor of the C++ kernels must be on the CPU, of {dtype} and {layout}, got {t.device}, {t.dtype}, "
            f"shape {tuple(t.shape)} with strides {t.stride()}"
        )
    return t.data_ptr()


def undo_shuffle_gelu(
    dy: torch.Tensor, z: torch.Tensor, r: int, approximate: str, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of z, whose channels are in the order (i, j, c), and of the bias, in z's dtype."""
    channels_last, dtype, n = torch.channels_last, z.dtype, z.shape[1]
    dy, z = (t.contiguous(memory_format=channels_last) for t in (dy, z))
    dz = torch.empty_like(z)
    dbias = torch.empty(n, dtype=torch.float32, device="cpu") if with_bias else None
    load().undo_shuffle_gelu(
        [z.shape[0], n // (r * r), r, *z.shape[2:]],
        dtype_name(dtype),
        approximate == "tanh",
        *(address(t, dtype, channels_last) for t in (dy, z, dz)),
        address(dbias, torch.float32),
        threads=torch.get_num_threads(),
    )
    return dz, None if dbias is None else dbias.to(dtype)
