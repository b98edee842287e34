"""One training step, made of operations on tensors alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._concurrent import concurrently, side_by_side
from .._device import autocast_dtype
from ..models import VideoNetwork
from .clip import Clip
from .master_weights import MasterWeights
from .muon import Muon
from .quantization import Quantization

__all__ = ["TrainingStep", "use_device_lr"]


def use_device_lr(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Turn the learning rate of each group into a tensor ``lr`` on the device; its value stays in ``initial_lr``."""
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        group["lr"] = torch.tensor(group["initial_lr"], dtype=torch.float32, device=device)


class _Part(nn.Module):
    """A method of the network as a module whose weights can be replaced for a call."""

    def __init__(self, model: VideoNetwork, method: str) -> None:
        super().__init__()
        self.model = model
        self._method = method

    def forward(self, *arguments: Tensor | None) -> Tensor:
        result: Tensor = getattr(self.model, self._method)(*arguments)
        return result


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
        self._embed, self._compare = _Part(model, "embed"), _Part(model, "distortion")
        self._dtype = autocast_dtype(precision)
        self._master_weights = None
        if self._dtype is not None:
            self._master_weights = MasterWeights(self._embed, self._dtype, apart="model.encoder.")
        self._behind_embeddings = list(model.coded_parameters().values())
        batch = orders.shape[1]
        self._shares = torch.full((batch,), 1.0 / batch, dtype=torch.float32, device=orders.device)  # in the mean error
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
        frames = self.clip.select(index)
        inputs = self.clip.inputs(index, frames)
        embeddings = None if inputs is None else self._call(self._embed, weights, inputs)
        if embeddings is not None and self.quantization is not None:
            embeddings = self.quantization.round_embeddings(embeddings)
        # The gradients stop at the embeddings first.
        leaf = None if embeddings is None else embeddings.detach().requires_grad_()
        errors = self._errors(weights, leaf, index, frames)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(errors).backward(self._shares)
        if embeddings is not None and leaf is not None:
            self._go_on(embeddings, leaf)
        if self.quantization is not None:
            self.quantization.restore_weights()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.errors.index_copy_(0, self._number % self._steps_per_epoch, errors.detach()[None])

    def _errors(self, weights: dict[str, Tensor], embeddings: Tensor | None, index: Tensor, frames: Tensor) -> Tensor:
        """Return the mean squared error of each frame."""
        return self._call(self._compare, weights, embeddings, index, frames)

    def _call(self, part: _Part, weights: dict[str, Tensor], *arguments: Tensor | None) -> Tensor:
        """Call a part of the network with these weights in place of its own."""
        # A cast that autocast kept from another step would be of weights that have changed since.
        device = self.errors.device.type
        with torch.autocast(device, dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            result: Tensor = functional_call(part, weights, arguments) if weights else part(*arguments)
            return result

    def _go_on(self, embeddings: Tensor, leaf: Tensor) -> None:
        """Take the encoder's gradients; beside its small kernels there is room for what Muon does to the decoder's."""
        calls: list[functools.partial[Any]] = [functools.partial(embeddings.backward, leaf.grad)]
        if not self.scaler.is_enabled():  # which may still find that a step is none
            muons = [optimizer for optimizer in self.optimizers if isinstance(optimizer, Muon)]
            calls += [functools.partial(optimizer.prepare, self._behind_embeddings) for optimizer in muons]
        concurrently(*calls)

    def _set_lr(self) -> None:
        factor = self._factors.index_select(0, self._number)[0]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                torch.mul(factor, group["initial_lr"], out=group["lr"])
