"""The learning-rate schedules: that of the NeRV code bases, and a linear one."""

from __future__ import annotations

import math

from ..config import SCHEDULES

__all__ = ["SCHEDULES", "learning_rate_factor"]


def learning_rate_factor(
    progress: float, schedule: str = "cosine", *, warmup: float = 0.1, start: float = 0.1
) -> float:
    """Return the factor on the learning rate: linear warm-up, then down to zero.

    Args:
        progress: part of all steps already done, in [0, 1).
        schedule: ``"cosine"``, as in the NeRV code bases, or ``"linear"``.
        warmup: part of the steps over which the factor rises.
        start: the factor at the first step.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if progress < warmup:
        return start + (1.0 - start) * progress / warmup
    rest = (progress - warmup) / (1.0 - warmup)
    return 1.0 - rest if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
