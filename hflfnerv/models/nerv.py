"""NeRV (Chen et al., NeurIPS 2021) as the HNeRV repository configures its baseline: one decoder on the time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import VideoNetwork
from .budget import keeps_size, nerv_stream, plan_or_explain
from .layout import choose_layout
from .spec import ModelSpec, TimeSpec
from .streams import DecoderStream, TimeStem
from .time_encoding import TimeEncoding

__all__ = ["NeRV"]

_TIME = TimeSpec(base=1.25, levels=80, first=0)


class NeRV(VideoNetwork):
    """``frame = (tanh(decoder(p_t)) + 1) / 2`` with ``p_t`` the encoding of frame t's time at 80 levels.

    Args:
        spec: the architecture, from :meth:`plan` or from a file's header.
        with_encoder: for training; there is no encoder, but the time encoding of all frames is cached.
    """

    name = "nerv"
    encoder_input = None

    def __init__(self, spec: ModelSpec, *, with_encoder: bool = True) -> None:
        super().__init__(spec)
        if set(spec.streams) != {"decoder"} or spec.time is None or spec.embedding_channels:
            raise ValueError("spec must hold the stream decoder, a time encoding and no embedding channels")
        stream = spec.streams["decoder"]
        self.decoder = DecoderStream(stream, TimeStem(stream, 2 * spec.time.levels))
        self.time = TimeEncoding(spec.time, spec.frames, cached=with_encoder)

    @classmethod
    def plan(cls, size: int, frames: int, height: int, width: int, *, preset: str = "paper") -> ModelSpec:
        def spec_for(size: int) -> ModelSpec | None:
            # The stem's weights grow with the grid. Sizes too small for the baseline's 8 x 16 cells get a coarser grid.
            for target_cells in (8 * 16, 64, 32, 16, 8):
                layout = choose_layout(height, width, stages=4, target_cells=target_cells)
                stream = nerv_stream(size, layout, 2 * _TIME.levels)
                if stream is not None:
                    break
            else:
                return None
            return ModelSpec(
                model=cls.name,
                frames=frames,
                height=height,
                width=width,
                embedding_channels=0,
                streams={"decoder": stream},
                time=_TIME,
            )

        return plan_or_explain(cls.name, size, frames, height, width, spec_for, exact=keeps_size(preset))

    def stems(self, embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
        return [self.decoder.begin(self.time(index).to(self.decoder.head.weight.dtype))]

    def images(self, stems: Sequence[Tensor]) -> tuple[Tensor, None]:
        (stem,) = stems
        return self.decoder.finish(stem), None
