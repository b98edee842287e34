"""A convolution of each channel with a kernel of its own, and its gradients: for the encoders here.

It is none of the public operations: PyTorch's convolution is its definition.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from . import _cpp
from ._check import check_like, check_tensor, compute_dtype, half_padding, memory_format_of
from ._library import register_convolution
from ._triton import rejects_tensor, unavailable

__all__ = ["DEPTHWISE_CONV2D", "depthwise_conv2d"]

_GROUP = 16  # channels that are multiplied with each other: a row of the matrix units
_INT32_MAX = 2**31 - 1
_TRITON_CHANNELS = 512
_TRITON_KERNEL = 7
# Of an image, from which on "groups" is faster than "cpp" on a CPU with matrix units, in half precision, measured.
_GROUPS_PIXELS = 2**13


class _DenseGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        channels, _, rows, columns = weight.shape

        def gradients(weight: torch.Tensor, groups: int, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                dy, x, weight, [channels], [1, 1], ctx.padding, [1, 1], False, [0, 0], groups, mask
            )

        wanted = list(ctx.needs_input_grad[:3])
        dx = dweight = dbias = None
        if wanted[0]:
            dx = gradients(weight, channels, [True, False, False])[0]
        if wanted[1] or wanted[2]:
            # The gradient of dense groups: sixteen times the products, of which the diagonal is wanted.
            dense = weight.new_empty((channels, _GROUP, rows, columns))
            _, dense, dbias = gradients(dense, channels // _GROUP, [False, *wanted[1:]])
        if wanted[1]:
            dweight = dense.unflatten(0, (-1, _GROUP)).diagonal(0, 1, 2).permute(0, 3, 1, 2).reshape(weight.shape)
        return dx, dweight, dbias, None


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> list[int]:
    return [*x.shape, *weight.shape[2:]]


def _address(t: torch.Tensor | None) -> int:
    """Return where an image, a weight with one input channel or a bias is."""
    image = t is not None and t.dim() == 4 and t.shape[1] > 1
    return _cpp.address(t, torch.float32, torch.channels_last if image else torch.contiguous_format)


def _run_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def _in_compute_dtype(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dtype = compute_dtype(x)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _run_groups(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> torch.Tensor:
    operands = _in_compute_dtype(x, weight, bias)
    out: torch.Tensor = _DenseGroups.apply(*operands, list(padding))  # type: ignore[no-untyped-call]
    return out


def _run_kernels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int], *, impl: str
) -> torch.Tensor:
    x, weight, bias = _in_compute_dtype(x, weight, bias)
    if impl == "triton":
        # As the kernels read it, here and not in them, so that it is copied once for both passes.
        taps = weight.permute(2, 3, 1, 0).to(torch.float32, memory_format=torch.contiguous_format)
        weight = taps.contiguous().permute(3, 2, 0, 1)
    out: torch.Tensor = torch.ops.hflfnerv.depthwise_conv2d(x, weight, bias, impl)
    return out


def _kernels_reject(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> str | None:
    if x.numel() == 0 or weight.numel() == 0:
        return f"x of shape {tuple(x.shape)} or weight of shape {tuple(weight.shape)} is empty"
    if any(size % 2 == 0 for size in weight.shape[2:]) or half_padding(weight) != tuple(padding):
        return f"padding {tuple(padding)} is not half of an odd kernel, in weight of shape {tuple(weight.shape)}"
    return None


def _triton_rejects(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> str | None:
    reason = rejects_tensor(x.device, compute_dtype(x)) or _kernels_reject(x, weight, padding)
    if reason is not None:
        return reason
    if weight.shape[0] > _TRITON_CHANNELS or max(weight.shape[2:]) > _TRITON_KERNEL:
        return (
            f"weight of shape {tuple(weight.shape)} has more than {_TRITON_CHANNELS} channels or a kernel of more than "
            f"{_TRITON_KERNEL}x{_TRITON_KERNEL}"
        )
    batch, channels, height, width = x.shape
    if height * width * channels > _INT32_MAX or batch * height * width > _INT32_MAX - 4096:
        return f"x of shape {tuple(x.shape)} has too many elements for offsets of 32 bits"
    return None


def _cpp_rejects(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> str | None:
    reason = _cpp.rejects_operand(x)
    return reason or _kernels_reject(x, weight, padding)


def _groups_reject(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]
) -> str | None:
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, and dense groups are quick on the CPU"
    if x.dtype == torch.float64:
        return "dtype torch.float64 is for exact gradients"
    if weight.shape[0] % _GROUP:
        return f"{weight.shape[0]} channels are no multiple of {_GROUP}"
    return None


DEPTHWISE_CONV2D = ImplementationTable(
    "depthwise_conv2d",
    [
        Implementation("triton", functools.partial(_run_kernels, impl="triton"), unavailable, _triton_rejects),
        Implementation("cpp", functools.partial(_run_kernels, impl="cpp"), _cpp.unavailable, _cpp_rejects),
        Implementation("groups", _run_groups, rejects=_groups_reject),
        Implementation("reference", _run_reference),
    ],
)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    layout = memory_format_of(x)
    if impl == "reference":
        return _run_reference(x, weight, bias, half_padding(weight)).contiguous(memory_format=layout)
    images = x.contiguous(memory_format=torch.channels_last)
    if impl == "triton":
        from ..triton_kernels.depthwise_conv2d import depthwise_conv2d_fwd

        y: torch.Tensor = depthwise_conv2d_fwd(images, weight, None if bias is None else bias.contiguous())
    else:
        # In half precision through copies: the images of an encoder are small.
        images, weight, bias = images.float(), weight.float().contiguous(), _cpp.float_bias(bias)
        y = torch.empty_like(images)
        _cpp.load().depthwise_conv2d_fwd(
            _sizes(x, weight), *map(_address, (images, weight, bias, y)), torch.get_num_threads()
        )
        y = y.to(x.dtype)
    return y.contiguous(memory_format=layout)


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, impl: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool], impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout, channels = memory_format_of(x), weight.shape[0]
    gradients: tuple[torch.Tensor | None, ...]
    if impl == "reference":
        padding = list(half_padding(weight))
        gradients = torch.ops.aten.convolution_backward(
            dy, x, weight, [channels], [1, 1], padding, [1, 1], False, [0, 0], channels, wanted
        )
    else:
        dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
        kernels = _triton_backward if impl == "triton" else _cpp_backward
        gradients = kernels(dy, x, weight, wanted)
    # The kernels make those of weight and bias together.
    dx, dweight, dbias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (
        x.new_empty(0) if dx is None else dx.contiguous(memory_format=layout),
        x.new_empty(0) if dweight is None else dweight.contiguous(),
        x.new_empty(0) if dbias is None else dbias,
    )


def _triton_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    from ..triton_kernels.depthwise_conv2d import depthwise_conv2d_bwd

    dx = torch.empty_like(x) if wanted[0] else None
    return (dx, *depthwise_conv2d_bwd(dy, x, weight, dx, sums=wanted[1] or wanted[2]))


def _cpp_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    dtype, (dy, x, weight) = x.dtype, (dy.float(), x.float(), weight.float().contiguous())
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] else None
    dbias = x.new_empty(len(weight)) if wanted[2] else None
    _cpp.load().depthwise_conv2d_bwd(
        _sizes(x, weight), *map(_address, (dy, x, weight, dx, dweight, dbias)), torch.get_num_threads()
    )
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in (dx, dweight, dbias))


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: list[bool], impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format_of(x)) if wanted[0] else x.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else x.new_empty(0)
    return dx, dweight, x.new_empty(weight.shape[0] if wanted[2] else 0)


register_convolution(
    "depthwise_conv2d", run=_forward, fake=_forward_fake, backward=_backward, backward_fake=_backward_fake
)


def _choice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int]) -> str:
    """Return what ``"auto"`` stands for: itself, where the first entry that can run is the fastest.

    On a GPU that is a prediction for half precision, not measured yet: cuDNN is known to be slow at the gradient of the
    weight in bfloat16 (``python -m bench.gpu --parts depthwise`` compares them).
    """
    if x.device.type != "cpu":
        return "auto" if compute_dtype(x).itemsize == 2 else "reference"
    # Of PyTorch's operations under a compiler, which sees into them, and where they run on matrix units for long.
    large = x.shape[2] * x.shape[3] >= _GROUPS_PIXELS
    if torch.compiler.is_compiling() or (large and _cpp.on_matrix_units(x)):
        return "reference" if _groups_reject(x, weight, bias, padding) else "groups"
    return "auto"


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    padding: tuple[int, int],
    impl: str = "auto",
) -> torch.Tensor:
    """Convolve each channel with a kernel of its own, stride 1.

    Equivalent PyTorch: ``F.conv2d(x, weight, bias, padding=padding, groups=C)``.

    Args:
        x: ``[B, C, H, W]``, floating point.
        weight: ``[C, 1, K_h, K_w]`` in x's dtype (under autocast both are cast).
        bias: ``[C]``, or None.
        padding: zeros on each side of the rows and of the columns.
        impl: ``"auto"``, ``"triton"`` (CUDA: up to 512 channels, odd kernels up to 7x7, half of them as padding;
            gradients included), ``"cpp"`` (CPU with AVX2 or AVX-512: odd kernels, half of them as padding;
            gradients included), ``"groups"`` (CPU, a multiple of 16 channels: PyTorch's, but for the weight's gradient,
            which is taken from a convolution with dense groups of 16 channels, of whose products all but one in 16 are
            thrown away, in a fraction of the time of PyTorch's own, which has no vector form) or ``"reference"``
            (PyTorch, anywhere). ``"auto"`` is the first that can run, but for float32 on a GPU, which is
            ``"reference"``, and on the CPU under torch.compile, or for large images in half precision with matrix
            units, where it is made of PyTorch's operations.

    Returns:
        ``[B, C, H + 2 padding_h - K_h + 1, W + 2 padding_w - K_w + 1]``; x's dtype and memory format, or autocast's
        dtype.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape, device or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        The products are PyTorch's, and may be summed in another order, that of a pixel the same wherever it lies.
        ``"triton"`` and ``"cpp"`` sum in float32 and round once, ``"triton"`` over pixels in an order that depends on
        the shape alone.

    Example:
        >>> depthwise_conv2d(torch.zeros(1, 64, 8, 9), torch.zeros(64, 1, 7, 7), None, padding=(3, 3)).shape
        torch.Size([1, 64, 8, 9])
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    channels = x.shape[1]
    check_tensor("weight", weight)
    check_like("weight", weight, x)
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(f"weight must be [{channels}, 1, K_h, K_w], got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        check_like("bias", bias, x)
        if bias.shape != (channels,):
            raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    if impl == "auto":
        impl = _choice(x, weight, bias, padding)
    entry = DEPTHWISE_CONV2D.select(impl, x, weight, bias, padding)
    out: torch.Tensor = entry.run(x, weight, bias, padding)
    return out
