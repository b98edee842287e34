"""How frames are made from a network: an engine is a network made ready, once, for one device and precision.

:data:`DECODE` lists the engines, fastest first, and :func:`make_engine` chooses one. A further engine is a class in a
module of its own and an entry in that table.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._concurrent import concurrently
from .._device import autocast_dtype
from .._impl import Implementation, ImplementationTable
from ..config import DECODE_PRECISIONS
from ..models import ModelSpec, VideoNetwork
from ..ops import output_stage

__all__ = [
    "DECODE",
    "OUTPUT_GROUPS",
    "Embeddings",
    "Engine",
    "ModuleEngine",
    "draw",
    "finish",
    "make_engine",
    "to_uint8",
]

#: Gives the embeddings of frames as float32 ``[n, C, h, w]`` on the CPU, or None for a network that has none.
Embeddings = Callable[[Sequence[int]], "torch.Tensor | None"]

#: How streams become a frame, by their number: the group of each, in the order of ``spec.streams``, whose images are
#: added, and the groups' factors of tanh. 1/2 is added to their sum.
OUTPUT_GROUPS = {1: ((0,), (0.5,)), 2: ((0, 0), (0.5,)), 3: ((0, 1, 1), (1.0, 0.5))}


class Engine(ABC):
    """A network made ready to decode.

    A frame is the same, bit for bit on one device and number of threads, whichever others are asked for with it.

    Args:
        model: the network in float32; an engine may move it to its device.
        embeddings: where the embeddings come from.
        device: the device to compute on.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int16"`` or ``"int8"``.

    Attributes:
        copy_seconds: how long it waited so far for copies from the device after the frames were made.
    """

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        self.copy_seconds = 0.0
        self.spec = model.spec
        self.embeddings = embeddings
        self.device = device
        self.precision = precision

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield frames as uint8 ``[H, W, 3]``, each in memory of its own, in the order of ``indices``."""

    @abstractmethod
    def float_frames(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield frames as float32 ``[3, H, W]`` on the CPU, neither clamped nor rounded to 8 bits."""

    def fill(self, indices: Sequence[int], out: NDArray[np.uint8]) -> None:
        """Write frames into ``out``, uint8 ``[n, H, W, 3]``, contiguous."""
        for row, frame in zip(out, self.frames(indices), strict=True):
            row[...] = frame


class DrawnStream(Protocol):
    """What :func:`draw` asks of a stream."""

    @property
    def head(self) -> nn.Conv2d:
        """The convolution to three channels."""

    def upsample(self, x: Tensor) -> Tensor:
        """Return what the head takes."""


def draw(streams: Sequence[DrawnStream], stems: Sequence[Tensor], spec: ModelSpec, *, as_bytes: bool) -> Tensor:
    """Make frames ``[B, H, W, 3]``, uint8 or float32, by the fused operations.

    Args:
        streams: of the network, in the order of ``spec.streams``.
        stems: what each stream's upsampling blocks start from, as :meth:`VideoNetwork.stems` returns it.
        spec: the network's.
        as_bytes: whether frames are uint8.
    """
    # The kernels of the first blocks look at the memory order.
    features = concurrently(
        *(
            functools.partial(stream.upsample, stem.contiguous(memory_format=torch.channels_last))
            for stream, stem in zip(streams, stems, strict=True)
        )
    )
    return finish(streams, features, spec, as_bytes=as_bytes)


def finish(streams: Sequence[DrawnStream], features: Sequence[Tensor], spec: ModelSpec, *, as_bytes: bool) -> Tensor:
    """Make frames as :func:`draw` does, of what the streams' last blocks made."""
    groups, scales = OUTPUT_GROUPS[len(streams)]
    return output_stage(
        features,
        [stream.head.weight for stream in streams],
        [stream.head.bias for stream in streams],
        groups=groups,
        scales=scales,
        crop=(spec.height, spec.width),
        as_bytes=as_bytes,
    )


class ModuleEngine(Engine):
    """The network as it is, one frame at a time, under autocast for half precisions."""

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        super().__init__(model, embeddings, device, precision)
        self._dtype = None if precision == "auto" else autocast_dtype(precision)
        self._model: VideoNetwork = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            yield to_uint8(self._image(index))[0].cpu().numpy()

    def float_frames(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        for index in indices:
            yield self._image(index)[0].float().cpu()

    @torch.inference_mode()
    def _image(self, index: int) -> torch.Tensor:
        embedding = self.embeddings([index])
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            return self._model.decode(
                None if embedding is None else embedding.to(self.device), torch.tensor([index], device=self.device)
            )


@dataclass(frozen=True)
class EngineEntry(Implementation):
    """An engine; ``run(model, embeddings, device, precision)`` makes it ready.

    Attributes:
        device: the type of device it decodes on; None for any.
        precisions: the precisions it has; None for all.
    """

    device: str | None = None
    precisions: tuple[str, ...] | None = None

    def meant_for(self, device: torch.device, precision: str) -> bool:
        """Return whether it is for this device and precision."""
        return self.device in (None, device.type) and (self.precisions is None or precision in self.precisions)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        device, precision = args[2:4]
        if not self.meant_for(device, precision):
            return f"it is not for device {device} with precision {precision!r}"
        return super().why_not(*args, **kwargs)


def _make_cuda_engine(*args: Any) -> Engine:
    from .engine_cuda import CudaEngine

    return CudaEngine(*args)


def _cuda_unavailable() -> str | None:
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def _cuda_rejects(model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> str | None:
    from .engine_cuda import rejects

    return rejects(model.spec, precision)


def _make_amx_engine(*args: Any) -> Engine:
    from .engine_amx import AmxEngine

    return AmxEngine(*args)


def _amx_unavailable() -> str | None:
    from .engine_amx import unavailable

    return unavailable()


def _amx_rejects(model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> str | None:
    from .engine_amx import rejects

    return rejects(model)


def _make_fused_engine(*args: Any) -> Engine:
    from .engine_fused import FusedEngine

    return FusedEngine(*args)


def _fused_rejects(model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> str | None:
    from .engine_fused import rejects

    return rejects(model)


_ENGINES = (
    EngineEntry("cuda", _make_cuda_engine, _cuda_unavailable, _cuda_rejects, device="cuda"),
    # The same on a CPU, for its frames: no kernel there is faster in int8 than in float32.
    EngineEntry("int8", _make_cuda_engine, rejects=_cuda_rejects, device="cpu", precisions=("int8",)),
    EngineEntry("amx", _make_amx_engine, _amx_unavailable, _amx_rejects, device="cpu", precisions=("auto", "bf16")),
    EngineEntry(
        "fused", _make_fused_engine, rejects=_fused_rejects, device="cpu", precisions=("auto", "int16", "fp32")
    ),
    EngineEntry("module", ModuleEngine, precisions=("auto", "fp32", "bf16", "fp16")),
)
#: The engines, fastest first for each type of device.
DECODE = ImplementationTable("decode", _ENGINES)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def make_engine(model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str = "auto") -> Engine:
    """Make a network ready with the first engine that can take it.

    Warns once for each reason why an engine that this machine could run does not take this network.

    Raises:
        ValueError: the precision is none.
    """
    if precision not in DECODE_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(DECODE_PRECISIONS)}, got {precision!r}")
    entry = DECODE.select("auto", model, embeddings, device, precision)
    for faster in _ENGINES[: DECODE.names.index(entry.name)]:
        if not faster.meant_for(device, precision) or faster.unavailable() is not None:
            continue
        reason = faster.rejects(model, embeddings, device, precision)
        if reason is not None:
            _say_once(f"decoding with '{entry.name}' instead of '{faster.name}': {reason}")
    engine: Engine = entry.run(model, embeddings, device, precision)
    return engine


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Turn float ``[B, 3, H, W]`` into uint8 ``[B, H, W, 3]``: clamp to [0, 1], scale by 255, round half to even."""
    return image.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
