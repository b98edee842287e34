"""Strides and grids for any frame size.

The papers fix their strides for 640 x 1280 only. Here a stream's strides are the sequence whose padded output and
whose grid come closest to that case, so that 640 x 1280 gives exactly the papers' networks and every other size a
network of the same kind. A stream makes an image of ``grid x prod(strides)`` and the model crops it to the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Layout", "choose_layout"]

_STRIDES = (5, 4, 3, 2)
# The papers' strides multiply to 320 in five stages. Of equal products the number of stages nearest to that pace is
# taken: at 160 x 320, 5-4-2-2 rather than 5-2-2-2-2.
_PACE = math.log(320) / 5
# How many octaves of grid size are worth how much padded area. At 1080 x 1920 it takes 2 x 4 cells and 12 % of padding
# rather than 9 x 16 cells (18 times the embedding) and none.
_GRID_WEIGHT = 0.1


@dataclass(frozen=True)
class Layout:
    """The geometry of one decoder stream.

    Attributes:
        grid: height and width of the stem's output, in cells.
        strides: upscale factor of each block, first block first.
    """

    grid: tuple[int, int]
    strides: tuple[int, ...]

    @property
    def scale(self) -> int:
        """The product of the strides: output pixels per cell and axis."""
        return math.prod(self.strides)

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the image the stream makes, at least the frame's."""
        return self.grid[0] * self.scale, self.grid[1] * self.scale

    def after_first(self) -> Layout:
        """Return the layout of what follows the first block."""
        first, *others = self.strides
        return Layout((self.grid[0] * first, self.grid[1] * first), tuple(others))


def _stride_sequences(stages: int) -> Iterator[tuple[int, ...]]:
    """Yield the non-increasing stride sequences of at most ``stages`` blocks."""

    def extend(prefix: tuple[int, ...], left: int) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield prefix
            return
        for stride in _STRIDES:
            if not prefix or stride <= prefix[-1]:
                yield from extend((*prefix, stride), left - 1)

    for count in range(stages, 0, -1):
        yield from extend((), count)


@lru_cache(maxsize=256)
def choose_layout(height: int, width: int, *, stages: int, target_cells: int) -> Layout:
    """Choose strides and grid for a frame of ``height`` x ``width`` pixels.

    Minimises ``log(padded area / area) + 0.1 |log(cells / target_cells)|`` over all non-increasing sequences of at
    most ``stages`` strides out of 2 to 5; of equal ones, the sequence whose mean stride is nearest to the papers'.

    Args:
        height: frame height in pixels, at least 1.
        width: frame width in pixels, at least 1.
        stages: the largest number of blocks.
        target_cells: the grid size of the paper's network, e.g. 8 for the 2 x 4 embedding.

    Raises:
        ValueError: the frame has no pixels.

    Example:
        >>> choose_layout(640, 1280, stages=5, target_cells=8)
        Layout(grid=(2, 4), strides=(5, 4, 4, 2, 2))
    """
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    best: tuple[tuple[float, float], Layout] | None = None
    for strides in _stride_sequences(stages):
        scale = math.prod(strides)
        layout = Layout((math.ceil(height / scale), math.ceil(width / scale)), strides)
        padding = layout.output[0] * layout.output[1] / (height * width)
        cost = math.log(padding) + _GRID_WEIGHT * abs(math.log(layout.cells / target_cells))
        rank = (round(cost, 9), abs(math.log(scale) / len(strides) - _PACE))
        if best is None or rank < best[0]:
            best = (rank, layout)
    assert best is not None
    return best[1]
