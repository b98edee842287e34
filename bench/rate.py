"""What was tried for the rate: ``python -m bench.rate run --data DIR [VARIANT ...]``, then ``report``.

Every variant is a way to quantise the network of ``preset="best"``, at the scale of :mod:`bench.ablations` and with the
same number of epochs in all. A run becomes a line in ``bench/results/rate.jsonl`` as soon as it is finished, with the
bytes of the real file and the quality of what it decodes to; what is there is not done again. ``report`` writes the
tables of ``docs/ablations.md``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Before torch is loaded; see hflfnerv.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor

from hflfnerv._memory import keep_freed_memory
from hflfnerv.codec import Bitstream, Decoder, Header, bjontegaard, evaluate
from hflfnerv.codec.encoder import code, encoding_header, initial_model, quantization_config, training_config
from hflfnerv.config import EncodeConfig, parse_size
from hflfnerv.data import Video, load_video
from hflfnerv.errors import BackendUnavailable
from hflfnerv.models import MODELS
from hflfnerv.train import QuantizationConfig, StepChooser, Trainer, embed_all, prepare_clip

from .ablations import CLIPS, CROP, DOCUMENT, EPOCHS, FRAMES, RESIZE, check_variants, variants_parser
from .reproduce import append_row, is_done, read_rows, results_path
from .run import RESULTS, environment

__all__ = ["VARIANTS", "Variant", "filled", "run", "tables"]

Row = dict[str, Any]
Patch = Callable[[Trainer], None]
PATH = RESULTS / "rate.jsonl"
#: Rows of the profile cpu from when `best` had 8 bits.
EARLIER = RESULTS / "reproduce-cpu-8-bits.jsonl"
SIZE = "0.15M"
#: The smallest network of ``best`` at this scale has 60,064 parameters.
SIZES = ("0.062M", "0.08M", "0.15M", "0.3M")
BEFORE, AFTER = "bits-8", "qat"


# Changes of the training.


def rate_term(trainer: Trainer) -> None:
    """Add ``w E / R`` times the bits to the loss: ``sum_i n_i log2(1 + 2 e m_i / s_i)``, near the entropy.

    That is of n values of mean magnitude m in steps of s, distributed as Laplace's; E and R are the error and the bits
    when the steps were chosen. The gradient goes to the weights as rounded: none for those that are zero.
    """
    step, model = trainer.training_step, trainer.model
    plain, settings = step._errors, trainer.config.quantization
    assert settings is not None
    worth: list[float] = []

    def errors(*arguments: Any) -> Tensor:
        made = plain(*arguments)
        if step.quantization is None:
            return made
        levels = step.quantization.levels
        if not worth:
            chooser = StepChooser(model, trainer.clip, seed=0)
            bits = chooser.bits({name: of.exponent for name, of in levels.items()})
            worth.append(settings.rate_weight * chooser.error / bits)
        terms = [
            p.numel() * torch.log2(1 + 2 * math.e * p.abs().mean() / 2 ** (levels[name].exponent / 16))
            for name, p in model.coded_parameters().items()
        ]
        return made + worth[0] * torch.stack(terms).sum()

    step._errors = errors


@dataclasses.dataclass(frozen=True)
class Variant:
    """A line of the table.

    Attributes:
        what: for the table.
        changes: of :class:`EncodeConfig`; without ``quantization_share`` all variants share one training.
        patches: changes of the training.
        plan: what the network's ``plan`` is told besides.
    """

    what: str
    changes: dict[str, Any]
    patches: tuple[Patch, ...] = ()
    plan: dict[str, Any] = dataclasses.field(default_factory=lambda: {"detail": 0})


def _after(what: str, **changes: Any) -> Variant:
    return Variant(what, {**_COSINE, **_EIGHT_BITS, "quantization_share": 0.0, "rate_weight": 0.0, **changes})


# What `best` had when these were measured.
_NO_DECAY = {"weight_decay": 0.0}
_COSINE = {**_NO_DECAY, "schedule": "cosine"}
_EIGHT_BITS = {"weight_bits": 8, "embedding_bits": 6}
_BEST = {**_COSINE, **_EIGHT_BITS, "quantization_share": 0.3, "rate_weight": 0.5}
VARIANTS: dict[str, Variant] = {
    BEFORE: _after("8 bits between the extremes, afterwards"),
    **{
        f"bits-{bits}": _after(f"{bits} bits, afterwards", weight_bits=bits, embedding_bits=min(bits, 6))
        for bits in (7, 6, 5, 4)
    },
    **{
        f"steps-{weight:g}": _after(f"steps by curvature, w = {weight:g}, afterwards", rate_weight=weight)
        for weight in (0.1, 0.2, 0.4, 0.8, 1.6)
    },
    **{
        f"qat-bits-{bits}": Variant(
            f"{bits} bits between the extremes, trained with them for 30 % of the epochs",
            {**_BEST, "rate_weight": 0.0, "weight_bits": bits, "embedding_bits": bits},
        )
        for bits in (5, 4)
    },
    AFTER: Variant("steps by curvature, w = 0.5, trained with them for 30 % of the epochs (A)", _BEST),
    "detail": Variant(
        "`best` without weight decay, its finest steps of 8 bits, of embeddings 6",
        {**_NO_DECAY, **_EIGHT_BITS},
        plan={},
    ),
    "finer": Variant("`best` without weight decay", _NO_DECAY, plan={}),
    "decay": Variant("**`best`**, all of it", {}, plan={}),
    **{
        f"qat-{weight:g}": Variant(f"A, w = {weight:g}", {**_BEST, "rate_weight": weight})
        for weight in (0.25, 1.0, 1.5)
    },
    **{
        f"qat-{share:g}-epochs": Variant(f"A, {100 * share:g} % of the epochs", {**_BEST, "quantization_share": share})
        for share in (0.1, 0.5, 1.0)
    },
    "qat-rate-term": Variant("A, with a rate term in the loss", _BEST, (rate_term,)),
}


def run(name: str, clip: str, size: str, seed: int, data: pathlib.Path, *, epochs: int = EPOCHS) -> Row:
    """Train a variant, or take the network of the one before if its training is the same; return its row."""
    variant = VARIANTS[name]
    config = EncodeConfig(
        size=size, epochs=epochs, seed=seed, frames=FRAMES, resize=RESIZE, crop=CROP, **variant.changes
    ).resolved()
    trainer, video, seconds = _trained(config, variant, clip, data)
    levels = trainer.levels
    quantization = quantization_config(config)
    if levels is None and quantization is not None:
        levels = StepChooser(trainer.model, trainer.clip, seed=seed).choose(quantization)
    embeddings = embed_all(trainer.model, trainer.clip, precision=trainer.config.precision)
    header = encoding_header(trainer.model.spec, video, config)
    file = code(trainer.model, embeddings, header, config, levels)
    quality = evaluate(Decoder(file, device="cpu", precision="fp32"), trainer.clip.frames)
    parameters = trainer.model.parameter_counts()
    return {
        **_key(name, clip, size, seed, epochs),
        "config": {key: getattr(config, key) for key in _SETTINGS},
        "parameters": parameters,
        "bytes": len(file),
        "bits_per_pixel": quality["bits_per_pixel"],
        "bits_per_value": 8 * Bitstream.open(file).accounting().symbol_bytes / parameters["total"],
        "range_coder_bytes": _range_coded(trainer, embeddings, header, config, levels),
        "psnr_db": quality["psnr_db"],
        "epochs_psnr_db": [round(result.psnr_db, 3) for result in trainer.history],
        "training_seconds": seconds,
        "threads": torch.get_num_threads(),
        **environment(),
    }


_SETTINGS = (
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "batch_size",
    "quantization_share",
    "rate_weight",
    "weight_bits",
    "embedding_bits",
)
_last: dict[tuple[Any, ...], tuple[Trainer, Video, float]] = {}


def _trained(config: EncodeConfig, variant: Variant, clip: str, data: pathlib.Path) -> tuple[Trainer, Video, float]:
    quantization: QuantizationConfig | None = quantization_config(config) if config.quantization_share else None
    plan = tuple(variant.plan.items())
    key = (clip, data, config.size, config.epochs, config.seed, quantization, variant.patches, plan)
    if key not in _last:
        _last.clear()
        video = load_video(data / "davis480p" / clip, frames=FRAMES, resize=RESIZE)
        prepared = prepare_clip(video.frames, config.encoder_input, crop=CROP, removed=config.highpass_removed)
        network = MODELS[config.model]
        spec = network.plan(config.parameters, len(video), *CROP, preset=config.preset, **variant.plan)
        device = torch.device("cpu")
        settings = dataclasses.replace(training_config(config, device), quantization=quantization)
        trainer = Trainer(initial_model(spec, config.seed), prepared, settings, device=device)
        for patch in variant.patches:
            patch(trainer)
        started = time.perf_counter()
        trainer.run()
        _last[key] = trainer, video, round(time.perf_counter() - started, 1)
    return _last[key]


def _range_coded(trainer: Trainer, embeddings: Any, header: Header, config: EncodeConfig, levels: Any) -> int | None:
    """Return the size of the same file by the range coder; None where its package is missing."""
    try:
        return len(code(trainer.model, embeddings, header, dataclasses.replace(config, entropy="range"), levels))
    except BackendUnavailable:
        return None


def _key(name: str, clip: str, size: str, seed: int, epochs: int) -> Row:
    return {"what": "rate", "variant": name, "clip": clip, "size": parse_size(size), "seed": seed, "epochs": epochs}


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the tables: every variant; then rate-distortion beside the paper's preset and x265."""
    rows = [row for row in rows if row["epochs"] == EPOCHS and row["seed"] == 1]
    yield "| clip | parameters | variant | bits a value | bits per pixel | by the range coder | PSNR of the file |"
    yield "|---|---|---|---|---|---|---|"
    order = {name: number for number, name in enumerate(VARIANTS)}
    places = {clip: number for number, clip in enumerate(CLIPS)}
    for row in sorted(rows, key=lambda row: (places[row["clip"]], row["size"], order[row["variant"]])):
        pixels = 8 * row["bytes"] / row["bits_per_pixel"]
        coded = "–" if row["range_coder_bytes"] is None else f"{8 * row['range_coder_bytes'] / pixels:.4f}"
        yield (
            f"| {row['clip']} | {row['parameters']['total']:,} | {VARIANTS[row['variant']].what} | "
            f"{row['bits_per_value']:.2f} | {row['bits_per_pixel']:.4f} | {coded} | {row['psnr_db']:.2f} |"
        )
    yield ""
    points = list(_curves(rows, CLIPS[0]))
    ours = [name for name in ("best, 8 bits", "best") if any(point["implementation"] == name for point in points)]
    if not ours:
        return
    yield f"| {CLIPS[0]}, by size | PSNR in dB at bits per pixel |"
    yield "|---|---|"
    for name in (*ours, *_ANCHORS[1:]):
        curve = sorted((p["bits_per_pixel"], p["psnr_db"]) for p in points if p["implementation"] == name)
        yield f"| {name} | {', '.join(f'{quality:.2f} at {rate:.4f}' for rate, quality in curve)} |"
    yield ""
    yield "| Bjontegaard delta | rate at equal PSNR | PSNR at equal rate |"
    yield "|---|---|---|"
    for anchor in _ANCHORS:
        if len([point for point in points if point["implementation"] == anchor]) < 2:
            continue
        for delta in bjontegaard(points, anchor):
            if delta["implementation"] in ours:
                rate, psnr = delta["bd_rate_percent"], delta["bd_psnr_db"]
                cells = ("–" if rate is None else f"{rate:+.1f} %", "–" if psnr is None else f"{psnr:+.2f} dB")
                yield f"| {delta['implementation']} against {anchor} | {' | '.join(cells)} |"
    yield ""
    yield "A dash: the curves have no such range in common."
    yield ""
    yield f"| clip, {SIZE} | 8 bits | `best` |"
    yield "|---|---|---|"
    for clip in CLIPS:
        of_clip = list(_curves(rows, clip))
        cells = [
            f"{point['psnr_db']:.2f} dB at {point['bits_per_pixel']:.4f}"
            for name in ours
            for point in of_clip
            if point["implementation"] == name and point["size"] == parse_size(SIZE)
        ]
        if len(cells) == 2:
            yield f"| {clip} | {' | '.join(cells)} |"


_ANCHORS = ("best, 8 bits", "paper", "x265 medium")
_NETWORKS = {"hflf/paper": "paper", "hflf/best": "best, 8 bits"}


def _curves(rows: Sequence[Row], clip: str) -> Iterator[Row]:
    """Yield the points of a clip's curves: ours by size, and those of the reproduction's rows."""
    rows = [row for row in rows if row["clip"] == clip]
    for name, variant in (("best, 8 bits", BEFORE), ("best", AFTER)):
        for row in rows:
            if row["variant"] == variant:
                yield {"implementation": name, **{key: row[key] for key in ("size", "bits_per_pixel", "psnr_db")}}
    measured = {row["size"] for row in rows if row["variant"] == BEFORE}
    for row in [*read_rows(results_path("cpu")), *read_rows(EARLIER)]:
        if row["clip"] != clip:
            continue
        if row["implementation"].startswith("x265"):
            yield row
        elif row["implementation"] in _NETWORKS and row["preset_settings"] and row["config"]["epochs"] == EPOCHS:
            name = _NETWORKS[row["implementation"]]
            # Of "best" those rows from before it weighed the rate, at sizes that have none here.
            earlier = not row["config"].get("rate_weight") and row["config"]["size"] not in measured
            if name == "paper" or earlier:
                yield {**row, "implementation": name, "size": row["config"]["size"]}


def filled(document: str, rows: Sequence[Row]) -> str:
    """Return the page with its tables made anew."""
    head, rest = document.split("<!-- rate -->\n", 1)
    _, tail = rest.split("<!-- /rate -->", 1)
    return "\n".join([f"{head}<!-- rate -->", *tables(rows), f"<!-- /rate -->{tail}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run variants, or write the tables."""
    keep_freed_memory()
    parser = variants_parser("bench.rate", __doc__, VARIANTS, PATH)
    parser.add_argument("--sizes", nargs="+", default=[SIZE], help=f"(default: {SIZE})")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.command == "report":
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), read_rows(arguments.results)))
        return 0
    check_variants(parser, arguments, VARIANTS)
    for clip in arguments.clips:
        for size in arguments.sizes:
            for seed in arguments.seeds:
                for name in arguments.variants or VARIANTS:
                    if is_done(_key(name, clip, size, seed, EPOCHS), read_rows(arguments.results)):
                        continue
                    row = run(name, clip, size, seed, arguments.data)
                    append_row(arguments.results, row)
                    rate, quality = row["bits_per_pixel"], row["psnr_db"]
                    print(f"{name}, {clip}, {size}, seed {seed}: {rate:.4f} bpp, {quality:.2f} dB", file=sys.stderr,
                          flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
