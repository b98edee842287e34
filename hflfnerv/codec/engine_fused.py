"""Decoding on any CPU by the fused operations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models import VideoNetwork
from ..models.streams import DecoderStream
from ..nn import UpsampleBlock
from ..ops import PackedWeights
from ..ops._winograd import LastBlock, last_blocks
from .engine import OUTPUT_GROUPS, Embeddings, Engine, finish

__all__ = ["FusedEngine", "rejects"]


def rejects(model: VideoNetwork) -> str | None:
    """Return why this engine cannot take a network, or None."""
    streams = len(model.spec.streams)
    return None if streams in OUTPUT_GROUPS else f"the network has {streams} streams"


class FusedEngine(Engine):
    """Upsampling blocks with weights that are evaluated once, then heads, tanh, sum and 8 bits in one pass.

    Where all last blocks run by Winograd's method, they and that pass alternate in bands of rows.

    One frame at a time, on ``torch.get_num_threads()`` threads. What is too small for the kernels runs in PyTorch,
    which may sum in another order on another number of threads.

    Args:
        model: on the CPU.
        embeddings: where the embeddings come from.
        device: the CPU.
        precision: ``"fp32"``, or ``"int16"``, where large blocks multiply 16-bit integers, which ``"auto"`` is, too.
    """

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        super().__init__(model, embeddings, device, precision)
        self._model: VideoNetwork = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._streams = [cast(DecoderStream, model.get_submodule(name)) for name in model.spec.streams]
        self._packed = PackedWeights(tiles="large" if precision == "fp32" else "integer")

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            yield self._frame(index, as_bytes=True).numpy()

    def float_frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            yield self._frame(index, as_bytes=False).permute(2, 0, 1)

    @torch.inference_mode()
    def _frame(self, index: int, *, as_bytes: bool) -> Tensor:
        """Make a frame ``[H, W, 3]``, uint8 or float32."""
        stems = self._model.stems(self.embeddings([index]), torch.tensor([index], device="cpu"))
        with self._packed:
            features = [
                functools.reduce(lambda x, block: block(x), stream.blocks[:-1], _channels_last(stem))
                for stream, stem in zip(self._streams, stems, strict=True)
            ]
            frame = self._in_bands(features, as_bytes=as_bytes)
            if frame is None:
                features = [stream.blocks[-1](x) for stream, x in zip(self._streams, features, strict=True)]
                frame = finish(self._streams, features, self.spec, as_bytes=as_bytes)
        return frame[0]

    def _in_bands(self, features: Sequence[Tensor], *, as_bytes: bool) -> Tensor | None:
        """Return frames ``[1, H, W, 3]`` of what the last blocks take, or None where these run in another way."""
        groups, scales = OUTPUT_GROUPS[len(self._streams)]
        blocks, biases = [], torch.zeros(len(scales), 3, dtype=torch.float32, device="cpu")
        for stream, x, group in zip(self._streams, features, groups, strict=True):
            block = stream.blocks[-1]
            assert isinstance(block, UpsampleBlock)
            if block.impl not in ("auto", "winograd"):
                return None
            weight, bias = block.conv.weight, block.conv.bias
            head = stream.head
            assert head.bias is not None
            biases[group] += head.bias
            blocks.append(LastBlock(x, weight, bias, block.upscale_factor, block.approximate, head.weight, group))
        crop = (self.spec.height, self.spec.width)
        return last_blocks(blocks, biases, scales, 0.5, crop, as_bytes=as_bytes)


def _channels_last(x: Tensor) -> Tensor:
    """Return a stem in the memory order that the kernels look at."""
    return x.contiguous(memory_format=torch.channels_last)
