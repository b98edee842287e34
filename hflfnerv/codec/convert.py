"""Turns checkpoints of the HNeRV and NVR-RRCP code bases into ``.hflf`` files."""

from __future__ import annotations

import os
from fractions import Fraction

import torch

from .._version import __version__
from ..data import DEFAULT_FPS, load_video
from ..errors import CheckpointError
from ..models import build_model
from ..train import prepare_clip
from .bitstream import Header, write_bitstream
from .encoder import embed_all
from .importer import read_checkpoint
from .quantization import quantize, quantize_tensors

__all__ = ["convert_checkpoint"]

_HIGHPASS_REMOVED = 0.8


def convert_checkpoint(
    path: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    frames: slice | None = None,
    resize: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    fps: Fraction | float | None = None,
    weight_bits: int = 8,
    embedding_bits: int = 6,
    entropy: str = "huffman",
) -> bytes:
    """Read a checkpoint and return a ``.hflf`` file that decodes to the frames its own code would make.

    A coded video (HNeRV's ``quant_vid.pth``) keeps its symbols, minima and scales bit for bit. A training checkpoint
    has no embeddings, so its encoder is run on the original video, and weights and embeddings are quantised between
    their extremes as its own evaluation does.

    Args:
        path: ``quant_vid.pth``, or a training checkpoint of HNeRV or NVR-RRCP.
        reference: the original video; needed for a training checkpoint.
        frames: frames of the original that were coded; None for all.
        resize: ``(height, width)`` to which they were resized, or None.
        crop: ``(height, width)`` of the centre crop, or None.
        fps: frame rate to store; None for the original's, or 25 without one.
        weight_bits: bits of a weight, for a training checkpoint.
        embedding_bits: bits of an embedding value, for a training checkpoint.
        entropy: the entropy coder, ``"huffman"`` or ``"range"``.

    Raises:
        CheckpointError: it is no such checkpoint, or does not fit the video.
        MediaError: the video cannot be read.
    """
    imported = read_checkpoint(path)
    video = None if reference is None else load_video(reference, frames=frames, resize=resize, fps=fps)
    if imported.embeddings is not None:
        spec, weights, embeddings = imported.spec(), imported.weights, imported.embeddings
        assert weights is not None
    else:
        if video is None:
            raise CheckpointError(
                f"{os.fspath(path)} is a training checkpoint, which has no embeddings: name the video it was "
                "trained on (--reference, with its --frames, --resize and --crop), so that its encoder can make them"
            )
        height, width = crop or video.shape[1:]
        spec = imported.spec(frames=len(video), height=height, width=width)
        model = build_model(spec)
        assert imported.float_weights is not None
        tensors = {**imported.float_weights, **imported.encoder}
        try:
            model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise CheckpointError(f"{os.fspath(path)} does not fit the network: {error}") from error
        clip = prepare_clip(video.frames, model.encoder_input, crop=crop, removed=_HIGHPASS_REMOVED)
        made = embed_all(model, clip)
        assert made is not None
        embeddings = quantize(made.numpy(), embedding_bits, scheme="minmax")
        weights = quantize_tensors(imported.float_weights, weight_bits, scheme="minmax", side_limit=float("inf"))
    header = Header(
        model=spec.to_dict(),
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        fps=video.fps
        if video is not None
        else DEFAULT_FPS
        if fps is None
        else Fraction(fps).limit_denominator(100_000),
        preset="imported",
        writer=f"hflfnerv {__version__}",
        training=None if imported.epoch is None else {"epochs": imported.epoch},
    )
    return write_bitstream(header, weights, embeddings, entropy=entropy)
