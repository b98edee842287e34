"""``conv_pixel_shuffle_gelu``: the upsampling block, convolution to activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._impl import Implementation, ImplementationTable
from ..reference import conv_pixel_shuffle_gelu as reference
from ._check import check_approximate, check_like, check_tensor, check_upscale_factor
from ._triton import rejects_tensor, unavailable
from .pixel_shuffle_gelu import pixel_shuffle_gelu, rejects_shape

__all__ = ["CONV_PIXEL_SHUFFLE_GELU", "conv_pixel_shuffle_gelu"]


def _run_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> torch.Tensor:
    return reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding, approximate=approximate)


def _composed_rejects(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    r: int,
    padding: tuple[int, int],
    approximate: str,
) -> str | None:
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    height, width = (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2] + 1 for i in range(2))
    return rejects_tensor(x.device, dtype) or rejects_shape(r, weight.shape[0], height, width)


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


CONV_PIXEL_SHUFFLE_GELU = ImplementationTable(
    "conv_pixel_shuffle_gelu",
    [
        Implementation("conv2d+triton", _run_composed, unavailable, _composed_rejects),
        Implementation("reference", _run_reference),
    ],
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
            :func:`pixel_shuffle_gelu`, which adds the bias as well) or ``"reference"`` (PyTorch, anywhere).

    Returns:
        ``[B, C_out, H' r, W' r]``, with ``H' = H + 2 padding - K_h + 1`` and W' likewise; x's dtype, or autocast's.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ without autocast, or r or padding is not an int.
        ValueError: a shape, device, number or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        The convolution is PyTorch's, with its accumulation and its determinism settings. ``"conv2d+triton"`` adds the
        bias after the convolution's result was rounded to its dtype; from there on see :func:`pixel_shuffle_gelu`.

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
    entry = CONV_PIXEL_SHUFFLE_GELU.select(impl, x, weight, bias, r, pair, approximate)
    out: torch.Tensor = entry.run(x, weight, bias, r, pair, approximate)
    return out
