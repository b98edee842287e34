"""Frames through x264, x265 and SVT-AV1 and back, in memory: what a network is compared with."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._optional import Lazy
from ..errors import BackendUnavailable, MediaError
from .color import FULL_RANGE, LIMITED_RANGE, SWS_ACCURATE, SWS_MATRICES, YUVConverter

if TYPE_CHECKING:
    import av
    from av.video.codeccontext import VideoCodecContext
else:
    av = Lazy("av", "conventional codecs")

__all__ = ["CONVENTIONAL_CODECS", "ConventionalCodec", "ConventionalResult", "code_conventionally"]

_MATRICES = ("bt709", "bt601")


@dataclass(frozen=True)
class ConventionalCodec:
    """A codec that people use, and what it is usually run with.

    Attributes:
        name: as people call it.
        encoder: FFmpeg's name of the encoder.
        decoders: FFmpeg's names of decoders, the first that is there is used.
        preset: an ordinary one.
        crfs: constant rate factors from good to bad.
        worst_crf: the largest it takes; the best is 0.
    """

    name: str
    encoder: str
    decoders: tuple[str, ...]
    preset: str
    crfs: tuple[int, ...]
    worst_crf: int

    def unavailable(self) -> str | None:
        """Return why it cannot be used here, or None if it can."""
        for role, names in (("encoder", (self.encoder,)), ("decoder", self.decoders)):
            if not av.codecs_available.intersection(names):
                return f"this build of PyAV has no {role} {' or '.join(names)}"
        return None

    def options(self, preset: str, crf: int, threads: int) -> dict[str, str]:
        """Return the encoder's options: preset and rate, nothing tuned, and no comment in the stream."""
        options = {"preset": preset, "crf": str(crf)}
        if self.encoder == "libx265":
            options["x265-params"] = f"log-level=error:info=0:pools={threads}:frame-threads={min(threads, 16)}"
        if self.encoder == "libsvtav1":
            options["svtav1-params"] = f"lp={threads}"
        return options


CONVENTIONAL_CODECS = {
    codec.name: codec
    for codec in (
        ConventionalCodec("x264", "libx264", ("h264",), "medium", (20, 24, 28, 32, 36, 40, 44), 51),
        ConventionalCodec("x265", "libx265", ("hevc",), "medium", (20, 24, 28, 32, 36, 40, 44), 51),
        ConventionalCodec("svt-av1", "libsvtav1", ("libdav1d", "libaom-av1"), "6", (28, 38, 48, 58), 63),
    )
}


@dataclass(frozen=True, eq=False)
class ConventionalResult:
    """A clip after a conventional codec.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, decoded.
        num_bytes: bytes of all packets, parameter sets included; no container, and no comment of the encoder.
        encode_seconds: time to encode, conversion to YUV included.
        decode_seconds: time to decode, conversion to RGB included.
    """

    frames: NDArray[np.uint8]
    num_bytes: int
    encode_seconds: float
    decode_seconds: float


def code_conventionally(
    frames: NDArray[np.uint8],
    fps: Fraction,
    codec: ConventionalCodec,
    *,
    crf: int,
    preset: str | None = None,
    matrix: str = "bt709",
    threads: int = 1,
) -> ConventionalResult:
    """Encode frames at constant quality, and decode the packets.

    8-bit 4:2:0 at limited range, tagged; an odd side gets one more row or column, which is cut off again. The
    conversions are swscale's accurate ones, so that what is lost is the codec's doing, and that of the smaller chroma.

    Args:
        frames: uint8 full-range RGB ``[T, H, W, 3]``.
        fps: frame rate; encoders choose keyframe distances by it.
        codec: one of :data:`CONVENTIONAL_CODECS`.
        crf: constant rate factor, 0 (best) to ``codec.worst_crf``.
        preset: the encoder's preset; None for ``codec.preset``.
        matrix: YUV matrix, ``"bt709"`` or ``"bt601"``.
        threads: of the encoder. x264 and x265 give slightly other streams with other numbers.

    Raises:
        BackendUnavailable: this build of PyAV has no such encoder or decoder.
        ValueError: an argument is out of its range, or the encoder does not know the preset or take the frame size.
        MediaError: the encoder or the decoder failed.
    """
    reason = codec.unavailable()
    if reason is not None:
        raise BackendUnavailable(f"{codec.name} cannot be measured: {reason}")
    if not 0 <= crf <= codec.worst_crf:
        raise ValueError(f"crf must be in 0..{codec.worst_crf} for {codec.name}, got {crf}")
    if matrix not in _MATRICES:
        raise ValueError(f"matrix must be one of {', '.join(_MATRICES)}, got {matrix!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    preset = codec.preset if preset is None else preset
    _, height, width, _ = frames.shape
    rows, columns = height + height % 2, width + width % 2
    # SVT-AV1 writes its settings to standard error, whatever FFmpeg's log level is.
    os.environ.setdefault("SVT_LOG", "1")
    encoder = _create(codec.encoder, "w")
    encoder.width, encoder.height, encoder.pix_fmt = columns, rows, "yuv420p"
    encoder.time_base, encoder.framerate = 1 / fps, fps
    encoder.thread_count = threads
    encoder.options = codec.options(preset, crf, threads)
    encoder.color_range, encoder.colorspace = LIMITED_RANGE, {"bt709": 1, "bt601": 6}[matrix]
    try:
        encoder.open()
    except av.FFmpegError as error:
        raise ValueError(
            f"preset must be one of {codec.encoder}'s, for frames it can encode, got {preset!r} for {height}x{width}: "
            f"{error.strerror}"
        ) from error

    to_yuv = YUVConverter("yuv420p", matrix)
    packets: list[av.Packet[Any]] = []
    started = time.perf_counter()
    try:
        for index, frame in enumerate(frames):
            padded = np.pad(frame, ((0, rows - height), (0, columns - width), (0, 0)), mode="edge")
            yuv = to_yuv(np.ascontiguousarray(padded))
            yuv.pts, yuv.time_base = index, 1 / fps
            packets += encoder.encode(yuv)
        packets += encoder.encode(None)
        encoded = time.perf_counter()
        decoded = _decode(codec, packets, matrix)[:, :height, :width]
    except av.FFmpegError as error:
        raise MediaError(f"{codec.name} failed on frames of {height}x{width}: {error.strerror}") from error
    if len(decoded) != len(frames):
        raise MediaError(f"{codec.name} gave back {len(decoded)} frames of {len(frames)}")
    num_bytes = sum(packet.size for packet in packets) - _comment_bytes(codec, bytes(packets[0]))
    return ConventionalResult(decoded, num_bytes, encoded - started, time.perf_counter() - encoded)


def _create(name: str, mode: Any) -> VideoCodecContext:
    context = av.CodecContext.create(name, mode)
    assert isinstance(context, av.video.codeccontext.VideoCodecContext)
    return context


def _decode(codec: ConventionalCodec, packets: list[av.Packet[Any]], matrix: str) -> NDArray[np.uint8]:
    decoder = _create(next(name for name in codec.decoders if name in av.codecs_available), "r")
    reformatter = av.video.reformatter.VideoReformatter()
    images = []
    for packet in (*packets, None):
        for frame in decoder.decode(packet):
            rgb = reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=SWS_MATRICES[matrix],
                src_color_range=LIMITED_RANGE,
                dst_color_range=FULL_RANGE,
                interpolation=SWS_ACCURATE,
            )
            images.append(rgb.to_ndarray())
    return np.stack(images) if images else np.empty((0, 0, 0, 3), np.uint8)


def _comment_bytes(codec: ConventionalCodec, packet: bytes) -> int:
    """Return the size of the message with x264's settings: no option leaves it out, and no decoder needs it."""
    start = packet.find(b"\x00\x00\x01\x06\x05") if codec.encoder == "libx264" else -1
    return 0 if start < 0 else packet.index(b"\x00\x00\x01", start + 3) - start
