"""What ``encode`` can be told, with the presets' settings, and in which precisions files are decoded."""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

__all__ = [
    "DECODE_PRECISIONS",
    "MATRICES",
    "PRESETS",
    "SCHEDULES",
    "EncodeConfig",
    "EncoderInput",
    "TrainingDefaults",
    "parse_size",
]

EncoderInput = Literal["frame", "highpass"]

#: How the learning rate falls after the warm-up.
SCHEDULES = ("cosine", "linear")
#: YUV matrices that a clip without a tag can be read by.
MATRICES = ("bt601", "bt709", "smpte240m", "fcc")
#: In which a decoder can compute; see ``Decoder``.
DECODE_PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int16", "int8")
# Bits of weights and of embeddings: as published, between the extremes; and of the finest steps by what they cost, for
# some small tensors are worth more than those.
_PUBLISHED_BITS = 8, 6
_FINEST_BITS = 10, 10
_SIZE_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
# A larger batch takes less time for a frame, and makes fewer steps: docs/ablations.md has what comes of it. Steps that
# it leaves at least; frames that it has at most, and pixels, for it takes memory.
_FEWEST_STEPS, _LARGEST_BATCH, _MOST_PIXELS = 5000, 4, 4 * 640 * 1280


class TrainingDefaults(NamedTuple):
    """Settings that a preset fixes per model where the user gives none."""

    optimizer: str
    lr: float
    batch_size: int
    encoder_input: EncoderInput | None
    quantization_share: float = 0.0
    rate_weight: float = 0.0
    schedule: str = "cosine"
    weight_decay: float = 0.0

    def with_batch(self, batch_size: int) -> TrainingDefaults:
        """Return the settings for so many frames a step.

        The learning rate of Muon grows with the root of them, as the noise of the gradients falls, and so does its
        weight decay: weights then lose as much in an epoch. The learning rate of Adam stays as it was published.
        """
        growth = math.sqrt(batch_size / self.batch_size) if self.optimizer == "muon" else 1.0
        return self._replace(batch_size=batch_size, lr=growth * self.lr, weight_decay=growth * self.weight_decay)

    def for_clip(self, epochs: int, shape: tuple[int, int, int]) -> TrainingDefaults:
        """Return the settings for a clip ``(T, H, W)``.

        With Muon, long training of frames that are not too large has twice or four times as many of them a step.
        """
        frames, height, width = shape
        most = min(_LARGEST_BATCH, frames, _MOST_PIXELS // (height * width)) if self.optimizer == "muon" else 0
        batch = self.batch_size
        while 2 * batch <= most and epochs * (frames // (2 * batch)) >= _FEWEST_STEPS:
            batch *= 2
        return self.with_batch(batch)


#: Per preset and model. ``paper``: the paper's own settings, and those its baselines were published with. ``best``:
#: what ``docs/ablations.md`` shows to be better.
PRESETS: dict[str, dict[str, TrainingDefaults]] = {
    "paper": {
        "hflf": TrainingDefaults("adam", lr=2e-3, batch_size=1, encoder_input="highpass"),
        "hnerv": TrainingDefaults("adam", lr=1e-3, batch_size=2, encoder_input="frame"),
        "nerv": TrainingDefaults("adam", lr=1e-3, batch_size=2, encoder_input=None),
    },
    "best": {
        "hflf": TrainingDefaults("muon", 0.02, 1, "frame", 0.3, 0.5, "linear", 0.03),
        "hnerv": TrainingDefaults("muon", 0.02, 1, "frame", 0.3, 0.5, "linear", 0.03),
        "nerv": TrainingDefaults("muon", 0.02, 1, None, 0.3, 0.5, "linear", 0.03),
    },
}


def parse_size(text: str | float) -> int:
    """Read a number of parameters: ``1.5M``, ``300k``, ``300000`` or a number.

    Raises:
        TypeError: it is neither text nor a number.
        ValueError: the text is none of these, or the number is less than 1 or more than 2**40.
    """
    if isinstance(text, bool):
        raise ValueError(f"size must be a number of parameters such as 1.5M, got {text!r}")
    if isinstance(text, numbers.Real):
        value = float(text)
    elif not isinstance(text, str):
        raise TypeError(f"size must be a number or text such as 1.5M, got {text!r}")
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmM]?)\s*", text)
        if match is None:
            raise ValueError(f"size must be a number of parameters such as 1.5M, 300k or 300000, got {text!r}")
        value = float(match[1]) * _SIZE_UNITS[match[2].lower()]
    if not 1 <= value <= 2**40:
        raise ValueError(f"size must be 1 to 2**40 parameters, got {text!r}")
    return round(value)


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode a video.

    Attributes:
        model: ``"hflf"`` (the paper's dual stream), ``"hnerv"`` or ``"nerv"``.
        preset: ``"best"``, the best known here, or ``"paper"``, as the method was published.
        size: parameters of embeddings and decoders together; a number or a string such as ``"1.5M"``.
        epochs: passes over the frames.
        optimizer: ``"adam"``, or ``"muon"`` for the weights of convolutions and Adam for the rest; None for the
            preset's.
        lr: learning rate; None for the preset's. With ``"muon"`` it is that of the convolutions, Adam's is a tenth of
            it, and the preset's is for one frame a step and grows with the root of ``batch_size``.
        weight_decay: what ``"muon"`` takes off the weights of the decoders' convolutions in each step, as a part of the
            learning rate; None for the preset's, which grows likewise.
        schedule: how the learning rate falls from a tenth of the epochs on, ``"cosine"`` or ``"linear"``; None for the
            preset's.
        encoder_input: what the encoder sees, ``"highpass"`` or ``"frame"``; None for the preset's. The encoder is no
            part of the file.
        batch_size: frames a step; None for the preset's. With ``"muon"`` that is two or four in long training, where
            5,000 steps or more are left and a step has no more pixels than four frames of 640 x 1280, unless there is
            an ``lr``.
        crop: ``(height, width)`` of a centre crop, after resizing and any filter; None for the whole frame.
        resize: ``(height, width)`` to which whole frames are resized first; None to keep their size.
        frames: a slice without a step, ``(start, stop)`` or ``"A:B"``; None for all frames.
        untagged_matrix: YUV matrix of a video that does not state its own, one of :data:`MATRICES`. The file tells
            by which one it was read.
        highpass_removed: fraction of the bandwidth that the high-pass filter removes on each axis.
        quantization_share: the last part of the epochs, in [0, 1], in which the network is trained with its weights
            and embeddings quantised as in the file; None for the preset's. It should have learned
            something by then, since the steps are chosen once.
        rate_weight: how much the size of the file counts beside its error: one per cent of its bits is worth so many
            per cent of the mean squared error. The step of each tensor follows from it. 0 for steps between a tensor's
            extremes; None for the preset's.
        weight_bits: bits of a quantised weight, 2 to 12; with ``rate_weight``, of the weights of the finest steps when
            these are chosen. None for 8, as published, or for 10 with ``rate_weight``.
        embedding_bits: bits of a quantised embedding value, 2 to 12; the same, but 6 as published.
        entropy: the entropy coder, ``"huffman"`` or ``"range"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        precision: compute type of the training step, ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 where the
            device multiplies in it, else fp32. Weights and loss stay float32.
        seed: seed of the initial weights and of the frame order.
        workdir: folder for checkpoints; training resumes from what is there. None for no checkpoints.
        checkpoint_seconds: time between checkpoints.
        tensorboard: folder for TensorBoard logs; None for none.
    """

    model: str = "hflf"
    preset: str = "best"
    size: int | float | str = "1.5M"
    epochs: int = 300
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    batch_size: int | None = None
    encoder_input: EncoderInput | None = None
    crop: tuple[int, int] | None = None
    resize: tuple[int, int] | None = None
    frames: slice | tuple[int | None, int | None] | str | None = None
    untagged_matrix: str = "bt601"
    highpass_removed: float = 0.8
    quantization_share: float | None = None
    rate_weight: float | None = None
    weight_bits: int | None = None
    embedding_bits: int | None = None
    entropy: str = "huffman"
    device: str = "auto"
    precision: str = "fp32"
    seed: int = 1
    workdir: str | os.PathLike[str] | None = None
    checkpoint_seconds: float = 60.0
    tensorboard: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _choice("preset", self.preset, PRESETS)
        _choice("model", self.model, PRESETS[self.preset])
        _choice("untagged_matrix", self.untagged_matrix, MATRICES)
        _choice("entropy", self.entropy, ("huffman", "range"))
        _choice("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        if self.optimizer is not None:
            _choice("optimizer", self.optimizer, ("adam", "muon"))
        if self.schedule is not None:
            _choice("schedule", self.schedule, SCHEDULES)
        if self.encoder_input is not None:
            _choice("encoder_input", self.encoder_input, ("highpass", "frame"))
            if PRESETS[self.preset][self.model].encoder_input is None:
                raise ValueError(f"encoder_input must be None for model {self.model!r}, which has no encoder")
        parse_size(self.size)
        for name, low, high in (
            ("epochs", 1, None),
            ("seed", 0, 2**31 - 1),
            ("weight_bits", 2, 12),
            ("embedding_bits", 2, 12),
            ("batch_size", 1, None),
        ):
            self._keep(name, _integer, low, high)
        for name in (
            "lr",
            "weight_decay",
            "quantization_share",
            "rate_weight",
            "highpass_removed",
            "checkpoint_seconds",
        ):
            self._keep(name, _number)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.quantization_share is not None and not 0 <= self.quantization_share <= 1:
            raise ValueError(f"quantization_share must be in [0, 1], got {self.quantization_share}")
        if self.rate_weight is not None and not 0 <= self.rate_weight < float("inf"):
            raise ValueError(f"rate_weight must be at least 0, got {self.rate_weight}")
        if not 0 <= self.highpass_removed <= 1:
            raise ValueError(f"highpass_removed must be in [0, 1], got {self.highpass_removed}")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"checkpoint_seconds must be at least 0, got {self.checkpoint_seconds}")
        for name in ("crop", "resize"):
            self._keep(name, _pair)

    def _keep(self, name: str, convert: Callable[..., Any], *limits: int | None) -> None:
        """Let a field hold Python's own number where it was given NumPy's; None stays where it is the default."""
        value = getattr(self, name)
        if value is not None or type(self).__dataclass_fields__[name].default is not None:
            object.__setattr__(self, name, convert(name, value, *limits))

    @property
    def parameters(self) -> int:
        """``size`` as a number."""
        return parse_size(self.size)

    def resolved(self, shape: tuple[int, int, int] | None = None) -> EncodeConfig:
        """Return the same configuration with the preset's settings filled in where there are none.

        Args:
            shape: ``(T, H, W)`` of what is coded, for the settings that depend on it; None for those of a short clip.

        Raises:
            ValueError: there is another optimiser than the preset's and no learning rate for it.
        """
        defaults = PRESETS[self.preset][self.model]
        rate_weight = defaults.rate_weight if self.rate_weight is None else self.rate_weight
        weight_bits, embedding_bits = _FINEST_BITS if rate_weight else _PUBLISHED_BITS
        optimizer = defaults.optimizer if self.optimizer is None else self.optimizer
        if self.lr is None and optimizer != defaults.optimizer:
            raise ValueError(
                f"lr must be given with optimizer {optimizer!r}, got None: that of preset {self.preset!r} is for "
                f"{defaults.optimizer!r}"
            )
        if self.batch_size is not None:
            defaults = defaults.with_batch(self.batch_size)
        elif shape is not None and self.lr is None:
            defaults = defaults.for_clip(self.epochs, shape)
        return replace(
            self,
            size=self.parameters,
            optimizer=optimizer,
            lr=defaults.lr if self.lr is None else self.lr,
            weight_decay=defaults.weight_decay if self.weight_decay is None else self.weight_decay,
            schedule=defaults.schedule if self.schedule is None else self.schedule,
            batch_size=defaults.batch_size,
            encoder_input=defaults.encoder_input if self.encoder_input is None else self.encoder_input,
            quantization_share=(
                defaults.quantization_share if self.quantization_share is None else self.quantization_share
            ),
            rate_weight=rate_weight,
            weight_bits=weight_bits if self.weight_bits is None else self.weight_bits,
            embedding_bits=embedding_bits if self.embedding_bits is None else self.embedding_bits,
        )


def _choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {f'in {low}..{high}' if high else f'at least {low}'}, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be (height, width), got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be (height, width), got {value!r}")
    height, width = (_integer(name, side, 1, 16384) for side in value)
    return height, width
