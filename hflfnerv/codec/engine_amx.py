"""Decoding on a CPU with AMX: the whole network in one compiled object, bfloat16 with float32 sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _ext
from ..models import VideoNetwork
from ..models.streams import DecoderStream
from ..nn import UpsampleBlock
from ..ops import _cpp
from .engine import OUTPUT_GROUPS, Embeddings, Engine

__all__ = ["AmxEngine", "rejects", "unavailable"]


def unavailable() -> str | None:
    """Return why this machine cannot run it, or None."""
    reason: str | None = _ext.unavailable() or _ext.load().amx_unavailable()
    return reason


def rejects(model: VideoNetwork) -> str | None:
    """Return why this engine cannot take a network, or None."""
    streams = len(model.spec.streams)
    return None if streams in OUTPUT_GROUPS else f"the network has {streams} streams"


class AmxEngine(Engine):
    """Weights packed once, activations in memory that is kept, both in the order in which AMX reads them.

    The stems run in float32, the upsampling blocks and the heads in bfloat16 with sums, biases, GELU, tanh and all that
    follows in float32. It uses ``torch.get_num_threads()`` threads, and frames do not depend on their number.

    Args:
        model: on the CPU; its weights are not looked at again.
        embeddings: where the embeddings come from.
        device: the CPU.
        precision: ``"auto"`` or ``"bf16"``.
    """

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        super().__init__(model, embeddings, device, precision)
        self._model = model
        streams = [cast(DecoderStream, model.get_submodule(name)) for name in model.spec.streams]
        groups, scales = OUTPUT_GROUPS[len(streams)]
        kept: list[Tensor] = []  # until the decoder has packed them
        described = [self._describe(stream, group, kept) for stream, group in zip(streams, groups, strict=True)]
        biases = torch.zeros(len(scales), 3, dtype=torch.float32, device="cpu")
        for stream, group in zip(streams, groups, strict=True):
            assert stream.head.bias is not None
            biases[group] += stream.head.bias
        self._decoder = _ext.load().FrameDecoder(
            (self.spec.height, self.spec.width),
            (scales, biases.flatten().tolist(), 0.5),
            described,
            torch.get_num_threads(),
        )

    @staticmethod
    def _describe(stream: DecoderStream, group: int, kept: list[Tensor]) -> tuple[object, ...]:
        def address(t: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> int:
            kept.append(t.to(dtype).contiguous(memory_format=layout))
            return _cpp.address(kept[-1], dtype, layout)

        blocks = []
        for block in stream.blocks:
            assert isinstance(block, UpsampleBlock)
            conv = block.conv
            assert conv.bias is not None
            blocks.append(
                (
                    conv.in_channels,
                    conv.out_channels // block.upscale_factor**2,
                    block.upscale_factor,
                    conv.kernel_size[0],
                    block.approximate == "tanh",
                    address(conv.weight, torch.bfloat16, torch.channels_last),
                    address(conv.bias, torch.float32),
                )
            )
        return (*stream.spec.grid, blocks, address(stream.head.weight, torch.float32), group)

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            frame = np.empty((self.spec.height, self.spec.width, 3), np.uint8)
            self._decode(index, frame.ctypes.data, as_bytes=True)
            yield frame

    def float_frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            frame = torch.empty(self.spec.height, self.spec.width, 3, dtype=torch.float32, device="cpu")
            self._decode(index, _cpp.address(frame, torch.float32), as_bytes=False)
            yield frame.permute(2, 0, 1)

    def fill(self, indices: Sequence[int], out: NDArray[np.uint8]) -> None:
        for row, index in zip(out, indices, strict=True):
            self._decode(index, row.ctypes.data, as_bytes=True)

    @torch.inference_mode()
    def _decode(self, index: int, address: int, *, as_bytes: bool) -> None:
        # One frame at a time: the stems' products may be summed in another order in a batch.
        stems = self._model.stems(self.embeddings([index]), torch.tensor([index], device="cpu"))
        stems = [stem.float().contiguous() for stem in stems]
        addresses = [_cpp.address(stem, torch.float32) for stem in stems]
        self._decoder.decode(addresses, address, as_bytes, torch.get_num_threads())
