"""What calling the CUDA kernels takes, a module for each file of ``csrc/cuda``."""

from .conv2d import conv2d_bwd, conv2d_fwd
from .conv_pixel_shuffle_gelu import (
    apart_of,
    columns,
    conv_pixel_shuffle_gelu_dgrad,
    conv_pixel_shuffle_gelu_fwd,
    empty_gradient,
    empty_result,
    filled_channels,
    implementation,
    pack_weight,
)
from .device import rejects_float32, rejects_tensor, unavailable
from .lists import list_cast, list_momentum, list_subtract, rejects_list
from .orthogonalise import orthogonalise_matrices
from .output_stage import output_stage_fwd, pack_head
from .pixel_shuffle_gelu import pixel_shuffle_gelu_bwd, pixel_shuffle_gelu_fwd, rejects_shuffle

__all__ = [
    "apart_of",
    "columns",
    "conv2d_bwd",
    "conv2d_fwd",
    "conv_pixel_shuffle_gelu_dgrad",
    "conv_pixel_shuffle_gelu_fwd",
    "empty_gradient",
    "empty_result",
    "filled_channels",
    "implementation",
    "list_cast",
    "list_momentum",
    "list_subtract",
    "orthogonalise_matrices",
    "output_stage_fwd",
    "pack_head",
    "pack_weight",
    "pixel_shuffle_gelu_bwd",
    "pixel_shuffle_gelu_fwd",
    "rejects_float32",
    "rejects_list",
    "rejects_shuffle",
    "rejects_tensor",
    "unavailable",
]
