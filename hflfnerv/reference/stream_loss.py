"""Definition of ``stream_loss`` and of its gradient."""

from __future__ import annotations

import torch

__all__ = ["stream_loss", "stream_loss_backward"]


def _parts(
    low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the error of each value that has a target, and ``tanh(low)`` and ``tanh(high)`` there."""
    dtype = torch.float64 if low.dtype == torch.float64 else torch.float32
    height, width = target.shape[1:3]
    dark = torch.tanh(low[..., :height, :width].to(dtype))
    fine = None if high is None else torch.tanh(high[..., :height, :width].to(dtype))
    image = dark * 0.5 + 0.5
    if fine is not None:
        image = image + fine
    return image - target.permute(0, 3, 1, 2).to(dtype) / 255, dark, fine


def stream_loss(low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each frame, from the images of the streams before their activations.

    ``loss[b] = Σ_{c, h, w} (image[b, c, h, w] - target[b, h, w, c] / 255)² / (3 H W)`` with
    ``image = tanh(low) / 2 + 1/2 + tanh(high)``

    Args:
        low: ``[B, 3, H', W']``, floating point, with ``H' >= H`` and ``W' >= W``; its top left is the frame.
        target: ``[B, H, W, 3]``, uint8.
        high: as ``low``, with rows and columns of its own, or None for a network of one stream.

    Returns:
        ``[B]``, float64 for float64 images and float32 otherwise.
    """
    return _parts(low, target, high)[0].square().mean(dim=(1, 2, 3))


def stream_loss_backward(
    dloss: torch.Tensor, low: torch.Tensor, target: torch.Tensor, high: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of :func:`stream_loss`.

    ``dlow = s (1 - tanh(low)²) / 2`` and ``dhigh = s (1 - tanh(high)²)`` with ``s = dloss[b] 2 error / (3 H W)`` in the
    frame and 0 outside it.

    Args:
        dloss: gradient of the losses, ``[B]``.
        low: as in the forward pass.
        target: as in the forward pass.
        high: as in the forward pass.

    Returns:
        ``(dlow, dhigh)``, shapes and dtype of the images; the second is None without ``high``.
    """
    error, dark, fine = _parts(low, target, high)
    height, width = target.shape[1:3]
    slope = error * (dloss * (2 / (3 * height * width))).view(-1, 1, 1, 1)

    dlow = torch.zeros_like(low)
    dlow[..., :height, :width] = slope * (1 - dark.square()) / 2
    if high is None or fine is None:
        return dlow, None
    dhigh = torch.zeros_like(high)
    dhigh[..., :height, :width] = slope * (1 - fine.square())
    return dlow, dhigh
