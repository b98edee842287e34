"""A training step on the CPU, from frames to updated weights: the trainer against the same network in plain PyTorch.

With the optimiser and the batch of each preset; that of ``best`` is a step before its quantised epochs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hflfnerv._device import training_precision
from hflfnerv._memory import keep_freed_memory
from hflfnerv.codec.benchmark import eager_step
from hflfnerv.config import PRESETS, TrainingDefaults
from hflfnerv.models import MODELS, VideoNetwork, build_model
from hflfnerv.train import Clip, TrainConfig, Trainer

from ..registry import Contender, Point, suite

# Parameters, height and width.
SIZES = [(150_000, 160, 320), (1_500_000, 640, 1280)]
FRAMES = 16
EPOCHS = 200  # more steps than the clock will take
BASELINE = "PyTorch, eager float32"
CPU = torch.device("cpu")


@suite("train_cpu")
def points() -> Iterable[Point]:
    """Yield every network at every size."""
    keep_freed_memory()  # as the command line does
    for size, height, width in SIZES:
        for name, network in MODELS.items():
            for preset in PRESETS:
                torch.manual_seed(0)
                spec = network.plan(size, FRAMES, height, width, preset=preset)
                yield _point(name, build_model(spec), size, preset)


def _clip(network: VideoNetwork, used: TrainingDefaults) -> Clip:
    shape = (FRAMES, network.spec.height, network.spec.width, 3)
    highpass = torch.randn(shape).half() if used.encoder_input == "highpass" else None
    return Clip(torch.randint(0, 256, shape, dtype=torch.uint8), highpass, used.encoder_input)


def _trainer(network: VideoNetwork, clip: Clip, used: TrainingDefaults, precision: str) -> Trainer:
    model = build_model(network.spec)
    model.load_state_dict(network.state_dict())
    config = TrainConfig(EPOCHS, used.lr, used.batch_size, 0, precision, used.optimizer)
    return Trainer(model, clip, config, device=CPU)


def _point(name: str, network: VideoNetwork, size: int, preset: str) -> Point:
    used = PRESETS[preset][name]
    batch = used.batch_size
    auto = training_precision("auto", CPU)
    clip = _clip(network, used)
    trainers = {precision: _trainer(network, clip, used, precision) for precision in dict.fromkeys((auto, "fp32"))}
    spec, threads = network.spec, torch.get_num_threads()

    def check() -> None:
        for trainer in trainers.values():
            trainer.training_step()
        # The first step's errors are those of the initial weights, alike in all precisions: means over a whole frame,
        # in which the rounding errors of its pixels, each up to 2^-8, average out.
        first = {precision: trainer.training_step.errors[0] for precision, trainer in trainers.items()}
        torch.testing.assert_close(first[auto], first["fp32"], rtol=2**-8, atol=0)

    return Point(
        what="train",
        data=f"{name} {size / 1e6:g}M {preset}, {spec.height} x {spec.width}, batch {batch}",
        dtype=auto,
        shape=(batch, 3, spec.height, spec.width),
        unit="steps/s",
        scale=1,
        contenders=[
            *(
                Contender(f"hflfnerv {precision}", trainer.training_step, 1, f"{threads} threads")
                for precision, trainer in trainers.items()
            ),
            Contender(BASELINE, eager_step(network, CPU, preset), 1, f"{threads} threads"),
        ],
        baseline=BASELINE,
        check=check,
        facts={"preset": preset, "optimizer": used.optimizer, "threads": threads},
    )
