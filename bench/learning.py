"""What a network learns, by how its training steps are computed: whole encodes of few epochs, and their quality.

The same seed, frames and schedule throughout, quantised epochs included: what differs is the device, the precision, and
which operations are PyTorch's own. A kernel whose gradients are wrong shows here, and which one it is; of one step so
do the gradients of each parameter, and what is added to it. It is a part of the suite for a GPU
(``python -m bench.gpu --parts learning``), and ``python -m bench.learning`` trains on the CPU, for which the rows are
in ``bench/results/learning_cpu.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# Before torch is loaded; see hflfnerv.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor

from hflfnerv._device import exact_convolutions
from hflfnerv._impl import ImplementationTable, tables
from hflfnerv._memory import keep_freed_memory
from hflfnerv.cli._options import argument, size_hw
from hflfnerv.codec import Decoder, evaluate
from hflfnerv.codec.encoder import code, encoding_header, initial_model, training_config
from hflfnerv.config import EncodeConfig
from hflfnerv.data import Video, load_video
from hflfnerv.models import MODELS
from hflfnerv.models.convnext import use_pytorch
from hflfnerv.models.streams import use_implementation
from hflfnerv.ops import _cuda
from hflfnerv.train import Trainer, embed_all, prepare_clip

from .device import Machine
from .encode import find_clip
from .gpu import keep
from .run import RESULTS, environment

Row = dict[str, Any]
Change = Callable[[Trainer], None]
PATH = RESULTS / "learning_cpu.jsonl"
NETWORKS = ("hnerv", "hflf")
BASELINE = "PyTorch's operations, fp32"
HALF = "PyTorch's operations, bf16"
EPOCHS = 30
_CROP = 640, 1280
_STEPS = 5  # after three on a GPU one is captured, and replayed
_NOISE = 0.05
_OPERATIONS = (
    "channel_norm",
    "conv2d",
    "conv_pixel_shuffle_gelu",
    "depthwise_conv2d",
    "orthogonalise",
    "pixel_shuffle_gelu",
    "scale_residual",
    "stream_loss",
)
_LISTS = "lists"  # which have no table
_ALL = (*_OPERATIONS, _LISTS)


class Way(NamedTuple):
    """How steps are computed.

    Attributes:
        precision: of the step.
        plain: operations that are PyTorch's own.
        change: what is done to the trainer before it runs.
    """

    precision: str
    plain: tuple[str, ...] = ()
    change: Change = lambda trainer: None


def _plain(trainer: Trainer) -> None:
    use_implementation(trainer.model, "reference")
    use_pytorch(trainer.model)


def _on_one_stream(trainer: Trainer) -> None:
    trainer.training_step.concurrent = False


def _launched(trainer: Trainer) -> None:
    trainer._taker = lambda: trainer.training_step  # type: ignore[method-assign]


def ways(*, on_gpu: bool) -> dict[str, Way]:
    """Return all ways by name: the plainest first, what an encode does, and that with one thing changed."""
    found = {BASELINE: Way("fp32", _ALL, _plain), HALF: Way("bf16", _ALL, _plain)}
    found |= {"fp32": Way("fp32"), "bf16": Way("bf16")}
    if not on_gpu:
        return found
    found["bf16 on one stream"] = Way("bf16", change=_on_one_stream)
    found["bf16 without a graph"] = Way("bf16", change=_launched)
    for name in _ALL:
        found[f"bf16, PyTorch's {name}"] = Way("bf16", (name,))
    return found


@contextlib.contextmanager
def plain_operations(names: tuple[str, ...]) -> Iterator[None]:
    """Let some operations be PyTorch's own meanwhile."""
    chosen = [table for table in tables() if table.op in names]
    rejects_list = _cuda.rejects_list

    def of_pytorch(table: ImplementationTable) -> Callable[..., Any]:
        return lambda impl, *arguments, **options: table.entries[-1]

    try:
        for table in chosen:
            table.select = of_pytorch(table)  # type: ignore[method-assign]
        if _LISTS in names:
            _cuda.rejects_list = lambda *lists: "left out by a benchmark"
        yield
    finally:
        for table in chosen:
            del table.select  # type: ignore[method-assign]
        _cuda.rejects_list = rejects_list


def _trainer(video: Video, config: EncodeConfig, way: Way, device: torch.device) -> Trainer:
    """Return what :func:`hflfnerv.encode` trains with, in this way."""
    count, height, width = video.shape
    spec = MODELS[config.model].plan(config.parameters, count, height, width, preset=config.preset)
    clip = prepare_clip(video.frames, config.encoder_input, crop=None, removed=config.highpass_removed)
    training = training_config(dataclasses.replace(config, precision=way.precision), device)
    trainer = Trainer(initial_model(spec, config.seed), clip, training, device=device)
    way.change(trainer)
    return trainer


def learn(video: Video, config: EncodeConfig, way: Way, device: torch.device) -> tuple[Row, Trainer]:
    """Encode a clip.

    Returns:
        What became of it, the PSNR of each epoch and of the file, its bytes and seconds; and the trainer at the end.
    """
    with plain_operations(way.plain):
        trainer = _trainer(video, config, way, device)
        began = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - began
    model = trainer.model
    embeddings = embed_all(model, trainer.clip, precision=way.precision)
    file = code(model, embeddings, encoding_header(model.spec, video, config), config, trainer.levels)
    quality = evaluate(Decoder(file, device=device, precision="fp32"), trainer.clip.frames)
    row = {
        "p20": quality["psnr_db"],
        "p50": quality["psnr_db"],
        "p80": quality["psnr_db"],
        "milliseconds": round(1e3 * seconds, 1),
        "bytes": len(file),
        "shape": [*video.frames.shape],
        "epochs_psnr_db": [round(epoch.psnr_db, 3) for epoch in trainer.history],
    }
    return row, trainer


class Step(NamedTuple):
    """What a training step makes of the network, by parameter.

    Attributes:
        gradients: of its loss.
        updates: what it adds to the weights.
    """

    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]


def step(video: Video, config: EncodeConfig, way: Way, device: torch.device, state: dict[str, Tensor]) -> Step:
    """Take the last of a few training steps from the given state, as training takes it.

    The steps before it, of which one is captured on a GPU, see other frames and other weights: what was computed once
    and is not computed anew shows.
    """
    with plain_operations(way.plain), exact_convolutions():
        trainer = _trainer(video, config, way, device)
        parameters = dict(trainer.model.named_parameters())
        trainer.model.load_state_dict(state)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for parameter in parameters.values():
                noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(device)
                parameter.add_(noise, alpha=_NOISE * float(parameter.square().mean().sqrt()))
        last = trainer.total_steps - 1
        trainer.training_step._factors.zero_()
        trainer.training_step._factors[last] = 1.0
        take_step = trainer._taker()
        for number in range(_STEPS - 1):
            trainer.training_step.seek(number % last)
            take_step()
        trainer.model.load_state_dict(state)
        trainer.training_step.seek(last)
        take_step()
    made = {name: p.grad.float() for name, p in parameters.items() if p.grad is not None}
    assert len(made) == len(parameters)
    return Step(made, {name: p.detach() - state[name] for name, p in parameters.items()})


def step_rows(
    video: Video,
    clip: str,
    network: str,
    device: torch.device,
    *,
    size: str = "1.5M",
    epochs: int = 2,
    batches: Sequence[int] = (1,),
) -> Iterator[Row]:
    """Yield, for each batch and way, how far gradient and update of each parameter are from PyTorch's in float32.

    A norm over all parameters would be that of the largest, and the updates of Muon are as long however small a
    gradient is. ``wrong`` has those parameters whose errors are over four times those of PyTorch's operations in
    bfloat16, and by more than its roundoff: some have a few values only, whose errors are large or small by chance.
    """
    config = EncodeConfig(model=network, size=size, epochs=epochs).resolved(video.shape)
    # Untrained, the blocks of an encoder add a millionth of what they compute.
    trained = learn(video, config, Way("fp32"), device)[1].model.state_dict()
    state = {name: value.clone() for name, value in trained.items()}
    for batch in batches:
        data = f"{network} {size}, {clip}, batch {batch}, after {epochs} epochs"
        for row in _step_rows(video, dataclasses.replace(config, batch_size=batch), device, state):
            yield {"what": row["what"], "data": data} | row


def _step_rows(video: Video, config: EncodeConfig, device: torch.device, state: dict[str, Tensor]) -> Iterator[Row]:
    exact: Step | None = None
    half: dict[str, dict[str, float]] = {}
    for name, way in ways(on_gpu=device.type == "cuda").items():
        if len(way.plain) == 1:
            continue
        found = step(video, config, way, device, state)
        exact = exact or found
        for what, made in found._asdict().items():
            errors = {each: _distance(made[each], true) for each, true in getattr(exact, what).items()}
            if name == HALF:
                half[what] = errors
            row: Row = {
                "what": f"{what} of a step",
                "implementation": name,
                "baseline": BASELINE,
                "dtype": way.precision,
            }
            row |= {"metric": "relative error", "unit": "", "p50": max(errors.values())}
            row["errors"] = {each: float(f"{error:.3g}") for each, error in errors.items()}
            bounds = {each: 4.0 * error + torch.finfo(torch.bfloat16).eps for each, error in half.get(what, {}).items()}
            row["wrong"] = [each for each, bound in bounds.items() if not errors[each] <= bound]
            yield row


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm().clamp(min=1e-30))


def _rows(
    video: Video, clip: str, network: str, device: torch.device, *, epochs: int, only: str = "", size: str = "1.5M"
) -> Iterator[Row]:
    config = EncodeConfig(model=network, size=size, epochs=epochs).resolved(video.shape)
    data = f"{network} {size}, {clip}, {len(video.frames)} frames, {epochs} epochs"
    for name, way in ways(on_gpu=device.type == "cuda").items():
        if only not in f"{data}: {name}":
            continue
        row = {"what": "learning", "data": data, "implementation": name, "baseline": BASELINE, "dtype": way.precision}
        row |= {"metric": "quality", "unit": "dB", "note": "PSNR of the file; milliseconds are those of training"}
        yield row | learn(video, config, way, device)[0]


def _complaints(row: Row) -> list[str]:
    if not row["wrong"]:
        return []
    errors = ", ".join(f"{name} {row['errors'][name]:.1e}" for name in row["wrong"])
    return [f"{row['data']}, {row['implementation']}: {row['what']} are wrong ({errors})"]


def points(machine: Machine) -> Iterator[Row]:
    """Train both networks in all ways on a GPU."""
    if machine.dry:
        video = load_video(torch.randint(0, 256, (4, 96, 160, 3), dtype=torch.uint8))
        name, epochs, size, batches = "random frames", 1, "100k", (1, 2)
    else:
        path = find_clip(machine.clip)
        video, name, epochs, size, batches = load_video(path, crop=_CROP), path.stem, EPOCHS, "1.5M", (1, 4)
    for network in NETWORKS:
        if machine.wants(f"{network} {size}, steps", seconds=90):
            with machine.room(network):
                subject = video, name, network, machine.device
                for row in step_rows(*subject, size=size, epochs=min(epochs, 2), batches=batches):
                    if row["wrong"]:
                        machine.failures += _complaints(row)
                    else:
                        yield row | machine.environment()
        if machine.wants(f"{network} {size}, {name}", seconds=200):
            with machine.room(network):
                for row in _rows(video, name, network, machine.device, epochs=epochs, size=size):
                    print(f"{row['data']}, {row['implementation']}: {row['p50']:.2f} dB", file=sys.stderr, flush=True)
                    yield row | machine.environment()


def main(argv: list[str] | None = None) -> int:
    """Train on the CPU and keep the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__.split("\n")[0])
    parser.add_argument("--clip", metavar="PATH", help="video (default: bunny.mp4 of the shared data)")
    parser.add_argument("--crop", type=argument(size_hw), default=_CROP, metavar="HxW", help="(default: 640x1280)")
    parser.add_argument("--resize", type=argument(size_hw), metavar="HxW", help="before that")
    parser.add_argument("--size", default="1.5M", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(default: %(default)s)")
    parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0], help="(default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--step", action="store_true", help="compare what a step makes, in place of an encode")
    parser.add_argument("--results", type=pathlib.Path, default=PATH, help="file of the rows")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    path = find_clip(arguments.clip)
    video = load_video(path, crop=arguments.crop, resize=arguments.resize)
    name = f"{path.stem} {'x'.join(map(str, video.shape[1:]))}"
    subject = video, name, arguments.network, torch.device("cpu")
    if arguments.step:
        complaints = []
        for row in step_rows(*subject, size=arguments.size):
            complaints += _complaints(row)
            print(f"{row['data']}, {row['implementation']}: {row['what']}, largest error {row['p50']:.2e}", flush=True)
        print("\n".join(complaints) or "all gradients and updates are right")
        return len(complaints)
    for row in _rows(*subject, epochs=arguments.epochs, only=arguments.only, size=arguments.size):
        keep(arguments.results, row | {"threads": torch.get_num_threads()} | environment())
        print(f"{row['data']}, {row['implementation']}: {row['p50']:.2f} dB, {row['bytes']} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
