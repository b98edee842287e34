"""The codec: bitstreams, the encoder and the decoder."""

from __future__ import annotations

from .bitstream import Accounting, Bitstream, Color, Header, Source, write_bitstream
from .convert import convert_checkpoint
from .decoder import Decoder, load_model
from .encoder import EncodeObserver, EncodeResult, encode
from .evaluation import evaluate, load_reference

__all__ = [
    "Accounting",
    "Bitstream",
    "Color",
    "Decoder",
    "EncodeObserver",
    "EncodeResult",
    "Header",
    "Source",
    "convert_checkpoint",
    "encode",
    "evaluate",
    "load_model",
    "load_reference",
    "write_bitstream",
]
