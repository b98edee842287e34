"""From whatever a video stores to 8-bit full-range RGB, on purpose.

Every conversion names the matrix and the range of both sides; nothing is left to a library's default. A stream's own
tags decide. Where it has none, the range is limited (full for JPEG-like formats and grey) and the matrix is BT.601 at
every size, as FFmpeg assumes: "Bunny", on which NeRV variants report results, is an untagged 720p clip, and its
published frames were made in this way. Players take BT.709 for untagged clips from 720 rows on; ``untagged_matrix``
says so, or otherwise, for one clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._optional import Lazy
from ..errors import MediaError

if TYPE_CHECKING:
    import av
else:
    av = Lazy("av", "video files")

__all__ = [
    "FULL_RANGE",
    "LIMITED_RANGE",
    "SWS_ACCURATE",
    "SWS_MATRICES",
    "ColorDescription",
    "RGBConverter",
    "YUVConverter",
    "primaries_code",
    "transfer_code",
]

#: AVCOL_RANGE_*
LIMITED_RANGE, FULL_RANGE = 1, 2
#: SWS_CS_* of the matrices that swscale knows
SWS_MATRICES = {"bt709": 1, "fcc": 4, "bt601": 5, "smpte240m": 7}
_SWS_BICUBIC, _SWS_FULL_CHR_H_INT, _SWS_FULL_CHR_H_INP, _SWS_ACCURATE_RND = 4, 1 << 13, 1 << 14, 1 << 18
SWS_ACCURATE = _SWS_BICUBIC | _SWS_FULL_CHR_H_INT | _SWS_FULL_CHR_H_INP | _SWS_ACCURATE_RND

# AVCOL_SPC_*: 5 is BT.470 BG and 6 SMPTE 170M, both with BT.601's coefficients. On a YUV format 0 (RGB) and 3
# (reserved) mean nothing: they count as untagged.
_MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020-cl",
    11: "smpte2085",
    12: "chroma-derived",
    13: "chroma-derived-cl",
    14: "ictcp",
}
_PRIMARIES = {
    1: "bt709",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
_TRANSFERS = {
    1: "bt709",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log",
    10: "log-sqrt",
    11: "iec61966-2-4",
    12: "bt1361",
    13: "srgb",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "pq",
    17: "smpte428",
    18: "hlg",
}
_UNSPECIFIED = 2
_FULL_RANGE_FORMATS = ("yuvj", "gray", "ya", "mono")


@dataclass(frozen=True)
class ColorDescription:
    """How a source stores its colours. The frames read from it are always 8-bit full-range RGB.

    Attributes:
        matrix: ``"rgb"``, or the YUV matrix that was used: ``"bt709"``, ``"bt601"``, ``"smpte240m"`` or ``"fcc"``.
        range: ``"full"`` or ``"limited"``.
        primaries: the tagged primaries, e.g. ``"bt709"``; None where untagged.
        transfer: the tagged transfer characteristics, e.g. ``"bt709"`` or ``"srgb"``; None where untagged.
        matrix_tagged: whether the source states its matrix; False where it had to be assumed.
        range_tagged: whether the source states its range.
    """

    matrix: str = "rgb"
    range: str = "full"
    primaries: str | None = None
    transfer: str | None = None
    matrix_tagged: bool = True
    range_tagged: bool = True


def primaries_code(name: str | None) -> int:
    """Return AVCOL_PRI_* of the primaries of this name; "unspecified" for None and for a name that is not known."""
    return next((code for code, known in _PRIMARIES.items() if known == name), _UNSPECIFIED)


def transfer_code(name: str | None) -> int:
    """Return AVCOL_TRC_* of the transfer characteristics of this name, likewise."""
    return next((code for code, known in _TRANSFERS.items() if known == name), _UNSPECIFIED)


class RGBConverter:
    """Turns decoded frames of one stream into RGB arrays, upright.

    Args:
        label: name of the source for error messages.
        untagged_matrix: YUV matrix of frames that do not state theirs.

    Numerics:
        8-bit 4:2:0 and 4:2:2 go through swscale's default conversion, bit for bit what ``ffmpeg -i clip %d.png`` writes
        on the same machine (up to 2.6 levels from the exact value); all other formats through its accurate one
        (within 0.5 levels; 1.25 for more than 8 bits at full range).
    """

    def __init__(self, label: str, untagged_matrix: str = "bt601") -> None:
        if untagged_matrix not in SWS_MATRICES:
            raise ValueError(f"untagged_matrix must be one of {', '.join(SWS_MATRICES)}, got {untagged_matrix!r}")
        self._label = label
        self._untagged_matrix = untagged_matrix
        self._reformatter = av.video.reformatter.VideoReformatter()

    def describe(self, frame: av.VideoFrame) -> ColorDescription:
        """Return how the frame stores its colours, with the assumptions made where it does not say."""
        name = frame.format.name
        primaries, transfer = _PRIMARIES.get(int(frame.color_primaries)), _TRANSFERS.get(int(frame.color_trc))
        tagged_range = {LIMITED_RANGE: "limited", FULL_RANGE: "full"}.get(int(frame.color_range))
        if frame.format.is_rgb or frame.format.has_palette:
            return ColorDescription("rgb", "full", primaries, transfer, True, True)
        assumed_range = "full" if name.startswith(_FULL_RANGE_FORMATS) else "limited"
        matrix = _MATRICES.get(int(frame.colorspace))
        return ColorDescription(
            matrix or self._untagged_matrix,
            tagged_range or assumed_range,
            primaries,
            transfer,
            matrix is not None,
            tagged_range is not None,
        )

    def __call__(self, frame: av.VideoFrame, index: int) -> NDArray[np.uint8]:
        """Return a frame as RGB.

        Args:
            frame: as decoded.
            index: its number, for error messages.

        Returns:
            ``[H, W, 3]``, uint8, full range, rotated and mirrored as its display matrix says.

        Raises:
            MediaError: the frame is HDR or wide-gamut, transparent, or of a format that has no conversion.
        """
        color = self.describe(frame)
        self._refuse_wide(color)
        # A matrix means nothing for RGB, but swscale wants one it knows.
        matrix = SWS_MATRICES.get("bt709" if color.matrix == "rgb" else color.matrix)
        if matrix is None:
            raise MediaError(f"{self._label} has the YUV matrix {color.matrix}, which has no conversion; use bt709")
        components = frame.format.components
        alpha = frame.format.has_palette or any(component.is_alpha for component in components)
        subsampled_8bit = frame.format.chroma_width(2) == 1 and components[0].bits == 8
        try:
            converted = self._reformatter.reformat(
                frame,
                format="rgba" if alpha else "rgb24",
                src_colorspace=matrix,
                src_color_range=FULL_RANGE if color.range == "full" else LIMITED_RANGE,
                dst_color_range=FULL_RANGE,
                interpolation=_SWS_BICUBIC if subsampled_8bit else SWS_ACCURATE,
            )
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self._label}: frame {index} cannot be converted from {frame.format.name} to RGB: {error}"
            ) from error
        rgb = converted.to_ndarray().view(np.uint8)
        if alpha:
            rgb = drop_alpha(rgb, f"{self._label}: frame {index}")
        return _upright(rgb, frame, self._label)

    def _refuse_wide(self, color: ColorDescription) -> None:
        if color.transfer in ("pq", "hlg"):
            what = f"HDR video ({color.transfer.upper()} transfer)"
        elif color.primaries == "bt2020" or color.matrix.startswith("bt2020"):
            what = "wide-gamut video (BT.2020)"
        else:
            return
        raise MediaError(f"{self._label} is {what}, which is not supported; convert it to BT.709 SDR first")


class YUVConverter:
    """Turns RGB arrays into frames at limited range, by swscale's accurate conversion (within half a level).

    Args:
        pixel_format: FFmpeg's name of the YUV format.
        matrix: one of ``SWS_MATRICES``.
    """

    def __init__(self, pixel_format: str, matrix: str) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._arguments: dict[str, Any] = {
            "format": pixel_format,
            "src_colorspace": SWS_MATRICES[matrix],
            "dst_colorspace": SWS_MATRICES[matrix],
            "src_color_range": FULL_RANGE,
            "dst_color_range": LIMITED_RANGE,
            "interpolation": SWS_ACCURATE,
        }

    def __call__(self, frame: NDArray[np.uint8]) -> av.VideoFrame:
        """Return a frame ``[H, W, 3]``, uint8 full-range RGB, as YUV."""
        return self._reformatter.reformat(av.VideoFrame.from_ndarray(frame, format="rgb24"), **self._arguments)


def drop_alpha(rgba: NDArray[np.uint8], label: str) -> NDArray[np.uint8]:
    """Return ``[H, W, 3]`` of ``[H, W, 4]`` whose last channel is opaque everywhere.

    Raises:
        MediaError: a pixel is transparent: what is behind it is not ours to choose.
    """
    if rgba[..., 3].min() < 255:
        raise MediaError(f"{label} has transparent pixels; put it on a background first, or remove its alpha channel")
    return np.ascontiguousarray(rgba[..., :3])


def _upright(image: NDArray[np.uint8], frame: av.VideoFrame, label: str) -> NDArray[np.uint8]:
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return image
    # x' = a x + c y, y' = b x + d y, in 16.16 fixed point; the last column is projective and always (0, 0, 1).
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    if b == c == 0:
        across, down = a, d
    elif a == d == 0:
        image = image.transpose(1, 0, 2)
        across, down = c, b
    else:
        raise MediaError(f"{label} is to be shown at an angle that is no multiple of 90 degrees; rotate it first")
    if across < 0:
        image = image[:, ::-1]
    if down < 0:
        image = image[::-1]
    return np.ascontiguousarray(image)
