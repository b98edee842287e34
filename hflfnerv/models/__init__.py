"""The networks: the paper's dual stream, and HNeRV and NeRV in the same framework."""

from __future__ import annotations

from .base import EncoderInput, VideoNetwork
from .hflf import HFLFNeRV
from .hnerv import HNeRV
from .layout import Layout, choose_layout
from .nerv import NeRV
from .spec import ModelSpec, StreamSpec, TimeSpec
from .time_encoding import TimeEncoding

__all__ = [
    "MODELS",
    "EncoderInput",
    "HFLFNeRV",
    "HNeRV",
    "Layout",
    "ModelSpec",
    "NeRV",
    "StreamSpec",
    "TimeEncoding",
    "TimeSpec",
    "VideoNetwork",
    "build_model",
    "choose_layout",
]

#: The networks by the name that the command line and the files use.
MODELS: dict[str, type[VideoNetwork]] = {model.name: model for model in (HFLFNeRV, HNeRV, NeRV)}


def build_model(spec: ModelSpec, *, with_encoder: bool = True) -> VideoNetwork:
    """Build the network of a spec.

    Raises:
        ValueError: the spec names no known model, or is not one of that model.
    """
    if spec.model not in MODELS:
        raise ValueError(f"spec.model must be one of {sorted(MODELS)}, got {spec.model!r}")
    return MODELS[spec.model](spec, with_encoder=with_encoder)
