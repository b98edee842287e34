"""Definition of ``pixel_shuffle_gelu`` and of its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["pixel_shuffle_gelu", "pixel_shuffle_gelu_backward"]


def pixel_shuffle_gelu(
    x: torch.Tensor, r: int, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> torch.Tensor:
    """Bias, PixelShuffle, GELU, as three PyTorch operations.

    ``y[b, c, h r + i, w r + j] = GELU(x[b, c r² + i r + j, h, w] + bias[c r² + i r + j])``

    Args:
        x: ``[B, C r², H, W]``, floating point.
        r: upscale factor, at least 1.
        bias: ``[C r²]`` in x's dtype, or None.
        approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.

    Returns:
        ``[B, C, H r, W r]`` in x's dtype.
    """
    if bias is not None:
        x = x + bias.view(-1, 1, 1)
    return F.gelu(F.pixel_shuffle(x, r), approximate=approximate)


def pixel_shuffle_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, r: int, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of :func:`pixel_shuffle_gelu`, as PyTorch operations.

    ``dx = unshuffle(dy) · GELU'(x + bias)`` and ``dbias = Σ_{b, h, w} dx``

    Args:
        dy: gradient of the output, ``[B, C, H r, W r]`` in x's dtype.
        x: as in the forward pass.
        r: as in the forward pass.
        bias: as in the forward pass.
        approximate: as in the forward pass.

    Returns:
        ``(dx, dbias)``: ``[B, C r², H, W]`` and ``[C r²]`` (None without a bias), in x's dtype.
    """
    z = x if bias is None else x + bias.view(-1, 1, 1)
    dx = torch.ops.aten.gelu_backward(F.pixel_unshuffle(dy, r), z, approximate=approximate)
    return dx, None if bias is None else dx.sum(dim=(0, 2, 3))
