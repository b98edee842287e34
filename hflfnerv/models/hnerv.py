"""HNeRV (Chen et al., CVPR 2023): one decoder on embeddings of the frame itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import VideoNetwork
from .budget import embedding_count, hfd_stream, keeps_size, plan_or_explain
from .convnext import ConvNeXtEncoder
from .layout import choose_layout
from .spec import ModelSpec
from .streams import DecoderStream, EmbeddingStem

__all__ = ["HNeRV"]

_EMBEDDING_CHANNELS = 16


class HNeRV(VideoNetwork):
    """``frame = (tanh(decoder(e_t)) + 1) / 2`` with ``e_t`` the ConvNeXt embedding of frame t.

    Args:
        spec: the architecture, from :meth:`plan` or from a file's header.
        with_encoder: build the encoder too; False for decoding.
    """

    name = "hnerv"
    encoder_input = "frame"

    def __init__(self, spec: ModelSpec, *, with_encoder: bool = True) -> None:
        super().__init__(spec)
        if set(spec.streams) != {"decoder"} or not spec.embedding_channels:
            raise ValueError("spec must hold the stream decoder and embedding channels")
        stream = spec.streams["decoder"]
        if with_encoder:
            self.encoder = ConvNeXtEncoder(stream.strides, embedding_channels=spec.embedding_channels)
        self.decoder = DecoderStream(stream, EmbeddingStem(stream, spec.embedding_channels))

    @classmethod
    def plan(cls, size: int, frames: int, height: int, width: int, *, preset: str = "paper") -> ModelSpec:
        layout = choose_layout(height, width, stages=5, target_cells=2 * 4)

        def spec_for(size: int) -> ModelSpec | None:
            rest = size - embedding_count(frames, _EMBEDDING_CHANNELS, layout)
            stream = hfd_stream(rest, layout, _EMBEDDING_CHANNELS)
            if stream is None:
                return None
            return ModelSpec(
                model=cls.name,
                frames=frames,
                height=height,
                width=width,
                embedding_channels=_EMBEDDING_CHANNELS,
                streams={"decoder": stream},
            )

        return plan_or_explain(cls.name, size, frames, height, width, spec_for, exact=keeps_size(preset))

    def stems(self, embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
        if embeddings is None:
            raise ValueError("embeddings must be a tensor for this network, got None")
        return [self.decoder.begin(embeddings)]

    def images(self, stems: Sequence[Tensor]) -> tuple[Tensor, None]:
        (stem,) = stems
        return self.decoder.finish(stem), None
