"""Fits a network to one video."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .._atomic import check_writable
from .._log_step import Levels
from ..errors import CheckpointError, TrainingDiverged, TrainingInterrupted
from ..models import VideoNetwork
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .clip import Clip
from .graph import CapturedStep
from .muon import Muon
from .quantization import Quantization, QuantizationConfig, StepChooser
from .schedule import learning_rate_factor
from .step import TrainingStep, use_device_lr

__all__ = ["EpochResult", "TrainConfig", "Trainer"]

# The learning rate of Adam beside Muon, as a part of Muon's: 2e-3 beside 0.02.
_ADAM_SHARE = 0.1
_CHECKPOINT_NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a training run; two runs with equal ones on the same clip and machine end bit-identical.

    On a GPU that is so as far as the gradients of cuDNN's convolutions are, some of which sum in no fixed order.

    Attributes:
        epochs: passes over the frames.
        lr: peak learning rate; with ``"muon"`` that of Muon.
        batch_size: frames a step; an incomplete last batch is dropped, as in the published code.
        seed: seed of the frame order.
        precision: compute type of forward and backward, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        optimizer: ``"adam"``, or ``"muon"`` for :meth:`VideoNetwork.hidden_weights` and Adam for the rest.
        schedule: how the learning rate falls, ``"cosine"`` or ``"linear"``; see :func:`learning_rate_factor`.
        quantization: how the last epochs run with quantised weights; None for none, and no steps.
        weight_decay: of Muon for the decoders' weights; an encoder's have none.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    precision: str = "fp32"
    optimizer: str = "adam"
    schedule: str = "cosine"
    quantization: QuantizationConfig | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.quantization is not None and not 0 <= self.quantization.epochs <= self.epochs:
            raise ValueError(f"quantization.epochs must be in 0..{self.epochs}, got {self.quantization.epochs}")
        learning_rate_factor(0.0, self.schedule)  # raises where there is no such schedule


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

    Attributes:
        training_step: takes the next step when it is called; :meth:`run` replays it as a CUDA graph on a GPU.

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
        self.optimizers = _make_optimizers(self.model, config)
        for optimizer in self.optimizers:
            use_device_lr(optimizer, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.step = 0
        self.history: list[EpochResult] = []
        self.resumed_from = 0
        factors = [self._lr_factor(step) for step in range(self.total_steps)]
        self.training_step = TrainingStep(
            self.model,
            self.clip,
            self.optimizers,
            self.scaler,
            precision=config.precision,
            orders=self._orders(),
            factors=torch.tensor(factors, dtype=torch.float32, device=device),
            steps_per_epoch=self.steps_per_epoch,
        )
        self._epoch_seconds = 0.0
        self._path = None if workdir is None else Path(workdir) / _CHECKPOINT_NAME
        self._checkpoint_seconds = checkpoint_seconds
        self._random_state: dict[str, Tensor] = {}
        self._fingerprint: dict[str, Any] = {}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(self._path)
            # What a checkpoint must share with this run. Hashing the clip is for checkpoints alone.
            self._fingerprint = {"model": model.spec.to_dict(), "train": asdict(config), "clip": clip.digest()}
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
            self.training_step.seek(self.step)
            self._quantize_if_due()
            take_step = self._taker()
            saved = started = time.monotonic()
            while self.step < self.total_steps:
                take_step()
                self.step += 1
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch(started)
                    if self._quantize_if_due():
                        take_step = self._taker()
                    if time.monotonic() - saved >= self._checkpoint_seconds and self.step < self.total_steps:
                        self._save()
                        saved = time.monotonic()
                    started = time.monotonic()
                if on_step is not None:
                    on_step(self)
                if stopped() and self.step < self.total_steps:
                    self._epoch_seconds += time.monotonic() - started
                    self._save()
                    where = "no checkpoint was kept (no workdir)" if self._path is None else f"saved in {self._path}"
                    raise TrainingInterrupted(
                        f"stopped in epoch {self.step // self.steps_per_epoch + 1} of {self.config.epochs}, {where}"
                    )
            self._save()

    def _quantize_if_due(self) -> bool:
        """Choose the steps when the first epoch with quantised weights is about to begin; return whether it was now."""
        config = self.config.quantization
        first_epoch = math.inf if config is None else self.config.epochs - config.epochs
        if self.training_step.quantization is not None or self.step < first_epoch * self.steps_per_epoch:
            return False
        assert config is not None
        levels = StepChooser(self.model, self.clip, seed=self.config.seed).choose(config)
        self.training_step.quantization = Quantization(self.model, levels)
        return True

    @property
    def levels(self) -> dict[str, Levels] | None:
        """The levels that were chosen for each coded parameter and ``"embeddings"``; None for none."""
        quantization = self.training_step.quantization
        return None if quantization is None else quantization.levels

    def _taker(self) -> Callable[[], None]:
        return self._captured_step() if self.device.type == "cuda" else self.training_step

    def _captured_step(self) -> Callable[[], None]:
        # Unless the optimiser itself looks at it, the GradScaler of fp16 reads the check of the gradients back.
        if self.scaler.is_enabled() and not all(hasattr(o, "_step_supports_amp_scaling") for o in self.optimizers):
            return self.training_step
        return CapturedStep(self.training_step, self.device)

    def _orders(self) -> Tensor:
        """Return the frames of each step, int64 ``[steps, B]``; an epoch's follow from the seed and its number."""
        orders = []
        for epoch in range(self.config.epochs):
            generator = torch.Generator().manual_seed((self.config.seed << 32) + epoch)
            order = torch.randperm(len(self.clip), generator=generator, device="cpu")
            orders.append(order[: self.steps_per_epoch * self.batch_size])
        return torch.cat(orders).view(-1, self.batch_size).to(self.device)

    def _lr_factor(self, step: int) -> float:
        return learning_rate_factor(step / self.total_steps, self.config.schedule)

    def _end_epoch(self, started: float) -> None:
        epoch = self.step // self.steps_per_epoch
        # Reading the errors waits for the device: the one place in an epoch that does.
        psnr_db = float((-10.0 * torch.log10(self.training_step.errors.double() + 1e-9)).mean())
        if not math.isfinite(psnr_db):
            raise TrainingDiverged(
                f"the loss is not finite in epoch {epoch}: lower the learning rate (--lr, now {self.config.lr}) "
                "or use --precision fp32"
            )
        lr = self.config.lr * self._lr_factor(self.step - 1)
        self.history.append(EpochResult(epoch, psnr_db, lr, self._epoch_seconds + time.monotonic() - started))
        self._epoch_seconds = 0.0

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
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{number}.{index}.{key}": value for key, value in state.items()})
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["epoch_errors"] = self.training_step.errors
        state = {
            "step": self.step,
            "fingerprint": self._fingerprint,
            "scaler": self.scaler.state_dict(),
            "epoch_seconds": self._epoch_seconds,
            "history": [list(vars(result).values()) for result in self.history],
        }
        quantization = self.training_step.quantization
        if quantization is not None:
            state["levels"] = quantization.levels
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
            for number, optimizer in enumerate(self.optimizers):
                _restore_optimizer(optimizer, _take(tensors, f"optimizer.{number}."))
            self.scaler.load_state_dict(state["scaler"])
            self.step = self.resumed_from = int(state["step"])
            self.history = [EpochResult(*row) for row in state["history"]]
            self._epoch_seconds = float(state["epoch_seconds"])
            self.training_step.errors.copy_(tensors["epoch_errors"])
            self._random_state = _take(tensors, "random.")
            if "levels" in state:
                levels = {name: Levels(*values) for name, values in state["levels"].items()}
                self.training_step.quantization = Quantization(self.model, levels)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._path} is damaged ({error}); delete it to start again") from error


def _make_optimizers(model: VideoNetwork, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers. Their learning rates become tensors on the device afterwards."""
    on_cuda = next(model.parameters()).is_cuda
    if config.optimizer == "adam":
        return [torch.optim.Adam(model.parameters(), lr=config.lr, fused=True, capturable=on_cuda)]
    muon = model.hidden_weights()
    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in muon)]
    # Smaller weights take fewer bits. Those of an encoder take none, and it learns less with smaller ones.
    coded = set(model.coded_parameters().values())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in muon if weight in coded], "weight_decay": config.weight_decay},
        {"params": [weight for weight in muon if weight not in coded]},
    ]
    return [
        Muon([group for group in groups if group["params"]], lr=config.lr),
        torch.optim.Adam(others, lr=_ADAM_SHARE * config.lr, fused=True, capturable=on_cuda),
    ]


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # Fused optimisers walk the memory: a moment must be laid out like its channels-last parameter.
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
