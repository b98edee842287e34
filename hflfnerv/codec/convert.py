"""Turns checkpoints of the HNeRV and NVR-RRCP code bases into ``.hflf`` files."""

from __future__ import annotations

import functools
import os
from fractions import Fraction

import torch

from ..data import DEFAULT_FPS, Video, count_frames, load_video, parse_fps, probe_video
from ..data.selection import as_frame_slice
from ..errors import CheckpointError
from ..models import MODELS, build_model
from ..train import embed_all, prepare_clip
from .bitstream import write_bitstream
from .encoder import make_header
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
    fps: str | Fraction | float | None = None,
    untagged_matrix: str = "bt601",
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
        reference: the original video; needed for a training checkpoint. The file keeps what it keeps of one that was
            encoded here: where the frames were cut from, frame rate, shape of a pixel, colours.
        frames: frames of the original that were coded; None for all.
        resize: ``(height, width)`` to which they were resized, or None.
        crop: ``(height, width)`` of the centre crop, or None.
        fps: frame rate to store; None for the original's, or 25 without one.
        untagged_matrix: YUV matrix of an original that does not state its own.
        weight_bits: bits of a weight, for a training checkpoint.
        embedding_bits: bits of an embedding value, for a training checkpoint.
        entropy: the entropy coder, ``"huffman"`` or ``"range"``.

    Raises:
        CheckpointError: it is no such checkpoint, or does not fit the video.
        MediaError: the video cannot be read.
        ValueError: an argument is out of its range.
    """
    rate = DEFAULT_FPS if fps is None else parse_fps(fps)
    imported = read_checkpoint(path)
    selection = as_frame_slice(frames)
    load = functools.partial(load_video, resize=resize, fps=fps, untagged_matrix=untagged_matrix)
    video: Video | None = None
    if imported.embeddings is not None:
        spec, weights, embeddings = imported.spec(), imported.weights, imported.embeddings
        assert weights is not None
        if reference is not None:
            # One frame tells everything but their number.
            first = _first_frame(reference, selection, spec.frames)
            video = load(reference, frames=slice(first, first + 1), crop=crop)
            if video.shape[1:] != (spec.height, spec.width):
                raise CheckpointError(
                    f"the checkpoint makes frames of {spec.height}x{spec.width} (height x width), and those of the "
                    f"reference are {video.shape[1]}x{video.shape[2]}: give --resize and --crop as it was trained with"
                )
    else:
        if reference is None:
            raise CheckpointError(
                f"{os.fspath(path)} is a training checkpoint, which has no embeddings: name the video it was "
                "trained on (--reference, with its --frames, --resize and --crop), so that its encoder can make them"
            )
        late_crop = crop if MODELS[imported.model].encoder_input == "highpass" else None
        video = load(reference, frames=selection, crop=None if late_crop else crop)
        height, width = crop or video.shape[1:]
        spec = imported.spec(frames=len(video), height=height, width=width)
        model = build_model(spec)
        assert imported.float_weights is not None
        tensors = {**imported.float_weights, **imported.encoder}
        try:
            model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise CheckpointError(f"{os.fspath(path)} does not fit the network: {error}") from error
        clip = prepare_clip(video.frames, model.encoder_input, crop=late_crop, removed=_HIGHPASS_REMOVED)
        made = embed_all(model, clip)
        assert made is not None
        embeddings = quantize(made.numpy(), embedding_bits, scheme="minmax")
        weights = quantize_tensors(imported.float_weights, weight_bits, scheme="minmax", side_limit=float("inf"))
    training = None if imported.epoch is None else {"epochs": imported.epoch}
    header = make_header(spec, preset="imported", fps=rate, video=video, resize=resize, crop=crop, training=training)
    return write_bitstream(header, weights, embeddings, entropy=entropy)


def _first_frame(reference: str | os.PathLike[str], selection: slice, count: int) -> int:
    """Return the index of the first selected frame of the original, which must have as many as were coded.

    Raises:
        CheckpointError: it has more or fewer.
    """
    chosen = range(0)
    stated = probe_video(reference).num_frames
    if stated is not None:
        chosen = range(stated)[selection]
    if len(chosen) != count:  # what a container states need not be true
        chosen = range(count_frames(reference))[selection]
    if len(chosen) != count:
        raise CheckpointError(
            f"the checkpoint has {count} frames, and {len(chosen)} of the reference are selected: give --frames as it "
            "was trained with"
        )
    return chosen[0]
