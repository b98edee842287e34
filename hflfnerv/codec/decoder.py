"""Frames from a bitstream."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from .._device import device_failure, resolve_device
from ..errors import InvalidBitstream
from ..models import ModelSpec, VideoNetwork, build_model
from .bitstream import Bitstream
from .engine import make_engine
from .quantization import dequantize

__all__ = ["Decoder", "load_model"]


def load_model(bitstream: Bitstream) -> VideoNetwork:
    """Rebuild the decoder network of a bitstream, on the CPU in float32.

    Raises:
        BitstreamError: the header describes no network, or the weights do not fit it.
    """
    try:
        spec = ModelSpec.from_dict(bitstream.header.model)
        # Without storage until the weights are there: a header alone allocates nothing.
        with torch.device("meta"):
            model = build_model(spec, with_encoder=False)
    except ValueError as error:
        raise InvalidBitstream(f"the header describes no network: {error}") from error
    header = bitstream.header
    if (spec.frames, spec.height, spec.width) != (header.frames, header.height, header.width):
        raise InvalidBitstream(
            f"the network is made for {spec.frames} frames of {spec.height} x {spec.width}, "
            f"the video has {header.frames} of {header.height} x {header.width}"
        )
    if spec.embedding_shape != bitstream.embedding_shape:
        raise InvalidBitstream(
            f"the network takes embeddings of shape {spec.embedding_shape}, the file has {bitstream.embedding_shape}"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.coded_parameters().items()}
    weights = bitstream.read_weights(shapes)
    model.load_coded({name: torch.from_numpy(dequantize(tensor)) for name, tensor in weights.items()})
    return model.requires_grad_(False).eval()


class Decoder:
    """Decodes any frame of a ``.hflf`` file on its own.

    Frames are decoded one at a time, so a frame is the same, bit for bit on one device and number of threads, whether
    it is asked for alone or with others.

    Args:
        source: path of a file, or its bytes.
        device: ``"auto"`` (CUDA where there is a device), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        precision: ``"fp32"``, ``"bf16"`` and ``"fp16"`` compute in these, halves where that is safe; ``"auto"`` in the
            fastest whose frames are within a level or so of float32's: bfloat16 on a CPU with AMX, float16 on a CUDA
            device, ``"int16"`` elsewhere. That is for CPUs: large blocks multiply 16-bit integers, with a tenth of
            bfloat16's errors, and the rest is float32; so is all of it on a CPU without AVX2. ``"int8"`` runs most of
            the network on 8-bit integers, at a small cost in PSNR that depends on the network; it is for CUDA devices,
            and on a CPU gives their frames slowly.

    Attributes:
        header: what the file says about the video.
        fps: frame rate.
        model: the network.
        engine: what makes the frames.

    Raises:
        BitstreamError: the data cannot be decoded; the subclass and the message name the cause.
        BackendUnavailable: the device is not there.

    Example:
        >>> dec = Decoder("clip.hflf")  # doctest: +SKIP
        >>> dec[17].shape  # doctest: +SKIP
        (640, 1280, 3)
    """

    def __init__(
        self, source: str | os.PathLike[str] | bytes, device: str | torch.device = "auto", precision: str = "auto"
    ) -> None:
        self.device = resolve_device(device)
        self.bitstream = Bitstream.open(source)
        self.header = self.bitstream.header
        self.fps: Fraction = self.header.fps
        self.model: VideoNetwork = load_model(self.bitstream)
        try:
            self.engine = make_engine(self.model, self.embeddings, self.device, precision)
        except RuntimeError as error:
            failure = device_failure(error, decoding=True)
            if failure is None or str(device) != "auto" or self.device.type == "cpu":
                raise
            warnings.warn(f"decoding on the CPU: {failure}", RuntimeWarning, stacklevel=2)
            self.device = torch.device("cpu")
            self.model = load_model(self.bitstream)
            self.engine = make_engine(self.model, self.embeddings, self.device, precision)

    def __len__(self) -> int:
        return self.header.frames

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the decoded video, ``(T, H, W, 3)``."""
        return self.header.frames, self.header.height, self.header.width, 3

    def __getitem__(self, key: int | slice) -> NDArray[np.uint8]:
        """Return frame ``key`` as uint8 ``[H, W, 3]``, or the frames of a slice as ``[n, H, W, 3]``."""
        if isinstance(key, slice):
            return self.frames(range(*key.indices(len(self))))
        [frame] = self.engine.frames(self._positions([key]))
        return frame

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all frames, as :meth:`iter_frames` does."""
        return self.iter_frames()

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames of ``indices``, in that order, as uint8 ``[n, H, W, 3]``.

        Raises:
            IndexError: an index is outside ``-T..T-1``.
            TypeError: an index is not an integer.
        """
        wanted = self._positions(indices)
        out = np.empty((len(wanted), *self.shape[1:]), dtype=np.uint8)
        self.engine.fill(wanted, out)
        return out

    def float_frames(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the frames of ``indices`` as the network makes them: neither clamped nor rounded to 8 bits.

        The NeRV papers report the PSNR of these. Rounding costs ``10 log10(1 + 1 / (12 * 255^2 * MSE))`` dB of it:
        0.012 at 33 dB, 0.05 at 40 dB.

        Returns:
            float32 ``[n, 3, H, W]`` on the CPU, nominally in [0, 1].

        Raises:
            IndexError: an index is outside ``-T..T-1``.
            TypeError: an index is not an integer.
        """
        images = list(self.engine.float_frames(self._positions(indices)))
        return torch.stack(images) if images else torch.empty(0, 3, *self.shape[1:3], dtype=torch.float32, device="cpu")

    def iter_frames(self, start: int | None = None, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames of ``start:stop`` as uint8 ``[H, W, 3]``, one at a time.

        Each is the caller's to keep and to write to. On a CUDA device it is the pinned memory that it was copied to;
        only what comes while the caller holds 16 frames or more, or views of them, is copied once more. PyTorch waits
        for a ``non_blocking`` copy from a frame that is let go of, but not for one from rows further down in it.
        """
        yield from self.engine.frames(range(*slice(start, stop).indices(len(self))))

    def _positions(self, indices: Sequence[int]) -> list[int]:
        if not isinstance(indices, Iterable):
            raise TypeError(f"indices must be a sequence of integers, got {indices!r}; one frame is dec[{indices!r}]")
        return [self._index(index) for index in indices]

    def _index(self, index: int) -> int:
        try:
            position = index.__index__()
        except AttributeError:
            raise TypeError(f"frame index must be an integer, got {index!r}") from None
        if not -len(self) <= position < len(self):
            raise IndexError(f"frame index must be in {-len(self)}..{len(self) - 1}, got {position}")
        return position % len(self)

    def embeddings(self, indices: Sequence[int]) -> torch.Tensor | None:
        """Return the embeddings of frames in 0..T-1 as float32 ``[n, C, h, w]``, None if the network has none."""
        if self.bitstream.embedding_shape is None:
            return None
        return torch.from_numpy(self.bitstream.read_embeddings(indices))
