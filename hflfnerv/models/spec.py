"""What a decoder needs to know to rebuild a network: plain numbers, kept in the file's header."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .layout import Layout

__all__ = ["DetailSpec", "ModelSpec", "StreamSpec", "TimeSpec"]

# What a hostile header may ask for at most.
_MAX_SIDE = 16384
_MAX_FRAMES = 2**24
_MAX_CHANNELS = 4096
_MAX_DETAIL = 64
_MAX_STAGES = 8
_MAX_PIXELS = 2**28
_MAX_PARAMETERS = 2**28
# Values of a layer: 8 GiB as float32, for frames as large as 4K with 100 million weights or 8K with 6 million have no
# more. Of small frames far less, so that what a file may take is known from the size of its frames.
_MAX_ACTIVATION = 2**31
_MAX_ACTIVATION_PER_PIXEL = 512
_FREE_ACTIVATION = 2**26
_MAX_STREAM_NAME = 64


@dataclass(frozen=True)
class DetailSpec:
    """A stem that upsamples once, where a second and finer embedding of the frame joins.

    Attributes:
        channels: channels of the finer embedding, which has the stream's grid.
        width: channels of the stem before it upsamples, on the grid of the other embedding.
        stride: upscale factor from that grid to the stream's, which it divides.
    """

    channels: int
    width: int
    stride: int


@dataclass(frozen=True)
class StreamSpec:
    """One decoder stream: a stem, upsampling blocks and a 3x3 head to three channels.

    Attributes:
        grid: height and width of the stem's output.
        widths: channels after the stem and after each block.
        strides: upscale factor of each block.
        kernels: kernel size of each block's convolution, odd.
        knots: learned feature maps along time, between which a frame's is interpolated, instead of a stem; 0 for none.
        detail: how a finer embedding joins in the stem; None for one embedding, which has the stream's grid.
    """

    grid: tuple[int, int]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    kernels: tuple[int, ...]
    knots: int = 0
    detail: DetailSpec | None = None

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, self.strides)

    @property
    def largest_activation(self) -> int:
        """The most values that the output of a layer has: of the stem, of a block, or of the head, for one frame."""
        scales = itertools.accumulate(self.strides, operator.mul, initial=1)
        channels = [*self.widths[:-1], max(self.widths[-1], 3)]
        values = [width * scale**2 for width, scale in zip(channels, scales, strict=True)]
        if self.detail is not None:
            values.append(math.ceil(self.detail.width / self.detail.stride**2))
        return math.prod(self.grid) * max(values)


@dataclass(frozen=True)
class TimeSpec:
    """The encoding of the frame time, Eq. (1): base, number of levels, and the numerator of frame 0's time."""

    base: float
    levels: int
    first: int


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one coded video.

    Attributes:
        model: ``"hflf"``, ``"hnerv"`` or ``"nerv"``.
        frames: number of frames T.
        height: frame height in pixels.
        width: frame width in pixels.
        embedding_channels: channels of a frame's embedding, the coarser one if there are two; 0 for a network driven by
            time alone.
        streams: the decoder streams by name, in alphabetical order, in which the networks make them; files may have
            them in any.
        time: the time encoding, None for a network that does not see the time.
        time_split: levels of the encoding that feed the first of two low-frequency streams.
    """

    model: str
    frames: int
    height: int
    width: int
    embedding_channels: int
    streams: Mapping[str, StreamSpec] = field(default_factory=dict)
    time: TimeSpec | None = None
    time_split: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", dict(sorted(self.streams.items())))

    @property
    def embedding_shape(self) -> tuple[int, int, int] | None:
        """Shape ``[C, h, w]`` of one frame's embedding, or None.

        A finer embedding is part of it: behind the channels of the coarser one, as PixelShuffle takes it.
        """
        if not self.embedding_channels:
            return None
        stream = next(iter(self.streams.values()))
        if stream.detail is None:
            return self.embedding_channels, *stream.grid
        s = stream.detail.stride
        return self.embedding_channels + stream.detail.channels * s * s, stream.grid[0] // s, stream.grid[1] // s

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON-ready dictionaries, lists, numbers and strings; optional fields only if needed."""
        fields = asdict(self)
        for stream in fields["streams"].values():
            for name in ("knots", "detail"):
                if not stream[name]:
                    del stream[name]
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read a spec, checking every field.

        Raises:
            ValueError: a field is missing, has the wrong type, or asks for more than a video network could need.
        """
        streams_data = _get(data, "streams", dict)
        if not 1 <= len(streams_data) <= 4:
            raise ValueError(f"streams must hold 1 to 4 entries, got {len(streams_data)}")
        for name in streams_data:
            if not isinstance(name, str) or len(name) > _MAX_STREAM_NAME or not name.isprintable():
                raise ValueError(
                    f"streams must have printable names of at most {_MAX_STREAM_NAME} characters, got {name!r:.60}"
                )
        streams = {name: _stream_from_dict(name, value) for name, value in streams_data.items()}
        time_data = data.get("time")
        time = None
        if time_data is not None:
            if not isinstance(time_data, Mapping):
                raise ValueError(f"time must be an object, got {type(time_data).__name__}")
            base = time_data.get("base")
            if isinstance(base, bool) or not isinstance(base, (int, float)) or not 1 < base <= 16:
                raise ValueError(f"time.base must be a number in (1, 16], got {base!r}")
            time = TimeSpec(float(base), _int(time_data, "levels", 1, 256), _int(time_data, "first", 0, 1))
        spec = cls(
            model=_get(data, "model", str),
            frames=_int(data, "frames", 1, _MAX_FRAMES),
            height=_int(data, "height", 1, _MAX_SIDE),
            width=_int(data, "width", 1, _MAX_SIDE),
            embedding_channels=_int(data, "embedding_channels", 0, _MAX_CHANNELS),
            streams=streams,
            time=time,
            time_split=_int(data, "time_split", 0, time.levels if time else 0),
        )
        for name, stream in streams.items():
            rows, columns = stream.layout.output
            if rows < spec.height or columns < spec.width or rows * columns > _MAX_PIXELS:
                raise ValueError(f"streams.{name} must cover {spec.height} x {spec.width}, got {rows} x {columns}")
            per_pixel = _MAX_ACTIVATION_PER_PIXEL * spec.height * spec.width
            most = min(_MAX_ACTIVATION, max(_FREE_ACTIVATION, per_pixel))
            if stream.largest_activation > most:
                raise ValueError(
                    f"streams.{name} must have layers of at most {most} values for frames of {spec.height} x "
                    f"{spec.width}, got {stream.largest_activation}"
                )
        return spec


def _get(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} must be a {kind.__name__}, got {value!r:.60}")
    return value


def _int(data: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value: int = _get(data, key, int)
    if not low <= value <= high:
        raise ValueError(f"{key} must be in {low}..{high}, got {value}")
    return value


def _ints(data: Mapping[str, Any], key: str, low: int, high: int, *, most: int) -> tuple[int, ...]:
    values = data.get(key)
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= most:
        raise ValueError(f"{key} must be a list of 1 to {most} integers, got {values!r:.60}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{key} must hold integers in {low}..{high}, got {value!r:.60}")
    return tuple(values)


def _stream_from_dict(name: str, data: Any) -> StreamSpec:
    if not isinstance(data, Mapping):
        raise ValueError(f"streams.{name} must be an object, got {type(data).__name__}")
    grid = _ints(data, "grid", 1, _MAX_SIDE, most=2)
    strides = _ints(data, "strides", 1, 16, most=_MAX_STAGES)
    widths = _ints(data, "widths", 1, _MAX_CHANNELS, most=_MAX_STAGES + 1)
    kernels = _ints(data, "kernels", 1, 15, most=_MAX_STAGES)
    if len(grid) != 2 or len(kernels) != len(strides) or len(widths) != len(strides) + 1:
        raise ValueError(f"streams.{name} must have a kernel per stride, one width more, and two grid sizes")
    if any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"streams.{name}.kernels must be odd, got {kernels}")
    weights = sum(
        c_in * c_out * s * s * k * k
        for c_in, c_out, s, k in zip(widths[:-1], widths[1:], strides, kernels, strict=True)
    )
    if weights + widths[0] * math.prod(grid) > _MAX_PARAMETERS:
        raise ValueError(f"streams.{name} must have at most {_MAX_PARAMETERS} weights, got {weights}")
    knots = _int(data, "knots", 2, _MAX_FRAMES) if "knots" in data else 0
    if knots * widths[0] * math.prod(grid) > _MAX_PARAMETERS:
        raise ValueError(f"streams.{name}.knots must hold at most {_MAX_PARAMETERS} values, got {knots}")
    return StreamSpec(
        (grid[0], grid[1]), widths, strides, kernels, knots, _detail_from_dict(name, data, grid, widths[0])
    )


def _detail_from_dict(
    name: str, stream: Mapping[str, Any], grid: tuple[int, ...], width_after: int
) -> DetailSpec | None:
    if "detail" not in stream:
        return None
    data = _get(stream, "detail", dict)
    stride = _int(data, "stride", 1, 16)
    if any(side % stride for side in grid):
        raise ValueError(f"streams.{name}.detail.stride must divide the grid {grid}, got {stride}")
    width = _int(data, "width", 1, _MAX_CHANNELS)
    if width * width_after * stride**2 > _MAX_PARAMETERS:
        raise ValueError(f"streams.{name}.detail.width must give at most {_MAX_PARAMETERS} weights, got {width}")
    return DetailSpec(_int(data, "channels", 1, _MAX_DETAIL), width, stride)
