"""Fits a network to one video."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._atomic import check_writable
from .._device import autocast_dtype
from ..errors import CheckpointError, TrainingDiverged, TrainingInterrupted
from ..models import VideoNetwork
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .clip import Clip
from .schedule import learning_rate_factor

__all__ = ["EpochResult", "TrainConfig", "Trainer"]

_CHECKPOINT_NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a training run; two runs with equal ones on the same clip and machine end bit-identical.

    Attributes:
        epochs: passes over the frames.
        lr: peak learning rate.
        batch_size: frames a step; an incomplete last batch is dropped, as in the published code.
        seed: seed of the frame order.
        precision: compute type of forward and backward, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    precision: str = "fp32"


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its number from 1, mean PSNR of its own predictions in dB, learning rate at its end, seconds."""

    epoch: int
    psnr_db: float
    lr: float
    seconds: float


class Trainer:
    """Adam on the mean squared error, with the schedule of the paper and exact resume.

    The state after each step depends on the configuration, the clip and the step number alone: the order of an epoch
    comes from ``(seed, epoch)``, and a checkpoint holds model, optimiser and random state.

    Args:
        model: the network, encoder included.
        clip: frames and encoder inputs.
        config: the run's numbers.
        device: where to train; model and clip are moved there.
        workdir: folder of the checkpoint; None for none.
        checkpoint_seconds: time between checkpoints; 0 for one after every epoch.

    Raises:
        CheckpointError: ``workdir`` holds another run's checkpoint, or a damaged one.
        OSError: ``workdir`` cannot be written.
    """

    def __init__(
        self,
        model: VideoNetwork,
        clip: Clip,
        config: TrainConfig,
        *,
        device: torch.device,
        workdir: Path | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        self.config = config
        self.device = device
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.clip = clip.to(device)
        self.batch_size = min(config.batch_size, len(clip))
        self.steps_per_epoch = len(clip) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step = 0
        self.history: list[EpochResult] = []
        self.resumed_from = 0
        self._epoch_errors: list[Tensor] = []
        self._epoch_seconds = 0.0
        self._path = None if workdir is None else Path(workdir) / _CHECKPOINT_NAME
        self._checkpoint_seconds = checkpoint_seconds
        self._random_state: dict[str, Tensor] = {}
        self._fingerprint: dict[str, Any] = {}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(self._path)
            # What a checkpoint must share with this run. Hashing the clip is for checkpoints alone.
            self._fingerprint = {"model": model.spec.to_dict(), "train": vars(config), "clip": clip.digest()}
            if self._path.exists():
                self._restore(load_checkpoint(self._path))

    def run(self, on_step: Callable[[Trainer], None] | None = None) -> None:
        """Train to the last epoch, from wherever the checkpoint left off.

        SIGINT and SIGTERM let the current step end, write a checkpoint and raise :class:`TrainingInterrupted`; a second
        SIGINT raises ``KeyboardInterrupt`` at once.

        Raises:
            TrainingInterrupted: stopped by a signal.
            TrainingDiverged: the loss is not finite.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _stop_signals() as stopped:
            self._seed_or_restore_random_state()
            saved = time.monotonic()
            order: Tensor | None = None
            while self.step < self.total_steps:
                epoch, position = divmod(self.step, self.steps_per_epoch)
                if order is None or position == 0:
                    order = self._order(epoch)
                started = time.perf_counter()
                lr = self._train_step(order[position * self.batch_size : (position + 1) * self.batch_size])
                self._epoch_seconds += time.perf_counter() - started
                self.step += 1
                if position + 1 == self.steps_per_epoch:
                    self._end_epoch(epoch, lr)
                    if time.monotonic() - saved >= self._checkpoint_seconds and self.step < self.total_steps:
                        self._save()
                        saved = time.monotonic()
                if on_step is not None:
                    on_step(self)
                if stopped() and self.step < self.total_steps:
                    self._save()
                    where = "no checkpoint was kept (no workdir)" if self._path is None else f"saved in {self._path}"
                    raise TrainingInterrupted(
                        f"stopped in epoch {self.step // self.steps_per_epoch + 1} of {self.config.epochs}, {where}"
                    )
            self._save()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.config.seed << 32) + epoch)
        return torch.randperm(len(self.clip), generator=generator).to(self.device)

    def _train_step(self, index: Tensor) -> float:
        lr = self.config.lr * learning_rate_factor(self.step / self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        targets = self.clip.targets(index)
        dtype = autocast_dtype(self.config.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(self.clip.inputs(index), index)
        errors = F.mse_loss(output.float(), targets, reduction="none").flatten(1).mean(1)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(errors.mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._epoch_errors.append(errors.detach())
        return lr

    def _end_epoch(self, epoch: int, lr: float) -> None:
        errors = torch.cat(self._epoch_errors).double()
        psnr_db = float((-10.0 * torch.log10(errors + 1e-9)).mean())
        if not math.isfinite(psnr_db):
            raise TrainingDiverged(
                f"the loss is not finite in epoch {epoch + 1}: lower the learning rate (--lr, now {self.config.lr}) "
                "or use --precision fp32"
            )
        self.history.append(EpochResult(epoch + 1, psnr_db, lr, self._epoch_seconds))
        self._epoch_errors, self._epoch_seconds = [], 0.0

    def _seed_or_restore_random_state(self) -> None:
        if not self._random_state:
            torch.manual_seed(self.config.seed)
            return
        torch.set_rng_state(self._random_state["cpu"])
        if self.device.type == "cuda" and "cuda" in self._random_state:
            torch.cuda.set_rng_state(self._random_state["cuda"], self.device)

    def _save(self) -> None:
        if self._path is None:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{key}": value for key, value in state.items()})
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self._epoch_errors:
            tensors["epoch_errors"] = torch.cat(self._epoch_errors)
        state = {
            "step": self.step,
            "fingerprint": self._fingerprint,
            "scaler": self.scaler.state_dict(),
            "epoch_seconds": self._epoch_seconds,
            "history": [list(vars(result).values()) for result in self.history],
        }
        save_checkpoint(self._path, Checkpoint(tensors, state))

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, dict(checkpoint.tensors)
        differences = _differences(state.get("fingerprint", {}), _json_like(self._fingerprint))
        if differences:
            raise CheckpointError(
                f"{self._path} belongs to another run ({'; '.join(differences)}): "
                "repeat that run's options to go on with it, delete it, or choose another --workdir"
            )
        try:
            self.model.load_state_dict(_take(tensors, "model."))
            optimizer_state: dict[int, dict[str, Tensor]] = {}
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for name, value in _take(tensors, "optimizer.").items():
                number, key = name.split(".", 1)
                parameter = parameters[int(number)]
                if value.shape == parameter.shape:
                    # Fused optimisers walk the memory: a moment must be laid out like its channels-last parameter.
                    value = torch.empty_like(parameter).copy_(value)
                optimizer_state.setdefault(int(number), {})[key] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
            self.scaler.load_state_dict(state["scaler"])
            self.step = self.resumed_from = int(state["step"])
            self.history = [EpochResult(*row) for row in state["history"]]
            self._epoch_seconds = float(state["epoch_seconds"])
            self._epoch_errors = [tensors["epoch_errors"].to(self.device)] if "epoch_errors" in tensors else []
            self._random_state = _take(tensors, "random.")
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._path} is damaged ({error}); delete it to start again") from error


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag for the block; signals reach the main thread only."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _json_like(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_like(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_like(item) for item in value]
    return value


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        path = f"{name}." if name else ""
        return [line for key in keys for line in _differences(there.get(key), here.get(key), f"{path}{key}")]
    return [] if there == here else [f"{name} is {there} there and {here} here"]
