"""What every network of this package has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .spec import ModelSpec

__all__ = ["EncoderInput", "VideoNetwork"]

EncoderInput = Literal["frame", "highpass"]
_ENCODER_PREFIX = "encoder."


class VideoNetwork(nn.Module, ABC):
    """A network that represents one video.

    The encoder, where there is one, makes a small embedding of each frame and is thrown away after training; the
    embeddings and everything else are the coded video.

    Attributes:
        name: the model's name on the command line and in files.
        encoder_input: what the encoder sees, or None for a network driven by the time alone.
        spec: the architecture.
        encoder: the embedding encoder; None if the network has none, or was built for decoding.
    """

    name: ClassVar[str]
    encoder_input: ClassVar[EncoderInput | None]

    def __init__(self, spec: ModelSpec, *, with_encoder: bool = True) -> None:
        super().__init__()
        if spec.model != self.name:
            raise ValueError(f"spec.model must be {self.name!r}, got {spec.model!r}")
        self.spec = spec
        self.encoder: nn.Module | None = None

    @classmethod
    @abstractmethod
    def plan(cls, size: int, frames: int, height: int, width: int) -> ModelSpec:
        """Return the architecture that spends ``size`` parameters on embeddings and decoders.

        Args:
            size: parameters of the coded video: all frames' embeddings and the decoders.
            frames: number of frames T.
            height: frame height in pixels.
            width: frame width in pixels.

        Raises:
            ValueError: ``size`` does not pay for the embeddings and the smallest decoders; names the least size.
        """

    @abstractmethod
    def decode(self, embeddings: Tensor | None, index: Tensor) -> Tensor:
        """Make frames.

        Args:
            embeddings: float ``[B, C, h, w]``, or None for a network without embeddings.
            index: int64 ``[B]``, the frames' indices in 0..T-1.

        Returns:
            float ``[B, 3, H, W]``, nominally in [0, 1] and not clamped.
        """

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
        """Encode and decode: what training differentiates. ``x`` is None for a network without an encoder."""
        return self.decode(None if x is None else self.embed(x), index)

    def crop(self, image: Tensor) -> Tensor:
        """Crop a stream's output to the frame: its top left ``[..., H, W]``."""
        return image[..., : self.spec.height, : self.spec.width]

    def coded_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are coded, by name, in the order in which they are coded."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(_ENCODER_PREFIX)}

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
