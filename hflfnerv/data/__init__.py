"""Videos, folders of images and arrays in and out, as uint8 frames."""

from .color import ColorDescription
from .conventional import CONVENTIONAL_CODECS, ConventionalCodec, ConventionalResult, code_conventionally
from .reader import DEFAULT_FPS, Video, VideoInfo, count_frames, load_video, probe_video
from .selection import parse_fps, parse_frames, parse_size_hw
from .transforms import centre_crop, centre_offset, resize
from .writer import WRITABLE_SUFFIXES, VideoWriter, write_frames

__all__ = [
    "CONVENTIONAL_CODECS",
    "DEFAULT_FPS",
    "WRITABLE_SUFFIXES",
    "ColorDescription",
    "ConventionalCodec",
    "ConventionalResult",
    "Video",
    "VideoInfo",
    "VideoWriter",
    "centre_crop",
    "centre_offset",
    "code_conventionally",
    "count_frames",
    "load_video",
    "parse_fps",
    "parse_frames",
    "parse_size_hw",
    "probe_video",
    "resize",
    "write_frames",
]
