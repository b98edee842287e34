"""Writing frames to a video, a folder of PNGs or a .npy file, as they come, whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._atomic import atomic_path, resolve_target
from .._optional import Lazy
from ..errors import BackendUnavailable, MediaError
from .color import LIMITED_RANGE, YUVConverter, primaries_code, transfer_code
from .selection import parse_fps

if TYPE_CHECKING:
    import av
    from av.container import OutputContainer
    from av.video.codeccontext import VideoCodecContext
    from PIL import Image
else:
    av = Lazy("av", "video files")
    Image = Lazy("PIL.Image", "images")

__all__ = ["WRITABLE_SUFFIXES", "VideoWriter", "write_frames"]

Frames: TypeAlias = "NDArray[np.uint8] | Tensor"

_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
#: What a path may end in; anything without a suffix, or an existing folder, is a folder of PNGs.
WRITABLE_SUFFIXES = (*_CONTAINERS, ".y4m", ".npy")
_PNG_NAME = re.compile(r"frame_(\d{5,})\.png")
_PNG_LEVEL = 4


def _failures() -> tuple[type[OSError] | type[av.FFmpegError], ...]:
    """Return what writing may raise: errors of FFmpeg only once something has loaded PyAV."""
    return (OSError, av.FFmpegError) if "av" in sys.modules else (OSError,)


class VideoWriter:
    """Writes frames as they come; the target appears when the last one is written, or not at all.

    The path decides the format:

    - ``.mp4``, ``.m4v``, ``.mov``, ``.mkv``: H.264 by libx264 at constant quality (``crf``), by BT.709's matrix at
      limited range, and tagged so. 4:2:0 where both sides are even, else 4:4:4 (4:2:0 cannot have odd sides); never
      padded.
    - ``.y4m``: uncompressed 4:4:4, BT.601 at limited range: what FFmpeg takes a .y4m for, which cannot state its
      matrix.
    - ``.npy``: uint8 ``[T, H, W, 3]``, lossless, and without a frame rate.
    - anything else without a suffix, or an existing folder: ``frame_00000.png``, ``frame_00001.png``, ... in that
      folder, lossless.

    Everything is written beside the target, or in a hidden folder within a folder that exists, and renamed at the end,
    so an error, or Ctrl-C, leaves no half-written output and an existing target untouched. Use it as a context manager:
    leaving it normally finishes the target, leaving it by an exception discards what was written.

    Args:
        path: where to write.
        fps: frames per second.
        size: ``(height, width)`` of the frames.
        overwrite: whether an existing target is replaced. None: a file is, a folder that is not empty is refused. In a
            folder that is not empty, True replaces its ``frame_NNNNN.png`` files, one by one, removes those beyond the
            last frame, and never touches another file.
        crf: quality of H.264, 0 (best) to 51; 12 is visually lossless.
        sample_aspect_ratio: width of a pixel divided by its height; stored in videos.
        primaries: the frames' primaries, by a name of :class:`ColorDescription`; H.264 is tagged so, and left untagged
            for None and for a name that is not known.
        transfer: their transfer characteristics, likewise.

    Raises:
        ValueError: an argument is out of its range.
        MediaError: the target has another suffix, exists and may not be replaced, or cannot be written (no such folder,
            no permission, full disk).
        BackendUnavailable: this build of PyAV has no libx264.

    Example:
        >>> with VideoWriter("/tmp/example.npy", fps=25, size=(24, 32)) as writer:
        ...     writer.write(np.zeros((8, 24, 32, 3), np.uint8))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: str | Fraction | float,
        size: tuple[int, int],
        *,
        overwrite: bool | None = None,
        crf: float = 12,
        sample_aspect_ratio: Fraction = Fraction(1),
        primaries: str | None = "bt709",
        transfer: str | None = "bt709",
    ) -> None:
        # What has no rate takes any, as do files that state it as a fraction.
        rate = fps if isinstance(fps, Fraction) and fps > 0 else parse_fps(fps)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (height, width), both at least 1, got {size!r}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be in 0..51, got {crf}")
        self._path = Path(path)
        self._shape = (*size, 3)
        self._count = 0
        self._finished = False
        aspect = sample_aspect_ratio.limit_denominator(10_000)
        try:
            format_ = _Format(rate, aspect, *size, crf, primaries, transfer)
            self._sink = _open_sink(os.fspath(path), overwrite, format_)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, frames: Frames) -> None:
        """Append frames.

        Args:
            frames: ``[n, H, W, 3]`` or ``[H, W, 3]``, uint8 full-range RGB, an array or a tensor on any device.

        Raises:
            TypeError: they are not uint8.
            ValueError: they are of another size, or the writer is closed.
            MediaError: they cannot be written, e.g. because the disk is full. The writer is then discarded.
        """
        if self._finished:
            raise ValueError(f"{self._path} is closed")
        array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
        if array.dtype != np.uint8:
            raise TypeError(f"frames must be uint8, got {array.dtype}")
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[1:] != self._shape:
            raise ValueError(f"frames must be [n, {', '.join(map(str, self._shape))}], got {list(array.shape)}")
        try:
            for frame in array:
                self._sink.add(np.ascontiguousarray(frame), self._count)
                self._count += 1
        except BaseException as error:
            self.discard()
            if isinstance(error, _failures()):
                raise self._cannot_write(error) from error
            raise

    def close(self) -> None:
        """Finish the target and put it in its place; nothing happens if that is done already.

        Raises:
            MediaError: no frame was written, or the target cannot be written.
        """
        if self._finished:
            return
        if not self._count:
            self.discard()
            raise MediaError(f"{self._path} is not written: there are no frames")
        try:
            self._sink.commit(self._count)
            self._finished = True
        except BaseException as error:
            self.discard()
            if isinstance(error, _failures()):
                raise self._cannot_write(error) from error
            raise

    def discard(self) -> None:
        """Remove what was written so far; nothing happens if the writer is closed already."""
        if not self._finished:
            self._finished = True
            self._sink.discard()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def _cannot_write(self, error: OSError | av.FFmpegError) -> MediaError:
        return MediaError(f"{self._path} cannot be written: {error.strerror or error}")


def write_frames(
    path: str | os.PathLike[str],
    frames: Frames | Iterable[Frames],
    fps: str | Fraction | float,
    *,
    overwrite: bool | None = None,
    crf: float = 12,
    sample_aspect_ratio: Fraction = Fraction(1),
) -> None:
    """Write frames to a video, a folder of PNGs or a .npy file, with a :class:`VideoWriter`.

    Args:
        path: where to write; decides the format.
        frames: ``[T, H, W, 3]``, uint8 full-range RGB; or batches ``[n, H, W, 3]`` or frames ``[H, W, 3]`` in order.
        fps: frames per second.
        overwrite: see :class:`VideoWriter`.
        crf: see :class:`VideoWriter`.
        sample_aspect_ratio: see :class:`VideoWriter`.

    Raises:
        MediaError: there are no frames, or they cannot be written. For the rest see :class:`VideoWriter`.
    """
    batches = iter([frames] if isinstance(frames, (np.ndarray, Tensor)) else frames)
    first = next(batches, None)
    if first is None:
        raise MediaError(f"{os.fspath(path)} is not written: there are no frames")
    if first.ndim not in (3, 4):
        raise ValueError(f"frames must be [n, H, W, 3] or [H, W, 3], got {list(first.shape)}")
    height, width = int(first.shape[-3]), int(first.shape[-2])
    with VideoWriter(
        path, fps, (height, width), overwrite=overwrite, crf=crf, sample_aspect_ratio=sample_aspect_ratio
    ) as writer:
        writer.write(first)
        for batch in batches:
            writer.write(batch)


class _Format(NamedTuple):
    fps: Fraction
    aspect: Fraction
    height: int
    width: int
    crf: float
    primaries: str | None
    transfer: str | None


class _Sink:
    """One kind of output. ``add`` and ``commit`` may fail; ``discard`` follows then and removes every trace."""

    @abstractmethod
    def add(self, frame: NDArray[np.uint8], index: int) -> None: ...

    @abstractmethod
    def commit(self, count: int) -> None: ...

    @abstractmethod
    def discard(self) -> None: ...


def _open_sink(path: str, overwrite: bool | None, format_: _Format) -> _Sink:
    target = Path(os.path.realpath(path))
    suffix = target.suffix.lower()
    if not target.parent.is_dir():
        raise MediaError(f"{path} cannot be written: there is no folder {target.parent}")
    if path.endswith(("/", os.sep)) or target.is_dir() or not suffix:
        return _FolderSink(path, target, overwrite)
    kinds: dict[str, type[_FileSink]] = {".y4m": _Y4MSink, ".npy": _NpySink, **dict.fromkeys(_CONTAINERS, _H264Sink)}
    if suffix not in kinds:
        raise MediaError(
            f"{path} must end in {', '.join(kinds)}, or be a folder for PNG frames (end its name with /), got {suffix}"
        )
    if resolve_target(path) is None:
        raise MediaError(f"{path} exists and is not a regular file")
    if overwrite is False and target.exists():
        raise MediaError(f"{path} exists already")
    return kinds[suffix](target, format_)


class _FileSink(_Sink):
    def __init__(self, target: Path, format_: _Format) -> None:
        self._format = format_
        self._stack = ExitStack()
        try:
            self._temporary = self._stack.enter_context(atomic_path(target))
            self._file: IO[bytes] = self._stack.enter_context(self._temporary.open("w+b"))
            self._begin(target)
        except BaseException:
            self.discard()
            raise

    @abstractmethod
    def _begin(self, target: Path) -> None: ...

    def _end(self, count: int) -> None:
        """Write what follows the last frame."""

    def commit(self, count: int) -> None:
        self._end(count)
        self._stack.close()

    def discard(self) -> None:
        # Whatever fails while things are closed, the file is removed; why it is discarded is the caller's to report.
        with suppress(*_failures()):
            self._stack.__exit__(OSError, OSError(errno.ECANCELED, "discarded"), None)


class _NpySink(_FileSink):
    def _begin(self, target: Path) -> None:
        self._write_header(0)

    def _write_header(self, count: int) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
            "fortran_order": False,
            "shape": (count, self._format.height, self._format.width, 3),
        }
        self._file.seek(0)
        # numpy pads the header so that the first dimension can grow in place.
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, frame: NDArray[np.uint8], index: int) -> None:
        self._file.write(frame.data)

    def _end(self, count: int) -> None:
        self._write_header(count)


class _Y4MSink(_FileSink):
    def _begin(self, target: Path) -> None:
        f = self._format
        self._to_yuv = YUVConverter("yuv444p", "bt601")
        self._file.write(
            f"YUV4MPEG2 W{f.width} H{f.height} F{f.fps.numerator}:{f.fps.denominator} Ip "
            f"A{f.aspect.numerator}:{f.aspect.denominator} C444 XYSCSS=444 XCOLORRANGE=LIMITED\n".encode()
        )

    def add(self, frame: NDArray[np.uint8], index: int) -> None:
        self._file.write(b"FRAME\n")
        self._file.write(np.ascontiguousarray(self._to_yuv(frame).to_ndarray()).data)


class _H264Sink(_FileSink):
    _CODEC: ClassVar[str] = "libx264"

    def _begin(self, target: Path) -> None:
        f = self._format
        parse_fps(f.fps)  # as encoder and container need it
        pixel_format = "yuv444p" if f.height % 2 or f.width % 2 else "yuv420p"
        self._to_yuv = YUVConverter(pixel_format, "bt709")
        self._output = _ErrorKeepingFile(self._file)
        self._container: OutputContainer = av.open(self._output, mode="w", format=_CONTAINERS[target.suffix.lower()])
        self._stack.callback(self._container.close)
        try:
            stream = self._container.add_stream(self._CODEC, rate=f.fps, options={"crf": str(f.crf)})
        except (av.FFmpegError, ValueError) as error:
            raise BackendUnavailable(f"{target} cannot be written: this build of PyAV has no {self._CODEC}") from error
        assert isinstance(stream, av.video.stream.VideoStream)
        context: VideoCodecContext = stream.codec_context
        context.width, context.height, context.pix_fmt = f.width, f.height, pixel_format
        context.time_base = 1 / f.fps
        context.sample_aspect_ratio = f.aspect
        context.color_range = LIMITED_RANGE
        context.colorspace = 1  # AVCOL_SPC_BT709
        context.color_primaries = primaries_code(f.primaries)
        context.color_trc = transfer_code(f.transfer)
        self._stream = stream

    def add(self, frame: NDArray[np.uint8], index: int) -> None:
        yuv = self._to_yuv(frame)
        yuv.pts = index
        yuv.time_base = 1 / self._format.fps
        self._container.mux(self._stream.encode(yuv))
        self._output.check()

    def _end(self, count: int) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._output.check()


class _ErrorKeepingFile:
    """A file that keeps its first error for ``check``: PyAV prints what a file raises while an error is pending."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None
        self.seek = file.seek
        self.tell = file.tell

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def check(self) -> None:
        if self._error is None:
            # What is still in the buffer would be written after the last check.
            self._file.flush()
        else:
            raise self._error


class _FolderSink(_Sink):
    def __init__(self, path: str, target: Path, overwrite: bool | None) -> None:
        self._target = target
        if target.exists():
            if not target.is_dir():
                raise MediaError(f"{path} exists and is not a folder")
            if not overwrite and any(target.iterdir()):
                raise MediaError(f"{path} is a folder that is not empty; empty it, choose another, or give --overwrite")
        # A folder that is there may be where somebody works, or a mount point: it is filled, not replaced.
        parent = target if target.exists() else target.parent
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=parent))
        umask = os.umask(0)
        os.umask(umask)
        self._temporary.chmod(0o777 & ~umask)

    def add(self, frame: NDArray[np.uint8], index: int) -> None:
        Image.fromarray(frame).save(self._temporary / f"frame_{index:05d}.png", compress_level=_PNG_LEVEL)

    def commit(self, count: int) -> None:
        if self._temporary.parent != self._target:
            self._temporary.replace(self._target)
            return
        for image in sorted(self._temporary.iterdir()):
            image.replace(self._target / image.name)
        # Frames of a longer clip that was here before would read as part of this one.
        for image in self._target.iterdir():
            match = _PNG_NAME.fullmatch(image.name)
            if match and int(match[1]) >= count:
                image.unlink()
        self._temporary.rmdir()

    def discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
