"""Training: the clip on the device, the steps, the checkpoints."""

from __future__ import annotations

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .clip import Clip, prepare_clip
from .graph import CapturedStep
from .muon import Muon
from .schedule import learning_rate_factor
from .trainer import EpochResult, TrainConfig, Trainer

__all__ = [
    "CapturedStep",
    "Checkpoint",
    "Clip",
    "EpochResult",
    "Muon",
    "TrainConfig",
    "Trainer",
    "learning_rate_factor",
    "load_checkpoint",
    "prepare_clip",
    "save_checkpoint",
]
