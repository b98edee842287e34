"""``conv_pixel_shuffle_gelu``: the upsampling block, convolution to activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from ..reference import conv_pixel_shuffle_gelu as reference
from . import (
    _conv_pixel_shuffle_gelu,  # noqa: F401  registers the operations
    _cpp,
    _cuda,
    _winograd,
)
from ._check import (
    check_approximate,
    check_like,
    check_tensor,
    check_upscale_factor,
    compute_dtype,
    has_channels_last_pixels,
    memory_format_of,
)
from ._triton import rejects_tensor, unavailable
from .packed_weights import is_kept, kept_weight, tiles_allowed
from .pixel_shuffle_gelu import image_is_small, pixel_shuffle_gelu, rejects_shape

__all__ = ["CONV_PIXEL_SHUFFLE_GELU", "Call", "conv_pixel_shuffle_gelu"]

_INT32_MAX = 2**31 - 1
_CUDA_MAX_KERNEL, _CUDA_MAX_N = 7, 2048


class Call(NamedTuple):
    """The checked arguments of one call: what each entry of the table runs or rejects."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    r: int
    padding: tuple[int, int]
    approximate: str
    pixels_apart: bool = False


def _tensors(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return x, weight and bias in the dtype of the result."""
    dtype = compute_dtype(call.x)
    return call.x.to(dtype), call.weight.to(dtype), None if call.bias is None else call.bias.to(dtype)


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _convolved_size(call: Call) -> tuple[int, int]:
    """Return the height and the width of the convolution's result."""
    height, width = (call.x.shape[i + 2] + 2 * call.padding[i] - call.weight.shape[i + 2] + 1 for i in range(2))
    return height, width


def _run_reference(call: Call) -> torch.Tensor:
    x, weight, bias, r, padding, approximate = call[:6]
    return reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding, approximate=approximate)


def _run_composed(call: Call, impl: str, *, bias_in_convolution: bool) -> torch.Tensor:
    """Run PyTorch's convolution and the kernel of :func:`pixel_shuffle_gelu`, one of which adds the bias."""
    x, weight, bias, r, padding, approximate = call[:6]
    first, second = (bias, None) if bias_in_convolution else (None, bias)
    return pixel_shuffle_gelu(
        F.conv2d(x, weight, first, padding=padding), r, second, approximate=approximate, impl=impl
    )


def _composed_triton_rejects(call: Call) -> str | None:
    return rejects_tensor(call.x.device, compute_dtype(call.x)) or rejects_shape(
        call.r, call.weight.shape[0], *_convolved_size(call)
    )


def _run_composed_triton(call: Call) -> torch.Tensor:
    # The bias goes into the second kernel, where it costs no pass over memory of its own. On Hopper that is CUDA's.
    return _run_composed(call, "auto", bias_in_convolution=False)


def _changes_size(call: Call) -> str | None:
    rows, columns = call.weight.shape[2:]
    if rows % 2 == 1 and columns % 2 == 1 and call.padding == (rows // 2, columns // 2):
        return None
    return (
        f"kernel {(rows, columns)} with padding {call.padding} changes the size of the image; the kernel takes odd "
        "sizes with half of them as padding, so that x and the convolution's result share their pixels"
    )


def _triton_rejects(call: Call) -> str | None:
    reason = rejects_tensor(call.x.device, compute_dtype(call.x)) or _changes_size(call)
    if reason is not None:
        return reason
    n, channels, rows, columns = call.weight.shape
    batch, _, height, width = call.x.shape
    padded, padded_n = (-(-size // 8) * 8 for size in (channels, n))
    image = max(padded, padded_n) * height * width
    if image > _INT32_MAX:
        return f"one image has {image} elements, more than {_INT32_MAX}"
    if n * (2 * width + 256) > _INT32_MAX:
        return f"two rows of the result have {2 * n * width} elements, too many for offsets of 32 bits in a tile"
    if batch * height * width > _INT32_MAX - 256:
        return f"x has {batch * height * width} pixels, more than {_INT32_MAX - 256}"
    taps = rows * columns
    if max((taps * padded + 64) * (n + 128), (taps * padded_n + 64) * (channels + 128)) > _INT32_MAX:
        return f"weight has {call.weight.numel()} elements, too many for offsets of 32 bits"
    return None


def _pack_triton(weight: torch.Tensor, r: int) -> torch.Tensor:
    from ..triton_kernels.conv_pixel_shuffle_gelu import pack_weight

    packed: torch.Tensor = pack_weight(weight, r)
    return packed


def _run_triton(call: Call) -> torch.Tensor:
    x, weight, bias = _tensors(call)
    keep_z = _wants_gradient(x, weight, bias)
    packed = None
    if not keep_z:
        packed = kept_weight(call.weight, lambda: ("triton", call.r, x.dtype), lambda: _pack_triton(weight, call.r))
    out: torch.Tensor = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, bias, packed, call.r, call.approximate, keep_z, "triton", *_gradients_by_shape(x, weight)
    )[0]
    return out


def _cuda_rejects(call: Call) -> str | None:
    x, weight, bias = call[:3]
    reason = _cuda.rejects_tensor(x.device, compute_dtype(x)) or _changes_size(call)
    if reason is not None:
        return reason
    n, _, rows, columns = weight.shape
    if max(rows, columns) > _CUDA_MAX_KERNEL or n > _CUDA_MAX_N:
        return (
            f"kernel {(rows, columns)} or {n} output channels are more than {_CUDA_MAX_KERNEL} and {_CUDA_MAX_N}, for "
            "which shared memory has room"
        )
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    batch, _, height, width = x.shape
    if batch * height * width > _INT32_MAX:
        return f"x has {batch * height * width} pixels, more than {_INT32_MAX}"
    if width * (n + 7 * call.r**2) > _INT32_MAX:
        return f"{call.r} rows of the result have {n * width} elements, too many for offsets of 32 bits"
    if _wants_gradient(x, weight, bias) and unavailable() is not None:
        return f"a gradient is wanted, and the backward pass runs Triton's kernels: {unavailable()}"
    return None


def _run_cuda(call: Call) -> torch.Tensor:
    x, weight, bias = _tensors(call)
    keep_z = _wants_gradient(x, weight, bias)
    packed, impl, r = None, _cuda.implementation(call.pixels_apart), call.r
    channels = filled = weight.shape[0] // (r * r)
    if not keep_z and is_kept(call.weight):
        filled = _cuda.filled_channels(weight.shape[0], r, call.pixels_apart)
        if filled > channels:
            more, key = (filled - channels) * r * r, ("cuda, filled", r, x.dtype)
            weight = _filled(call.weight, weight, more, key)
            bias = None if call.bias is None or bias is None else _filled(call.bias, bias, more, key)
        columns = _cuda.columns(x, weight, r, call.pixels_apart)
        packed = kept_weight(
            call.weight,
            lambda: (impl, r, x.dtype, filled, columns),
            lambda: _cuda.pack_weight(x, weight, r, call.pixels_apart),
        )
    out: torch.Tensor = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, bias, packed, r, call.approximate, keep_z, impl, *_gradients_by_shape(x, weight)
    )[0]
    return out if filled == channels else out[:, :channels]


def _filled(parameter: torch.Tensor, values: torch.Tensor, more: int, key: tuple[object, ...]) -> torch.Tensor:
    """Return a parameter's values with so many zeros behind those of its first axis, as they are kept."""
    zeros = [0, 0] * (values.dim() - 1) + [0, more]
    made = kept_weight(parameter, lambda: key, lambda: F.pad(values, zeros))
    return F.pad(values, zeros) if made is None else made


def _cpp_rejects(call: Call) -> str | None:
    x, weight, bias = call[:3]
    reason = _cpp.rejects_amx_operand(x)
    if reason is not None:
        return reason
    if _wants_gradient(x, weight, bias):
        reason = _changes_size(call)
        if reason is not None:
            return f"a gradient is wanted, and {reason}"
    if torch.channels_last not in (memory_format_of(x), memory_format_of(weight)):
        return "neither x nor weight is channels-last; use .to(memory_format=torch.channels_last)"
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    if weight.numel() > _INT32_MAX:
        return f"weight has {weight.numel()} elements, more than {_INT32_MAX}"
    return None


def _run_cpp(call: Call) -> torch.Tensor:
    x, weight, bias = _tensors(call)
    out: torch.Tensor
    if _wants_gradient(x, weight, bias):
        impl = "cpp"
        out = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
            x, weight, bias, None, call.r, call.approximate, True, impl, impl, impl
        )[0]
    else:
        out = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_inference(
            x, weight, bias, call.r, call.padding, call.approximate
        )
    return out


def _winograd_rejects(call: Call) -> str | None:
    return _winograd.rejects(call.x, call.weight, call.padding)


def _run_winograd(call: Call) -> torch.Tensor:
    x, weight, bias = _tensors(call)
    keep_z = _wants_gradient(x, weight, bias)
    packed, impl = None, "winograd"
    if not keep_z:
        tiles = tiles_allowed()
        impl = _winograd.implementation(tiles)
        packed = _winograd.kept(x, weight, call.weight, call.r, tiles)
    out: torch.Tensor = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, bias, packed, call.r, call.approximate, keep_z, impl, "winograd", "winograd"
    )[0]
    return _winograd.in_layout_of(x, weight, out)


def _composed_cpp_rejects(call: Call) -> str | None:
    return _cpp.rejects_operand(call.x)


def _run_composed_cpp(call: Call) -> torch.Tensor:
    # With a gradient the second kernel takes the bias, because it gets the bias's gradient for nothing; PyTorch's
    # convolution rounds once for both otherwise.
    return _run_composed(call, "cpp", bias_in_convolution=not _wants_gradient(call.bias))


CONV_PIXEL_SHUFFLE_GELU = ImplementationTable(
    "conv_pixel_shuffle_gelu",
    [
        Implementation("conv2d+triton", _run_composed_triton, unavailable, _composed_triton_rejects),
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("cuda", _run_cuda, _cuda.unavailable, _cuda_rejects),
        Implementation("cpp", _run_cpp, _cpp.unavailable_amx, _cpp_rejects),
        Implementation("winograd", _run_winograd, _cpp.unavailable, _winograd_rejects),
        Implementation("conv2d+cpp", _run_composed_cpp, _cpp.unavailable, _composed_cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


# Which of several implementations is faster, by shape, as measured on an H200 by ``python -m bench.gpu --parts conv``.


def _tiles(x: torch.Tensor, columns: int) -> int:
    """Return how many tiles of 256 pixels by 128 channels a convolution's result has."""
    return -(-x.shape[0] * x.shape[2] * x.shape[3] // 256) * -(-columns // 128)


def _is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the matrix product is large in all three directions, in half precision."""
    n, channels, rows, columns = weight.shape
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return compute_dtype(x).itemsize == 2 and pixels >= 2048 and n >= 96 and channels * rows * columns >= 512


def _is_wide(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a result of many channels makes up for few pixels, in half precision."""
    n, channels, rows, columns = weight.shape
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return compute_dtype(x).itemsize == 2 and pixels >= 128 and n >= 192 and channels * rows * columns >= 384


def _triton_is_faster(call: Call) -> bool:
    """Return whether "triton" is faster than "conv2d+triton".

    Where the matrix product is large, or wide and its weight kept or small, and x is channels-last already.
    """
    x, weight = call.x, call.weight
    if not has_channels_last_pixels(x):
        return False
    kept = is_kept(weight) and not _wants_gradient(x, weight, call.bias)
    return _is_large(x, weight) or (_is_wide(x, weight) and (kept or weight.numel() < 2**17))


def _cuda_is_faster(call: Call) -> bool:
    """Return whether "cuda" can run, and is faster than the others.

    Where there are tiles for half of the multiprocessors. A weight that is not kept has to be packed as well, which
    takes the longer the more channels there are.
    """
    x, weight = call.x, call.weight
    if not x.is_cuda or _cuda.unavailable() is not None or _cuda_rejects(call) is not None:
        return False
    n, channels, rows, columns = weight.shape
    kept = is_kept(weight) and not _wants_gradient(x, weight, call.bias)
    small = n < 96 or channels * rows * columns < 512
    return _tiles(x, n) >= (66 if kept or small else 132)


def _gradients_by_shape(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, str]:
    """Return what makes the gradients of x and weight where the forward pass is "triton" or "cuda"."""
    half, pixels = compute_dtype(x).itemsize == 2, x.shape[0] * x.shape[2] * x.shape[3]
    wgrad = "triton" if half and pixels >= 128 else "conv2d"
    hopper = x.is_cuda and _cuda.unavailable() is None and _cuda.rejects_tensor(x.device, compute_dtype(x)) is None
    fits = max(weight.shape[2:]) <= _CUDA_MAX_KERNEL and weight.shape[1] <= _CUDA_MAX_N
    if hopper and fits and _tiles(x, weight.shape[1]) >= 48:
        return "cuda", wgrad
    return ("triton" if _is_large(x, weight) and weight.shape[1] % 8 != 0 else "conv2d"), wgrad


def _winograd_is_faster(call: Call) -> bool:
    """Return whether "winograd" is faster than "conv2d+cpp" where it can run.

    Matrix units for 16 bits, which PyTorch's convolutions use, make up for the products that it saves.
    """
    if _cpp.on_matrix_units(call.x):
        return False
    kept = is_kept(call.weight) and not _wants_gradient(call.x, call.weight, call.bias)
    return _winograd.pays(call.x, call.weight, kept=kept)


def _by_shape(call: Call) -> str:
    """Return what "auto" is for these inputs: "cuda" or "triton" where that is faster, else the table's order.

    On the CPU that is neither "winograd" nor "conv2d+cpp" for images so small that the call takes longer than it saves.
    """
    if call.x.device.type == "cpu":
        if _cpp.unavailable_amx() is None and _cpp_rejects(call) is None:
            return "auto"
        if image_is_small(call.weight.shape[0], *_convolved_size(call)):
            return "reference"
        fits = _cpp.unavailable() is None and _winograd_rejects(call) is None
        return "conv2d+cpp" if fits and not _winograd_is_faster(call) else "auto"
    if _cuda_is_faster(call):
        return "cuda"
    if unavailable() is not None or _triton_rejects(call) is not None:
        return "auto"
    return "triton" if _triton_is_faster(call) else "auto"


def _pair(padding: object) -> tuple[int, int]:
    pair = padding if isinstance(padding, tuple) else (padding, padding)
    if len(pair) != 2 or not all(isinstance(p, int) and not isinstance(p, bool) for p in pair):
        raise TypeError(f"padding must be an int or a pair of ints, got {padding!r}")
    if min(pair) < 0:
        raise ValueError(f"padding must be at least 0, got {padding!r}")
    return pair


def conv_pixel_shuffle_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    *,
    padding: int | tuple[int, int],
    approximate: str = "none",
    impl: str = "auto",
    pixels_apart: bool = False,
) -> torch.Tensor:
    """Convolve (stride 1), add a bias, shuffle channels into space, apply GELU.

    ``y = GELU(PixelShuffle_r(weight * x + bias))``: the upsampling block of HNeRV (arXiv 2304.02633), NeRV
    (arXiv 2110.13903) and their successors.

    Equivalent PyTorch: ``F.gelu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=padding), r), approximate=...)``.

    Args:
        x: ``[B, C_in, H, W]``, floating point, any strides.
        weight: ``[C_out r², C_in, K_h, K_w]`` in x's dtype.
        bias: ``[C_out r²]`` in x's dtype, or None.
        r: upscale factor, at least 1.
        padding: zeros added on each side, for rows and columns or one number for both.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.
        impl: ``"auto"``, ``"conv2d+triton"`` (PyTorch's convolution, then the fused kernel of
            :func:`pixel_shuffle_gelu`, which adds the bias as well), ``"triton"`` (one kernel for all, half of an odd
            kernel as padding; the gradients of x and weight by kernels too, or by PyTorch's convolutions where those
            are faster), ``"cuda"`` (Hopper: one kernel that reads the image once for all taps, bfloat16 and
            float16, half of an odd kernel as padding; the gradient of x likewise, that of the weight as with
            ``"triton"``), ``"cpp"`` (CPU with AMX: one kernel for all, bfloat16, channels-last; gradients
            likewise where half of an odd kernel is the padding),
            ``"winograd"`` (CPU with AVX2 or AVX-512: one kernel for all, kernels 3x3 and 5x5 with half of them as
            padding; a fifth to a sixth of the products that the definition takes, and gradients likewise, in float32
            whatever is read and written; channels-last is read and written as it is, any other layout through copies),
            ``"conv2d+cpp"`` (CPU: PyTorch's convolution, then the kernel of :func:`pixel_shuffle_gelu`) or
            ``"reference"`` (PyTorch, anywhere).
        pixels_apart: whether the pixels of a channels-last result may lie apart in memory, as the next block reads
            them: for a result that nothing else reads. Other operations of PyTorch copy it first.

    Returns:
        ``[B, C_out, H' r, W' r]``, with ``H' = H + 2 padding - K_h + 1`` and W' likewise; x's dtype, or autocast's.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ without autocast, or r or padding is not an int.
        ValueError: a shape, device, number or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        The convolution is PyTorch's, with its accumulation and its determinism settings. ``"conv2d+triton"`` adds the
        bias after the convolution's result was rounded to its dtype; from there on see :func:`pixel_shuffle_gelu`.
        ``"triton"`` sums in float32, adds the bias and applies GELU in float32, and rounds once; float32 products are
        rounded to TF32 where ``torch.backends.cudnn.conv.fp32_precision`` says so, which is PyTorch's default. Its
        result is channels-last, and so is what it keeps for the backward pass. The gradients that kernels make are
        summed in float32, in an order that depends on shapes and the device alone. ``"cuda"`` does likewise, in the
        same order in every run. In half precision the GELU of both is within 3e-5 of the exact one plus the error of
        the hardware's tanh, 5e-4 of its value. Where r C_out is no multiple of 8, and with ``pixels_apart`` where
        C_out is none, ``"cuda"`` pads the pixels of its result in memory to a multiple of 8 channels, as which the next
        block reads them without a copy; those of the gradient of x likewise. ``"cpp"`` sums in float32 in an order that
        depends on nothing but the weight's shape, adds the bias and applies GELU in float32, and rounds once; its
        result is channels-last, and the same bits on any number of threads and in any batch. What it keeps for the
        gradients, and the gradient of that, are rounded once as well; the gradient of the weight is summed over pixels
        in float32 in an order that depends on the shape alone, and a value of x that is not finite may reach all of it
        that belongs to its channel. The result of ``"winograd"`` lies likewise, and is the same bits as often; it
        multiplies polynomials evaluated at 8 x 8 points (Lavin and Gray, arXiv 1509.09308). Its rounding errors are
        up to five times those of float32 sums by definition with kernels 5x5 and up to nine times with 3x3, in the root
        mean square and more where few channels are summed; far below those of TF32. In half precision that is far below
        the rounding of the result, and of what is kept for the gradients, which happens once. A NaN or an infinity
        spreads to the results of every tile whose 8 x 8 pixels of x it is among, up to four: to 8 x 8 pixels with
        kernels 5x5 and 7 x 7 with 3x3, where the convolution alone reaches 5 x 5 or 3 x 3. ``"conv2d+cpp"`` avoids
        both. Without gradients, ``PackedWeights(tiles=...)`` lets it take 10 x 10 points for kernels 5x5, or
        18 x 18 with products of 16-bit integers.

    Example:
        >>> x, weight = torch.zeros(1, 3, 5, 7), torch.zeros(8, 3, 3, 3)
        >>> conv_pixel_shuffle_gelu(x, weight, None, 2, padding=1).shape
        torch.Size([1, 2, 10, 14])
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_like("weight", weight, x)
    check_upscale_factor(r)
    check_approximate(approximate)
    pair = _pair(padding)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C_in, H, W], got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be [C_out r², C_in, K_h, K_w] with x's C_in = {x.shape[1]}, got shape {tuple(weight.shape)}"
        )
    if weight.shape[0] % (r * r) != 0:
        raise ValueError(f"weight must have a multiple of r² = {r * r} output channels, got {weight.shape[0]}")
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    if any(x.shape[i + 2] + 2 * pair[i] < weight.shape[i + 2] for i in range(2)):
        raise ValueError(
            f"x must be at least as large as the kernel {tuple(weight.shape[2:])} after padding {pair}, "
            f"got {tuple(x.shape[2:])}"
        )
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, x)
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},), one value per output channel, got {tuple(bias.shape)}"
            )
    call = Call(x, weight, bias, r, pair, approximate, pixels_apart)
    entry = CONV_PIXEL_SHUFFLE_GELU.select(_by_shape(call) if impl == "auto" else impl, call)
    out: torch.Tensor = entry.run(call)
    return out
