"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

# Tests run side by side (pytest -n), and threads that wait for each other on busy cores are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips and checkpoints: HFLFNERV_SHARED_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("HFLFNERV_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set HFLFNERV_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def moving_frames() -> np.ndarray:
    """A small synthetic clip, uint8 [6, 48, 64, 3]: a textured square moving over a gradient."""
    frames = np.empty((6, 48, 64, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:48, 0:64]
    for t in range(len(frames)):
        frames[t, ..., 0] = 2 * rows + 10 * t
        frames[t, ..., 1] = 3 * columns
        frames[t, ..., 2] = 128 + 60 * np.sin(rows / 3.0) * np.cos(columns / 4.0)
        frames[t, 10 + 2 * t : 26 + 2 * t, 8 + 6 * t : 24 + 6 * t] = ((rows ^ columns) % 2 * 200)[:16, :16, None]
    return frames
