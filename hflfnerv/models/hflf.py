"""The dual-stream network of the paper (Hayami et al., arXiv 2409.18497v2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .._concurrent import concurrently
from .base import VideoNetwork
from .budget import (
    detail_stream,
    embedding_count,
    grid_stream,
    hfd_stream,
    keeps_size,
    lfd_stream,
    plan_or_explain,
)
from .convnext import ConvNeXtEncoder, DetailEncoder
from .layout import choose_layout
from .spec import ModelSpec, StreamSpec, TimeSpec
from .streams import DecoderStream, DetailStem, EmbeddingStem, GridStem, TimeStem
from .time_encoding import TimeEncoding

__all__ = ["HFLFNeRV"]

_EMBEDDING_CHANNELS = 16
_TIME = TimeSpec(base=1.25, levels=30, first=1)
_TIME_SPLIT = 10
_SHARES = (20, 1, 5)
# Of "best": HFD and LFD, and the frames from one knot of the LFD to the next.
_BEST_SHARES = (19, 1)
_FRAMES_PER_KNOT = 4
# The finer embedding has this many channels, or as many as this part of all parameters pays for.
_DETAIL_CHANNELS = 4
_DETAIL_SHARE = 0.2


class HFLFNeRV(VideoNetwork):
    """High-frequency decoder on embeddings of the high-pass frame, low-frequency decoders on the time.

    ``preset="paper"``: ``frame = tanh(HFD(e_t)) + (tanh(LFD1(p_t[:10 levels]) + LFD2(p_t[10:])) + 1) / 2``, the
    additive link of the paper, with ``e_t`` the ConvNeXt embedding of the high-pass frame and ``p_t`` the time encoding
    of Eq. (1).

    ``preset="best"``: ``frame = (tanh(HFD(e_t, d_t) + LFD(g_t)) + 1) / 2``, with ``g_t`` interpolated between feature
    maps that are learned, one for four frames. That costs a twentieth of the parameters, where the paper's LFD1 and
    LFD2 cost nearly a quarter, most of it in the linear layers on the time. ``d_t`` is a second embedding, of few
    channels and by an encoder of its own, on the finer grid that the HFD has after its first block: it tells where in
    the frame something is, which the cells of ``e_t``, 2 x 4 of them, hardly do. Both are of the whole frame.

    Args:
        spec: the architecture, from :meth:`plan` or from a file's header.
        with_encoder: build the encoder too; False for decoding.

    Example:
        >>> import torch
        >>> from hflfnerv.models import HFLFNeRV
        >>> net = HFLFNeRV(HFLFNeRV.plan(size=100_000, frames=8, height=96, width=160))
        >>> net(torch.zeros(1, 3, 96, 160), torch.tensor([0])).shape
        torch.Size([1, 3, 96, 160])
    """

    name = "hflf"
    encoder_input = "highpass"

    def __init__(self, spec: ModelSpec, *, with_encoder: bool = True) -> None:
        super().__init__(spec)
        if not spec.embedding_channels or "hfd" not in spec.streams:
            raise ValueError("spec must hold the stream hfd and embedding channels")
        hfd = spec.streams["hfd"]
        channels, detail = spec.embedding_channels, hfd.detail
        if detail is None:
            if with_encoder:
                self.encoder = ConvNeXtEncoder(hfd.strides, embedding_channels=channels)
            self.hfd = DecoderStream(hfd, EmbeddingStem(hfd, channels))
        else:
            if with_encoder:
                self.encoder = DetailEncoder(
                    (detail.stride, *hfd.strides), embedding_channels=channels, detail_channels=detail.channels
                )
            self.hfd = DecoderStream(hfd, DetailStem(hfd, channels))
        others = set(spec.streams) - {"hfd"}
        if others == {"lfd"} and spec.streams["lfd"].knots:
            lfd = spec.streams["lfd"]
            self.lfd = DecoderStream(lfd, GridStem(lfd, spec.frames))
            return
        if others != {"lfd1", "lfd2"} or spec.time is None:
            raise ValueError("spec must hold the streams lfd1, lfd2 and a time encoding, or a stream lfd with knots")
        if not 0 < spec.time_split < spec.time.levels:
            raise ValueError(f"spec.time_split must be in 1..{spec.time.levels - 1}, got {spec.time_split}")
        lfd1, lfd2 = spec.streams["lfd1"], spec.streams["lfd2"]
        self.lfd1 = DecoderStream(lfd1, TimeStem(lfd1, 2 * spec.time_split))
        self.lfd2 = DecoderStream(lfd2, TimeStem(lfd2, 2 * (spec.time.levels - spec.time_split)))
        self.time = TimeEncoding(spec.time, spec.frames, cached=with_encoder)

    @classmethod
    def plan(
        cls, size: int, frames: int, height: int, width: int, *, preset: str = "paper", detail: int | None = None
    ) -> ModelSpec:
        """Return the architecture that spends ``size`` parameters; see :meth:`VideoNetwork.plan`.

        Args:
            size: parameters of the coded video: all frames' embeddings and the decoders.
            frames: number of frames T.
            height: frame height in pixels.
            width: frame width in pixels.
            preset: ``"paper"`` or ``"best"``.
            detail: most channels of the finer embedding of ``"best"``, which has fewer where the size does not pay for
                them; None for at most 4, of at most a fifth of the parameters.

        Raises:
            ValueError: ``size`` does not pay for the embeddings and the smallest decoders; names the least size.
        """
        hfd_layout = choose_layout(height, width, stages=5, target_cells=2 * 4)
        lfd_layout = choose_layout(height, width, stages=4, target_cells=5 * 10)
        fine_layout = hfd_layout.after_first()
        best = keeps_size(preset)

        def streams_for(budget: int, channels: int) -> dict[str, StreamSpec | None]:
            if best:
                hfd_share, lfd_share = (budget * share / sum(_BEST_SHARES) for share in _BEST_SHARES)
                knots = max(2, math.ceil(frames / _FRAMES_PER_KNOT))
                hfd = (
                    detail_stream(hfd_share, hfd_layout, _EMBEDDING_CHANNELS, channels)
                    if channels
                    else hfd_stream(hfd_share, hfd_layout, _EMBEDDING_CHANNELS)
                )
                return {"hfd": hfd, "lfd": grid_stream(lfd_share, lfd_layout, knots)}
            hfd_share, lfd1_share, lfd2_share = (budget * share / sum(_SHARES) for share in _SHARES)
            return {
                "hfd": hfd_stream(hfd_share, hfd_layout, _EMBEDDING_CHANNELS),
                "lfd1": lfd_stream(lfd1_share, lfd_layout, 2 * _TIME_SPLIT),
                "lfd2": lfd_stream(lfd2_share, lfd_layout, 2 * (_TIME.levels - _TIME_SPLIT)),
            }

        def spec_for(size: int, channels: int = 0) -> ModelSpec | None:
            embeddings = embedding_count(frames, _EMBEDDING_CHANNELS, hfd_layout)
            streams = streams_for(size - embeddings - embedding_count(frames, channels, fine_layout), channels)
            found = {name: stream for name, stream in streams.items() if stream is not None}
            if len(found) < len(streams):
                return None
            return ModelSpec(
                model=cls.name,
                frames=frames,
                height=height,
                width=width,
                embedding_channels=_EMBEDDING_CHANNELS,
                streams=found,
                time=None if best else _TIME,
                time_split=0 if best else _TIME_SPLIT,
            )

        if best and len(hfd_layout.strides) > 1:
            if detail is None:
                affordable = int(_DETAIL_SHARE * size / max(embedding_count(frames, 1, fine_layout), 1))
                detail = min(affordable, _DETAIL_CHANNELS)
            for channels in range(detail, 0, -1):
                spec_of = partial(spec_for, channels=channels)
                with contextlib.suppress(ValueError):  # a network with fewer may be small enough
                    return plan_or_explain(cls.name, size, frames, height, width, spec_of, exact=True)
        return plan_or_explain(cls.name, size, frames, height, width, spec_for, exact=best)

    def hidden_weights(self) -> list[Tensor]:
        stem = self.hfd.stem
        return [*super().hidden_weights(), *([stem.upsample.weight] if isinstance(stem, DetailStem) else [])]

    def stems(self, embeddings: Tensor | None, index: Tensor) -> list[Tensor]:
        if embeddings is None:
            raise ValueError("embeddings must be a tensor for this network, got None")
        if "lfd" in self.spec.streams:
            return concurrently(partial(self.hfd.begin, embeddings), partial(self.lfd.begin, index))
        time = self.time(index).to(embeddings.dtype)
        split = 2 * self.spec.time_split
        return concurrently(
            partial(self.hfd.begin, embeddings),
            partial(self.lfd1.begin, time[:, :split]),
            partial(self.lfd2.begin, time[:, split:]),
        )

    def stream_images(self, stems: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the high- and the low-frequency image of :meth:`stems`, before any tanh, cropped to the frame."""
        lfds = [self.lfd] if "lfd" in self.spec.streams else [self.lfd1, self.lfd2]
        calls = [partial(stream.finish, stem) for stream, stem in zip([self.hfd, *lfds], stems, strict=True)]
        high, *lows = map(self.crop, concurrently(*calls))
        return high, lows[0] if len(lows) == 1 else lows[0] + lows[1]

    def images(self, stems: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        high, low = self.stream_images(stems)
        return (low + high, None) if "lfd" in self.spec.streams else (low, high)
