"""Convolutions on the CPU by Winograd's method: what the kernels can take, and calling them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._device import cpu_flags
from . import _cpp
from ._check import compute_dtype, half_padding, memory_format_of
from .packed_weights import TILES, kept_weight, tiles_allowed
from .pixel_shuffle_gelu import image_is_small

__all__ = [
    "LastBlock",
    "forward",
    "gradients",
    "implementation",
    "in_layout_of",
    "kept",
    "last_blocks",
    "pack_weight",
    "pays",
    "rejects",
    "takes_integers",
    "tiles_of",
]

_KERNELS = (3, 5)
_INT32_MAX = 2**31 - 1
# Pixels of an image from which on the method pays, measured: for each size of the kernel, where the weight is evaluated
# at every call, and where it is kept. It saves the less, the faster PyTorch multiplies.
_LEAST = {
    "avx2": {3: (360, 360), 5: (128, 128)},
    "avx512": {3: (2200, 144), 5: (800, 52)},
    "avx512_bf16": {3: (16_000, 560), 5: (3200, 200)},  # and float16 likewise
    "emulated": {3: (144, 144), 5: (52, 52)},  # 16 bits that no instruction multiplies
}
# Pixels of an image from which on integers pay, measured for each size of the kernel, and the most input channels for
# them, with which errors grow.
_INTEGER_LEAST, _INTEGER_CHANNELS = {3: 8000, 5: 3200}, 128
# Threads up to which a frame's strips, at least one for each, are wide enough to share a pass over the weight.
_MOST_STRIPS = 8
_INSTRUCTIONS = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}


def rejects(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> str | None:
    """Return why the kernels cannot run these tensors, or None."""
    reason = _cpp.rejects_operand(x)
    if reason is not None:
        return reason
    rows, columns = weight.shape[2:]
    if rows != columns or rows not in _KERNELS or padding != half_padding(weight):
        return f"kernel {(rows, columns)} with padding {padding} is not 3x3 with 1 or 5x5 with 2"
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    if weight.numel() > _INT32_MAX:
        return f"weight has {weight.numel()} elements, more than {_INT32_MAX}"
    return None


def pays(x: torch.Tensor, weight: torch.Tensor, *, kept: bool) -> bool:
    """Return whether an image is large enough for the method to pay, where the extension is there.

    The size of one image decides, not that of the batch: an image gives the same bits alone and among others.

    Args:
        x: the input of the convolution.
        weight: of the convolution.
        kept: whether the weight is evaluated once for many calls.
    """
    least: int = _LEAST[_multiplies(compute_dtype(x))][int(weight.shape[2])][kept]  # a tensor in torch.jit.trace
    return x.shape[2] * x.shape[3] >= least


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies(dtype: torch.dtype) -> str:
    """Return the row of ``_LEAST`` that says how PyTorch multiplies a dtype here."""
    if dtype == torch.float32:
        return _cpp.simd()
    return "avx512_bf16" if _INSTRUCTIONS[dtype] in cpu_flags() else "emulated"


def in_layout_of(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y in the layout that PyTorch's convolution gives: channels-last where x or weight is, else contiguous."""
    return y if torch.channels_last in (memory_format_of(x), memory_format_of(weight)) else y.contiguous()


def implementation(tiles: str) -> str:
    """Return what the registered operation calls the method with such tiles."""
    return "winograd" if tiles == "small" else f"winograd, {tiles} tiles"


_TILES_OF = {implementation(tiles): tiles for tiles in TILES}


def tiles_of(name: str) -> str | None:
    """Undo :func:`implementation`; None for what is another method."""
    return _TILES_OF.get(name)


def takes_integers(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a convolution takes integer tiles where it may; the size of one image decides."""
    least = _INTEGER_LEAST[int(weight.shape[2])]
    return x.shape[1] <= _INTEGER_CHANNELS and x.shape[2] * x.shape[3] >= least


def _points(x: torch.Tensor, weight: torch.Tensor, tiles: str) -> int:
    """Return the points on each axis at which tiles are evaluated.

    18 are those of a Fourier transform, with products of integers.
    """
    kernel = int(weight.shape[2])
    if tiles == "integer" and takes_integers(x, weight):
        return 18
    # The errors of large tiles are far below the rounding of 16 bits.
    return 10 if kernel == 5 and (tiles != "small" or x.dtype.itemsize == 2) else 8


def _sizes(x: torch.Tensor, weight: torch.Tensor, r: int, tiles: str = "small") -> list[int]:
    batch, channels, height, width = x.shape
    return [batch, channels, height, width, weight.shape[0] // (r * r), r, weight.shape[2], _points(x, weight, tiles)]


def pack_weight(
    x: torch.Tensor, weight: torch.Tensor, r: int, *, tiles: str = "small", data_gradient: bool = False
) -> torch.Tensor:
    """Return the weight at the points at which tiles are multiplied, in the order in which the kernels read it.

    Args:
        x: any input of the convolution; only its dtype, number of channels and size matter.
        weight: ``[C_out r², C_in, k, k]``, float32, float16 or bfloat16.
        r: upscale factor.
        tiles: those that :func:`forward` is to take.
        data_gradient: whether it is for the gradient of x.
    """
    module, sizes = _cpp.load(), _sizes(x, weight, r, tiles)
    weight = weight.float().contiguous(memory_format=torch.channels_last)
    packed = torch.empty(module.winograd_weight_floats(sizes, data_gradient), dtype=torch.float32, device="cpu")
    addresses = (_address(t, torch.float32) for t in (weight, packed))
    module.winograd_weight(sizes, data_gradient, *addresses, threads=torch.get_num_threads())
    return packed


def kept(x: torch.Tensor, weight: torch.Tensor, parameter: torch.Tensor, r: int, tiles: str) -> torch.Tensor | None:
    """Return what :func:`pack_weight` makes of a weight, where it is kept for the parameter that it was, or None."""
    layout = lambda: ("winograd", r, _points(x, weight, tiles), x.dtype)  # noqa: E731
    return kept_weight(parameter, layout, lambda: pack_weight(x, weight, r, tiles=tiles))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    r: int,
    activation: str,
    *,
    keep_z: bool,
    tiles: str = "small",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y, channels-last, and z with its channels in the order (i, j, c) where it is to be kept, in x's dtype.

    ``activation`` is ``"gelu"``, ``"gelu_tanh"`` or ``"identity"``, ``tiles`` as for :class:`PackedWeights`; in half
    precision small ones are large anyway.
    """
    if packed is None:
        packed = pack_weight(x, weight, r, tiles=tiles)
    x = x.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = x.shape
    n = weight.shape[0]
    y = _cpp.empty_image(x.dtype, batch, n // (r * r), height * r, width * r)
    z = _cpp.empty_image(x.dtype, batch, n, height, width) if keep_z else None
    biases = _cpp.float_bias(bias)
    _cpp.load().winograd_fwd(
        _sizes(x, weight, r, tiles),
        _cpp.dtype_name(x.dtype),
        activation,
        _address(x, x.dtype),
        *(_address(t, torch.float32) for t in (packed, biases)),
        *(_address(t, x.dtype) for t in (y, z)),
        threads=torch.get_num_threads(),
    )
    return y, z


class LastBlock(NamedTuple):
    """What the last block of a stream takes, and the weight ``[3, C, 3, 3]`` and group of the head that follows it."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    r: int
    approximate: str
    head: torch.Tensor
    group: int


def last_blocks(
    blocks: Sequence[LastBlock],
    biases: torch.Tensor,
    scales: Sequence[float],
    offset: float,
    crop: tuple[int, int],
    *,
    as_bytes: bool,
) -> torch.Tensor | None:
    """Return what ``output_stage`` makes of the blocks' results, ``[1, H, W, 3]``, without keeping those in memory.

    Or None where the kernels cannot take the blocks, another implementation would be chosen, or there are many threads.
    ``biases`` are the heads', float32 ``[G, 3]``. Gradients are not seen.
    """
    if _cpp.unavailable() is not None or torch.get_num_threads() > _MOST_STRIPS:
        return None
    tiles = tiles_allowed()
    for x, weight, *_ in blocks:
        size = (x.shape[2], x.shape[3])
        if x.shape[0] != 1 or rejects(x, weight, half_padding(weight)) is not None:
            return None
        if compute_dtype(x) != torch.float32:
            return None
        if image_is_small(weight.shape[0], *size) or not pays(x, weight, kept=True):
            return None
    heights = {(_points(x, weight, tiles) + 1 - weight.shape[2]) * r for x, weight, _, r, *_ in blocks}
    if len(heights) != 1:
        return None
    used, streams = [], []
    for x, weight, bias, r, approximate, head, group in blocks:
        packed = kept(x, weight, weight, r, tiles)
        if packed is None:
            packed = pack_weight(x, weight, r, tiles=tiles)
        x, head = x.contiguous(memory_format=torch.channels_last), head.float().contiguous()
        bias = _cpp.float_bias(bias)
        used.append((x, packed, bias, head))  # until the kernels have read them
        activation = "gelu_tanh" if approximate == "tanh" else "gelu"
        addresses = (_address(t, torch.float32) for t in (x, packed, bias))
        head_address = _cpp.address(head, torch.float32)
        streams.append((_sizes(x, weight, r, tiles), activation, *addresses, head_address, group))
    out = torch.empty((1, *crop, 3), dtype=torch.uint8 if as_bytes else torch.float32, device="cpu")
    link = (list(scales), biases.flatten().tolist(), offset)
    _cpp.load().winograd_output_fwd(
        crop, link, streams, _cpp.address(out, out.dtype), as_bytes, torch.get_num_threads()
    )
    return out


def gradients(
    dz: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: int, wanted: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x and weight, as far as they are wanted, for dz in the order (i, j, c)."""
    module, sizes, threads, dtype = _cpp.load(), _sizes(x, weight, r), torch.get_num_threads(), x.dtype
    # The gradient of x has x's layout. Not every operation before takes another: the backward pass of nn.InstanceNorm2d
    # on the CPU (torch 2.13) gives wrong numbers for a channels-last gradient of a single image's contiguous result.
    x_format = memory_format_of(x)
    dz, x = (t.contiguous(memory_format=torch.channels_last) for t in (dz, x))
    dx = dweight = None
    if wanted[0]:
        packed, dx = pack_weight(x, weight, r, data_gradient=True), _cpp.empty_image(dtype, *x.shape)
        addresses = (_address(dz, dtype), _address(packed, torch.float32), _address(dx, dtype))
        module.winograd_dgrad(sizes, _cpp.dtype_name(dtype), *addresses, threads=threads)
        dx = dx.contiguous(memory_format=x_format)
    if wanted[1]:
        dweight = _cpp.empty_image(torch.float32, *weight.shape)
        addresses = (_address(x, dtype), _address(dz, dtype), _address(dweight, torch.float32))
        module.winograd_wgrad(sizes, _cpp.dtype_name(dtype), *addresses, threads=threads)
        if dweight.dtype != weight.dtype or not weight.is_contiguous(memory_format=torch.channels_last):
            dweight = torch.empty_like(weight).copy_(dweight)
    return dx, dweight


def _address(t: torch.Tensor | None, dtype: torch.dtype) -> int:
    """Return where a tensor is: images and weights channels-last, what has one axis in its order."""
    four = t is not None and t.dim() == 4
    return _cpp.address(t, dtype, torch.channels_last if four else torch.contiguous_format)
