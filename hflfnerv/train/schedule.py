"""The learning-rate schedule of the NeRV code bases."""

from __future__ import annotations

import math

__all__ = ["learning_rate_factor"]


def learning_rate_factor(progress: float, *, warmup: float = 0.1, start: float = 0.1) -> float:
    """Return the factor on the learning rate: linear warm-up, then cosine to zero.

    Args:
        progress: part of all steps already done, in [0, 1).
        warmup: part of the steps over which the factor rises.
        start: the factor at the first step.
    """
    if progress < warmup:
        return start + (1.0 - start) * progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
