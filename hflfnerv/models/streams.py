"""The decoder stream every network here is made of: stem, upsampling blocks, head."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import UpsampleBlock
from .spec import StreamSpec

__all__ = ["DecoderStream"]


class DecoderStream(nn.Module):
    """A stem to ``widths[0]`` channels on the grid, GELU, upsampling blocks, and a 3x3 convolution to three channels.

    Args:
        spec: grid, widths, strides and kernels.
        in_features: length of the stem's input. With ``spatial=True`` the stem is a 1x1 convolution on an embedding
            ``[B, in_features, h, w]`` that already has the grid's size; otherwise a linear layer on a vector
            ``[B, in_features]``, whose output is laid out as ``[B, widths[0], h, w]``.
        spatial: which of the two.

    Shape:
        Output ``[B, 3, grid_h * prod(strides), grid_w * prod(strides)]``, before any tanh.
    """

    def __init__(self, spec: StreamSpec, in_features: int, *, spatial: bool) -> None:
        super().__init__()
        self.spec = spec
        self.spatial = spatial
        first = spec.widths[0]
        self.stem: nn.Module = (
            nn.Conv2d(in_features, first, 1) if spatial else nn.Linear(in_features, first * spec.layout.cells)
        )
        self.act = nn.GELU()
        self.blocks = nn.ModuleList(
            UpsampleBlock(c_in, c_out, stride, kernel)
            for c_in, c_out, stride, kernel in zip(
                spec.widths[:-1], spec.widths[1:], spec.strides, spec.kernels, strict=True
            )
        )
        self.head = nn.Conv2d(spec.widths[-1], 3, 3, padding=1)

    def _stem(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return x if self.spatial else x.view(-1, self.spec.widths[0], *self.spec.grid)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the output of the stem and of each block, coarsest first."""
        outputs = [self._stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        for block in self.blocks:
            x = block(x)
        image: Tensor = self.head(x)
        return image
