"""Why the CUDA kernels cannot run here, or on a tensor, in words; and what calling them takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .. import _ext
from ._check import lie_alike
from ._device_checks import device_checks

__all__ = [
    "apart_of",
    "columns",
    "conv2d_bwd",
    "conv2d_fwd",
    "conv_pixel_shuffle_gelu_dgrad",
    "conv_pixel_shuffle_gelu_fwd",
    "empty_gradient",
    "empty_result",
    "filled_channels",
    "implementation",
    "list_cast",
    "list_momentum",
    "list_subtract",
    "orthogonalise",
    "output_stage_fwd",
    "pack_head",
    "pack_weight",
    "pixel_shuffle_gelu_bwd",
    "pixel_shuffle_gelu_fwd",
    "rejects_float32",
    "rejects_list",
    "rejects_shuffle",
    "rejects_tensor",
    "unavailable",
]

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_GROUP = 8  # elements of 16 bytes, as which the kernel reads channels
_MOST_THREADS = 1024
_MOST_PIXELS = 2**30


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


unavailable, rejects_tensor = device_checks("the CUDA kernels", _DTYPES, _machine, _capability)
_, rejects_float32 = device_checks("the CUDA kernels", [torch.float32], _machine, _capability)


def _padded(channels: int) -> int:
    return -(-channels // _GROUP) * _GROUP


def _result_pixel(n: int, r: int, apart: bool) -> int:
    """Return the elements from one pixel of y to the next.

    Where the r pixels from one of x are no multiple of 16 bytes, each is padded to one: the kernel then stores 16 bytes
    at a time, and reads such a tensor as it is where it is the next block's x. Where pixels may lie apart, all are.
    """
    channels = n // (r * r)
    return channels if not apart and r * channels % _GROUP == 0 else _padded(channels)


def filled_channels(n: int, r: int, apart: bool) -> int:
    """Return how many channels a result of ``n / r²`` is to have for wide stores, those behind them of no use.

    Where pixels are padded in memory the kernel stores what is left of eight channels by twos and ones. From four on
    that takes longer than to multiply and store eight of which some are zeros, as measured on an H200.
    """
    channels, pixel = n // (r * r), _result_pixel(n, r, apart)
    return pixel if channels % _GROUP >= _GROUP // 2 else channels


# What the registered operation calls the implementation, and whether its result's pixels may lie apart.
_APART_BY_NAME = {"cuda": False, "cuda, pixels apart": True}


def implementation(apart: bool) -> str:
    """Return what the registered operation calls it."""
    return next(name for name, value in _APART_BY_NAME.items() if value == apart)


def apart_of(name: str) -> bool | None:
    """Undo :func:`implementation`; None for what is another implementation."""
    return _APART_BY_NAME.get(name)


def empty_result(x: torch.Tensor, n: int, r: int, apart: bool) -> torch.Tensor:
    """Return memory for y ``[B, n / r², H r, W r]``, channels-last, its pixels padded as the kernel wants them."""
    batch, _, height, width = x.shape
    memory = x.new_empty((batch, height * r, width * r, _result_pixel(n, r, apart)))
    return memory[..., : n // (r * r)].permute(0, 3, 1, 2)


def _padded_pixels(like: torch.Tensor, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return like.new_empty((batch, height, width, _padded(channels)))[..., :channels].permute(0, 3, 1, 2)


def empty_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return memory for the gradient of x, channels-last, its pixels padded to a multiple of 16 bytes."""
    return _padded_pixels(x, *x.shape)


def _strides(t: torch.Tensor) -> list[int] | None:
    """Return the strides between images, rows and pixels as the kernel takes them, None where it cannot."""
    batch, channels, height, width = t.shape
    image, channel, row, pixel = t.stride()
    # An axis of size 1 may have any stride; the kernel's copies want one that makes sense.
    pixel = pixel if width > 1 else _padded(channels)
    row = row if height > 1 else width * pixel
    image = image if batch > 1 else height * row
    whole = all(stride % _GROUP == 0 for stride in (image, row, pixel)) and t.data_ptr() % 16 == 0
    apart = pixel >= channels and row >= width * pixel and image >= height * row
    return [image, row, pixel] if whole and apart and (channel == 1 or channels == 1) else None


def _default_strides(x: torch.Tensor) -> list[int]:
    _, channels, height, width = x.shape
    pixel = _padded(channels)
    return [height * width * pixel, width * pixel, pixel]


def _prepare(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return x in memory as the kernel reads it, itself where possible, and its strides."""
    strides = _strides(x)
    if strides is not None:
        return x, strides
    # What lies behind the channels is never read.
    return _padded_pixels(x, *x.shape).copy_(x), _default_strides(x)


def _sizes(x: torch.Tensor, strides: list[int], weight: torch.Tensor, r: int, apart: bool) -> list[int]:
    n, _, rows, columns = weight.shape
    pixel = _result_pixel(n, r, apart)
    return [*x.shape, n // (r * r), r, rows, columns, rows // 2, columns // 2, *strides, pixel, 0]


def _gradient_sizes(dz: torch.Tensor, strides: list[int], weight: torch.Tensor, r: int, pixel: int) -> list[int]:
    n, channels, rows, columns = weight.shape
    batch, _, height, width = dz.shape
    return [batch, n, height, width, channels, 1, rows, columns, rows // 2, columns // 2, *strides, pixel, r]


def columns(x: torch.Tensor, weight: torch.Tensor, r: int, apart: bool) -> int:
    """Return the width of the kernel's tiles where its input has the shape of ``x``, one of a few."""
    sizes = _sizes(x, _default_strides(x), weight, r, apart)
    with torch.cuda.device_of(weight):
        width: int = _ext.load().conv_pixel_shuffle_gelu_cuda_columns(sizes, weight.device.index)
    return width


def pack_weight(x: torch.Tensor, weight: torch.Tensor, r: int, apart: bool) -> torch.Tensor:
    """Return the weight as the kernel reads it where its input has the shape of ``x``.

    Depends on the weight, ``apart`` and :func:`columns` alone, so a caller whose weights stay as they are can keep it.
    """
    return _pack(_sizes(x, _default_strides(x), weight, r, apart), weight)


def _pack(sizes: list[int], weight: torch.Tensor) -> torch.Tensor:
    module, device = _ext.load(), weight.device.index
    with torch.cuda.device_of(weight):
        packed = weight.new_empty(module.conv_pixel_shuffle_gelu_cuda_packed_elements(sizes, device))
        strides = _weight_strides(weight)
        if strides is None:
            weight = weight.contiguous()
            strides = [weight.stride(0), weight.stride(1), 1]
        stream = torch.cuda.current_stream().cuda_stream
        module.conv_pixel_shuffle_gelu_cuda_pack(sizes, device, weight.data_ptr(), strides, packed.data_ptr(), stream)
    return packed


def _weight_strides(weight: torch.Tensor) -> list[int] | None:
    """Return the strides of ``[n, C_in, taps]``, None where the taps are no one axis of a weight's memory."""
    _, _, rows, columns = weight.shape
    n, channel, row, column = weight.stride()
    if rows == 1 or columns == 1:
        return [n, channel, row if columns == 1 else column]
    return [n, channel, column] if row == columns * column else None


def conv_pixel_shuffle_gelu_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    r: int,
    approximate: str,
    *,
    keep_z: bool,
    apart: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``(y, z)``: y as from :func:`empty_result`, z ``[B, n, H, W]``, channels-last, in the order (i, j, c).

    Args:
        x: ``[B, C_in, H, W]``; read as it is if channels are adjacent and pixels multiples of 16 bytes, else copied.
        weight: ``[n, C_in, K_h, K_w]``, odd; the padding is half of it.
        packed: the same, from :func:`pack_weight`, or None.
        bias: ``[n]`` in the order (c, i, j), or None.
        r: upscale factor.
        approximate: ``"none"`` (GELU by erf) or ``"tanh"`` (its tanh form).
        keep_z: whether to write z; it is None otherwise.
        apart: whether pixels of y may lie apart for the next block's sake.
    """
    module: Any = _ext.load()
    batch, _, height, width = x.shape
    n = weight.shape[0]
    with torch.cuda.device_of(x):
        y = empty_result(x, n, r, apart)
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
        z = torch.empty((batch, n, height, width), **options) if keep_z else None
        x, strides = _prepare(x)
        packed = pack_weight(x, weight, r, apart) if packed is None else packed
        bias = None if bias is None else bias.contiguous()
        addresses = [0 if t is None else t.data_ptr() for t in (x, packed, bias, y, z)]
        module.conv_pixel_shuffle_gelu_cuda_fwd(
            _sizes(x, strides, weight, r, apart),
            x.device.index,
            _DTYPES[x.dtype],
            "gelu_tanh" if approximate == "tanh" else "gelu",
            *addresses,
            torch.cuda.current_stream().cuda_stream,
        )
    return y, z


def conv_pixel_shuffle_gelu_dgrad(dz: torch.Tensor, weight: torch.Tensor, r: int) -> torch.Tensor:
    """Return dx ``[B, C_in, H, W]`` as :func:`empty_gradient` has it.

    Args:
        dz: ``[B, n, H, W]`` in the order (i, j, c), or with zero channels behind them.
        weight: ``[n, C_in, K_h, K_w]`` in the order (c, i, j), odd; the padding is half of it.
        r: upscale factor.
    """
    module: Any = _ext.load()
    batch, _, height, width = dz.shape
    with torch.cuda.device_of(dz):
        dx = _padded_pixels(dz, batch, weight.shape[1], height, width)
        dz, strides = _prepare(dz)
        sizes = _gradient_sizes(dz, strides, weight, r, dx.stride(3))
        packed = _pack(sizes, weight)
        module.conv_pixel_shuffle_gelu_cuda_fwd(
            sizes,
            dz.device.index,
            _DTYPES[dz.dtype],
            "none",
            *[0 if t is None else t.data_ptr() for t in (dz, packed, None, dx, None)],
            torch.cuda.current_stream().cuda_stream,
        )
    return dx


def pack_head(weight: torch.Tensor) -> torch.Tensor:
    """Return a head's weight ``[3, C, 3, 3]`` as the kernel of the output stage reads it, see csrc/cuda/output_stage.h.

    Depends on the weight alone, so a caller whose weights stay as they are can keep it.
    """
    channels = weight.shape[1]
    steps = -(-channels // 16)
    matrices = weight.new_zeros((3, 16, 16 * steps))  # kernel's rows; its columns and colours by channels
    matrices[:, :9, :channels] = weight.permute(2, 3, 0, 1).reshape(3, 9, channels)
    # Halves and rows of eight; steps, halves, quads, elements.
    fragments = matrices.view(3, 2, 8, steps, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    return fragments.contiguous()


def output_stage_fwd(
    features: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    biases: torch.Tensor,
    groups: Sequence[int],
    scales: Sequence[float],
    offset: float,
    y: torch.Tensor,
) -> None:
    """Write frames into ``y`` ``[B, H, W, 3]``, uint8 or float32.

    Args:
        features: up to three ``[B, C, H', W']`` of one dtype, channels-last, their pixels apart or not, in the order of
            their groups.
        packed: their weights, from :func:`pack_head`.
        biases: float32 ``[groups, 3]``, contiguous.
        groups: the group of each feature.
        scales: a number for each group.
        offset: a number.
        y: contiguous.
    """
    first = features[0]
    with torch.cuda.device_of(first):
        _ext.load().output_stage_cuda_fwd(
            list(y.shape[:3]),
            first.device.index,
            _DTYPES[first.dtype],
            [
                (x.data_ptr(), weight.data_ptr(), *x.shape[1:], x.stride(3), group)
                for x, weight, group in zip(features, packed, groups, strict=True)
            ],
            list(scales),
            offset,
            biases.data_ptr(),
            y.data_ptr(),
            y.dtype == torch.uint8,
            torch.cuda.current_stream().cuda_stream,
        )


def orthogonalise(
    matrices: Sequence[torch.Tensor], quintic: tuple[float, float, float], steps: int
) -> list[torch.Tensor]:
    """Return ``steps`` steps ``X <- a X + (b X Xᵀ + c (X Xᵀ)²) X`` of each matrix, from ``X = x / |x|``.

    Args:
        matrices: float32 ``[rows, columns]``, contiguous, on one device, the smaller of both from 1 to 128.
        quintic: a, b, c.
        steps: their number, at least 1.
    """
    module: Any = _ext.load()
    with torch.cuda.device_of(matrices[0]):
        sizes = [x.numel() for x in matrices]
        memory = matrices[0].new_empty(sum(sizes)).split(sizes)
        results = [y.view(x.shape) for x, y in zip(matrices, memory, strict=True)]
        tasks = [(*x.shape, x.data_ptr(), y.data_ptr()) for x, y in zip(matrices, results, strict=True)]
        most: int = module.orthogonalise_cuda_matrices
        for some in (tasks[i : i + most] for i in range(0, len(tasks), most)):
            scratch = matrices[0].new_empty(module.orthogonalise_cuda_scratch(some))
            stream = torch.cuda.current_stream().cuda_stream
            module.orthogonalise_cuda(some, quintic, steps, scratch.data_ptr(), matrices[0].device.index, stream)
    return results


def rejects_shuffle(batch: int, channels: int, r: int, height: int, width: int) -> str | None:
    """Return why the kernels cannot shuffle x ``[batch, channels r², height, width]``, or None."""
    pixels = batch * height * width
    if pixels > _MOST_PIXELS:
        return f"x has {pixels} pixels, more than {_MOST_PIXELS}"
    run = r * channels  # what becomes of a pixel in one row of y
    vector = _common_divisor(width * run, (_GROUP, 2, 1))
    # After so many vectors channels repeat; each of them has a thread.
    threads = r * (run // min(vector, _common_divisor(run, (_GROUP, 4, 2, 1))))
    if threads > _MOST_THREADS:
        rows = f"rows of y that are multiples of {2 * vector} bytes"
        return f"x has {channels * r * r} channels, which with {rows} take {threads} threads, more than {_MOST_THREADS}"
    return None


def _common_divisor(number: int, among: Sequence[int]) -> int:
    for divisor in among:
        if number % divisor == 0:
            return divisor
    return 1


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _shuffle_arguments(x: torch.Tensor, r: int) -> tuple[list[int], int | None, str]:
    batch, channels, height, width = x.shape
    return [batch, channels // (r * r), r, height, width], x.device.index, _DTYPES[x.dtype]


def pixel_shuffle_gelu_fwd(
    x: torch.Tensor, r: int, bias: torch.Tensor | None, approximate: str, y: torch.Tensor
) -> None:
    """Write y ``[B, C, H r, W r]`` for x ``[B, C r², H, W]``, both channels-last, and a contiguous bias."""
    x = _aligned(x)
    with torch.cuda.device_of(x):
        _ext.load().pixel_shuffle_gelu_cuda_fwd(
            *_shuffle_arguments(x, r),
            approximate == "tanh",
            *[0 if t is None else t.data_ptr() for t in (x, bias, y)],
            torch.cuda.current_stream().cuda_stream,
        )


def pixel_shuffle_gelu_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    r: int,
    bias: torch.Tensor | None,
    approximate: str,
    dx: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Write dx, and dbias where there is a bias; tensors as in :func:`pixel_shuffle_gelu_fwd`."""
    module: Any = _ext.load()
    dy, x = _aligned(dy), _aligned(x)
    arguments = _shuffle_arguments(x, r)
    with torch.cuda.device_of(x):
        sums = None
        if dbias is not None:
            count = module.pixel_shuffle_gelu_cuda_sums(*arguments, dy.data_ptr(), x.data_ptr(), dx.data_ptr())
            sums = torch.empty(count, dtype=torch.float32, device=x.device)
        module.pixel_shuffle_gelu_cuda_bwd(
            *arguments,
            approximate == "tanh",
            *[0 if t is None else t.data_ptr() for t in (dy, x, bias, dx, sums, dbias)],
            torch.cuda.current_stream().cuda_stream,
        )


def _conv2d_sizes(x: torch.Tensor, weight: torch.Tensor) -> list[int]:
    return [*x.shape, weight.shape[0], x.stride(3)]


def conv2d_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write a 3x3 convolution with padding 1 into ``y`` ``[B, N, H, W]``, channels-last.

    Args:
        x: ``[B, C, H, W]``, C at most 64, channels-last, its pixels ``x.stride(3)`` elements apart.
        weight: ``[N, C, 3, 3]``, N at most 3, any strides.
        bias: ``[N]``, contiguous, or None.
        y: its pixels N elements apart.
    """
    with torch.cuda.device_of(x):
        _ext.load().conv2d_cuda_fwd(
            _conv2d_sizes(x, weight),
            x.device.index,
            _DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            list(weight.stride()),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


def conv2d_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Write those gradients of a 3x3 convolution with padding 1 that are not None.

    Args:
        dy: ``[B, N, H, W]``, any strides.
        x: as of :func:`conv2d_fwd`.
        weight: likewise.
        dx: memory of x's shape, channels-last, its pixels ``dx.stride(3)`` elements apart, the gaps its own: what a
            multiple of 16 bytes takes of them becomes zero.
        dweight: of weight's shape, any strides.
        dbias: ``[N]``, contiguous.
    """
    module: Any = _ext.load()
    sizes, device = _conv2d_sizes(x, weight), x.device.index
    with torch.cuda.device_of(x):
        partial = None
        if dweight is not None or dbias is not None:
            partial = x.new_empty(module.conv2d_cuda_partial_floats(sizes, device), dtype=torch.float32)
        module.conv2d_cuda_bwd(
            sizes,
            device,
            _DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            list(weight.stride()),
            dy.data_ptr(),
            list(dy.stride()),
            0 if dx is None else dx.data_ptr(),
            0 if dx is None else dx.stride(3),
            0 if dweight is None else dweight.data_ptr(),
            [0] * 4 if dweight is None else list(dweight.stride()),
            0 if dbias is None else dbias.data_ptr(),
            0 if partial is None else partial.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


_LIST_DTYPES = {torch.float32: "float32", **_DTYPES}
_LIST_ELEMENTS = 2**31 - 4096
_, _rejects_listed = device_checks("the CUDA kernels", _LIST_DTYPES, _machine, _capability)


def rejects_list(*lists: Sequence[torch.Tensor]) -> str | None:
    """Return why the kernels for lists cannot take these, whose elements meet in the order of memory, or None."""
    for tensors in zip(*lists, strict=True):
        first = tensors[0]
        if any(x.device != first.device or not lie_alike(x, first) for x in tensors):
            return "the tensors of two lists differ in shape, in memory or in their device"
        for x in tensors:
            reason = _rejects_listed(x.device, x.dtype)
            if reason is not None:
                return reason
        dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
        if not dense or not 0 < first.numel() < _LIST_ELEMENTS:
            return f"a tensor of shape {tuple(first.shape)} is empty, too large, or has gaps in memory"
    return None


def _listed(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], c: Sequence[torch.Tensor] = (), factors: Sequence[float] = ()
) -> list[tuple[int, int, int, float, int]]:
    addresses = [x.data_ptr() for x in c] or [0] * len(a)
    numbers = factors or [1.0] * len(a)
    return [
        (x.data_ptr(), y.data_ptr(), z, factor, x.numel())
        for x, y, z, factor in zip(a, b, addresses, numbers, strict=True)
    ]


def list_cast(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Write each source, rounded, into its target; sources have one dtype, and targets, of float32 and 16 bits."""
    first = sources[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        names = _LIST_DTYPES[first.dtype], _LIST_DTYPES[targets[0].dtype]
        _ext.load().list_cast(_listed(sources, targets), *names, first.device.index, stream)


def list_momentum(
    gradients: Sequence[torch.Tensor], averages: Sequence[torch.Tensor], results: Sequence[torch.Tensor], mu: float
) -> None:
    """Move averages towards gradients by ``1 - mu``; results are gradients, moved towards the averages by ``mu``."""
    first = gradients[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        _ext.load().list_momentum(_listed(gradients, averages, results), mu, first.device.index, stream)


def list_subtract(
    parameters: Sequence[torch.Tensor], updates: Sequence[torch.Tensor], factors: Sequence[float], rate: torch.Tensor
) -> None:
    """Subtract updates, times their factors and the rate, float32 ``[]`` on the device."""
    first = parameters[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream
        listed = _listed(updates, parameters, factors=factors)
        _ext.load().list_subtract(listed, rate.data_ptr(), first.device.index, stream)
