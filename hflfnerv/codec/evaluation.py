"""How good a decoded video is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import MATRICES, EncodeConfig
from ..data import load_video, probe_video
from ..errors import BackendUnavailable
from ..metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, lpips, ms_ssim, psnr
from .decoder import Decoder

__all__ = ["compare", "evaluate", "file_matrix", "load_reference"]


def evaluate(decoder: Decoder, reference: Tensor, *, with_lpips: bool = False) -> dict[str, Any]:
    """Compare a decoded video with its original, frame by frame.

    Args:
        decoder: the coded video.
        reference: uint8 ``[T, H, W, 3]`` of the decoded shape.
        with_lpips: compute LPIPS (VGG) too, where its package and weights are there.

    Returns:
        ``bits_per_pixel`` of the whole file; ``psnr_db``, ``ms_ssim`` and, if asked for, ``lpips``, means over the
        frames; and under ``per_frame`` their values for each frame. ``ms_ssim`` is None for frames too small for its
        five scales, ``lpips`` where it cannot be computed, with the reason under ``lpips_unavailable``.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(reference.shape) != decoder.shape:
        raise ValueError(
            f"reference must have the decoded shape {decoder.shape}, got {tuple(reference.shape)}: "
            "give the frames, resize and crop with which it was encoded"
        )
    return {
        "bits_per_pixel": bits_per_pixel(decoder.bitstream.size, decoder.shape),
        **compare(decoder.iter_frames(), reference, with_lpips=with_lpips),
    }


def compare(decoded: Iterable[NDArray[np.uint8]], reference: Tensor, *, with_lpips: bool = False) -> dict[str, Any]:
    """Compare frames with their originals, one by one.

    Args:
        decoded: uint8 ``[H, W, 3]`` each.
        reference: uint8 ``[T, H, W, 3]``; on its device the metrics are computed.
        with_lpips: compute LPIPS (VGG) too, where its package and weights are there.

    Returns:
        What :func:`evaluate` does, without the rate.

    Raises:
        ValueError: the shapes or the numbers of frames differ.
    """
    metrics = {"psnr_db": psnr}
    if min(reference.shape[1:3]) >= MS_SSIM_MIN_SIDE:
        metrics["ms_ssim"] = ms_ssim
    report: dict[str, Any] = {"psnr_db": None, "ms_ssim": None}
    if with_lpips:
        report["lpips"] = None
        try:
            lpips(reference[:1], reference[:1])
            metrics["lpips"] = lpips
        except (BackendUnavailable, ValueError) as error:
            report["lpips_unavailable"] = str(error)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for frame, original in zip(decoded, reference, strict=True):
        image = torch.from_numpy(frame).to(reference.device)
        for name, metric in metrics.items():
            values[name].append(float(metric(image, original)))
    for name, per_frame in values.items():
        report[name] = float(np.mean(per_frame))
    return {**report, "per_frame": values}


def load_reference(
    decoder: Decoder,
    source: str | os.PathLike[str],
    *,
    frames: slice | None = None,
    resize: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    untagged_matrix: str | None = None,
) -> Tensor:
    """Read the original of a coded video, prepared as it was for coding.

    What is not given is taken from the file, which knows frames, resize, crop and YUV matrix that it was made with. A
    source that has the coded size, and not the original's, is neither resized nor cropped, and one of the coded length
    is taken whole.

    Returns:
        uint8 ``[T, H, W, 3]``.

    Raises:
        FileNotFoundError: there is no such source.
        MediaError: it cannot be read.
        ValueError: the crop does not fit.
    """
    count, height, width, _ = decoder.shape
    made = decoder.header.source
    info = probe_video(source)
    found = (info.height, info.width)
    # A resize and a crop may end at the size they began with: only another size tells that they are done already.
    if made is not None and (found == (made.height, made.width) or found != (height, width)):
        resize = made.resize if resize is None else resize
        crop = made.crop[2:] if crop is None and made.crop is not None else crop
    if frames is None and made is not None and info.num_frames != count:
        frames = slice(made.first_frame, made.first_frame + count)
    matrix = file_matrix(decoder) if untagged_matrix is None else untagged_matrix
    return load_video(source, frames=frames, resize=resize, crop=crop, untagged_matrix=matrix).frames


def file_matrix(decoder: Decoder) -> str:
    """Return the YUV matrix by which an untagged original of a coded video is to be read."""
    color = decoder.header.color
    return color.matrix if color is not None and color.matrix in MATRICES else EncodeConfig.untagged_matrix
