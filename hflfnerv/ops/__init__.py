"""The operations: validation, registration with PyTorch, the table of implementations, the public function."""

from .conv2d import CONV2D, conv2d
from .conv_pixel_shuffle_gelu import CONV_PIXEL_SHUFFLE_GELU, conv_pixel_shuffle_gelu
from .conv_pixel_shuffle_gelu_int8 import (
    CONV_PIXEL_SHUFFLE_GELU_INT8,
    QUANTIZE_INT8,
    Int8Block,
    Int8Range,
    conv_pixel_shuffle_gelu_int8,
    int8_image,
    quantize_int8,
)
from .highpass import HIGHPASS, highpass
from .output_stage import OUTPUT_STAGE, output_stage
from .packed_weights import PackedWeights
from .pixel_shuffle_gelu import PIXEL_SHUFFLE_GELU, pixel_shuffle_gelu
from .stream_loss import STREAM_LOSS, stream_loss

__all__ = [
    "CONV2D",
    "CONV_PIXEL_SHUFFLE_GELU",
    "CONV_PIXEL_SHUFFLE_GELU_INT8",
    "HIGHPASS",
    "OUTPUT_STAGE",
    "PIXEL_SHUFFLE_GELU",
    "QUANTIZE_INT8",
    "STREAM_LOSS",
    "Int8Block",
    "Int8Range",
    "PackedWeights",
    "conv2d",
    "conv_pixel_shuffle_gelu",
    "conv_pixel_shuffle_gelu_int8",
    "highpass",
    "int8_image",
    "output_stage",
    "pixel_shuffle_gelu",
    "quantize_int8",
    "stream_loss",
]
