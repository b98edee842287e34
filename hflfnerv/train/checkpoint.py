"""Training checkpoints: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._atomic import atomic_path
from .._optional import Lazy
from ..errors import CheckpointError

if TYPE_CHECKING:
    import safetensors
    from safetensors import torch as safetensors_torch
else:
    safetensors = Lazy("safetensors", "checkpoints")
    safetensors_torch = Lazy("safetensors.torch", "checkpoints")

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_KEY = "hflfnerv"
_VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a training run.

    Attributes:
        tensors: model, optimiser and random state by name.
        state: JSON-ready values: the step, the run's fingerprint, the history.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint; an older one at ``path`` stays until the new one is complete.

    Raises:
        OSError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {_KEY: json.dumps({"version": _VERSION, **checkpoint.state})}
    data = safetensors_torch.save(tensors, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: the file is damaged or is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(metadata[_KEY])
        version = state.pop("version")
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of hflfnerv ({error}); delete it") from error
    if version != _VERSION:
        raise CheckpointError(f"{path} has checkpoint version {version}, this program reads {_VERSION}")
    return Checkpoint(tensors, state)
