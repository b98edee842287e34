"""The sinusoidal encoding of the frame time (paper, Eq. 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .spec import TimeSpec

__all__ = ["TimeEncoding"]


class TimeEncoding(nn.Module):
    """Encodes the time of frames.

    ``[sin(b^0 pi t), cos(b^0 pi t), ..., sin(b^(l-1) pi t), cos(b^(l-1) pi t)]``, Eq. (1) of the paper, with
    ``t = (first + i) / frames`` for frame ``i``: ``first = 1`` gives the paper's t in (0, 1], ``first = 0`` the
    index / T of the HNeRV and NVR-RRCP code.

    Computed in float64, since at level 79 the argument is 10^8 and float32 would be noise.

    Args:
        spec: base, levels and first.
        frames: number of frames T.
        cached: keep the table of all frames as a buffer, so that a training step makes no host computation. Without
            it each call computes the rows it needs, and a header alone makes no allocation.
    """

    table: Tensor | None

    def __init__(self, spec: TimeSpec, frames: int, *, cached: bool) -> None:
        super().__init__()
        self.spec = spec
        self.frames = frames
        table = self._rows(np.arange(frames)) if cached else None
        self.register_buffer("table", table, persistent=False)

    def _rows(self, index: np.ndarray) -> Tensor:
        t = (index.astype(np.float64) + self.spec.first) / self.frames
        angle = t[:, None] * (self.spec.base ** np.arange(self.spec.levels, dtype=np.float64) * np.pi)
        rows = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(index), 2 * self.spec.levels)
        return torch.from_numpy(rows.astype(np.float32))

    def forward(self, index: Tensor) -> Tensor:
        """Return float32 ``[B, 2 * levels]`` for frame indices ``[B]``."""
        if self.table is not None:
            return self.table[index]
        return self._rows(index.cpu().numpy()).to(index.device)
