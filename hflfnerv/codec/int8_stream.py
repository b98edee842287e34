"""A decoder's large upsampling blocks in int8: weights per output channel, activations per channel.

Only blocks that make a sizable part of a frame's multiplications are worth it, and they are the last ones of a stream:
between them the activation stays in 8 bits, and the last one hands half precision or float32 to the head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..models import ModelSpec
from ..models.streams import DecoderStream
from ..nn import UpsampleBlock
from ..ops import Int8Block, Int8Range, conv_pixel_shuffle_gelu_int8, int8_image, quantize_int8

__all__ = ["Int8Stream", "first_int8_block"]

# Blocks with less than this share of the network's multiplications stay as they are.
_LEAST_SHARE = 0.05


def first_int8_block(spec: ModelSpec, name: str) -> int | None:
    """Return the first of the last blocks of a stream that are worth running in int8, or None where none is.

    Args:
        spec: of the network.
        name: of the stream.
    """
    costs = {stream: _multiplications(spec, stream) for stream in spec.streams}
    least = _LEAST_SHARE * sum(map(sum, costs.values()))
    first = len(costs[name])
    while first > 0 and costs[name][first - 1] >= least and spec.streams[name].kernels[first - 1] % 2 == 1:
        first -= 1
    return first if first < len(costs[name]) else None


def _multiplications(spec: ModelSpec, name: str) -> list[int]:
    """Return those of each block of a stream for one frame."""
    stream = spec.streams[name]
    cells, costs = stream.layout.cells, []
    for c_in, c_out, stride, kernel in zip(
        stream.widths[:-1], stream.widths[1:], stream.strides, stream.kernels, strict=True
    ):
        costs.append(cells * c_in * c_out * stride**2 * kernel**2)
        cells *= stride**2
    return costs


class Int8Stream:
    """What :func:`~hflfnerv.codec.engine.draw` takes for a stream, with its last blocks in int8.

    Args:
        stream: in the precision of all that is not int8.
        exact: the same in float32, from which weights and ranges are taken.
        first: the first block in int8.
        stems: what ``exact`` starts from in frames that are typical of the video, float32 ``[1, C, h, w]`` each. The
            ranges of the activations are those of these frames.
    """

    def __init__(self, stream: DecoderStream, exact: DecoderStream, first: int, stems: Iterable[Tensor]) -> None:
        self.head = stream.head
        self._before = stream.blocks[:first]
        ranges = _ranges(exact, first, stems)
        blocks = [block for block in exact.blocks[first:] if isinstance(block, UpsampleBlock)]
        self._blocks = [
            Int8Block.of(
                block.conv.weight, block.conv.bias, block.upscale_factor, of, to, approximate=block.approximate
            )
            for block, of, to in zip(blocks, ranges, [*ranges[1:], None], strict=True)
        ]
        self._ranges = ranges
        self._images: dict[tuple[int, ...], list[Tensor]] = {}

    def upsample(self, x: Tensor) -> Tensor:
        """Return what the head takes, in x's dtype; see :meth:`DecoderStream.upsample`."""
        for block in self._before:
            x = block(x)
        images = self._images_for(x)
        quantize_int8(x, self._ranges[0], images[0])
        *blocks, last = self._blocks
        for quantized, image, following in zip(blocks, images[:-1], images[1:], strict=True):
            conv_pixel_shuffle_gelu_int8(image, quantized, following)
        rows, columns = (
            size - kernel + 1 for size, kernel in zip(images[-1].shape[2:], last.weight.shape[2:], strict=True)
        )
        size = (len(x), last.out_channels, rows * last.r, columns * last.r)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return conv_pixel_shuffle_gelu_int8(images[-1], last, out)

    def forget(self, batch: int) -> None:
        """Give the images of so many frames back."""
        self._images = {key: images for key, images in self._images.items() if key[0] != batch}

    def _images_for(self, x: Tensor) -> list[Tensor]:
        # Made once for each size: their borders stay, and a CUDA graph reads and writes where it did when captured.
        key = (x.shape[0], *x.shape[2:])
        if key not in self._images:
            rows, columns = x.shape[2:]
            images = []
            for block, of in zip(self._blocks, self._ranges, strict=True):
                images.append(int8_image(len(x), rows, columns, of, halo=block.weight.shape[2] // 2))
                rows, columns = rows * block.r, columns * block.r
            self._images[key] = images
        return self._images[key]


def _ranges(exact: DecoderStream, first: int, stems: Iterable[Tensor]) -> list[Int8Range]:
    """Return the range of what each block from the first on takes."""
    least: list[Tensor] = []
    greatest: list[Tensor] = []
    for stem in stems:
        inputs = itertools.accumulate(exact.blocks[:-1], lambda x, block: block(x), initial=stem)
        taken = list(itertools.islice(inputs, first, None))
        lows, highs = ([getattr(x, what)(dim=(0, 2, 3)) for x in taken] for what in ("amin", "amax"))
        least = lows if not least else [torch.minimum(a, b) for a, b in zip(least, lows, strict=True)]
        greatest = highs if not greatest else [torch.maximum(a, b) for a, b in zip(greatest, highs, strict=True)]
    return [Int8Range.of(low, high) for low, high in zip(least, greatest, strict=True)]
