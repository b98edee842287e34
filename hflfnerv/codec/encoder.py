"""From a video to a bitstream: load, fit, quantise, code, check."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._atomic import atomic_path
from .._device import resolve_device, training_precision
from .._log_step import Levels
from .._version import __version__
from ..config import EncodeConfig
from ..data import DEFAULT_FPS, Video, centre_crop, centre_offset, load_video
from ..data.selection import as_frame_slice, format_frames
from ..errors import BackendUnavailable
from ..metrics import psnr
from ..models import MODELS, ModelSpec, VideoNetwork, build_model
from ..models.budget import parameter_count
from ..train import EMBEDDINGS, Clip, QuantizationConfig, TrainConfig, Trainer, embed_all, prepare_clip
from .bitstream import Bitstream, Color, Header, Source, write_bitstream
from .decoder import Decoder
from .engine import to_uint8
from .entropy import entropy_coder
from .evaluation import evaluate
from .quantization import quantize, quantize_tensors, quantize_to_levels
from .sections import MAX_ELEMENTS

__all__ = [
    "EncodeObserver",
    "EncodeResult",
    "code",
    "encode",
    "encoding_header",
    "initial_model",
    "make_header",
    "quantization_config",
    "training_config",
]


class EncodeObserver(Protocol):
    """Is told how far an encode has come."""

    def stage(self, name: str) -> None:
        """A stage begins: ``load``, ``train``, ``code`` or ``check``."""

    def step(self, trainer: Trainer) -> None:
        """A training step ended."""


@dataclass(frozen=True)
class EncodeResult:
    """A coded video.

    Attributes:
        bitstream: the bytes of the ``.hflf`` file.
        report: JSON-ready account of the run: sizes, quality, times, configuration.
    """

    bitstream: bytes
    report: dict[str, Any] = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.bitstream)


class _Silent:
    def stage(self, name: str) -> None:
        pass

    def step(self, trainer: Trainer) -> None:
        pass


class _Stages:
    """Times the stages of a run and passes them on."""

    def __init__(self, observer: EncodeObserver) -> None:
        self.observer = observer
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.observer.stage(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@contextmanager
def _float32_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def encode(
    source: str | os.PathLike[str] | NDArray[np.uint8] | Tensor,
    config: EncodeConfig | None = None,
    *,
    fps: str | Fraction | float | None = None,
    observer: EncodeObserver | None = None,
) -> EncodeResult:
    """Fit a network to a video and code it.

    Whole frames are resized, high-pass filtered where the encoder sees that, and cropped, in this order (the filter of
    the paper runs before the crop). The network is trained, its weights and all frames' embeddings are quantised and
    entropy coded, and the bytes are decoded again: the quality in the report is that of the decoded file, in float32,
    whatever the machine.

    Args:
        source: a video file, a folder of images (sorted naturally), or uint8 frames ``[T, H, W, 3]``.
        config: everything that can be chosen; None for the defaults.
        fps: frame rate, instead of the source's own, or of 25 for a source that has none.
        observer: told of every stage and training step.

    Raises:
        TypeError: ``config`` is no EncodeConfig.
        FileNotFoundError: there is no such source.
        MediaError: the source cannot be read, or does not fit in memory.
        ValueError: the configuration is impossible for this video, or exceeds a limit of the format.
        CheckpointError: ``config.workdir`` holds another run's checkpoint.
        TrainingInterrupted: stopped by a signal; the same call goes on if there is a ``workdir``.
    """
    if config is not None and not isinstance(config, EncodeConfig):
        raise TypeError(f"config must be an EncodeConfig, got {type(config).__name__}")
    asked = config or EncodeConfig()
    config = asked.resolved()
    device = resolve_device(config.device)
    stages = _Stages(observer or _Silent())
    entropy_coder(config.entropy)  # an optional package that is missing is better missed before training

    with stages("load"):
        network = MODELS[config.model]
        # The filter needs whole frames; nothing else does, and they may be many times larger than what is coded.
        late_crop = config.crop if config.encoder_input == "highpass" else None
        video = load_video(
            source,
            frames=config.frames,
            resize=config.resize,
            crop=None if late_crop else config.crop,
            fps=fps,
            untagged_matrix=config.untagged_matrix,
        )
        count, height, width = video.shape
        if late_crop is not None:
            height, width = late_crop
            centre_crop(video.frames[:1], *late_crop)  # one that does not fit is no question of the network's size
        config = asked.resolved((count, height, width))
        spec = network.plan(config.parameters, count, height, width, preset=config.preset)
        header = encoding_header(spec, video, config)
        _check_limits(spec)
        clip = prepare_clip(video.frames, config.encoder_input, crop=late_crop, removed=config.highpass_removed)
        del video  # and whole frames with it

    with stages("train"):
        model = initial_model(spec, config.seed)
        trainer = _train(model, clip, config, device, stages.observer)

    with stages("code"):
        embeddings = embed_all(model, trainer.clip, precision=trainer.config.precision)
        psnr_before = [float(psnr(made, original)) for made, original in _predictions(model, trainer.clip, embeddings)]
        data = code(model, embeddings, header, config, trainer.levels)

    with stages("check"):
        quality = evaluate(Decoder(data, device=device, precision="fp32"), trainer.clip.frames)

    report = {
        "model": config.model,
        "preset": config.preset,
        "frames": count,
        "height": height,
        "width": width,
        "fps": float(header.fps),
        "parameters": model.parameter_counts(),
        "bytes": len(data),
        "section_bytes": Bitstream.open(data).section_bytes,
        **{name: quality[name] for name in ("bits_per_pixel", "psnr_db", "ms_ssim")},
        "psnr_db_before_quantization": float(np.mean(psnr_before)),
        "seconds": stages.seconds,
        "epochs": [vars(result) for result in trainer.history],
        "device": str(device),
        "precision": trainer.config.precision,
        "config": _json_config(config),
        "version": __version__,
    }
    return EncodeResult(data, report)


def _train(
    model: VideoNetwork, clip: Clip, config: EncodeConfig, device: torch.device, observer: EncodeObserver
) -> Trainer:
    trainer = Trainer(
        model,
        clip,
        training_config(config, device),
        device=device,
        workdir=None if config.workdir is None else Path(config.workdir),
        checkpoint_seconds=config.checkpoint_seconds,
    )
    with _tensorboard(config) as log:

        def on_step(trainer: Trainer) -> None:
            observer.step(trainer)
            log(trainer)

        trainer.run(on_step)
    return trainer


def code(
    model: VideoNetwork,
    embeddings: Tensor | None,
    header: Header,
    config: EncodeConfig,
    levels: Mapping[str, Levels] | None = None,
) -> bytes:
    """Quantise a trained network and write its file.

    Args:
        model: the network.
        embeddings: of all frames, from :func:`~hflfnerv.train.embed_all`.
        header: from :func:`encoding_header`.
        config: what was asked for, resolved.
        levels: of each tensor, as :attr:`hflfnerv.train.Trainer.levels` has them; None to quantise to
            ``config.weight_bits`` and ``config.embedding_bits`` between the extremes.
    """
    tensors = {name: p.detach().cpu().contiguous().numpy() for name, p in model.coded_parameters().items()}
    values = None if embeddings is None else embeddings.numpy()
    assert config.weight_bits is not None
    assert config.embedding_bits is not None
    if levels is None:
        weights = quantize_tensors(tensors, config.weight_bits)
        quantised = None if values is None else quantize(values, config.embedding_bits)
    else:
        weights = {name: quantize_to_levels(tensor, levels[name]) for name, tensor in tensors.items()}
        quantised = None if values is None else quantize_to_levels(values, levels[EMBEDDINGS])
    return write_bitstream(header, weights, quantised, entropy=config.entropy)


def initial_model(spec: ModelSpec, seed: int) -> VideoNetwork:
    """Return a network, its encoder included, as training begins with it; random state stays as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        # The caller's default device and dtype are no part of the configuration.
        with torch.device("cpu"), _float32_by_default():
            return build_model(spec)


def training_config(config: EncodeConfig, device: torch.device) -> TrainConfig:
    """Return the numbers of an encode's training.

    Args:
        config: resolved.
        device: where to train, which decides what the precision ``"auto"`` is.
    """
    assert config.optimizer is not None
    assert config.lr is not None
    assert config.batch_size is not None
    assert config.schedule is not None
    assert config.weight_decay is not None
    return TrainConfig(
        epochs=config.epochs,
        lr=config.lr,
        batch_size=config.batch_size,
        seed=config.seed,
        precision=training_precision(config.precision, device),
        optimizer=config.optimizer,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        quantization=quantization_config(config),
    )


def quantization_config(config: EncodeConfig) -> QuantizationConfig | None:
    """Return how training chooses steps, or None where weights are quantised afterwards between their extremes.

    Args:
        config: resolved.
    """
    assert config.quantization_share is not None
    assert config.rate_weight is not None
    assert config.weight_bits is not None
    assert config.embedding_bits is not None
    epochs = round(config.quantization_share * config.epochs)
    if not epochs and not config.rate_weight:
        return None
    return QuantizationConfig(epochs, config.rate_weight, config.weight_bits, config.embedding_bits)


@torch.inference_mode()
def _predictions(model: VideoNetwork, clip: Clip, embeddings: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each frame as the network makes it before quantisation, and the original, both uint8 on the CPU."""
    device = clip.frames.device
    for index in torch.arange(len(clip), device=device).split(1):
        embedding = None if embeddings is None else embeddings[index.cpu()].to(device)
        yield to_uint8(model.decode(embedding, index))[0].cpu(), clip.frames[index][0].cpu()


def _check_limits(spec: ModelSpec) -> None:
    """Raise before training what :func:`code` or a decoder would raise after it: a limit of the format is exceeded."""
    ModelSpec.from_dict(spec.to_dict())
    embedding_values = spec.frames * math.prod(spec.embedding_shape or (0,))
    weights = parameter_count(spec) - embedding_values
    if max(weights, embedding_values) > MAX_ELEMENTS:
        raise ValueError(
            f"size must give at most {MAX_ELEMENTS} weights and as many embedding values, got {weights} and "
            f"{embedding_values}: ask for a smaller size, or code fewer frames"
        )


def encoding_header(spec: ModelSpec, video: Video, config: EncodeConfig) -> Header:
    """Return the header of an encode.

    Args:
        spec: the network's.
        video: what was loaded, cropped or not.
        config: what was asked for, resolved.
    """
    training = {
        **{name: getattr(config, name) for name in ("epochs", "seed", "lr", "batch_size")},
        **({"rate_weight": config.rate_weight} if config.rate_weight else {}),
    }
    return make_header(
        spec, preset=config.preset, video=video, resize=config.resize, crop=config.crop, training=training
    )


def make_header(
    spec: ModelSpec,
    *,
    preset: str,
    fps: Fraction = DEFAULT_FPS,
    video: Video | None = None,
    resize: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Header:
    """Return the header of a file that this program writes.

    Args:
        spec: the network's.
        preset: name of the settings it was made with.
        fps: frame rate where there is no ``video``.
        video: the original; None if it is unknown. Of its frames nothing is used, not even their size and number.
        resize: ``(height, width)`` to which whole frames of the original were resized, or None.
        crop: ``(height, width)`` of the centre crop that followed, or None.
        training: how the network was trained, None if not told.
    """
    known: dict[str, Any] = {"fps": fps}
    if video is not None:
        window = None
        if crop is not None:
            height, width = resize or video.source_size
            window = (centre_offset(height, crop[0]), centre_offset(width, crop[1]), *crop)
        color = video.color
        known = {
            "fps": video.fps,
            "sample_aspect_ratio": video.sample_aspect_ratio,
            "color": Color(color.matrix, color.range, color.primaries, color.transfer),
            "source": Source(*video.source_size, first_frame=video.first_frame, resize=resize, crop=window),
        }
    return Header(
        model=spec.to_dict(),
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        preset=preset,
        writer=f"hflfnerv {__version__}",
        training=training,
        **known,
    )


def _json_config(config: EncodeConfig) -> dict[str, Any]:
    values = dict(vars(config))
    if config.frames is not None:
        values["frames"] = format_frames(as_frame_slice(config.frames))
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}


@contextmanager
def _tensorboard(config: EncodeConfig) -> Iterator[Callable[[Trainer], None]]:
    """Yield a function that logs each finished epoch, or does nothing where no log was asked for."""
    if config.tensorboard is None:
        yield lambda trainer: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendUnavailable(
            f"TensorBoard logs need the package tensorboard ({error}): pip install 'hflfnerv[tensorboard]'"
        ) from error
    logged = 0
    with SummaryWriter(os.fspath(config.tensorboard)) as writer:

        def log(trainer: Trainer) -> None:
            nonlocal logged
            for result in trainer.history[logged:]:
                writer.add_scalar("train/psnr_db", result.psnr_db, result.epoch)
                writer.add_scalar("train/lr", result.lr, result.epoch)
                writer.add_scalar("train/epoch_seconds", result.seconds, result.epoch)
            logged = len(trainer.history)

        yield log
