"""Whole networks at 1.5 M parameters and 640x1280: decoding, and the training step."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hflfnerv.codec.benchmark import plain_optimizers
from hflfnerv.codec.engine_cuda import CudaEngine
from hflfnerv.config import PRESETS, TrainingDefaults
from hflfnerv.models import VideoNetwork, build_model
from hflfnerv.models.convnext import use_pytorch
from hflfnerv.models.hflf import HFLFNeRV
from hflfnerv.models.hnerv import HNeRV
from hflfnerv.models.streams import use_implementation
from hflfnerv.ops import PackedWeights
from hflfnerv.train import CapturedStep, Clip, TrainConfig, Trainer

from .device import Machine, require_close, without_autotuning
from .encode import EPOCHS as ENCODE_EPOCHS
from .registry import Contender, Point

FRAMES = 132
BATCHES = (8, 1, 32)
LAUNCHED = "eager fp32, launched"
COMPILED = "torch.compile max-autotune bf16"
COMPILED_BY_DEFAULT = "torch.compile bf16"
ENGINE, ENGINE_TO_HOST = "Decoder's engine fp16", "Decoder's engine fp16, to the host"
ENGINE_INT8 = "Decoder's engine int8"
TRAINER = "Trainer bf16"
TRAINER_ON_ONE_STREAM = "Trainer bf16, on one stream"


def network_of(
    machine: Machine, model: type[VideoNetwork], *, with_encoder: bool, preset: str = "paper"
) -> VideoNetwork:
    size, frames, height, width = machine.shape((1_500_000, FRAMES, 640, 1280), (100_000, 8, 96, 160))
    torch.manual_seed(1)
    # With the encoder comes the table of the time encoding, without which a graph cannot be captured: rows of it are
    # computed on the host.
    network = build_model(model.plan(size, frames, height, width, preset=preset), with_encoder=True)
    if not with_encoder:
        network.encoder = None
    return network.to(machine.device)


def _with(network: VideoNetwork, impl: str, dtype: torch.dtype = torch.float32) -> VideoNetwork:
    """Return a copy in a dtype, channels-last, whose blocks use one implementation; "reference" is all PyTorch's."""
    network = copy.deepcopy(network).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_implementation(network, impl)
    if impl == "reference":
        use_pytorch(network)
    return network


def _named(machine: Machine) -> Iterator[tuple[str, type[VideoNetwork], int]]:
    for batch in BATCHES if not machine.dry else (2,):
        for model in (HNeRV, HFLFNeRV):
            yield f"{model.name} 1.5M, 640x1280, batch {batch}", model, batch


@contextlib.contextmanager
def captured_or_failed() -> Iterator[None]:
    """Make an error of the warning that something goes on without the CUDA graph that is to be measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph", category=RuntimeWarning)
        yield


def decode_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure decoding, from embeddings to float frames that stay on the device."""
    for name, model, batch in _named(machine):
        if machine.wants(name, seconds=90):
            with machine.room(name), torch.inference_mode(), PackedWeights():
                yield from _measure_decode(machine, name, model, batch)


def _measure_decode(machine: Machine, name: str, model: type[VideoNetwork], batch: int) -> Iterator[dict[str, Any]]:
    network = network_of(machine, model, with_encoder=False)
    shape = network.spec.embedding_shape
    assert shape is not None
    embeddings = torch.randn(batch, *shape, device=machine.device)
    index = torch.arange(batch, device=machine.device) % network.spec.frames

    def run(impl: str, dtype: torch.dtype, frames: int = batch) -> Callable[[], torch.Tensor]:
        of, cast = _with(network, impl, dtype), embeddings.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: of.decode(cast[:frames], index[:frames])

    def compiled(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        of, cast = (
            _with(network, "reference", dtype),
            embeddings.to(dtype).contiguous(memory_format=torch.channels_last),
        )
        decode = machine.compile(of.decode)
        return lambda: decode(cast, index)

    bf16, fp16 = torch.bfloat16, torch.float16
    eager = run("reference", torch.float32)
    runs: dict[str, tuple[torch.dtype, Callable[[], torch.Tensor]]] = {"auto bf16": (bf16, run("auto", bf16))}
    if not machine.dry:
        runs["auto fp16"] = fp16, run("auto", fp16)
        runs["conv2d+triton bf16"] = bf16, run("conv2d+triton", bf16)
    runs["eager bf16"] = bf16, run("reference", bf16)
    runs[COMPILED] = bf16, compiled(bf16)

    # To uint8, as a decoder is used; the others stop at floats.
    values = torch.randn(network.spec.frames, *shape)
    engine, in_int8 = (
        CudaEngine(copy.deepcopy(network), lambda wanted: values[list(wanted)], machine.device, precision)
        for precision in ("fp16", "int8")
    )
    engine.batch_size = in_int8.batch_size = batch
    wanted = [frame % network.spec.frames for frame in range(batch)]
    on_host = np.empty((batch, network.spec.height, network.spec.width, 3), np.uint8)

    def check() -> None:
        with machine.trying(ENGINE), captured_or_failed():
            images = torch.stack(list(engine.float_frames(wanted[:2]))).clamp(0, 1) * 255
            frames = engine.device_frames(wanted)[:2].cpu().permute(0, 3, 1, 2)
            assert float((images - frames).abs().max()) < 2, f"{name}: the engine's frames are not its images"
        with machine.trying(ENGINE_INT8), captured_or_failed():
            frames, rounded = (of.device_frames(wanted)[:2].float() for of in (engine, in_int8))
            distance = float((frames - rounded).square().mean().sqrt())
            assert distance <= 4, f"{name}: frames in int8 are {distance:.1f} levels away from those in float16"
        with machine.trying(ENGINE_TO_HOST), captured_or_failed():
            engine.fill(wanted, on_host)
            copied = torch.equal(engine.device_frames(wanted).cpu(), torch.from_numpy(on_host))
            assert copied, f"{name}: the copy differs"
        # Frames do not depend on each other, and float64 takes its time.
        with without_autotuning():
            expected = run("reference", torch.float64, 2)()
        same = {dtype: run("reference", dtype, 2)() for dtype in (bf16, fp16)}
        for run_name, (dtype, of) in runs.items():
            with machine.trying(run_name):
                frames = of()
                assert frames.isfinite().all(), f"{name}, {run_name}: not finite"
                require_close(f"{name}, {run_name}", frames[:2], expected, same[dtype])

    point = Point(
        what="decode",
        data=name,
        dtype="bfloat16",
        shape=embeddings.shape,
        unit="frames/s",
        scale=1.0,
        contenders=[
            *(Contender(run_name, of, batch) for run_name, (_, of) in runs.items()),
            Contender(ENGINE, lambda: engine.device_frames(wanted), batch, "uint8 frames, which stay on the device"),
            Contender(ENGINE_INT8, lambda: in_int8.device_frames(wanted), batch, "uint8 frames, on the device; INT8"),
            Contender(ENGINE_TO_HOST, lambda: engine.fill(wanted, on_host), batch, "uint8 frames in host memory"),
            Contender("eager fp32", eager, batch, "TF32 convolutions as PyTorch's default"),
            Contender(LAUNCHED, eager, batch, "without a CUDA graph; TF32 convolutions as PyTorch's default"),
        ],
        baseline=COMPILED,
        check=check,
    )
    yield from machine.measure(point, launched=(LAUNCHED, ENGINE, ENGINE_INT8, ENGINE_TO_HOST), flush=False)


def settings_of_best() -> Iterator[tuple[type[VideoNetwork], TrainingDefaults]]:
    """Yield both networks with the settings of a whole encode, and then with those of short training."""
    for model in (HNeRV, HFLFNeRV):
        yield model, PRESETS["best"][model.name].for_clip(ENCODE_EPOCHS, (FRAMES, 640, 1280))
    for model in (HNeRV, HFLFNeRV):
        yield model, PRESETS["best"][model.name]


def training_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure forward, backward and the optimiser on frames that are on the device, the encoder included.

    The networks of ``paper``, with Adam, in every batch; those of ``best``, with Muon, in the batches of short and of
    long training.
    """
    points = [(name, model, batch, "paper") for name, model, batch in _named(machine)]
    for model, used in settings_of_best():
        batch = used.batch_size
        points.append((f"{model.name} 1.5M best, 640x1280, batch {batch}", model, batch, "best"))
    for name, model, batch, preset in points[::3] if machine.dry else points:  # a dry run has time for two
        if machine.wants(name, seconds=120):
            with machine.room(name):
                yield from _measure_training(machine, name, model, batch, preset)


def _measure_training(
    machine: Machine, name: str, model: type[VideoNetwork], batch: int, preset: str
) -> Iterator[dict[str, Any]]:
    network = network_of(machine, model, with_encoder=True, preset=preset)
    spec, used = network.spec, PRESETS[preset][model.name]
    x, target = (torch.rand(batch, 3, spec.height, spec.width, device=machine.device) for _ in range(2))
    x, target = (t.contiguous(memory_format=torch.channels_last) for t in (x, target))
    index = torch.arange(batch, device=machine.device) % spec.frames

    class Trainee:
        def __init__(self, impl: str, autocast: torch.dtype | None, *, mode: str | None = None) -> None:
            self.network = _with(network, impl)
            self.autocast = autocast
            self.forward = self.network if mode is None else machine.compile(self.network, mode)
            self.parameters = [p for p in self.network.parameters() if p.requires_grad]
            self.optimizers = plain_optimizers(self.network, used, fused=True, capturable=not machine.dry)

        def differentiate(self) -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            # A cast kept from before the capture of a graph would be of weights that have changed since.
            with torch.autocast(
                machine.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
            ):
                frames = self.forward(x, index)
            F.mse_loss(frames.float(), target).backward()

        def gradients(self) -> torch.Tensor:
            self.differentiate()
            return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

        def step(self) -> None:
            self.differentiate()
            for optimizer in self.optimizers:
                optimizer.step()

    bf16 = torch.bfloat16
    trainees = {"auto bf16": Trainee("auto", bf16)}
    if not machine.dry:
        trainees["conv2d+triton bf16"] = Trainee("conv2d+triton", bf16)
        trainees["triton bf16"] = Trainee("triton", bf16)
    trainees["eager bf16"] = Trainee("reference", bf16)
    trainees[COMPILED_BY_DEFAULT] = Trainee("reference", bf16, mode="default")
    trainees[COMPILED] = Trainee("reference", bf16, mode="max-autotune")
    eager = Trainee("reference", None)
    own_step, in_turn = (trainers_step(machine, network, batch, used, concurrent=each) for each in (True, False))

    def check() -> None:
        expected, same = eager.gradients(), trainees["eager bf16"].gradients()
        for trainee_name, trainee in trainees.items():
            with machine.trying(trainee_name):
                require_close(f"{name}, gradients of {trainee_name}", trainee.gradients(), expected, same)

    point = Point(
        what="training_step",
        data=name,
        dtype="bfloat16",
        shape=x.shape,
        unit="frames/s",
        scale=1.0,
        contenders=[
            *(Contender(trainee_name, trainee.step, batch) for trainee_name, trainee in trainees.items()),
            Contender(TRAINER, own_step, batch, "with the choice of frames, the schedule and the fused loss"),
            Contender(TRAINER_ON_ONE_STREAM, in_turn, batch, "likewise"),
            Contender("eager fp32", eager.step, batch, "TF32 convolutions as PyTorch's default"),
            Contender(LAUNCHED, eager.step, batch, "without a CUDA graph; TF32 convolutions as PyTorch's default"),
        ],
        baseline=COMPILED,
        check=check,
    )
    with captured_or_failed():
        rows = machine.measure(point, launched=(LAUNCHED, TRAINER, TRAINER_ON_ONE_STREAM), flush=False)
    yield from rows


def trainers_step(
    machine: Machine,
    network: VideoNetwork,
    batch: int,
    used: TrainingDefaults,
    *,
    captured: bool = True,
    concurrent: bool = True,
) -> Callable[[], None]:
    """Return the step that ``hflfnerv encode`` takes, where there is CUDA as a CUDA graph unless told otherwise."""
    spec = network.spec
    shape = (4 * batch, spec.height, spec.width, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=machine.device)
    highpass = torch.randn(shape, device=machine.device).half() if used.encoder_input == "highpass" else None
    clip = Clip(frames, highpass, used.encoder_input)
    # More steps than the clock will take.
    config = TrainConfig(2000, used.lr, batch, 0, "bf16", used.optimizer, used.schedule, weight_decay=used.weight_decay)
    step = Trainer(copy.deepcopy(network), clip, config, device=machine.device).training_step
    step.concurrent = concurrent
    return CapturedStep(step, machine.device) if captured and not machine.dry else step
