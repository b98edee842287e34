"""Reads the checkpoints of the HNeRV and NVR-RRCP code bases. Nothing in them is executed: tensors only are loaded.

Three kinds of file:

* HNeRV's ``quant_vid.pth``, a coded video: quantised weights and embeddings, kept bit for bit;
* HNeRV's training checkpoints (``model_latest.pth``), float weights with the encoder;
* NVR-RRCP's training checkpoints, likewise, with two low-frequency decoders.

A training checkpoint has no embeddings: its encoder has to be run on the frames.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._device import first_line
from ..errors import CheckpointError
from ..models.spec import ModelSpec, StreamSpec, TimeSpec
from .quantization import MinMax, QuantizedTensor, pair_shape

__all__ = ["ImportedModel", "read_checkpoint"]

# Their names and ours. {main} is the stream on the embeddings: "decoder" for HNeRV, "hfd" for NVR-RRCP.
_NAMES = (
    (r"decoder\.0\.conv\.downconv\.(weight|bias)", "{main}.stem.{0}"),
    (r"decoder\.([1-9]\d?)\.conv\.upconv\.0\.(weight|bias)", "{main}.blocks.{0}.conv.{1}"),
    (r"head_layer\.(weight|bias)", "{main}.head.{0}"),
    (r"lr_decoder([12])\.0\.0\.(weight|bias)", "lfd{0}.stem.{1}"),
    (r"lr_decoder([12])\.([1-9]\d?)\.conv\.upconv\.0\.(weight|bias)", "lfd{0}.blocks.{1}.conv.{2}"),
    (r"lr_head_layer([12])\.(weight|bias)", "lfd{0}.head.{1}"),
)
_ENCODER = "encoder."

# NVR-RRCP writes this grid into its forward pass, and this base into its run script; neither is in the checkpoint.
_LFD_GRID = (5, 10)
_TIME_BASE = 1.25


@dataclass(frozen=True)
class ImportedModel:
    """What a checkpoint holds, in our names.

    Attributes:
        model: ``"hnerv"`` or ``"hflf"``.
        weights: quantised weights, bit for bit; None for a training checkpoint.
        float_weights: float32 weights; None for a coded video.
        embeddings: quantised embeddings ``[T, C, h, w]``; None for a training checkpoint.
        encoder: the encoder's weights, names beginning with ``encoder.``; empty for a coded video.
        epoch: epochs trained, None if not told.
    """

    model: str
    weights: Mapping[str, QuantizedTensor] | None
    float_weights: Mapping[str, NDArray[np.float32]] | None
    embeddings: QuantizedTensor | None
    encoder: Mapping[str, NDArray[np.float32]]
    epoch: int | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name."""
        tensors: Mapping[str, Any] = self.weights if self.weights is not None else self.float_weights or {}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def spec(self, *, frames: int | None = None, height: int | None = None, width: int | None = None) -> ModelSpec:
        """Derive the architecture from the shapes.

        Args:
            frames: number of frames; needed for a training checkpoint, taken from the embeddings otherwise.
            height: frame height in pixels; likewise.
            width: frame width in pixels; likewise.

        Raises:
            CheckpointError: the shapes are not those of a supported network, or do not fit the frame size.
            ValueError: a size is missing.
        """
        shapes = self.shapes
        main = "decoder" if self.model == "hnerv" else "hfd"
        widths, strides, kernels = _stream(shapes, main)
        scale = math.prod(strides)
        if self.embeddings is not None:
            count, _, rows, columns = self.embeddings.shape
            frames, height, width = frames or count, height or rows * scale, width or columns * scale
            if frames != count:
                raise CheckpointError(f"the checkpoint has embeddings of {count} frames, not of {frames}")
        if frames is None or height is None or width is None:
            raise ValueError("frames, height and width must be given for a training checkpoint, which has none of them")
        streams = {main: StreamSpec(_grid(height, width, scale), widths, strides, kernels)}
        time, split = None, 0
        if self.model == "hflf":
            for name in ("lfd1", "lfd2"):
                widths, strides, kernels = _stream(shapes, name)
                made = (_LFD_GRID[0] * math.prod(strides), _LFD_GRID[1] * math.prod(strides))
                if made != (height, width):
                    raise CheckpointError(f"{name} makes {made[0]} x {made[1]} frames, not {height} x {width}")
                streams[name] = StreamSpec(_LFD_GRID, widths, strides, kernels)
            split = shapes["lfd1.stem.weight"][1] // 2
            levels = split + shapes["lfd2.stem.weight"][1] // 2
            time = TimeSpec(base=_TIME_BASE, levels=levels, first=0)
        return ModelSpec(
            model=self.model,
            frames=frames,
            height=height,
            width=width,
            embedding_channels=shapes[f"{main}.stem.weight"][1],
            streams=streams,
            time=time,
            time_split=split,
        )


def read_checkpoint(path: str | os.PathLike[str]) -> ImportedModel:
    """Read a checkpoint of HNeRV or NVR-RRCP.

    Args:
        path: ``quant_vid.pth`` or a training checkpoint.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is not such a checkpoint, or holds anything but tensors and plain values.

    Numerics:
        Quantised tensors keep their symbols, minima and scales bit for bit. Dequantised in float32, as HNeRV's loader
        does, they give the same weights.
    """
    data = _load(path)
    if isinstance(data, Mapping) and {"embed", "model"} <= data.keys():
        return _from_coded(data)
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        return _from_training(data)
    raise CheckpointError(
        f"{os.fspath(path)} must be a quant_vid.pth ('embed' and 'model') or a training checkpoint ('state_dict')"
    )


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} cannot be read as a checkpoint of tensors: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return in one line why torch.load failed; of a pickle it says a page, and advises to load it unsafely."""
    if isinstance(error, EOFError):
        return "it is empty, or ends too early"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return f"it holds {found[1]}" if found else "it is not what torch.save writes"
    return first_line(error)


def _from_coded(data: Mapping[str, Any]) -> ImportedModel:
    model, names = _rename(data["model"])
    entries = {ours: _entry(theirs, data["model"][theirs]) for ours, theirs in names.items()}
    embedding = _entry("embed", data["embed"])
    if embedding[0].ndim != 4:
        raise CheckpointError(f"embed must have four axes, got shape {embedding[0].shape}")
    bits = _bits([symbols for symbols, _ in entries.values()])
    imported = ImportedModel(
        model=model,
        weights={name: _quantized(name, entry, bits) for name, entry in entries.items()},
        float_weights=None,
        embeddings=_quantized("embed", embedding, _bits([embedding[0]])),
        encoder={},
        epoch=None,
    )
    imported.spec()
    return imported


def _from_training(data: Mapping[str, Any]) -> ImportedModel:
    state = {
        str(name).removeprefix("module.").replace("blocks.0.", ""): value for name, value in data["state_dict"].items()
    }
    encoder = {name: _floats(name, value) for name, value in state.items() if name.startswith(_ENCODER)}
    model, names = _rename([name for name in state if not name.startswith(_ENCODER)])
    weights = {ours: _floats(theirs, state[theirs]) for ours, theirs in names.items()}
    epoch = data.get("epoch")
    imported = ImportedModel(
        model=model,
        weights=None,
        float_weights=weights,
        embeddings=None,
        encoder=encoder,
        epoch=epoch if isinstance(epoch, int) else None,
    )
    for name in ("decoder",) if model == "hnerv" else ("hfd", "lfd1", "lfd2"):
        _stream(imported.shapes, name)
    return imported


def _rename(theirs: Any) -> tuple[str, dict[str, str]]:
    """Return the model's name, and their tensor names by ours, in our networks' order."""
    names = [str(name) for name in theirs]
    is_dual = any(name.startswith("lr_") for name in names)
    renamed = {}
    for name in names:
        for pattern, ours in _NAMES:
            match = re.fullmatch(pattern, name)
            if match:
                parts = list(match.groups())
                if ".blocks." in ours:
                    parts[-2] = str(int(parts[-2]) - 1)
                renamed[ours.format(*parts, main="hfd" if is_dual else "decoder")] = name
                break
        else:
            raise CheckpointError(
                f"tensor {name!r} belongs to no supported network: HNeRV with PixelShuffle blocks without "
                "normalisation, or NVR-RRCP"
            )
    return ("hflf" if is_dual else "hnerv"), dict(sorted(renamed.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[str, int, int, bool]:
    stream, part, *rest = name.split(".")
    index = int(rest[0]) if part == "blocks" else 0
    return stream, ("stem", "blocks", "head").index(part), index, rest[-1] == "bias"


def _stream(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[tuple[int, ...], ...]:
    """Return widths, strides and kernels of a stream, from the shapes of its weights."""
    layers: list[tuple[int, ...]] = []
    while f"{name}.blocks.{len(layers)}.conv.weight" in shapes:
        layers.append(shapes[f"{name}.blocks.{len(layers)}.conv.weight"])
    layers.append(shapes.get(f"{name}.head.weight", ()))
    stem = shapes.get(f"{name}.stem.weight", ())
    if len(layers) < 2 or any(len(shape) != 4 for shape in layers) or len(stem) not in (2, 4):
        raise CheckpointError(f"the checkpoint must hold stem, blocks and head of the stream {name}")
    kernels = tuple(shape[2] for shape in layers[:-1])
    if any(shape[2] != shape[3] or shape[2] % 2 == 0 for shape in layers) or layers[-1][0] != 3 or layers[-1][2] != 3:
        raise CheckpointError(f"stream {name} must have odd square kernels and a 3x3 head to 3 channels")
    cells = 1 if len(stem) == 4 else math.prod(_LFD_GRID)
    if stem[0] != cells * layers[0][1] or stem[2:] not in ((), (1, 1)):
        raise CheckpointError(
            f"the stem of stream {name} must be a {'1x1 convolution' if cells == 1 else 'linear layer'} to "
            f"{cells} x {layers[0][1]} channels, got shape {stem} (NeRV's time-driven stem is not supported)"
        )
    strides = []
    for this, following in itertools.pairwise(layers):
        stride = math.isqrt(this[0] // following[1])
        if stride < 1 or this[0] != stride * stride * following[1]:
            raise CheckpointError(f"stream {name}: {this[0]} channels cannot be shuffled to {following[1]}")
        strides.append(stride)
    for key, shape in shapes.items():
        if key.startswith(f"{name}.") and key.endswith(".weight") and shapes.get(f"{key[:-6]}bias") != shape[:1]:
            raise CheckpointError(f"{key} must come with a bias of {shape[0]} values")
    return tuple(shape[1] for shape in layers), tuple(strides), kernels


def _grid(height: int, width: int, scale: int) -> tuple[int, int]:
    if height % scale or width % scale:
        raise CheckpointError(f"the network upscales by {scale}, which does not divide {height} x {width} frames")
    return height // scale, width // scale


def _entry(name: str, entry: Any) -> tuple[NDArray[np.uint8], MinMax]:
    """Check one {'quant', 'min', 'scale'} of HNeRV."""
    if not isinstance(entry, Mapping) or not all(
        isinstance(entry.get(key), torch.Tensor) for key in ("quant", "min", "scale")
    ):
        raise CheckpointError(f"{name} must hold the tensors 'quant', 'min' and 'scale'")
    symbols, minimum, scale = (entry[key].numpy() for key in ("quant", "min", "scale"))
    if symbols.dtype != np.uint8:
        raise CheckpointError(f"{name}.quant must be uint8, got {symbols.dtype}")
    axis = next((a for a in range(symbols.ndim) if pair_shape(symbols.shape, a) == minimum.shape), None)
    try:
        return symbols, MinMax(minimum, scale, None if minimum.ndim == 0 else axis)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _bits(arrays: list[NDArray[np.uint8]]) -> int:
    """Bits of the symbols: the file does not tell, but min-max quantisation uses its largest symbol."""
    return max([2, *(int(array.max(initial=0)).bit_length() for array in arrays)])


def _quantized(name: str, entry: tuple[NDArray[np.uint8], MinMax], bits: int) -> QuantizedTensor:
    try:
        return QuantizedTensor(entry[0], bits, entry[1])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _floats(name: str, value: Any) -> NDArray[np.float32]:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not torch.isfinite(value).all():
        raise CheckpointError(f"{name} must be a tensor of finite floats")
    return np.ascontiguousarray(value.float().numpy())
