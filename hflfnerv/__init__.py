"""hflfnerv: a dual-stream neural video codec, and the fused kernels it is made of.

The names below are loaded when they are first used, so that ``import hflfnerv`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import huffman, metrics, models, nn, ops
    from .codec import Decoder, EncodeResult, encode, evaluate
    from .config import EncodeConfig
    from .errors import BackendUnavailable, BitstreamError, HflfnervError
    from .fusion import FuseReport, fuse, unfuse

__all__ = [
    "BackendUnavailable",
    "BitstreamError",
    "Decoder",
    "EncodeConfig",
    "EncodeResult",
    "FuseReport",
    "HflfnervError",
    "__version__",
    "encode",
    "evaluate",
    "fuse",
    "huffman",
    "metrics",
    "models",
    "nn",
    "ops",
    "unfuse",
]

_MODULES = ("huffman", "metrics", "models", "nn", "ops")
_NAMES = {
    "Decoder": "codec",
    "EncodeResult": "codec",
    "encode": "codec",
    "evaluate": "codec",
    "EncodeConfig": "config",
    "BackendUnavailable": "errors",
    "BitstreamError": "errors",
    "HflfnervError": "errors",
    "FuseReport": "fusion",
    "fuse": "fusion",
    "unfuse": "fusion",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
