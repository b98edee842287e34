"""What was tried for ``preset="best"``: ``python -m bench.ablations run --data DIR [VARIANT ...]``, then ``report``.

Every variant is one change to a network or its training, or a few together, at a scale at which many can be tried: 32
frames of 160x320, 0.15 M parameters, 50 epochs. A run becomes a line in ``bench/results/ablations.jsonl`` as soon as it
is finished; what is there is not done again. ``report`` writes the table of ``docs/ablations.md``. A change that pays
moves into the package; the others stay here, so that nobody has to wonder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# Before torch is loaded; see hflfnerv.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hflfnerv._memory import keep_freed_memory
from hflfnerv.config import PRESETS, TrainingDefaults
from hflfnerv.data import load_video
from hflfnerv.metrics import psnr
from hflfnerv.models import MODELS, VideoNetwork, build_model
from hflfnerv.models.convnext import ConvNeXtBlock, ConvNeXtEncoder, larger_patches
from hflfnerv.models.spec import StreamSpec
from hflfnerv.models.streams import DecoderStream, EmbeddingStem, GridStem
from hflfnerv.nn import UpsampleBlock
from hflfnerv.train import Clip, TrainConfig, Trainer, prepare_clip

from .reproduce import append_row, is_done, read_rows
from .run import RESULTS, ROOT, environment

__all__ = ["VARIANTS", "Variant", "filled", "run", "table"]

Row = dict[str, Any]
Patch = Callable[[VideoNetwork], None]
DOCUMENT = ROOT / "docs" / "ablations.md"
PATH = RESULTS / "ablations.jsonl"
CLIPS = ("soapbox", "camel", "motocross-jump")
SIZE, FRAMES, RESIZE, CROP, EPOCHS = 150_000, "0:32", (180, 320), (160, 320), 50
_TIME_FEATURES = 16


# Changes of a network, made before it is trained.


def embedded_stream(model: VideoNetwork) -> DecoderStream:
    """Return the stream that runs on embeddings: HFD, or HNeRV's decoder."""
    stream = model.get_submodule("hfd" if model.name == "hflf" else "decoder")
    assert isinstance(stream, DecoderStream)
    return stream


def muon_for_hfd_alone(model: VideoNetwork) -> None:
    """Leave the low-frequency streams and the encoder to Adam."""
    weights = [block.conv.weight for block in embedded_stream(model).blocks]
    model.hidden_weights = lambda: weights


def muon_for_decoders_alone(model: VideoNetwork) -> None:
    """Leave the encoder to Adam."""
    weights = [module.conv.weight for module in model.modules() if isinstance(module, UpsampleBlock)]
    model.hidden_weights = lambda: weights


def sine(model: VideoNetwork) -> None:
    """Sine instead of GELU in the blocks of the embedded stream, as in HNeRV-Boost."""
    for block in embedded_stream(model).blocks:
        block.forward = lambda x, block=block: torch.sin(_shuffled(block, x))


def time_modulation(model: VideoNetwork) -> None:
    """A scale and a shift per channel and frame before the activation, from 16 time features, as in HNeRV-Boost."""
    stream = embedded_stream(model)
    stream.modulation = nn.ModuleList()
    encoding = _TimeFeatures(model)
    for block in stream.blocks:
        linear = nn.Linear(_TIME_FEATURES, 2 * (block.conv.out_channels // block.upscale_factor**2))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        stream.modulation.append(linear)

        def forward(x: Tensor, block: Any = block, linear: nn.Linear = linear) -> Tensor:
            scale, shift = linear(encoding.current)[:, :, None, None].chunk(2, 1)
            return F.gelu(_shuffled(block, x) * (1 + scale) + shift)

        block.forward = forward


def position_maps(model: VideoNetwork) -> None:
    """Learned feature maps along time, mixed into the first block's output before the activation: what stays in place.

    Their parameters come on top of the size.
    """
    stream = embedded_stream(model)
    block, index = stream.blocks[0], _Index(model)
    rows, columns = (side * block.upscale_factor for side in stream.spec.grid)
    stream.maps = GridStem(StreamSpec((rows, columns), (8,), (), (), knots=4), model.spec.frames)
    stream.mix = nn.Conv2d(8, stream.spec.widths[1], 1, bias=False)
    block.forward = lambda x: F.gelu(_shuffled(block, x) + stream.mix(stream.maps(index.current)))


def residual(model: VideoNetwork) -> None:
    """Bilinear up-sampling of the input added to the output of every block, as far as the channels go."""
    for block in [module for module in model.modules() if isinstance(module, UpsampleBlock)]:
        plain = block.forward

        def forward(x: Tensor, plain: Callable[[Tensor], Tensor] = plain, r: int = block.upscale_factor) -> Tensor:
            y = plain(x)
            skip = F.interpolate(x[:, : y.shape[1]], scale_factor=r, mode="bilinear")
            return y + F.pad(skip, (0, 0, 0, 0, 0, y.shape[1] - skip.shape[1]))

        block.forward = forward


def image_pyramid(model: VideoNetwork) -> None:
    """A 3x3 head on every block of the embedded stream, up-sampled and summed: low frequencies from coarse features."""
    stream = embedded_stream(model)
    stream.heads = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for width in stream.spec.widths[1:-1])

    def finish(x: Tensor) -> Tensor:
        image: Tensor | None = None
        for block, head in zip(stream.blocks, [*stream.heads, stream.head], strict=True):
            x = block(x)
            finer = head(x)
            image = finer if image is None else finer + F.interpolate(image, size=finer.shape[2:], mode="bilinear")
        assert image is not None
        return image

    stream.finish = finish


def neighbour_embeddings(model: VideoNetwork) -> None:
    """The stem sees the embeddings of the frames before and after, too."""
    stream = embedded_stream(model)
    stream.stem = EmbeddingStem(stream.spec, 3 * model.spec.embedding_channels)
    plain, last = model.stems, model.spec.frames - 1

    def stems(embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
        before, after = (model.ablation_clip.inputs((index + i).clamp(0, last)) for i in (-1, 1))
        assert embeddings is not None
        return plain(torch.cat([model.embed(before), embeddings, model.embed(after)], 1), index)

    model.stems = stems


def variance_preserving(model: VideoNetwork) -> None:
    """He initialisation of stem and blocks, biases zero: differences between frames keep their size through the net."""
    stream = embedded_stream(model)
    for conv in [stream.stem, *(block.conv for block in stream.blocks)]:
        conv.weight.data.mul_(math.sqrt(6))  # nn.Conv2d has variance 1 / (3 fan_in)
        conv.bias.data.zero_()


def layer_scale_one(model: VideoNetwork) -> None:
    """Residual branches of the encoder that begin at full strength instead of 1e-6."""
    for module in model.modules():
        if isinstance(module, ConvNeXtBlock):
            nn.init.ones_(module.gamma)


def encoders_with_all_strides(model: VideoNetwork) -> None:
    """A stage of the encoders for every stride, as HNeRV's has, instead of one for the first two."""
    strides, detail = embedded_stream(model).spec.strides, embedded_stream(model).spec.detail
    assert detail is not None
    channels = model.spec.embedding_channels
    model.encoder.coarse = ConvNeXtEncoder((detail.stride, *strides), embedding_channels=channels)
    model.encoder.fine = ConvNeXtEncoder(strides, 32, detail.channels)


def encoder_with_larger_patches(model: VideoNetwork) -> None:
    """One stage of the encoder for the first two strides, as the dual stream's encoders have."""
    strides = larger_patches(embedded_stream(model).spec.strides)
    model.encoder = ConvNeXtEncoder(strides, embedding_channels=model.spec.embedding_channels)


def link_of_the_paper(model: VideoNetwork) -> None:
    """A tanh for each of the two images of ``best``, added, instead of one for their sum."""
    model.images = lambda stems: (model.lfd.finish(stems[1]), model.hfd.finish(stems[0]))


class _Index:
    """The frames at hand."""

    def __init__(self, model: VideoNetwork) -> None:
        self.current = torch.zeros(1, dtype=torch.int64)
        stems = model.stems

        def watched(embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
            self.current = index
            return stems(embeddings, index)

        model.stems = watched


class _TimeFeatures:
    """Sixteen sines and cosines of the time of the frames at hand."""

    def __init__(self, model: VideoNetwork) -> None:
        frames = model.spec.frames
        time_of = (torch.arange(frames, dtype=torch.float64) + 1) / frames
        angle = time_of[:, None] * (math.pi * 1.6 ** torch.arange(_TIME_FEATURES // 2, dtype=torch.float64))
        self._table = torch.cat([angle.sin(), angle.cos()], 1).float()
        self._index = _Index(model)

    @property
    def current(self) -> Tensor:
        return self._table[self._index.current]


def _shuffled(block: Any, x: Tensor) -> Tensor:
    conv = block.conv
    return F.pixel_shuffle(F.conv2d(x, conv.weight, conv.bias, padding=conv.padding), block.upscale_factor)


def without_quantization(settings: TrainingDefaults) -> TrainingDefaults:
    """Return the settings of a training with float weights: what a file takes is the matter of bench.rate."""
    return settings._replace(quantization_share=0.0, rate_weight=0.0, weight_decay=0.0)


def training_of(settings: TrainingDefaults, epochs: int, seed: int, precision: str = "fp32") -> TrainConfig:
    """Return how a network is trained with these settings."""
    return TrainConfig(
        epochs,
        settings.lr,
        settings.batch_size,
        seed,
        precision,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
    )


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        network: model and preset, ``"hflf/best"``: structure, and settings where ``changes`` has none.
        what: what is changed, for the table.
        patches: changes of the network.
        changes: other settings than the preset's, by the names of :class:`TrainingDefaults`.
        plan: what the network's ``plan`` is told besides.
        precision: in which it is trained; the frames are measured in float32 all the same.
    """

    network: str
    what: str
    patches: tuple[Patch, ...] = ()
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "fp32"

    @property
    def settings(self) -> TrainingDefaults:
        """The settings of its training."""
        model, preset = self.network.split("/")
        return without_quantization(PRESETS[preset][model])._replace(**self.changes)

    def model(self, frames: int) -> VideoNetwork:
        """Build the network."""
        name, preset = self.network.split("/")
        model = build_model(MODELS[name].plan(SIZE, frames, *CROP, preset=preset, **self.plan))
        for patch in self.patches:
            patch(model)
        return model


def _one_embedding(what: str, patches: tuple[Patch, ...] = (), **changes: Any) -> Variant:
    return Variant("hflf/best", what, patches, {**_COSINE, **changes}, {"detail": 0})


def _hnerv(what: str, patches: tuple[Patch, ...] = ()) -> Variant:
    return Variant("hnerv/best", f"HNeRV B, {what}", patches, _COSINE)


_MUON = {"optimizer": "muon", "lr": 0.02}
_COSINE = {"schedule": "cosine"}  # which `best` had when these were tried
_BEST = "A, a finer embedding of 4 channels, encoders that begin with larger patches, linear schedule"
VARIANTS: dict[str, Variant] = {
    "paper": Variant("hflf/paper", "dual stream, `paper`"),
    "paper-frame": Variant("hflf/paper", "`paper`, encoder sees the frame", changes={"encoder_input": "frame"}),
    "muon-hfd": Variant("hflf/paper", "`paper`, Muon for the HFD", (muon_for_hfd_alone,), _MUON),
    "muon-decoders": Variant("hflf/paper", "`paper`, Muon for all decoders", (muon_for_decoders_alone,), _MUON),
    "muon": Variant("hflf/paper", "`paper`, Muon for decoders and encoder", changes=_MUON),
    "muon-frame": Variant(
        "hflf/paper", "the same, encoder sees the frame", changes={**_MUON, "encoder_input": "frame"}
    ),
    "best": _one_embedding("dual stream: the same, encoder sees the frame, one LFD on learned maps, one tanh (A)"),
    "best-highpass": _one_embedding("A, encoder sees the high-pass frame", encoder_input="highpass"),
    "best-link": _one_embedding("A, two tanh as in the paper", (link_of_the_paper,)),
    "best-sine": _one_embedding("A, sine in the HFD", (sine,)),
    "best-modulation": _one_embedding("A, time-conditioned scale and shift in the HFD", (time_modulation,)),
    "best-lr-0.01": _one_embedding("A, learning rate 0.01", lr=0.01),
    "best-lr-0.04": _one_embedding("A, learning rate 0.04", lr=0.04),
    "best-adam": _one_embedding("A with Adam at 2e-3", optimizer="adam", lr=2e-3),
    "best-position": _one_embedding("A, four learned maps of 8 channels along time in the HFD", (position_maps,)),
    "detail": Variant("hflf/best", f"dual stream, **`best`**: {_BEST}"),
    "detail-cosine": Variant("hflf/best", "`best`, cosine schedule", changes=_COSINE),
    "detail-strides": Variant(
        "hflf/best", "`best`, a stage of the encoders for every stride", (encoders_with_all_strides,)
    ),
    "detail-1": Variant("hflf/best", "`best`, finer embedding of 1 channel", plan={"detail": 1}),
    "detail-2": Variant("hflf/best", "`best`, finer embedding of 2 channels", plan={"detail": 2}),
    "detail-8": Variant("hflf/best", "`best`, finer embedding of 8 channels", plan={"detail": 8}),
    "detail-highpass": Variant(
        "hflf/best", "`best`, both encoders see the high-pass frame", changes={"encoder_input": "highpass"}
    ),
    "detail-modulation": Variant(
        "hflf/best", "`best`, time-conditioned scale and shift in the HFD", (time_modulation,)
    ),
    "detail-bf16": Variant("hflf/best", "`best`, trained in bfloat16", precision="bf16"),
    "hnerv-paper": Variant("hnerv/paper", "HNeRV, as published"),
    "hnerv-tuned": Variant("hnerv/paper", "HNeRV, learning rate 2e-3, batch 1", changes={"lr": 2e-3, "batch_size": 1}),
    "hnerv-start": Variant("hnerv/paper", "HNeRV, variance-preserving start", (variance_preserving,)),
    "hnerv-best": Variant("hnerv/best", "HNeRV, **`best`**: Muon, batch 1, linear schedule"),
    "hnerv-best-cosine": Variant("hnerv/best", "HNeRV `best`, cosine schedule (B)", changes=_COSINE),
    "hnerv-best-start": _hnerv("variance-preserving start", (variance_preserving,)),
    "hnerv-best-scale": _hnerv("encoder's layer scale begins at 1", (layer_scale_one,)),
    "hnerv-best-neighbours": _hnerv("stem sees three embeddings", (neighbour_embeddings,)),
    "hnerv-best-residual": _hnerv("bilinear skip round every block", (residual,)),
    "hnerv-best-pyramid": _hnerv("heads at all scales summed", (image_pyramid,)),
    "hnerv-best-patches": Variant(
        "hnerv/best", "HNeRV `best`, a stage of the encoder for the first two strides", (encoder_with_larger_patches,)
    ),
}


def run(name: str, clip_name: str, seed: int, data: pathlib.Path, *, epochs: int = EPOCHS) -> Row:
    """Train one variant on one clip and return its row."""
    variant = VARIANTS[name]
    settings = variant.settings
    torch.manual_seed(seed)
    video = load_video(data / "davis480p" / clip_name, frames=FRAMES, resize=RESIZE)
    model = variant.model(len(video))
    clip = prepare_clip(video.frames, settings.encoder_input, crop=CROP, removed=0.8)
    model.ablation_clip = clip  # for variants that look at neighbours
    config = training_of(settings, epochs, seed, variant.precision)
    trainer = Trainer(model, clip, config, device=torch.device("cpu"))
    started = time.perf_counter()
    trainer.run()
    return {
        **_key(name, clip_name, seed, epochs),
        "network": variant.network,
        "settings": settings._asdict(),
        "precision": variant.precision,
        "parameters": sum(p.numel() for p in model.coded_parameters().values())
        + model.parameter_counts()["embeddings"],
        "psnr_db": _quality(model, clip),
        "epochs_psnr_db": [round(result.psnr_db, 3) for result in trainer.history],
        "training_seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        **environment(),
    }


def _key(name: str, clip: str, seed: int, epochs: int) -> Row:
    return {"what": "ablation", "variant": name, "clip": clip, "seed": seed, "epochs": epochs}


@torch.inference_mode()
def _quality(model: VideoNetwork, clip: Clip) -> float:
    """Return the mean PSNR in dB of all frames, rounded to 8 bits, before quantisation of the weights."""
    values = []
    for index in torch.arange(len(clip)).split(1):
        image = model(clip.inputs(index), index)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        values.append(float(psnr(image, clip.frames[index][0])))
    return sum(values) / len(values)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table: variants with a row, PSNR per clip, mean over seeds."""
    yield f"| variant | parameters | {' | '.join(CLIPS)} |"
    yield "|---|---|" + "---|" * len(CLIPS)
    for name, variant in VARIANTS.items():
        own = [row for row in rows if row["variant"] == name and row["epochs"] == EPOCHS]
        if not own:
            continue
        cells = []
        for clip in CLIPS:
            values = [row["psnr_db"] for row in own if row["clip"] == clip]
            spread = f" ± {(max(values) - min(values)) / 2:.2f} ({len(values)} seeds)" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}" if values else "")
        yield f"| {variant.what} | {own[0]['parameters']:,} | {' | '.join(cells)} |"


def filled(document: str, rows: Sequence[Row]) -> str:
    """Return the page with its table made anew."""
    head, rest = document.split("<!-- table -->\n", 1)
    _, tail = rest.split("<!-- /table -->", 1)
    return "\n".join([f"{head}<!-- table -->", *table(rows), f"<!-- /table -->{tail}"])


def variants_parser(
    module: str, document: str | None, variants: Iterable[str], results: pathlib.Path
) -> argparse.ArgumentParser:
    """Return the command line of a table of variants: what to run, on what, and where its rows are.

    Args:
        module: what ``python -m`` calls.
        document: its docstring.
        variants: their names.
        results: where the rows are unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(document or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("variants", nargs="*", help=f"all if none is named: {', '.join(variants)}")
    parser.add_argument("--data", type=pathlib.Path, help="folder that holds davis480p")
    parser.add_argument("--clips", nargs="+", default=[CLIPS[0]], help=f"of {', '.join(CLIPS)} (default: {CLIPS[0]})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="(default: 1)")
    parser.add_argument(
        "--results", type=pathlib.Path, default=results, help=f"(default: {results.relative_to(ROOT).as_posix()})"
    )
    return parser


def check_variants(parser: argparse.ArgumentParser, arguments: argparse.Namespace, variants: Iterable[str]) -> None:
    """End with a usage error where there is no such variant, or no folder of clips."""
    unknown = sorted(set(arguments.variants) - set(variants))
    if unknown or arguments.data is None:
        parser.error(
            f"unknown variants: {', '.join(unknown)}" if unknown else "--data must name the folder of davis480p"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run variants, or write the table."""
    keep_freed_memory()
    parser = variants_parser("bench.ablations", __doc__, VARIANTS, PATH)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.command == "report":
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), read_rows(arguments.results)))
        return 0
    check_variants(parser, arguments, VARIANTS)
    for name in arguments.variants or VARIANTS:
        for clip in arguments.clips:
            for seed in arguments.seeds:
                if is_done(_key(name, clip, seed, EPOCHS), read_rows(arguments.results)):
                    continue
                row = run(name, clip, seed, arguments.data)
                append_row(arguments.results, row)
                print(f"{name}, {clip}, seed {seed}: {row['psnr_db']:.2f} dB", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
