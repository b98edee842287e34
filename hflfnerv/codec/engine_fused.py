"""Decoding on any CPU in float32, by the fused operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models import VideoNetwork
from ..models.streams import DecoderStream
from ..ops import PackedWeights
from .engine import OUTPUT_GROUPS, Embeddings, Engine, draw

__all__ = ["FusedEngine", "rejects"]


def rejects(model: VideoNetwork) -> str | None:
    """Return why this engine cannot take a network, or None."""
    streams = len(model.spec.streams)
    return None if streams in OUTPUT_GROUPS else f"the network has {streams} streams"


class FusedEngine(Engine):
    """Upsampling blocks with weights that are evaluated once, then heads, tanh, sum and 8 bits in one pass.

    One frame at a time, on ``torch.get_num_threads()`` threads; frames do not depend on their number.

    Args:
        model: on the CPU.
        embeddings: where the embeddings come from.
        device: the CPU.
        precision: ``"auto"`` or ``"fp32"``.
    """

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        super().__init__(model, embeddings, device, precision)
        self._model: VideoNetwork = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._streams = [cast(DecoderStream, model.get_submodule(name)) for name in model.spec.streams]
        self._packed = PackedWeights(large_tiles=True)

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            yield self._frame(index, as_bytes=True).numpy()

    def float_frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            yield self._frame(index, as_bytes=False).permute(2, 0, 1)

    @torch.inference_mode()
    def _frame(self, index: int, *, as_bytes: bool) -> Tensor:
        """Make a frame ``[H, W, 3]``, uint8 or float32."""
        stems = self._model.stems(self.embeddings([index]), torch.tensor([index]))
        with self._packed:
            return draw(self._streams, stems, self.spec, as_bytes=as_bytes)[0]
