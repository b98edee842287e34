"""Training: the clip on the device, the steps, the checkpoints."""

from __future__ import annotations

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .clip import Clip, embed_all, prepare_clip
from .graph import CapturedStep
from .muon import Muon
from .quantization import EMBEDDINGS, Quantization, QuantizationConfig, StepChooser, fake_quantize
from .schedule import SCHEDULES, learning_rate_factor
from .trainer import EpochResult, TrainConfig, Trainer

__all__ = [
    "EMBEDDINGS",
    "SCHEDULES",
    "CapturedStep",
    "Checkpoint",
    "Clip",
    "EpochResult",
    "Muon",
    "Quantization",
    "QuantizationConfig",
    "StepChooser",
    "TrainConfig",
    "Trainer",
    "embed_all",
    "fake_quantize",
    "learning_rate_factor",
    "load_checkpoint",
    "prepare_clip",
    "save_checkpoint",
]
