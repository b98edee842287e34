"""``conv_pixel_shuffle_gelu``: the upsampling block, convolution to activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from ..reference import conv_pixel_shuffle_gelu as reference
from . import _cpp
from ._check import check_approximate, check_like, check_tensor, check_upscale_factor
from ._library import register
from ._triton import rejects_tensor, unavailable
from .pixel_shuffle_gelu import image_is_small, pixel_shuffle_gelu, rejects_shape

__all__ = ["CONV_PIXEL_SHUFFLE_GELU", "conv_pixel_shuffle_gelu"]

_INT32_MAX = 2**31 - 1


def _run_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    return reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding, approximate=approximate)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _composed_rejects(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str | None:
    height, width = (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2] + 1 for i in range(2))
    return rejects_tensor(x.device, _autocast_dtype(x)) or rejects_shape(r, weight.shape[0], height, width)


def _run_composed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    # The bias goes into the second kernel, where it costs no pass over memory of its own.
    return pixel_shuffle_gelu(F.conv2d(x, weight, padding=padding), r, bias, approximate=approximate, impl="triton")


def _triton_rejects(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str | None:
    reason = rejects_tensor(x.device, _autocast_dtype(x))
    if reason is not None:
        return reason
    n, channels, rows, columns = weight.shape
    if rows % 2 == 0 or columns % 2 == 0 or padding != (rows // 2, columns // 2):
        return (
            f"kernel {(rows, columns)} with padding {padding} changes the size of the image; the kernel takes odd "
            "sizes with half of them as padding, so that x and the convolution's result share their pixels"
        )
    batch, _, height, width = x.shape
    padded = -(-channels // 8) * 8
    image = max(padded, n) * height * width
    if image > _INT32_MAX:
        return f"one image has {image} elements, more than {_INT32_MAX}"
    if n * (2 * width + 256) > _INT32_MAX:
        return f"two rows of the result have {2 * n * width} elements, too many for offsets of 32 bits in a tile"
    if batch * height * width > _INT32_MAX - 256:
        return f"x has {batch * height * width} pixels, more than {_INT32_MAX - 256}"
    if (rows * columns * padded + 64) * (n + 128) > _INT32_MAX:
        return f"weight has {weight.numel()} elements, too many for offsets of 32 bits"
    return None


def _run_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    dtype = _autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    leaves = (x, weight) if bias is None else (x, weight, bias)
    keep_z = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    out: torch.Tensor = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, bias, None, r, approximate, keep_z, "triton"
    )[0]
    return out


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _cpp_rejects(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str | None:
    if x.device.type != "cpu":
        return _cpp.rejects_tensor(x.device, x.dtype)
    dtype = _autocast_dtype(x)
    if dtype != torch.bfloat16:
        return f"dtype {dtype} is not torch.bfloat16, the one that AMX multiplies"
    if _wants_gradient(x, weight, bias):
        return "a gradient is wanted, and this kernel is for inference alone; 'conv2d+cpp' has gradients"
    if not _is_channels_last(x) and not _is_channels_last(weight):
        return "neither x nor weight is channels-last; use .to(memory_format=torch.channels_last)"
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    if weight.numel() > _INT32_MAX:
        return f"weight has {weight.numel()} elements, more than {_INT32_MAX}"
    return None


def _run_cpp(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    bias = None if bias is None else bias.to(torch.bfloat16)
    out: torch.Tensor = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_inference(x, weight, bias, r, padding, approximate)
    return out


def _composed_cpp_rejects(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str | None:
    return _cpp.rejects_tensor(x.device, _autocast_dtype(x) if x.device.type == "cpu" else x.dtype)


def _run_composed_cpp(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    # With a gradient the second kernel takes the bias, because it gets the bias's gradient for nothing; PyTorch's
    # convolution rounds once for both otherwise.
    if _wants_gradient(bias):
        return pixel_shuffle_gelu(F.conv2d(x, weight, padding=padding), r, bias, approximate=approximate, impl="cpp")
    return pixel_shuffle_gelu(F.conv2d(x, weight, bias, padding=padding), r, approximate=approximate, impl="cpp")


CONV_PIXEL_SHUFFLE_GELU = ImplementationTable(
    "conv_pixel_shuffle_gelu",
    [
        Implementation("conv2d+triton", _run_composed, unavailable, _composed_rejects),
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("cpp", _run_cpp, _cpp.unavailable_amx, _cpp_rejects),
        Implementation("conv2d+cpp", _run_composed_cpp, _cpp.unavailable, _composed_cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _predicted_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether "triton" should beat "conv2d+triton".

    A prediction, not a measurement: no GPU has run this comparison yet (``python -m bench.gpu --parts conv`` makes it).
    By a model of the L2 cache's traffic the fused kernel wins where the matrix product is large in all three
    directions, in half precision, and x is channels-last already.
    """
    n, channels, rows, columns = weight.shape
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return (
        _autocast_dtype(x).itemsize == 2
        and x.is_contiguous(memory_format=torch.channels_last)
        and pixels >= 2048
        and n >= 96
        and channels * rows * columns >= 512
    )


def _by_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str:
    """Return what "auto" is for these inputs: "triton" where it is predicted to be faster, else the table's order.

    On the CPU that is not "conv2d+cpp" for images so small that the call takes longer than it saves.
    """
    if x.device.type == "cpu":
        rows, columns = (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2] + 1 for i in range(2))
        small = image_is_small(weight.shape[0], rows, columns)
        whole = _cpp.unavailable_amx() is None and _cpp_rejects(x, weight, bias, r, padding, approximate) is None
        return "reference" if small and not whole else "auto"
    if unavailable() is not None or _triton_rejects(x, weight, bias, r, padding, approximate) is not None:
        return "auto"
    return "triton" if _predicted_faster(x, weight) else "auto"


def _shuffled_order(t: torch.Tensor, r: int) -> torch.Tensor:
    """Reorder the first axis from (c, i, j), that of PixelShuffle, to (i, j, c), in which y's rows are contiguous."""
    reordered: torch.Tensor = t.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)
    return reordered


def _shuffle_order(t: torch.Tensor, r: int) -> torch.Tensor:
    """Undo :func:`_shuffled_order`."""
    reordered: torch.Tensor = t.unflatten(0, (r * r, -1)).transpose(0, 1).flatten(0, 1)
    return reordered


def _half_padding(weight: torch.Tensor) -> list[int]:
    return [weight.shape[2] // 2, weight.shape[3] // 2]


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: torch.Tensor | None,
    r: int,
    approximate: str,
    keep_z: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "reference":
        y = F.conv2d(x, weight, bias, padding=_half_padding(weight))
        z = _shuffled_order(y.transpose(0, 1), r).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        y = F.gelu(F.pixel_shuffle(y, r), approximate=approximate).contiguous(memory_format=torch.channels_last)
        return y, z if keep_z else x.new_empty(0)
    from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_fwd, pack_weight

    if packed is None:
        packed = pack_weight(weight, r)
    kernel_size = (weight.shape[2], weight.shape[3])
    y, kept = conv_pixel_shuffle_gelu_fwd(x, packed, bias, weight.shape[0], kernel_size, r, approximate, keep_z=keep_z)
    return y, x.new_empty(0) if kept is None else kept


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: torch.Tensor | None,
    r: int,
    approximate: str,
    keep_z: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, height, width = x.shape
    n = weight.shape[0]
    y = x.new_empty((batch, n // (r * r), height * r, width * r)).contiguous(memory_format=torch.channels_last)
    if not keep_z:
        return y, x.new_empty(0)
    return y, x.new_empty((batch, n, height, width)).contiguous(memory_format=torch.channels_last)


def _backward(
    dy: torch.Tensor, z: torch.Tensor, r: int, approximate: str, with_bias: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dy = dy.contiguous(memory_format=torch.channels_last)
    z = z.contiguous(memory_format=torch.channels_last)
    if impl == "reference":
        spread = _shuffled_order(F.pixel_unshuffle(dy, r).transpose(0, 1), r).transpose(0, 1)
        dz = torch.ops.aten.gelu_backward(spread, z, approximate=approximate)
        dz = dz.contiguous(memory_format=torch.channels_last)
        dbias = _shuffle_order(dz.sum(dim=(0, 2, 3)), r) if with_bias else None
    else:
        from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_bwd

        dz, dbias = conv_pixel_shuffle_gelu_bwd(dy, z, r, approximate, with_bias)
    return dz, z.new_empty(0) if dbias is None else dbias


def _backward_fake(
    dy: torch.Tensor, z: torch.Tensor, r: int, approximate: str, with_bias: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = z.new_empty(z.shape).contiguous(memory_format=torch.channels_last)
    return dz, z.new_empty(z.shape[1] if with_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _, ctx.r, ctx.approximate, ctx.keep_z, ctx.impl = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: torch.Tensor | None, _dz: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    if not ctx.keep_z:
        raise RuntimeError("keep_z must be True where a gradient is wanted, got False: the gradient is a function of z")
    x, weight, z = ctx.saved_tensors
    dz, dbias = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward(
        dy, z, ctx.r, ctx.approximate, ctx.with_bias, ctx.impl
    )
    # The channels of dz are in the order (i, j, c), so the weight's are put there, and those of its gradient back.
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz,
        x,
        _shuffled_order(weight, ctx.r),
        None,
        [1, 1],
        _half_padding(weight),
        [1, 1],
        False,
        [0, 0],
        1,
        [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
    )
    if dweight is not None:
        dweight = _shuffle_order(dweight, ctx.r)
    return dx, dweight, dbias if ctx.with_bias else None, None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    raise RuntimeError("conv_pixel_shuffle_gelu has no second derivative in its kernels; use impl='reference'")


# ``packed`` is ``pack_weight(weight, r)`` of the Triton kernels for a caller who keeps it, or None.
register(
    "conv_pixel_shuffle_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, int r, str approximate, "
    "bool keep_z, str impl) -> (Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register(
    "conv_pixel_shuffle_gelu_backward(Tensor dy, Tensor z, int r, str approximate, bool with_bias, str impl)"
    " -> (Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
    setup_context=None,
    backward=_no_double_backward,
)


def _inference_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, r: int, padding: list[int], approximate: str
) -> torch.Tensor:
    height, width = (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2] + 1 for i in range(2))
    size = (x.shape[0], weight.shape[0] // (r * r), height * r, width * r)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _inference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, r: int, padding: list[int], approximate: str
) -> torch.Tensor:
    y = _inference_fake(x, weight, bias, r, padding, approximate)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    biases = _cpp.float_bias(bias)
    _cpp.load().conv_pixel_shuffle_gelu_fwd(
        [*x.shape, y.shape[1], r, *weight.shape[2:], *padding],
        approximate == "tanh",
        *(_cpp.address(t) for t in (x, weight, biases, y)),
        threads=torch.get_num_threads(),
    )
    return y


def _no_gradient(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    raise RuntimeError("conv_pixel_shuffle_gelu_inference has no gradient; use impl='conv2d+cpp'")


register(
    "conv_pixel_shuffle_gelu_inference(Tensor x, Tensor weight, Tensor? bias, int r, int[] padding, str approximate)"
    " -> Tensor",
    run=_inference,
    fake=_inference_fake,
    setup_context=None,
    backward=_no_gradient,
)


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
            kernel as padding; the gradients of x and weight are PyTorch's convolutions), ``"cpp"`` (CPU with AMX:
            one kernel for all, bfloat16, channels-last, without gradients), ``"conv2d+cpp"`` (CPU: PyTorch's
            convolution, then the kernel of :func:`pixel_shuffle_gelu`) or ``"reference"`` (PyTorch, anywhere).

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
        result is channels-last, and so is what it keeps for the backward pass. ``"cpp"`` sums in float32 in an order
        that depends on nothing but the weight's shape, adds the bias and applies GELU in float32, and rounds once; its
        result is channels-last, and the same bits on any number of threads and in any batch.

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
    if impl == "auto":
        impl = _by_shape(x, weight, bias, r, pair, approximate)
    entry = CONV_PIXEL_SHUFFLE_GELU.select(impl, x, weight, bias, r, pair, approximate)
    out: torch.Tensor = entry.run(x, weight, bias, r, pair, approximate)
    return out
