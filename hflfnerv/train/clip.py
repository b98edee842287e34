"""The training data of one video: frames once as uint8, encoder inputs once as float16."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._device import autocast_dtype
from .._optional import Lazy
from ..data import centre_crop
from ..errors import MediaError
from ..models import EncoderInput, VideoNetwork
from ..ops import highpass

if TYPE_CHECKING:
    import psutil
else:
    psutil = Lazy("psutil", "clips with high-pass frames")

__all__ = ["Clip", "embed_all", "prepare_clip"]

_BATCH_PIXELS = 4_000_000


@dataclass(frozen=True)
class Clip:
    """Frames and encoder inputs in channels-last order.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, what is coded.
        highpass: float16 ``[T, H, W, 3]``, the frames' high-pass part; None where the encoder does not see it.
        encoder_input: what the encoder sees.
    """

    frames: Tensor
    highpass: Tensor | None
    encoder_input: EncoderInput | None

    def __len__(self) -> int:
        return self.frames.shape[0]

    def to(self, device: torch.device) -> Clip:
        """Return the clip on ``device``."""
        return Clip(
            self.frames.to(device), None if self.highpass is None else self.highpass.to(device), self.encoder_input
        )

    def select(self, index: Tensor) -> Tensor:
        """Return some of the frames."""
        return _select(self.frames, index)

    def targets(self, index: Tensor) -> Tensor:
        """Return float32 frames ``[B, 3, H, W]`` in [0, 1], channels-last in memory."""
        return _in_unit_range(self.select(index))

    def inputs(self, index: Tensor, frames: Tensor | None = None) -> Tensor | None:
        """Return float32 encoder inputs ``[B, 3, H, W]``, channels-last in memory, or None.

        Args:
            index: which.
            frames: those from :meth:`select`, where they are there already.
        """
        if self.encoder_input == "frame":
            return _in_unit_range(self.select(index) if frames is None else frames)
        return None if self.highpass is None else _select(self.highpass, index).permute(0, 3, 1, 2).float()

    def digest(self) -> str:
        """Return a hash of the frames and inputs, to tell whether a checkpoint belongs to them."""
        digest = hashlib.blake2b(repr((tuple(self.frames.shape), self.encoder_input)).encode(), digest_size=16)
        digest.update(self.frames.cpu().contiguous().numpy().data)
        if self.highpass is not None:
            digest.update(self.highpass.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _select(images: Tensor, index: Tensor) -> Tensor:
    """Return ``images[index]``; as words of 64 bits where they can be, which a GPU copies as fast as bytes."""
    if not images.is_contiguous() or images[0].nbytes % 8 or images.data_ptr() % 8:
        return images[index]
    rows = images.flatten(1).view(torch.int64).index_select(0, index)
    return rows.view(images.dtype).view(-1, *images.shape[1:])


def _in_unit_range(frames: Tensor) -> Tensor:
    # The dtype of a tensor decides that of the quotient; that of a number is the default, which is the caller's.
    return frames.permute(0, 3, 1, 2) / torch.tensor(255.0, dtype=torch.float32, device="cpu")


def prepare_clip(
    frames: Tensor, encoder_input: EncoderInput | None, *, crop: tuple[int, int] | None, removed: float
) -> Clip:
    """Filter and crop whole frames.

    The high-pass filter runs over the whole frame, before the crop, as in the paper; its signed result is cropped like
    the frame. It depends on the frame alone, so it is computed once.

    Args:
        frames: uint8 ``[T, H, W, 3]``, whole frames.
        encoder_input: ``"highpass"``, ``"frame"`` or None.
        crop: height and width of the centre crop, or None.
        removed: fraction of the bandwidth the filter removes on each axis.

    Raises:
        MediaError: the filtered frames do not fit in memory.
        ValueError: the crop is larger than the frame.
    """
    cropped = frames if crop is None else centre_crop(frames, *crop)
    if encoder_input != "highpass":
        return Clip(cropped.contiguous(), None, encoder_input)
    count, height, width, _ = frames.shape
    needed = cropped.numel() * (2 if crop is None else 3)  # float16, and a copy of what the crop leaves
    available = psutil.virtual_memory().available
    if needed > available:
        raise MediaError(
            f"the high-pass frames and the crop need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: "
            "encode fewer frames (--frames) or smaller ones (--resize, --crop)"
        )
    filtered = torch.empty(cropped.shape, dtype=torch.float16, device=frames.device)
    batch = max(1, _BATCH_PIXELS // (height * width))
    for start in range(0, count, batch):
        part = _in_unit_range(frames[start : start + batch])
        part = highpass(part, removed).permute(0, 2, 3, 1)
        filtered[start : start + batch] = part if crop is None else centre_crop(part, *crop)
    return Clip(cropped.contiguous(), filtered, encoder_input)


@torch.inference_mode()
def embed_all(model: VideoNetwork, clip: Clip, *, precision: str = "fp32") -> Tensor | None:
    """Embeddings of all frames, float32 ``[T, C, h, w]`` on the CPU, or None.

    Args:
        model: the network, its encoder included.
        clip: what the encoder sees.
        precision: that of training, for the embeddings that the decoder has learned from: ``"fp32"``, ``"bf16"`` or
            ``"fp16"``.
    """
    if model.encoder is None:
        return None
    device, dtype = clip.frames.device, autocast_dtype(precision)
    rows = []
    for index in torch.arange(len(clip), device=device).split(1):
        inputs = clip.inputs(index)
        assert inputs is not None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            rows.append(model.embed(inputs).float().cpu())
    return torch.cat(rows).contiguous()
