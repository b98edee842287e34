"""Definition of ``highpass``."""

from __future__ import annotations

import torch

__all__ = ["highpass", "highpass_mask", "removed_frequencies"]


def removed_frequencies(size: int, removed: float) -> int:
    """Return ``n``: on an axis of ``size`` samples the frequencies ``-n … n - 1`` are removed."""
    return int(removed * (size // 2))


def highpass_mask(height: int, width: int, removed: float, *, device: torch.device | None = None) -> torch.Tensor:
    """Return the bool mask ``[H, W]`` of the frequencies that stay, in the order of ``torch.fft.fft2`` (unshifted).

    It is written down in the shifted layout, where frequency 0 is at ``(H // 2, W // 2)``: a rectangle of
    ``2 int(removed (H // 2))`` rows by ``2 int(removed (W // 2))`` columns is taken out, from
    ``H // 2 - int(removed (H // 2))`` and ``W // 2 - int(removed (W // 2))`` on.
    """
    row, column = removed_frequencies(height, removed), removed_frequencies(width, removed)
    mask = torch.ones(height, width, dtype=torch.bool, device=device)
    mask[height // 2 - row : height // 2 + row, width // 2 - column : width // 2 + column] = False
    unshifted: torch.Tensor = torch.fft.ifftshift(mask)
    return unshifted


def highpass(x: torch.Tensor, removed: float = 0.8) -> torch.Tensor:
    """Zero a rectangle of low frequencies of each image (arXiv 2409.18497, the input of the encoder).

    ``y = Re(ifft2(mask · fft2(x)))``

    Args:
        x: ``[..., H, W]``, float32 or float64.
        removed: share of the bandwidth to remove on each axis, in [0, 1].

    Returns:
        ``[..., H, W]`` in x's dtype.
    """
    mask = highpass_mask(x.shape[-2], x.shape[-1], removed, device=x.device)
    y: torch.Tensor = torch.fft.ifft2(torch.fft.fft2(x) * mask).real
    return y
