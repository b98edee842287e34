"""The operations: validation, registration with PyTorch, the table of implementations, the public function."""

from .conv2d import CONV2D, conv2d
from .conv_pixel_shuffle_gelu import CONV_PIXEL_SHUFFLE_GELU, conv_pixel_shuffle_gelu
from .highpass import HIGHPASS, highpass
from .output_stage import OUTPUT_STAGE, output_stage
from .packed_weights import PackedWeights
from .pixel_shuffle_gelu import PIXEL_SHUFFLE_GELU, pixel_shuffle_gelu
from .stream_loss import STREAM_LOSS, stream_loss

__all__ = [
    "CONV2D",
    "CONV_PIXEL_SHUFFLE_GELU",
    "HIGHPASS",
    "OUTPUT_STAGE",
    "PIXEL_SHUFFLE_GELU",
    "STREAM_LOSS",
    "PackedWeights",
    "conv2d",
    "conv_pixel_shuffle_gelu",
    "highpass",
    "output_stage",
    "pixel_shuffle_gelu",
    "stream_loss",
]
