"""One training step, made of operations on tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._concurrent import side_by_side
from .._device import autocast_dtype
from ..models import VideoNetwork
from .clip import Clip
from .master_weights import MasterWeights
from .quantization import Quantization

__all__ = ["TrainingStep", "use_device_lr"]


def use_device_lr(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Turn the learning rate of each group into a tensor ``lr`` on the device; its value stays in ``initial_lr``."""
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        group["lr"] = torch.tensor(group["initial_lr"], dtype=torch.float32, device=device)


class _Objective(nn.Module):
    """The mean squared error of each frame, as a module whose weights can be replaced for a call."""

    def __init__(self, model: VideoNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, index: Tensor, clip: Clip, quantization: Quantization | None) -> Tensor:
        frames = clip.select(index)
        inputs = clip.inputs(index, frames)
        embeddings = None if inputs is None else self.model.embed(inputs)
        if quantization is not None and embeddings is not None:
            embeddings = quantization.round_embeddings(embeddings)
        return self.model.distortion(embeddings, index, frames)


class TrainingStep:
    """Forward, loss, backward, optimisers, learning rate, error: everything between two steps of the host.

    What changes from step to step is on the device: the number of the step, from which follow the frames of the batch
    and the learning rate, and the errors of the epoch. Nothing is read back and no Python value differs from one call
    to the next, so that a call can be captured in a CUDA graph and replayed (see :mod:`.graph`). On the CPU the very
    same function runs as it is.

    Args:
        model: the network, on its device.
        clip: the frames, on the same device.
        optimizers: as :func:`use_device_lr` left them.
        scaler: scales the loss of fp16.
        precision: compute type of the forward and backward passes, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        orders: int64 ``[steps, B]`` on the device, the frames of each step of the run.
        factors: float32 ``[steps]`` on the device, the factor on the learning rates at each step.
        steps_per_epoch: after how many steps :attr:`errors` is written anew.

    Attributes:
        errors: float32 ``[steps_per_epoch, B]``, the mean squared error of each frame of the running epoch.
        quantization: how weights and embeddings are quantised in the step; None while they are not. A step that was
            captured before it is set goes on without.
        concurrent: whether independent parts of the step run side by side on a GPU.
    """

    def __init__(
        self,
        model: VideoNetwork,
        clip: Clip,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        *,
        precision: str,
        orders: Tensor,
        factors: Tensor,
        steps_per_epoch: int,
    ) -> None:
        self.model = model
        self.clip = clip
        self.optimizers = tuple(optimizers)
        self.scaler = scaler
        self.errors = torch.zeros(steps_per_epoch, orders.shape[1], dtype=torch.float32, device=orders.device)
        self.quantization: Quantization | None = None
        self.concurrent = True
        self._objective = _Objective(model)
        self._dtype = autocast_dtype(precision)
        self._master_weights = None if self._dtype is None else MasterWeights(self._objective, self._dtype)
        self._orders = orders
        self._factors = factors
        self._steps_per_epoch = steps_per_epoch
        self._number = torch.zeros(1, dtype=torch.int64, device=orders.device)

    def seek(self, number: int) -> None:
        """Make ``number`` the next step; 0 is the first."""
        self._number.fill_(number)

    def __call__(self) -> None:
        """Take the next step."""
        with side_by_side() if self.concurrent else nullcontext():
            self._take()
        self._number.add_(1)

    def _take(self) -> None:
        index = self._orders.index_select(0, self._number)[0]
        self._set_lr()
        if self.quantization is not None:
            self.quantization.round_weights()
        # Kept until the gradients are taken, as concurrent streams ask for.
        weights = {} if self._master_weights is None else self._master_weights.cast()
        errors = self._errors(index, weights)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(errors.mean()).backward()
        if self.quantization is not None:
            self.quantization.restore_weights()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.errors.index_copy_(0, self._number % self._steps_per_epoch, errors.detach()[None])

    def _errors(self, index: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return the mean squared error of each frame, with these weights in place of the network's own."""
        # A cast that autocast kept from another step would be of weights that have changed since.
        with torch.autocast(index.device.type, dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            arguments = index, self.clip, self.quantization
            errors: Tensor = (
                functional_call(self._objective, weights, arguments) if weights else self._objective(*arguments)
            )
            return errors

    def _set_lr(self) -> None:
        factor = self._factors.index_select(0, self._number)[0]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                torch.mul(factor, group["initial_lr"], out=group["lr"])
