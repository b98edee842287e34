"""How fast this machine encodes and decodes: networks with random weights, on random frames."""

from __future__ import annotations

import contextlib
import functools
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._device import training_precision
from ..config import PRESETS, TrainingDefaults
from ..models import MODELS, VideoNetwork, build_model
from ..models.convnext import use_pytorch
from ..models.streams import use_implementation
from ..train import TrainConfig, Trainer, prepare_clip
from .bitstream import write_bitstream
from .decoder import Decoder
from .encoder import make_header
from .engine import to_uint8
from .engine_cuda import CudaEngine
from .quantization import quantize, quantize_tensors

__all__ = ["PlainMuon", "eager_step", "measure", "newton_schulz", "plain_network", "plain_optimizers"]

Row = dict[str, Any]
OURS, EAGER, COMPILED = "hflfnerv", "eager fp32", "torch.compile max-autotune bf16"


def measure(
    model: str,
    size: int,
    frames: int,
    height: int,
    width: int,
    *,
    device: torch.device,
    preset: str = "best",
    precision: str = "auto",
    batches: Sequence[int] = (1, 8, 32),
    seconds: float = 1.0,
    compiled: bool = False,
) -> Iterator[Row]:
    """Measure one model: opening a file, decoding it, a training step; beside them PyTorch without our kernels.

    Decoding ends with uint8 frames in the host's memory. Rivals run the same network with PyTorch's own operations, on
    the same device and with the same last step, but leave the frames on the device.

    Args:
        model: ``"hflf"``, ``"hnerv"`` or ``"nerv"``.
        size: parameters of embeddings and decoders.
        frames: length of the video.
        height: of a frame.
        width: of a frame.
        device: where to run.
        preset: ``"best"`` or ``"paper"``: the architecture, the optimiser and the batch of a training step. That of
            ``"best"`` is one of the epochs before those with quantised weights.
        precision: ours, of decoding and of training.
        batches: numbers of frames decoded at once.
        seconds: time for each figure.
        compiled: measure torch.compile too, which takes minutes to compile.

    Yields:
        One JSON-ready row for each figure: ``what``, ``model``, ``preset``, ``implementation``, ``precision``,
        ``batch``, ``value``, ``unit`` and ``peak_memory_mb``, the process's own on a CPU and the device's on a GPU.
    """
    spec = MODELS[model].plan(size, frames, height, width, preset=preset)
    torch.manual_seed(0)
    network = build_model(spec)
    data = _file(network, preset)
    row = {"model": model, "preset": preset, "parameters": network.parameter_counts()["total"]}
    row |= {"shape": [frames, height, width]}
    row |= {"device": str(device), "threads": torch.get_num_threads()}

    def figure(what: str, implementation: str, used: str, batch: int, value: float, unit: str) -> Row:
        of = {"what": what, "implementation": implementation, "precision": used, "batch": batch}
        return row | of | {"value": value, "unit": unit, "peak_memory_mb": _peak_memory_mb(device)}

    def first_frame() -> None:
        Decoder(data, device, precision)[0]

    yield figure("open to first frame", OURS, precision, 1, _seconds(first_frame, device, seconds), "s")

    decoder = Decoder(data, device, precision)
    rivals: dict[str, Callable[[int], Callable[[], object]]] = {EAGER: _decoder_of(network, device, torch.float32)}
    if compiled:
        rivals[COMPILED] = _decoder_of(network, device, torch.bfloat16, torch.compile)
    for batch in batches:
        if isinstance(decoder.engine, CudaEngine):
            decoder.engine.batch_size = batch
        wanted = [index % frames for index in range(batch)]
        out = np.empty((batch, height, width, 3), np.uint8)
        ours = functools.partial(decoder.engine.fill, wanted, out)
        yield figure("decode", OURS, precision, batch, batch / _seconds(ours, device, seconds), "frames/s")
        for name, make in rivals.items():
            used = "fp32" if name == EAGER else "bf16"
            value = batch / _seconds(make(batch), device, seconds)
            yield figure("decode", name, used, batch, value, "frames/s")
    del decoder, rivals

    batch = PRESETS[preset][model].batch_size
    used = training_precision(precision, device)
    step_seconds = _training_step_seconds(network, device, used, preset, seconds)
    yield figure("training step", OURS, used, batch, 1 / step_seconds, "steps/s")
    eager = eager_step(network, device, preset)
    yield figure("training step", EAGER, "fp32", batch, 1 / _seconds(eager, device, seconds), "steps/s")


def _file(network: VideoNetwork, preset: str) -> bytes:
    spec = network.spec
    weights = {name: p.detach().numpy() for name, p in network.coded_parameters().items()}
    shape = spec.embedding_shape
    values = None if shape is None else np.random.default_rng(0).normal(size=(spec.frames, *shape))
    embeddings = None if values is None else quantize(values.astype(np.float32), 6)
    return write_bitstream(make_header(spec, preset=preset), quantize_tensors(weights, 8), embeddings)


def plain_network(network: VideoNetwork) -> VideoNetwork:
    """Return a copy that runs PyTorch's own operations, gradients included, in PyTorch's own memory order."""
    plain = build_model(network.spec)
    plain.load_state_dict(network.state_dict())
    use_implementation(plain, "reference")
    use_pytorch(plain)
    return plain


def _decoder_of(
    network: VideoNetwork, device: torch.device, dtype: torch.dtype, compile: Callable[..., Any] | None = None
) -> Callable[[int], Callable[[], object]]:
    plain = plain_network(network).to(device=device, dtype=dtype)
    if compile is not None:
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def frames_of(embeddings: Tensor | None, index: Tensor) -> Tensor:
        return to_uint8(plain.decode(embeddings, index))

    decode = frames_of if compile is None else compile(frames_of, mode="max-autotune", dynamic=False)

    def make(batch: int) -> Callable[[], object]:
        shape = network.spec.embedding_shape
        embeddings = None if shape is None else torch.randn(batch, *shape, device=device, dtype=dtype)
        index = torch.arange(batch, device=device) % network.spec.frames

        @torch.inference_mode()
        def run() -> object:
            return decode(embeddings, index)

        return run

    return make


def _random_frames(network: VideoNetwork, count: int) -> Tensor:
    spec = network.spec
    return torch.randint(0, 256, (count, spec.height, spec.width, 3), dtype=torch.uint8, device="cpu")


def _training_step_seconds(
    network: VideoNetwork, device: torch.device, precision: str, preset: str, seconds: float
) -> float:
    steps = 4
    model = build_model(network.spec)
    used = PRESETS[preset][network.spec.model]
    count = min(steps * used.batch_size, network.spec.frames)
    clip = prepare_clip(_random_frames(network, count), used.encoder_input, crop=None, removed=0.8)
    config = TrainConfig(1000, used.lr, used.batch_size, seed=0, precision=precision, optimizer=used.optimizer)
    trainer = Trainer(model, clip, config, device=device)
    began = time.perf_counter()

    class Enough(Exception):
        pass

    def stop(trainer: Trainer) -> None:
        # The first epochs compile, capture and fill caches.
        if len(trainer.history) > 5 and time.perf_counter() - began > seconds:
            raise Enough

    with contextlib.suppress(Enough):
        trainer.run(stop)
    return statistics.median(epoch.seconds for epoch in trainer.history[2:]) / trainer.steps_per_epoch


def eager_step(network: VideoNetwork, device: torch.device, preset: str) -> Callable[[], object]:
    """Return a training step of a plain copy in float32, as one would write it down, always of the same frames.

    The optimiser and the batch are those of the preset.
    """
    model = plain_network(network).to(device)
    used = PRESETS[preset][network.spec.model]
    optimizers = plain_optimizers(model, used)
    batch = used.batch_size
    frames = _random_frames(network, batch).permute(0, 3, 1, 2).contiguous().to(device).float() / 255
    x = None if network.encoder_input is None else frames
    index = torch.arange(batch, device=device) % network.spec.frames

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.mse_loss(model(x, index), frames).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def plain_optimizers(model: VideoNetwork, used: TrainingDefaults, **adam: Any) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a preset as one would write them down.

    Args:
        model: the network.
        used: the preset's settings.
        adam: further options of Adam.
    """
    hidden = model.hidden_weights() if used.optimizer == "muon" else []
    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in hidden)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=1e-3, **adam)]
    return [*optimizers, PlainMuon(hidden, lr=used.lr)] if hidden else optimizers


class PlainMuon(torch.optim.Optimizer):
    """Muon as its authors write it down, five Newton-Schulz steps in full: the rival of :class:`~hflfnerv.train.Muon`.

    In bfloat16 on a GPU, as theirs, and in float32 on a CPU, most of which would take longer in bfloat16.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                matrix = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.add_(newton_schulz(matrix).view_as(parameter), alpha=-group["lr"] * scale)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Orthogonalise a matrix by the steps as they are written down."""
    x: Tensor = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median time of a call after three that are not counted; at least three are."""

    def timed() -> float:
        _synchronize(device)
        began = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - began

    _reset_peak_memory(device)
    deadline = time.perf_counter() + budget
    for _ in range(3):
        timed()
        if time.perf_counter() > deadline:
            break
    times: list[float] = []
    while len(times) < 3 or time.perf_counter() < deadline:
        times.append(timed())
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
