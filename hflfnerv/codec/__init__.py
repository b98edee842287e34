"""The codec: bitstreams, the encoder and the decoder."""

from __future__ import annotations

from .bitstream import Accounting, Bitstream, Color, Header, Source, write_bitstream
from .convert import convert_checkpoint
from .decoder import Decoder, load_model
from .encoder import EncodeObserver, EncodeResult, encode
from .evaluation import compare, evaluate, file_matrix, load_reference
from .rate_distortion import bjontegaard, check_plot, conventional_point, file_point, mean_points, plot_points

__all__ = [
    "Accounting",
    "Bitstream",
    "Color",
    "Decoder",
    "EncodeObserver",
    "EncodeResult",
    "Header",
    "Source",
    "bjontegaard",
    "check_plot",
    "compare",
    "conventional_point",
    "convert_checkpoint",
    "encode",
    "evaluate",
    "file_matrix",
    "file_point",
    "load_model",
    "load_reference",
    "mean_points",
    "plot_points",
    "write_bitstream",
]
