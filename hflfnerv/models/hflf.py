"""The dual-stream network of the paper (Hayami et al., arXiv 2409.18497v2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import VideoNetwork
from .budget import embedding_count, hfd_stream, lfd_stream, plan_or_explain
from .convnext import ConvNeXtEncoder
from .layout import choose_layout
from .spec import ModelSpec, TimeSpec
from .streams import DecoderStream
from .time_encoding import TimeEncoding

__all__ = ["HFLFNeRV"]

_EMBEDDING_CHANNELS = 16
_TIME = TimeSpec(base=1.25, levels=30, first=1)
_TIME_SPLIT = 10
_SHARES = (20, 1, 5)


class HFLFNeRV(VideoNetwork):
    """High-frequency decoder on embeddings of the high-pass frame, two low-frequency decoders on the time.

    ``frame = tanh(HFD(e_t)) + (tanh(LFD1(p_t[:10 levels]) + LFD2(p_t[10:])) + 1) / 2``: the additive link of the
    paper, with ``e_t`` the ConvNeXt embedding of the high-pass frame and ``p_t`` the time encoding of Eq. (1).

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
        if set(spec.streams) != {"hfd", "lfd1", "lfd2"} or spec.time is None or not spec.embedding_channels:
            raise ValueError("spec must hold the streams hfd, lfd1, lfd2, a time encoding and embedding channels")
        if not 0 < spec.time_split < spec.time.levels:
            raise ValueError(f"spec.time_split must be in 1..{spec.time.levels - 1}, got {spec.time_split}")
        hfd = spec.streams["hfd"]
        if with_encoder:
            self.encoder = ConvNeXtEncoder(hfd.strides, embedding_channels=spec.embedding_channels)
        self.hfd = DecoderStream(hfd, spec.embedding_channels, spatial=True)
        self.lfd1 = DecoderStream(spec.streams["lfd1"], 2 * spec.time_split, spatial=False)
        self.lfd2 = DecoderStream(spec.streams["lfd2"], 2 * (spec.time.levels - spec.time_split), spatial=False)
        self.time = TimeEncoding(spec.time, spec.frames, cached=with_encoder)

    @classmethod
    def plan(cls, size: int, frames: int, height: int, width: int) -> ModelSpec:
        hfd_layout = choose_layout(height, width, stages=5, target_cells=2 * 4)
        lfd_layout = choose_layout(height, width, stages=4, target_cells=5 * 10)

        def spec_for(size: int) -> ModelSpec | None:
            rest = size - embedding_count(frames, _EMBEDDING_CHANNELS, hfd_layout)
            hfd_share, lfd1_share, lfd2_share = (rest * share / sum(_SHARES) for share in _SHARES)
            hfd = hfd_stream(hfd_share, hfd_layout, _EMBEDDING_CHANNELS)
            lfd1 = lfd_stream(lfd1_share, lfd_layout, 2 * _TIME_SPLIT)
            lfd2 = lfd_stream(lfd2_share, lfd_layout, 2 * (_TIME.levels - _TIME_SPLIT))
            if hfd is None or lfd1 is None or lfd2 is None:
                return None
            return ModelSpec(
                model=cls.name,
                frames=frames,
                height=height,
                width=width,
                embedding_channels=_EMBEDDING_CHANNELS,
                streams={"hfd": hfd, "lfd1": lfd1, "lfd2": lfd2},
                time=_TIME,
                time_split=_TIME_SPLIT,
            )

        return plan_or_explain(cls.name, size, frames, height, width, spec_for)

    def decode_streams(self, embeddings: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the high-frequency image in (-1, 1) and the low-frequency image in (0, 1), whose sum is the frame."""
        time = self.time(index).to(embeddings.dtype)
        split = 2 * self.spec.time_split
        high = torch.tanh(self.crop(self.hfd(embeddings)))
        low = self.crop(self.lfd1(time[:, :split])) + self.crop(self.lfd2(time[:, split:]))
        return high, torch.tanh(low) * 0.5 + 0.5

    def decode(self, embeddings: Tensor | None, index: Tensor) -> Tensor:
        if embeddings is None:
            raise ValueError("embeddings must be a tensor for this network, got None")
        high, low = self.decode_streams(embeddings, index)
        return high + low
