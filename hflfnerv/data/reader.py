"""Reading videos, folders of images and arrays into uint8 frames."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._optional import Lazy
from ..errors import MediaError
from .color import ColorDescription, RGBConverter
from .images import IMAGE_SUFFIXES, list_images, read_image
from .selection import MAX_TERM, FrameRange, as_frame_slice, format_frames, parse_fps
from .transforms import centre_crop, centre_offset
from .transforms import resize as resize_frames

if TYPE_CHECKING:
    import av
    import psutil
    from av.container import InputContainer
    from av.video.stream import VideoStream
else:
    av = Lazy("av", "video files")
    psutil = Lazy("psutil", "frames without a limit on their memory")

__all__ = ["DEFAULT_FPS", "Source", "Video", "VideoInfo", "count_frames", "load_video", "probe_video"]

Source: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | Tensor"

#: Frame rate of what has none (folders of images, arrays), as FFmpeg's image2 demuxer has it.
DEFAULT_FPS = Fraction(25)
#: Part of the free memory that frames may take.
_MEMORY_SHARE = 0.8
_GROWTH_BYTES = 32 << 20
# Of an EBML element: an identifier of at most 4 bytes and a size of at most 8.
_MAX_ELEMENT_HEAD_BYTES = 12


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source before its frames are read.

    Attributes:
        name: file name without suffix, or name of the folder.
        height: rows of a frame, upright.
        width: columns of a frame, upright.
        num_frames: exact for folders and arrays; for videos as the container states or implies it, None where it is
            unknown.
        fps: average frames per second.
        sample_aspect_ratio: width of a pixel divided by its height, 1 where the source does not say.
        color: how the source stores its colours.
    """

    name: str
    height: int
    width: int
    num_frames: int | None
    fps: Fraction
    sample_aspect_ratio: Fraction
    color: ColorDescription


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, in presentation order.

    Attributes:
        frames: ``[T, H, W, 3]``, uint8 full-range RGB, contiguous, on the CPU.
        fps: average frames per second.
        name: file name without suffix, or name of the folder.
        color: how the source stored its colours.
        sample_aspect_ratio: width of a pixel divided by its height; a resize changes it so that the shown shape stays.
        source_size: ``(height, width)`` of the source, before any resize and crop.
        first_frame: index in the source of the first frame.
        resize: ``(height, width)`` that whole frames were resized to first, or None.
        crop: ``(top, left, height, width)`` that was then cut out, or None.
    """

    frames: Tensor = field(repr=False)
    fps: Fraction = DEFAULT_FPS
    name: str = "array"
    color: ColorDescription = field(default_factory=ColorDescription)
    sample_aspect_ratio: Fraction = Fraction(1)
    source_size: tuple[int, int] = (0, 0)
    first_frame: int = 0
    resize: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None

    def __len__(self) -> int:
        return int(self.frames.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(T, H, W)``."""
        count, height, width, _ = self.frames.shape
        return count, height, width


def probe_video(
    source: Source, *, fps: str | Fraction | float | None = None, untagged_matrix: str = "bt601"
) -> VideoInfo:
    """Describe a source without reading more than its first frame.

    Args and errors are those of :func:`load_video`.
    """
    return _open_source(source, fps, untagged_matrix).info


def count_frames(source: Source) -> int:
    """Return the exact number of frames; those of a video file are decoded for that, one after the other.

    Errors are those of :func:`load_video`.
    """
    return _open_source(source, None, "bt601").count()


def load_video(
    source: Source,
    *,
    frames: FrameRange = None,
    resize: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    fps: str | Fraction | float | None = None,
    max_bytes: int | None = None,
    untagged_matrix: str = "bt601",
) -> Video:
    """Read frames into memory, once, as 8-bit full-range RGB.

    The matrix and the range of YUV video are the stream's own; where it states none, they are assumed (see
    ``untagged_matrix``, and :class:`ColorDescription` in the result). More than 8 bits become 8. HDR and BT.2020 video
    is refused. Rotation and mirroring that a file asks for are applied. Interlaced frames stay as they are.

    Args:
        source: a video file; a folder of images (sorted naturally: ``frame2`` before ``frame10``; hidden files and
            other files are ignored); one image; a ``.npy`` file; or a uint8 array or tensor ``[T, H, W, 3]``.
        frames: the frames to read, as Python slices: ``slice(A, B)``, ``(A, B)`` or ``"A:B"``, without a step. Decoding
            stops after ``B``. Negative numbers count from the end; for a video file that costs one decoding pass more,
            because containers do not always state the exact count.
        resize: ``(height, width)`` to resize to, bicubic and antialiased.
        crop: ``(height, width)`` of the centre crop that follows.
        fps: frame rate, as :func:`parse_fps` takes it, instead of the source's own or of 25 for images and arrays.
        max_bytes: the most the frames may take; None for 80 % of the memory that is free.
        untagged_matrix: YUV matrix of a stream that does not state its own: ``"bt601"`` (what FFmpeg assumes, at every
            size), ``"bt709"``, ``"smpte240m"`` or ``"fcc"``.

    Returns:
        The video. Frames of an array are not copied where that can be avoided. A video of variable frame rate has its
        average one.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: the array is not uint8, or the source is of another type.
        ValueError: an argument is out of its range.
        MediaError: the source cannot be read, or is damaged, or its frames differ in size, or the range selects none,
            or they need more memory than they may take.

    Example:
        >>> clip = load_video(np.zeros((8, 24, 32, 3), np.uint8), frames="2:6", resize=(12, 16))
        >>> clip.shape
        (4, 12, 16)
    """
    opened = _open_source(source, fps, untagged_matrix)
    info = opened.info
    selection = as_frame_slice(frames)
    start, stop = _bounds(opened, selection)
    height, width = _checked_pair("resize", resize) if resize is not None else (info.height, info.width)
    aspect = _limited(info.sample_aspect_ratio * Fraction(info.width * height, width * info.height))
    cut = None
    if crop is not None:
        whole_height, whole_width = height, width
        height, width = _checked_pair("crop", crop)
        # Only for its check, before anything is decoded.
        centre_crop(torch.empty(1, whole_height, whole_width, 0), height, width)
        cut = (centre_offset(whole_height, height), centre_offset(whole_width, width), height, width)

    if isinstance(opened, _ArraySource) and not opened.on_disk:
        tensor = torch.from_numpy(opened.array[start:stop])
        if resize is not None:
            tensor = resize_frames(tensor, *resize)
        result = (centre_crop(tensor, height, width) if crop is not None else tensor).contiguous()
        if not len(result):
            raise _empty(info.name, selection, len(opened.array))
    else:
        buffer = _FrameBuffer(info.name, height, width, _expected(info, start, stop), max_bytes)
        for image in opened.read(start, stop):
            tensor = torch.from_numpy(image)[None]
            if resize is not None:
                tensor = resize_frames(tensor, *resize)
            buffer.append((centre_crop(tensor, height, width) if crop is not None else tensor)[0].numpy())
        result = buffer.finish()
        if not len(result):
            raise _empty(info.name, selection, info.num_frames)
    return Video(result, info.fps, info.name, info.color, aspect, (info.height, info.width), start, resize, cut)


class _Source(Protocol):
    @property
    def info(self) -> VideoInfo: ...

    def count(self) -> int:
        """Return the exact number of frames."""

    def read(self, start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        """Yield frames ``[H, W, 3]``; ends early where there are no more."""


class _ArraySource:
    def __init__(self, array: NDArray[np.uint8], name: str, fps: Fraction, on_disk: bool) -> None:
        if array.dtype != np.uint8:
            raise TypeError(f"frames must be uint8, got {array.dtype}")
        if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
            raise ValueError(f"frames must be [T, H, W, 3] and not empty, got {list(array.shape)}")
        self.array = array
        self.on_disk = on_disk
        count, height, width, _ = array.shape
        self.info = VideoInfo(name, height, width, count, fps, Fraction(1), ColorDescription())

    def count(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        for frame in self.array[start:stop]:
            yield np.array(frame)


class _ImageSource:
    def __init__(self, paths: list[Path], name: str, fps: Fraction) -> None:
        self._paths = paths
        height, width, _ = read_image(paths[0]).shape
        self.info = VideoInfo(name, height, width, len(paths), fps, Fraction(1), ColorDescription())

    def count(self) -> int:
        return len(self._paths)

    def read(self, start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        for path in self._paths[start:stop]:
            image = read_image(path)
            if image.shape[:2] != (self.info.height, self.info.width):
                raise MediaError(
                    f"all images of a folder must have one size, but {self._paths[0]} is {self.info.height}x"
                    f"{self.info.width} and {path} is {image.shape[0]}x{image.shape[1]} (height x width)"
                )
            yield image


class _FileSource:
    def __init__(self, path: Path, fps: Fraction | None, untagged_matrix: str) -> None:
        self._path = path
        self._convert = RGBConverter(str(path), untagged_matrix)
        with _opened(path) as (container, stream):
            rate = fps if fps is not None else stream.average_rate or stream.guessed_rate or DEFAULT_FPS
            aspect = stream.sample_aspect_ratio
            count = _stated_count(container, stream, rate)
            frame = next(_decode(path, container, stream), None)
            if frame is None:
                raise MediaError(f"{path} has a video stream, but no frame of it can be decoded")
            height, width, _ = self._convert(frame, 0).shape
        if not aspect or aspect < 0:
            aspect = Fraction(1)
        if (height, width) == (frame.width, frame.height) and height != width:
            aspect = 1 / aspect
        self.info = VideoInfo(path.stem, height, width, count, rate, aspect, self._convert.describe(frame))

    def count(self) -> int:
        return sum(1 for _ in self._frames())

    def read(self, start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        if stop is not None and stop <= start:
            return
        for index, frame in enumerate(self._frames()):
            if index >= start:
                yield self._convert(frame, index)
            if stop is not None and index + 1 >= stop:
                return

    def _frames(self) -> Iterator[av.VideoFrame]:
        size = None
        with _opened(self._path) as (container, stream):
            for index, frame in enumerate(_decode(self._path, container, stream)):
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise MediaError(
                        f"{self._path}: frame {index} is {frame.height}x{frame.width}, the frames before it are "
                        f"{size[0]}x{size[1]} (height x width); a video must have one size"
                    )
                yield frame


def _open_source(source: Source, fps: str | Fraction | float | None, untagged_matrix: str) -> _Source:
    given = None if fps is None else parse_fps(fps)
    rate = DEFAULT_FPS if given is None else given
    if isinstance(source, Tensor):
        return _ArraySource(source.detach().cpu().numpy(), "array", rate, on_disk=False)
    if isinstance(source, np.ndarray):
        # torch takes neither read-only arrays nor negative strides.
        usable = source if source.flags.writeable and min(source.strides, default=0) >= 0 else source.copy()
        return _ArraySource(usable, "array", rate, on_disk=False)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, a uint8 array or a tensor, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        return _ImageSource(list_images(path), path.resolve().name, rate)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise MediaError(f"{path} is neither a regular file nor a folder")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path} cannot be read: permission denied")
    if path.suffix.lower() == ".npy":
        return _open_npy(path, rate)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _ImageSource([path], path.stem, rate)
    return _FileSource(path, given, untagged_matrix)


def _open_npy(path: Path, fps: Fraction) -> _ArraySource:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return _ArraySource(array, path.stem, fps, on_disk=True)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise MediaError(f"{path} is not a .npy file of uint8 frames [T, H, W, 3]: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        # "file:" so that no name is taken for a protocol, and no playlist leads anywhere but to files.
        container = av.open(f"file:{path}", mode="r", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path} is not a video that can be read: {_reason(error)}") from error
    with container:
        # FFmpeg draws any text as video.
        if container.format.name == "tty":
            raise MediaError(f"{path} is not a video: it contains text")
        stream = container.streams.best("video")
        if (
            not isinstance(stream, av.video.stream.VideoStream)
            or stream.disposition & av.stream.Disposition.attached_pic
        ):
            raise MediaError(f"{path} has no video stream")
        stream.thread_type = "AUTO"
        yield container, stream


def _decode(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yield frames in presentation order; nothing that FFmpeg had to conceal gets through."""
    remedy = "repair or re-encode the file, or choose frames before it with --frames"
    packets = container.demux(stream)
    index = read = 0
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else []
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{path} is damaged near frame {index}: {_reason(error)}; {remedy}") from error
        if packet is None:
            break
        if packet.pos is not None:
            read = max(read, packet.pos + packet.size)
        for frame in frames:
            if not isinstance(frame, av.VideoFrame):
                continue
            if frame.is_corrupt:
                raise MediaError(f"{path} is damaged at frame {index}; {remedy}")
            yield frame
            index += 1
        if packet.is_corrupt:
            raise MediaError(f"{path} is damaged near frame {index}; {remedy}")
    # A cut file ends like a whole one for the demuxer.
    size, end = path.stat().st_size, _stated_end(path, container, stream)
    if end > size:
        raise MediaError(f"{path} is cut off near frame {index}: it should have {end} bytes and has {size}; {remedy}")
    if container.format.name == "yuv4mpegpipe" and size > read > 0:
        raise MediaError(f"{path} is cut off in frame {index}, of which it has {size - read} bytes; {remedy}")


def _stated_end(path: Path, container: InputContainer, stream: VideoStream) -> int:
    """Return how many bytes the file must have by what it says itself; 0 where it does not say.

    Durations would tell less: they are those of the longest stream, and rounded.
    """
    if "mp4" in container.format.name:
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if "matroska" in container.format.name:
        with path.open("rb") as file:
            # The EBML header, whose length is not fixed, and the segment that holds everything else (RFC 8794, 9559).
            header_end = _element_end(file, 0)
            return 0 if header_end is None else _element_end(file, header_end) or 0
    return 0


def _element_end(file: BinaryIO, position: int) -> int | None:
    """Return where an EBML element ends that begins at a position; None where it does not say, as in live streams."""
    file.seek(position)
    data = file.read(_MAX_ELEMENT_HEAD_BYTES)
    value = unknown = 0
    for _ in ("identifier", "size"):
        # The number of leading zeros of the first byte is that of the bytes which follow it.
        length = 9 - data[0].bit_length() if data else 1
        if length > min(8, len(data)):
            return None
        unknown = (1 << 7 * length) - 1
        value = int.from_bytes(data[:length], "big") & unknown
        position, data = position + length, data[length:]
    return None if value == unknown else position + value


def _stated_count(container: InputContainer, stream: VideoStream, rate: Fraction) -> int | None:
    if stream.frames > 0:
        return stream.frames
    if stream.duration and stream.time_base:
        return max(1, round(stream.duration * stream.time_base * rate))
    if container.duration:
        return max(1, round(Fraction(container.duration, av.time_base) * rate))
    return None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _bounds(source: _Source, selection: slice) -> tuple[int, int | None]:
    start, stop = selection.start, selection.stop
    if (start is not None and start < 0) or (stop is not None and stop < 0):
        count = source.count()
        start, stop, _ = selection.indices(count)
        if stop <= start:
            raise _empty(source.info.name, selection, count)
    start = start or 0
    if stop is not None and stop <= start:
        raise _empty(source.info.name, selection, source.info.num_frames)
    return start, stop


def _empty(name: str, selection: slice, count: int | None) -> MediaError:
    known = "" if count is None else f", which has {count} frame{'' if count == 1 else 's'}"
    return MediaError(f"--frames {format_frames(selection)} selects no frame of {name}{known}")


def _expected(info: VideoInfo, start: int, stop: int | None) -> int | None:
    if info.num_frames is None:
        return None
    return max(0, info.num_frames - start if stop is None else min(info.num_frames, stop) - start)


class _FrameBuffer:
    """Frames in one allocation: of the expected size, or grown in place."""

    def __init__(self, name: str, height: int, width: int, expected: int | None, max_bytes: int | None) -> None:
        self._name = name
        self._frame_bytes = 3 * height * width
        self._free = psutil.virtual_memory().available
        self._limit = int(_MEMORY_SHARE * self._free) if max_bytes is None else max_bytes
        self._limited_by_caller = max_bytes is not None
        self._shape = (height, width, 3)
        self._check(1 if expected is None else expected, "need")
        self._frames = np.empty((expected or 0, *self._shape), np.uint8)
        self._count = 0

    def _check(self, count: int, verb: str) -> None:
        need = count * self._frame_bytes
        if need <= self._limit:
            return
        height, width, _ = self._shape
        room = (
            f"the limit is {_human(self._limit)}"
            if self._limited_by_caller
            else f"{_human(self._free)} are free, of which {_MEMORY_SHARE:.0%} may be used"
        )
        raise MediaError(
            f"{count} frames of {height}x{width} of {self._name} {verb} {_human(need)} of memory, but {room}; choose "
            f"fewer frames (--frames A:B) or smaller ones (--resize HxW)"
        )

    def append(self, frame: NDArray[np.uint8]) -> None:
        if self._count == len(self._frames):
            self._check(self._count + 1, "and more need at least")
            more = min(
                max(1, _GROWTH_BYTES // self._frame_bytes, self._count // 8),
                self._limit // self._frame_bytes - self._count,
            )
            self._frames.resize((self._count + more, *self._shape), refcheck=False)
        self._frames[self._count] = frame
        self._count += 1

    def finish(self) -> Tensor:
        self._frames.resize((self._count, *self._shape), refcheck=False)
        return torch.from_numpy(self._frames)


def _human(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    value = size / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _checked_pair(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(f"{name} must be (height, width), both at least 1, got {pair!r}")
    return pair


def _limited(ratio: Fraction) -> Fraction:
    """Return the nearest fraction of two numbers that containers and coded videos can hold."""
    if ratio < 1:
        return 1 / _limited(1 / ratio)
    return ratio.limit_denominator(max(1, MAX_TERM // ratio))
