"""Modules: parameters, and a call into :mod:`hflfnerv.ops`."""

from .highpass import HighPass
from .pixel_shuffle_gelu import PixelShuffleGELU
from .upsample_block import UpsampleBlock

__all__ = ["HighPass", "PixelShuffleGELU", "UpsampleBlock"]
