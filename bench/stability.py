"""Why training stalls: ``python -m bench.stability run --data DIR``, then ``report``.

Trains networks on a clip on which HNeRV is known to collapse, and after every epoch measures how much of what tells one
frame from another is left after each layer: the *contrast in time*, the standard deviation over frames of each value,
mean over values. Each run becomes a line in ``bench/results/stability.jsonl``, and ``report`` writes the tables of
``docs/stability.md``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Before torch is loaded; see hflfnerv.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor

from hflfnerv._memory import keep_freed_memory
from hflfnerv.config import PRESETS
from hflfnerv.data import load_video
from hflfnerv.models import MODELS, VideoNetwork, build_model
from hflfnerv.models.streams import DecoderStream
from hflfnerv.train import Clip, Trainer, prepare_clip

from .ablations import CROP, FRAMES, RESIZE, SIZE, training_of, variance_preserving, without_quantization
from .reproduce import append_row, is_done, read_rows
from .run import RESULTS, ROOT, environment

__all__ = ["NETWORKS", "filled", "run", "tables"]

Row = dict[str, Any]
DOCUMENT = ROOT / "docs" / "stability.md"
PATH = RESULTS / "stability.jsonl"
EPOCHS = 50
#: A frame is told from the others by less than this part of the clip's own contrast: the network makes one image.
STALLED = 0.1
_EVERY_NTH_FRAME = 4

#: Network, preset and change of the network before training.
NETWORKS: dict[str, tuple[str, str, Callable[[VideoNetwork], None] | None]] = {
    "HNeRV, paper": ("hnerv", "paper", None),
    "HNeRV, paper, variance-preserving start": ("hnerv", "paper", variance_preserving),
    "dual stream, paper": ("hflf", "paper", None),
    "HNeRV, best": ("hnerv", "best", None),
    "dual stream, best": ("hflf", "best", None),
}


def contrast_in_time(values: Tensor) -> float:
    """Return the standard deviation over the first axis, mean over all others."""
    return float(values.float().std(0).mean())


@torch.inference_mode()
def contrasts(model: VideoNetwork, clip: Clip) -> dict[str, Any]:
    """Return the contrast in time of embeddings, each layer of the stream that runs on them, image and frame."""
    stream = model.get_submodule("hfd" if model.name == "hflf" else "decoder")
    assert isinstance(stream, DecoderStream)
    layers: list[list[Tensor]] = []
    for index in torch.arange(0, len(clip), _EVERY_NTH_FRAME).split(1):
        inputs = clip.inputs(index)
        assert inputs is not None
        embedding = model.embed(inputs)
        features = stream.features(embedding)
        frame = model.decode(embedding, index).clamp(0, 1)
        layers.append([embedding, *features, stream.head(features[-1]), frame])
    *hidden, frames = (torch.cat(layer) for layer in zip(*layers, strict=True))
    original = clip.targets(torch.arange(0, len(clip), _EVERY_NTH_FRAME))
    return {
        "layers": [float(f"{contrast_in_time(layer):.3g}") for layer in hidden],
        "frame": round(contrast_in_time(frames) / contrast_in_time(original), 4),
    }


def run(network: str, clip_name: str, seed: int, data: pathlib.Path, *, epochs: int = EPOCHS) -> Row:
    """Train one network and return its row."""
    name, preset, change = NETWORKS[network]
    settings = without_quantization(PRESETS[preset][name])
    video = load_video(data / "davis480p" / clip_name, frames=FRAMES, resize=RESIZE)
    torch.manual_seed(seed)
    model = build_model(MODELS[name].plan(SIZE, len(video), *CROP, preset=preset))
    if change is not None:
        change(model)
    clip = prepare_clip(video.frames, settings.encoder_input, crop=CROP, removed=0.8)
    config = training_of(settings, epochs, seed)
    trainer = Trainer(model, clip, config, device=torch.device("cpu"))
    measured = [contrasts(trainer.model, trainer.clip)]

    def on_step(trainer: Trainer) -> None:
        if trainer.step % trainer.steps_per_epoch == 0:
            measured.append(contrasts(trainer.model, trainer.clip))

    trainer.run(on_step)
    return {
        **_key(network, clip_name, seed, epochs),
        "settings": settings._asdict(),
        "parameters": model.parameter_counts()["total"],
        "epochs_psnr_db": [round(result.psnr_db, 3) for result in trainer.history],
        "contrast_layers": [entry["layers"] for entry in measured],
        "contrast_frame": [entry["frame"] for entry in measured],
        "threads": torch.get_num_threads(),
        **environment(),
    }


def _key(network: str, clip: str, seed: int, epochs: int) -> Row:
    return {"what": "stability", "network": network, "clip": clip, "seed": seed, "epochs": epochs}


def stalled_epochs(row: Row) -> int:
    """Return how many epochs pass until the frames differ, for the last time."""
    return max((epoch for epoch, value in enumerate(row["contrast_frame"]) if value < STALLED), default=0)


def tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the lines of both tables by name."""
    return {"runs": list(_runs(rows)), "layers": list(_layers(rows))}


def _runs(rows: Sequence[Row]) -> Iterator[str]:
    yield "| network | clip | seeds | epochs as one image | still so at the end | PSNR of the last epoch, dB |"
    yield "|---|---|---|---|---|---|"
    for network in NETWORKS:
        for clip in dict.fromkeys(row["clip"] for row in rows):
            own = sorted(
                (row for row in rows if row["network"] == network and row["clip"] == clip), key=lambda row: row["seed"]
            )
            if own:
                stalled = [stalled_epochs(row) for row in own]
                at_end = sum(epochs == row["epochs"] for epochs, row in zip(stalled, own, strict=True))
                psnr = ", ".join(f"{row['epochs_psnr_db'][-1]:.2f}" for row in own)
                yield f"| {network} | {clip} | {len(own)} | {', '.join(map(str, stalled))} | {at_end} | {psnr} |"


def _layers(rows: Sequence[Row]) -> Iterator[str]:
    first = [row for row in rows if row["seed"] == 1 and row["clip"] == rows[0]["clip"]]
    yield "| network | after | embedding | stem | blocks | head | frames, part of the clip's |"
    yield "|---|---|---|---|---|---|---|"
    for network in NETWORKS:
        for row in first:
            if row["network"] != network:
                continue
            for epoch in (0, 2, 10, 30, row["epochs"]):
                embedding, stem, *blocks, head = (f"{value:.2g}" for value in row["contrast_layers"][epoch])
                when = "the start" if epoch == 0 else f"epoch {epoch}"
                yield (
                    f"| {network} | {when} | {embedding} | {stem} | {', '.join(blocks)} | {head} | "
                    f"{row['contrast_frame'][epoch]:.3f} |"
                )


def filled(document: str, rows: Sequence[Row]) -> str:
    """Return the page with its tables made anew."""
    for name, lines in tables(rows).items():
        head, rest = document.split(f"<!-- {name} -->\n", 1)
        _, tail = rest.split(f"<!-- /{name} -->", 1)
        document = "\n".join([f"{head}<!-- {name} -->", *lines, f"<!-- /{name} -->{tail}"])
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Train networks, or write the tables."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("networks", nargs="*", help=f"all if none is named: {'; '.join(NETWORKS)}")
    parser.add_argument("--data", type=pathlib.Path, help="folder that holds davis480p")
    parser.add_argument("--clips", nargs="+", default=["motocross-jump"], help="(default: motocross-jump)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--results", type=pathlib.Path, default=PATH, help="(default: bench/results/stability.jsonl)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.command == "report":
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), read_rows(arguments.results)))
        return 0
    unknown = sorted(set(arguments.networks) - set(NETWORKS))
    if unknown or arguments.data is None:
        parser.error(f"unknown networks: {'; '.join(unknown)}" if unknown else "--data must name davis480p's folder")
    for network in arguments.networks or NETWORKS:
        for clip in arguments.clips:
            for seed in arguments.seeds:
                if is_done(_key(network, clip, seed, EPOCHS), read_rows(arguments.results)):
                    continue
                row = run(network, clip, seed, arguments.data)
                append_row(arguments.results, row)
                print(
                    f"{network}, {clip}, seed {seed}: {stalled_epochs(row)} epochs as one image, "
                    f"{row['epochs_psnr_db'][-1]:.2f} dB",
                    file=sys.stderr,
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
