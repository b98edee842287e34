"""The registered operations behind ``conv_pixel_shuffle_gelu``: implementations, fakes, gradients.

Channels of the pre-activation z and of its gradient are in the order (i, j, c), in which y's rows are contiguous, where
PixelShuffle has (c, i, j).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import _amx, _cpp, _cuda, _winograd
from ._check import channels_last_pixels, half_padding, memory_format_of
from ._library import register, register_gradient

__all__ = ["conv2d_gradients"]


def _shuffled_order(t: torch.Tensor, r: int) -> torch.Tensor:
    """Reorder the first axis from (c, i, j), that of PixelShuffle, to (i, j, c), in which y's rows are contiguous."""
    reordered: torch.Tensor = t.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)
    return reordered


def _shuffle_order(t: torch.Tensor, r: int) -> torch.Tensor:
    """Undo :func:`_shuffled_order`."""
    reordered: torch.Tensor = t.unflatten(0, (r * r, -1)).transpose(0, 1).flatten(0, 1)
    return reordered


def _activation(approximate: str) -> str:
    """Return what the C++ kernels call a form of GELU."""
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: torch.Tensor | None,
    r: int,
    approximate: str,
    keep_z: bool,
    impl: str,
    dgrad: str,
    wgrad: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "reference":
        y = F.conv2d(x, weight, bias, padding=half_padding(weight))
        z = _shuffled_order(y.transpose(0, 1), r).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        y = F.gelu(F.pixel_shuffle(y, r), approximate=approximate).contiguous(memory_format=torch.channels_last)
        return y, z if keep_z else x.new_empty(0)
    apart = _cuda.apart_of(impl)
    if apart is not None:
        y, kept = _cuda.conv_pixel_shuffle_gelu_fwd(x, weight, packed, bias, r, approximate, keep_z=keep_z, apart=apart)
        return y, x.new_empty(0) if kept is None else kept
    if impl == "cpp":
        y, kept = _amx.forward(x, weight, bias, r, half_padding(weight), _activation(approximate), keep_z=keep_z)
        return y, x.new_empty(0) if kept is None else kept
    tiles = _winograd.tiles_of(impl)
    if tiles is not None:
        activation = _activation(approximate)
        y, kept = _winograd.forward(x, weight, packed, bias, r, activation, keep_z=keep_z, tiles=tiles)
        return y, x.new_empty(0) if kept is None else kept
    from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_fwd, pack_weight

    if packed is None:
        packed = pack_weight(weight, r)
    kernel_size = (weight.shape[2], weight.shape[3])
    bias = None if bias is None else bias.contiguous()
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
    dgrad: str,
    wgrad: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, height, width = x.shape
    n = weight.shape[0]
    apart = _cuda.apart_of(impl)
    if apart is not None:
        y = _cuda.empty_result(x, n, r, apart)
    else:
        y = x.new_empty((batch, n // (r * r), height * r, width * r)).contiguous(memory_format=torch.channels_last)
    if not keep_z:
        return y, x.new_empty(0)
    return y, x.new_empty((batch, n, height, width)).contiguous(memory_format=torch.channels_last)


def _undo_shuffle_gelu(
    dy: torch.Tensor, z: torch.Tensor, r: int, approximate: str, with_bias: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (dz, dbias); the kernel puts zero channels behind those of dz, to a multiple of 8."""
    # The kernel takes pixels apart as well, as the gradient of the next block's x may have them.
    dy = dy.contiguous(memory_format=torch.channels_last) if impl == "reference" else channels_last_pixels(dy)
    z = z.contiguous(memory_format=torch.channels_last)
    if impl != "reference":
        from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_bwd

        dz, dbias = conv_pixel_shuffle_gelu_bwd(dy, z, r, approximate, with_bias)
        return dz, dbias
    spread = _shuffled_order(F.pixel_unshuffle(dy, r).transpose(0, 1), r).transpose(0, 1)
    dz = torch.ops.aten.gelu_backward(spread, z, approximate=approximate)
    dbias = _shuffle_order(dz.sum(dim=(0, 2, 3)), r) if with_bias else None
    return dz.contiguous(memory_format=torch.channels_last), dbias


def conv2d_gradients(
    dz: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: int, wanted: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dx and dweight, as far as they are wanted, from PyTorch's convolutions."""
    n = weight.shape[0]
    # The channels of dz are in the order (i, j, c), so the weight's are put there, and those of its gradient back.
    ordered = _shuffled_order(weight, r)
    if dz.shape[1] > n:  # zero weights for zero channels, instead of a copy of dz without them
        ordered = F.pad(ordered, (0, 0, 0, 0, 0, 0, 0, dz.shape[1] - n))
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz, x, ordered, None, [1, 1], list(half_padding(weight)), [1, 1], False, [0, 0], 1, [*wanted, False]
    )
    if wanted[1]:
        dweight = torch.empty_like(weight).copy_(_shuffle_order(dweight[:n], r))
    return dx, dweight


def _format_of_dx(x: torch.Tensor, dgrad: str) -> torch.memory_format:
    """Return the memory format of the gradient of x: that of x.

    Triton's kernels and the convolutions of a channels-last dz make it channels-last, and so it stays where x is
    neither that nor contiguous, such as the pixels with gaps between them that the CUDA kernel returns.
    """
    if dgrad in ("winograd", "cpp"):
        return memory_format_of(x)
    contiguous = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if contiguous else torch.channels_last


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    r: int,
    approximate: str,
    wanted: list[bool],
    impl: str,
    dgrad: str,
    wgrad: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl in ("winograd", "cpp"):
        dz, dbias = _cpp.undo_shuffle_gelu(dy, z, r, approximate, wanted[2])
    else:
        dz, dbias = _undo_shuffle_gelu(dy, z, r, approximate, wanted[2], impl)
    if dgrad == wgrad == "winograd":
        return _as_results(x, (*_winograd.gradients(dz, x, weight, r, wanted), dbias))
    if dgrad == wgrad == "cpp":
        return _as_results(x, (*_amx.gradients(dz, x, weight, r, half_padding(weight), wanted), dbias))
    by_conv2d = [wanted[0] and dgrad == "conv2d", wanted[1] and wgrad == "conv2d"]
    dx, dweight = conv2d_gradients(dz, x, weight, r, by_conv2d) if any(by_conv2d) else (None, None)
    if wanted[0] and dgrad == "cuda":
        # As it comes, its pixels apart where the channels are no multiple of 8.
        dx = _cuda.conv_pixel_shuffle_gelu_dgrad(dz, weight, r)
    if wanted[0] and dgrad == "triton":
        from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_dgrad

        dx = conv_pixel_shuffle_gelu_dgrad(dz, weight, r)
    if wanted[1] and wgrad == "triton":
        from ..triton_kernels.conv_pixel_shuffle_gelu import conv_pixel_shuffle_gelu_wgrad

        dweight = conv_pixel_shuffle_gelu_wgrad(x, dz, weight, r)
    if dx is not None and dgrad != "cuda":
        dx = dx.contiguous(memory_format=_format_of_dx(x, dgrad))
    return _as_results(x, (dx, dweight, dbias))


def _as_results(
    x: torch.Tensor, gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replace what is not wanted by empty tensors: the registered operation always returns three."""
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    r: int,
    approximate: str,
    wanted: list[bool],
    impl: str,
    dgrad: str,
    wgrad: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not wanted[0]:
        dx = x.new_empty(0)
    elif dgrad == "cuda":
        dx = _cuda.empty_gradient(x)
    else:
        dx = x.new_empty(x.shape).contiguous(memory_format=_format_of_dx(x, dgrad))
    dweight = torch.empty_like(weight) if wanted[1] else x.new_empty(0)
    return dx, dweight, x.new_empty(weight.shape[0] if wanted[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _, ctx.r, ctx.approximate, ctx.keep_z, *ctx.implementations = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: torch.Tensor | None, _dz: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    if not ctx.keep_z:
        raise RuntimeError("keep_z must be True where a gradient is wanted, got False: the gradient is a function of z")
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.with_bias and ctx.needs_input_grad[2]]
    gradients = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward(
        dy, *ctx.saved_tensors, ctx.r, ctx.approximate, wanted, *ctx.implementations
    )
    return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 7)


# ``packed`` is what ``pack_weight`` of the kernels returns, for a caller who keeps it, or None. ``impl`` says what runs
# the forward pass and undoes GELU and shuffle (after "cuda" and "cuda, pixels apart" Triton's kernel does), ``dgrad``
# and ``wgrad`` what makes the gradients of x and weight: "triton", "conv2d", PyTorch's convolutions, or of x "cuda";
# "winograd" and "cpp", the kernels for AMX, make all of them, "winograd, large tiles" and "winograd, integer tiles"
# none.
register(
    "conv_pixel_shuffle_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, int r, str approximate, "
    "bool keep_z, str impl, str dgrad, str wgrad) -> (Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
register_gradient(
    "conv_pixel_shuffle_gelu_backward(Tensor dy, Tensor x, Tensor weight, Tensor z, int r, str approximate, "
    "bool[] wanted, str impl, str dgrad, str wgrad) -> (Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
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
    rows, columns = padding
    return _amx.forward(x, weight, bias, r, (rows, columns), _activation(approximate), keep_z=False)[0]


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
