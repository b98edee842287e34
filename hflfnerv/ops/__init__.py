"""The operations: validation, registration with PyTorch, the table of implementations, the public function."""

from .conv_pixel_shuffle_gelu import CONV_PIXEL_SHUFFLE_GELU, conv_pixel_shuffle_gelu
from .highpass import HIGHPASS, highpass
from .pixel_shuffle_gelu import PIXEL_SHUFFLE_GELU, pixel_shuffle_gelu

__all__ = [
    "CONV_PIXEL_SHUFFLE_GELU",
    "HIGHPASS",
    "PIXEL_SHUFFLE_GELU",
    "conv_pixel_shuffle_gelu",
    "highpass",
    "pixel_shuffle_gelu",
]
