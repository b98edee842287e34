"""The decoder stream every network here is made of: stem, upsampling blocks, head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import UpsampleBlock
from ..ops import conv2d
from .spec import StreamSpec

__all__ = ["DecoderStream", "DetailStem", "EmbeddingStem", "GridStem", "TimeStem", "use_implementation"]


class EmbeddingStem(nn.Conv2d):
    """``GELU(conv1x1(e))`` of an embedding ``[B, channels, h, w]`` that has the grid's size."""

    def __init__(self, spec: StreamSpec, channels: int) -> None:
        super().__init__(channels, spec.widths[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class DetailStem(nn.Module):
    """``GELU(PixelShuffle(conv1x1(GELU(conv1x1(e)))) + conv1x1(d))`` of a coarse embedding e and a fine one d.

    That is an embedding stem and an upsampling block, to which d adds in front of the activation. Both embeddings come
    as one tensor ``[B, channels + detail * stride**2, h, w]``: behind e is what PixelShuffle makes d of.

    Args:
        spec: of the stream, with ``detail``.
        channels: of the coarse embedding.
    """

    def __init__(self, spec: StreamSpec, channels: int) -> None:
        super().__init__()
        detail = spec.detail
        if detail is None:
            raise ValueError("spec must hold detail")
        self.coarse = nn.Conv2d(channels, detail.width, 1)
        self.upsample = nn.Conv2d(detail.width, spec.widths[0] * detail.stride**2, 1)
        self.fine = nn.Conv2d(detail.channels, spec.widths[0], 1, bias=False)
        self._stride = detail.stride

    def forward(self, x: Tensor) -> Tensor:
        coarse, fine = x.tensor_split([self.coarse.in_channels], 1)
        upsampled = F.pixel_shuffle(self.upsample(F.gelu(self.coarse(coarse))), self._stride)
        return F.gelu(upsampled + self.fine(F.pixel_shuffle(fine, self._stride)))


class TimeStem(nn.Linear):
    """``GELU(W p + b)`` of a vector ``[B, features]``, laid out as ``[B, widths[0], h, w]``."""

    def __init__(self, spec: StreamSpec, features: int) -> None:
        super().__init__(features, spec.widths[0] * spec.layout.cells)
        self._shape = (-1, spec.widths[0], *spec.grid)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x)).view(self._shape)


class GridStem(nn.Module):
    """Feature maps at knots along time, linear in between: frame 0 is at the first knot, the last one at the last.

    Args:
        spec: of the stream; ``knots`` maps of ``widths[0]`` channels on its grid.
        frames: number of frames T.
    """

    def __init__(self, spec: StreamSpec, frames: int) -> None:
        super().__init__()
        self.grid = nn.Parameter(0.1 * torch.randn(spec.knots, spec.widths[0], *spec.grid))
        self._knots_per_frame = (spec.knots - 1) / max(frames - 1, 1)

    def forward(self, index: Tensor) -> Tensor:
        """Return ``[B, widths[0], h, w]`` for frame indices ``[B]``."""
        position = index.double() * self._knots_per_frame
        left = position.floor().long().clamp(max=self.grid.shape[0] - 2)
        weight = (position - left)[:, None, None, None].to(self.grid.dtype)
        return torch.lerp(self.grid[left], self.grid[left + 1], weight)


class Head(nn.Conv2d):
    """A 3x3 convolution to three channels, by the implementation ``impl`` of :func:`hflfnerv.ops.conv2d`."""

    def __init__(self, channels: int, *, impl: str = "auto") -> None:
        super().__init__(channels, 3, 3, padding=1)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, impl=self.impl)


class DecoderStream(nn.Module):
    """A stem to ``widths[0]`` channels on the grid, upsampling blocks, and a 3x3 convolution to three channels.

    Args:
        spec: grid, widths, strides and kernels.
        stem: makes ``[B, widths[0], grid_h, grid_w]`` of the stream's input.

    Shape:
        Output ``[B, 3, grid_h * prod(strides), grid_w * prod(strides)]``, before any tanh.
    """

    def __init__(self, spec: StreamSpec, stem: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.stem = stem
        self.blocks = nn.ModuleList(
            UpsampleBlock(c_in, c_out, stride, kernel, pixels_apart=number < len(spec.strides))
            for number, (c_in, c_out, stride, kernel) in enumerate(
                zip(spec.widths[:-1], spec.widths[1:], spec.strides, spec.kernels, strict=True), 1
            )
        )
        self.head = Head(spec.widths[-1])

    def begin(self, x: Tensor) -> Tensor:
        """Return the output of the stem, ``[B, widths[0], grid_h, grid_w]``."""
        features: Tensor = self.stem(x)
        return features

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the output of the stem and of each block, coarsest first."""
        outputs = [self.begin(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    def finish(self, x: Tensor) -> Tensor:
        """Return the image that the blocks and the head make of :meth:`begin`'s output."""
        image: Tensor = self.head(self.upsample(x))
        return image

    def upsample(self, x: Tensor) -> Tensor:
        """Return what the head takes: the output of the last block."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.begin(x))


def use_implementation(model: nn.Module, impl: str) -> None:
    """Let all upsampling blocks use one implementation; with ``"reference"`` the heads are PyTorch's as well.

    Args:
        model: a network, or a part of one.
        impl: of :func:`hflfnerv.ops.conv_pixel_shuffle_gelu`.
    """
    for module in model.modules():
        if isinstance(module, UpsampleBlock):
            module.impl = impl
        elif isinstance(module, Head):
            module.impl = "reference" if impl == "reference" else "auto"
