"""What every network of this package has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EncoderInput
from ..nn import UpsampleBlock
from ..ops import stream_loss
from .spec import ModelSpec

__all__ = ["EncoderInput", "VideoNetwork"]

_ENCODER_PREFIX = "encoder."


class VideoNetwork(nn.Module, ABC):
    """A network that represents one video.

    The encoder, where there is one, makes a small embedding of each frame and is thrown away after training; the
    embeddings and everything else are the coded video.

    Attributes:
        name: the model's name on the command line and in files.
        encoder_input: what the encoder sees as published, or None for a network driven by the time alone.
        spec: the architecture.
        encoder: the embedding encoder; None if the network has none, or was built for decoding.
    """

    name: ClassVar[str]
    encoder_input: ClassVar[EncoderInput | None]

    def __init__(self, spec: ModelSpec, *, with_encoder: bool = True) -> None:
        super().__init__()
        if spec.model != self.name:
            raise ValueError(f"spec.model must be {self.name!r}, got {spec.model!r}")
        for name, stream in spec.streams.items():
            if stream.detail is not None and name != "hfd":
                raise ValueError(f"spec.streams.{name} must have no detail, which is for the stream hfd alone")
        self.spec = spec
        self.encoder: nn.Module | None = None

    @classmethod
    @abstractmethod
    def plan(cls, size: int, frames: int, height: int, width: int, *, preset: str = "paper") -> ModelSpec:
        """Return the architecture that spends ``size`` parameters on embeddings and decoders.

        Args:
            size: parameters of the coded video: all frames' embeddings and the decoders.
            frames: number of frames T.
            height: frame height in pixels.
            width: frame width in pixels.
            preset: ``"paper"`` for the widths of the published formulas, whose true size is within a few per cent of
                ``size`` from about a million on, and may be half or twice a small one; ``"best"`` for the largest
                network of at most ``size`` parameters.

        Raises:
            TypeError: a number is not an integer.
            ValueError: a number is less than 1, there is no such preset, or ``size`` does not pay for the embeddings
                and the smallest decoders; names the least size.
        """

    @abstractmethod
    def stems(self, embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
        """Make what each stream's upsampling blocks start from: all that a frame is made of, while it is small.

        Args:
            embeddings: as in :meth:`decode`.
            index: as in :meth:`decode`.

        Returns:
            float ``[B, C, h, w]`` for each stream, in the order of ``spec.streams``.
        """

    @abstractmethod
    def images(self, stems: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Make the images of the streams from :meth:`stems`, before activation and crop.

        Returns:
            ``(low, high)``, float ``[B, 3, H', W']`` with the frame at the top left; ``high`` is None for a network of
            one stream. The frame is ``tanh(low) / 2 + 1/2 + tanh(high)``.
        """

    def render(self, stems: Sequence[Tensor]) -> Tensor:
        """Make frames of :meth:`stems`; returns what :meth:`decode` returns."""
        low, high = self.images(stems)
        frame = torch.tanh(self.crop(low)) * 0.5 + 0.5
        return frame if high is None else frame + torch.tanh(self.crop(high))

    def decode(self, embeddings: Tensor | None, index: Tensor) -> Tensor:
        """Make frames.

        Args:
            embeddings: float ``[B, C, h, w]``, or None for a network without embeddings.
            index: int64 ``[B]``, the frames' indices in 0..T-1.

        Returns:
            float ``[B, 3, H, W]``, nominally in [0, 1] and not clamped.
        """
        return self.render(self.stems(embeddings, index))

    def embed(self, x: Tensor) -> Tensor:
        """Make embeddings ``[B, C, h, w]`` of encoder inputs ``[B, 3, H, W]``.

        Frames that the strides do not divide are padded at the bottom and the right with their edge pixels.
        """
        if self.encoder is None:
            raise RuntimeError(f"this {self.name} network has no encoder")
        rows, columns = next(iter(self.spec.streams.values())).layout.output
        pad = (0, columns - x.shape[-1], 0, rows - x.shape[-2])
        embeddings: Tensor = self.encoder(F.pad(x, pad, mode="replicate") if any(pad) else x)
        return embeddings

    def forward(self, x: Tensor | None, index: Tensor) -> Tensor:
        """Encode and decode. ``x`` is None for a network without an encoder."""
        return self.decode(None if x is None else self.embed(x), index)

    def errors(self, x: Tensor | None, index: Tensor, frames: Tensor) -> Tensor:
        """Encode, decode and compare: the mean squared error of each frame, float32 ``[B]``.

        Args:
            x: as in :meth:`forward`.
            index: as in :meth:`decode`.
            frames: what the frames should be, uint8 ``[B, H, W, 3]``.
        """
        return self.distortion(None if x is None else self.embed(x), index, frames)

    def distortion(self, embeddings: Tensor | None, index: Tensor, frames: Tensor) -> Tensor:
        """Decode and compare; arguments as in :meth:`decode` and :meth:`errors`, whose result it returns."""
        low, high = self.images(self.stems(embeddings, index))
        return stream_loss(low, frames, high)

    def crop(self, image: Tensor) -> Tensor:
        """Crop a stream's output to the frame: its top left ``[..., H, W]``."""
        return image[..., : self.spec.height, : self.spec.width]

    def coded_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are coded, by name, in the order in which they are coded."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(_ENCODER_PREFIX)}

    def hidden_weights(self) -> list[Tensor]:
        """Return the weights between hidden layers that are matrices: what Muon is for.

        The upsampling blocks' convolutions, and all of the encoder's but the depthwise ones. Stems and heads, whose
        inputs or outputs are numbers with a meaning, are not among them.
        """
        blocks = [m.conv.weight for m in self.modules() if isinstance(m, UpsampleBlock)]
        encoder = [] if self.encoder is None else self.encoder.modules()
        full = [m.weight for m in encoder if isinstance(m, (nn.Conv2d, nn.Linear)) and getattr(m, "groups", 1) == 1]
        return blocks + full

    def load_coded(self, tensors: dict[str, Tensor]) -> None:
        """Make ``tensors`` the coded parameters, without a copy; names and shapes must match exactly."""
        missing, unexpected = self.load_state_dict(tensors, strict=False, assign=True)
        missing = [name for name in missing if not name.startswith(_ENCODER_PREFIX)]
        if missing or unexpected:
            raise ValueError(f"tensors must match the network, got missing {missing} and unexpected {unexpected}")

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of coded parameters: each stream's, the embeddings' of all frames, and their total."""
        counts = dict.fromkeys(self.spec.streams, 0)
        for name, parameter in self.coded_parameters().items():
            counts[name.split(".", 1)[0]] += parameter.numel()
        shape = self.spec.embedding_shape
        counts["embeddings"] = self.spec.frames * shape[0] * shape[1] * shape[2] if shape else 0
        counts["total"] = sum(counts.values())
        return counts
