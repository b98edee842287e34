"""Networks with the structure of published NeRV code: which module holds which, and who calls whom.

HNeRV (arXiv 2304.02633), NeRV (2110.13903), E-NeRV (2207.08132), DNeRV (2304.06544) and NVR-RRCP (2409.18497), in our
own words: what :func:`hflfnerv.fuse` must find its way through, and what it is measured on. They are the decoders, to
which the encoders of HNeRV, DNeRV and NVR-RRCP hand embeddings. Encodings of time are inputs too: they have
no parameters, and float32 keeps nothing of the phase of their highest frequencies, so that results could not be
compared across dtypes.

Without arguments the classes make networks of a few channels, for tests; :data:`NETWORKS` has them at 1.5 M.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "NVRRRCP", "SMALL", "DNeRV", "ENeRV", "HNeRV", "NeRV", "Network"]


def activation(name: str) -> nn.Module:
    return {"gelu": nn.GELU, "tanh-gelu": lambda: nn.GELU("tanh"), "silu": nn.SiLU}[name]()


def norm_layer(name: str, channels: int) -> nn.Module:
    return {"none": nn.Identity, "bn": lambda: nn.BatchNorm2d(channels)}[name]()


def mlp(*widths: int) -> nn.Sequential:
    """NeRV, E-NeRV, NVR-RRCP: linear layers that share one activation object."""
    act = nn.GELU()
    return nn.Sequential(*(module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), act)))


class UpConv(nn.Module):
    """HNeRV: the convolution and the shuffle (of stride 1: an Identity) are a Sequential."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        shuffle = nn.Identity() if stride == 1 else nn.PixelShuffle(stride)
        conv = nn.Conv2d(c_in, c_out * stride**2, kernel, 1, math.ceil((kernel - 1) // 2), bias=bias)
        self.upconv = nn.Sequential(conv, shuffle)

    def forward(self, x: Tensor) -> Tensor:
        return self.upconv(x)


class DownConv(nn.Module):
    """HNeRV: what its first decoder layer is, with kernel 0 and stride 1, that is 1x1."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.downconv = nn.Conv2d(c_in, c_out, kernel + stride, stride, math.ceil(kernel / 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.downconv(x)


class Block(nn.Module):
    """HNeRV, NVR-RRCP, NeRV and E-NeRV: a convolution module, a norm that is mostly off, an activation."""

    def __init__(self, conv: nn.Module, channels: int, act: str = "gelu", norm: str = "none") -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm_layer(norm, channels)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def up_blocks(
    widths: Sequence[int], strides: Sequence[int], kernels: Sequence[int], act: str = "gelu", bias: bool = True
) -> Iterator[Block]:
    for c_in, c_out, stride, kernel in zip(widths[:-1], widths[1:], strides, kernels, strict=True):
        yield Block(UpConv(c_in, c_out, stride, kernel, bias), c_out, act)


class HNeRV(nn.Module):
    """HNeRV: a ModuleList of blocks, the first of which may spread channels over a grid around each cell."""

    def __init__(
        self,
        embedding: int = 4,
        widths: Sequence[int] = (6, 5, 4, 4),
        strides: Sequence[int] = (2, 3, 1),
        kernels: Sequence[int] = (1, 3, 5),
        *,
        spread: int = 2,
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc_h = self.fc_w = spread
        channels = widths[0] * spread**2
        stem = Block(DownConv(embedding, channels, stride=1, kernel=0), channels, act)
        self.decoder = nn.ModuleList([stem, *up_blocks(widths, strides, kernels, act, bias)])
        self.head_layer = nn.Conv2d(widths[-1], 3, 3, 1, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        outputs = [x if embedding is None else embedding]
        y = self.decoder[0](outputs[0])
        n, _, h, w = y.shape
        y = y.view(n, -1, self.fc_h, self.fc_w, h, w).permute(0, 1, 4, 2, 5, 3)
        y = y.reshape(n, -1, self.fc_h * h, self.fc_w * w)
        for layer in self.decoder[1:]:
            y = layer(y)
            outputs.append(y)
        return torch.tanh(self.head_layer(y)) * 0.5 + 0.5, outputs


class NVRRRCP(nn.Module):
    """NVR-RRCP: HNeRV's decoder, and two on time encodings with a stem of Linear and GELU; images are added."""

    def __init__(
        self,
        high: HNeRV | None = None,
        grid: tuple[int, int] = (2, 2),
        features: tuple[int, int] = (3, 5),
        widths: tuple[Sequence[int], Sequence[int]] = ((5, 4, 3), (5, 4, 3)),
        strides: Sequence[int] = (2, 3),
        kernels: Sequence[int] = (3, 5),
    ) -> None:
        super().__init__()
        self.high = HNeRV() if high is None else high
        self.grid, self.features = grid, features
        self.low1, self.low2 = (
            nn.ModuleList([mlp(count, of[0] * math.prod(grid)), *up_blocks(of, strides, kernels)])
            for count, of in zip(features, widths, strict=True)
        )
        self.head1, self.head2 = (nn.Conv2d(of[-1], 3, 3, 1, 1) for of in widths)

    def low(self, layers: nn.ModuleList, head: nn.Module, time: Tensor) -> Tensor:
        y = layers[0](time)
        y = y.view(y.size(0), -1, *self.grid)
        for layer in layers[1:]:
            y = layer(y)
        return head(y)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        slow, fast = time.split(self.features, dim=1)
        low = self.low(self.low1, self.head1, slow) + self.low(self.low2, self.head2, fast)
        return torch.tanh(self.high(x)[0]) + torch.tanh(low) * 0.5 + 0.5


class CustomConv(nn.Module):
    """NeRV, E-NeRV and DNeRV: attributes called one after another; their names stay, whatever they are."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, kind: str = "conv", bias: bool = True, kernel: int = 3
    ) -> None:
        super().__init__()
        if kind == "conv":
            self.conv: nn.Module = nn.Conv2d(c_in, c_out * stride**2, kernel, 1, kernel // 2, bias=bias)
            self.up_scale: nn.Module = nn.PixelShuffle(stride)
        elif kind == "deconv":
            self.conv = nn.ConvTranspose2d(c_in, c_out, stride, stride)
            self.up_scale = nn.Identity()
        else:
            self.conv = nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=True)
            self.up_scale = nn.Conv2d(c_in, c_out, 2 * stride + 1, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.up_scale(out)


class NeRV(nn.Module):
    """NeRV: blocks and heads in ModuleLists, a head only where there is one."""

    def __init__(
        self,
        features: int = 4,
        hidden: int = 8,
        grid: tuple[int, int] = (2, 3),
        widths: Sequence[int] = (5, 4, 4, 3),
        strides: Sequence[int] = (2, 1, 3),
        *,
        kind: str = "conv",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stem = mlp(features, hidden, widths[0] * math.prod(grid))
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.layers.append(Block(CustomConv(c_in, c_out, stride, kind, bias), c_out))
            self.heads.append(None)  # type: ignore[arg-type]
        self.heads[-1] = nn.Conv2d(widths[-1], 3, 1, 1)

    def forward(self, time: Tensor) -> list[Tensor]:
        y = self.stem(time)
        y = y.view(y.size(0), -1, *self.grid)
        images = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            y = layer(y)
            if head is not None:
                images.append((torch.tanh(head(y)) + 1) * 0.5)
        return images


class ConvUpBlock(nn.Module):
    """E-NeRV: two convolutions, of which the narrower one shuffles."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        if c_in <= c_out:
            self.conv1: nn.Module = CustomConv(c_in, c_in // 4, stride)
            self.conv2: nn.Module = nn.Conv2d(c_in // 4, c_out, 3, 1, 1)
        else:
            self.conv1 = nn.Conv2d(c_in, c_out, 3, 1, 1)
            self.conv2 = CustomConv(c_out, c_out, stride)
        self.norm = nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv2(self.conv1(x))))


class Attention(nn.Module):
    """E-NeRV: self-attention over the cells of the grid."""

    def __init__(self, width: int, heads: int, per_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * per_head, bias=False)
        self.to_out = nn.Linear(heads * per_head, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) * query.size(-1) ** -0.5, dim=-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """E-NeRV: attention and two linear layers, each with what goes in added."""

    def __init__(self, width: int, heads: int, per_head: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads, per_head)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ffn(x) + x


class ENeRV(nn.Module):
    """E-NeRV: a map of place and time from attention; blocks whose normalised input the time scales and shifts."""

    def __init__(
        self,
        features: int = 4,
        place_features: int = 4,
        hidden: int = 6,
        width: int = 8,
        per_head: int = 2,
        grid: tuple[int, int] = (2, 3),
        widths: Sequence[int] = (4, 3, 3),
        strides: Sequence[int] = (2, 2),
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stem_t, self.stem_xy = mlp(features, hidden, width), mlp(place_features, width)
        self.trans1, self.trans2 = (TransformerBlock(width, heads, per_head, hidden) for heads in (1, 8))
        self.register_buffer("place", torch.randn(math.prod(grid), place_features))
        self.toconv = mlp(width, widths[0])
        self.t_branch = mlp(features, hidden, hidden)
        self.t_layers = nn.ModuleList(mlp(hidden, 2 * channels) for channels in widths[:-1])
        self.norm_layers = nn.ModuleList(nn.InstanceNorm2d(channels) for channels in widths[:-1])
        first, *others = zip(widths[:-1], widths[1:], strides, strict=True)
        self.layers = nn.ModuleList([ConvUpBlock(*first), *(Block(CustomConv(*sizes), sizes[1]) for sizes in others)])
        self.head_layers = nn.ModuleList([*([None] * len(others)), nn.Conv2d(widths[-1], 3, 1, 1)])  # type: ignore[list-item]

    def forward(self, data: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        time, scales = self.stem_t(data["time"]), self.t_branch(data["time"])
        y = self.trans1(self.stem_xy(self.place).expand(len(time), -1, -1))
        y = self.toconv(self.trans2(y * time.unsqueeze(1)))
        y = y.transpose(1, 2).unflatten(2, self.grid)
        images = []
        for layer, head, t_layer, norm in zip(
            self.layers, self.head_layers, self.t_layers, self.norm_layers, strict=True
        ):
            gain, shift = t_layer(scales)[..., None, None].chunk(2, dim=1)
            y = layer(norm(y) * gain + shift)
            if head is not None:
                images.append(torch.sigmoid(head(y)))
        return {"output_list": images}


class DNeRVBlock(nn.Module):
    """DNeRV: a convolution module and an activation, without a place for a norm."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv = CustomConv(c_in, c_out, stride, kernel=kernel)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class DNeRV(nn.Module):
    """DNeRV: after its third block, gates of the content and of the differences between frames mix the two."""

    def __init__(
        self,
        embedding: int = 4,
        width: int = 12,
        strides: Sequence[int] = (2, 3, 2, 2, 1),
        kernels: Sequence[int] = (1, 3, 5, 5, 5),
        difference_stride: int = 2,
    ) -> None:
        super().__init__()
        widths = [width]
        for _ in strides:
            widths.append(int(widths[-1] // 1.2))
        self.enc_c2_layer = nn.Conv2d(embedding, width, 1)
        self.decoder_layers, self.dec_head_layers = nn.ModuleList(), nn.ModuleList()
        for sizes in zip(widths[:-1], widths[1:], strides, kernels, strict=True):
            self.decoder_layers.append(DNeRVBlock(*sizes))
            self.dec_head_layers.append(None)  # type: ignore[arg-type]
        self.dec_head_layers[-1] = nn.Conv2d(widths[-1], 3, 3, 1, 1)
        self.diff_exc_layer = nn.Conv2d(2, widths[2], 1)
        self.diff_dec_layers = nn.ModuleList([DNeRVBlock(widths[2], widths[3], difference_stride, 3)])
        self.dec_p_c, self.dec_p_d, self.dec_s_c, self.dec_s_d = (
            nn.Conv2d(widths[3], widths[3], 3, 1, 1) for _ in range(4)
        )

    def forward(self, data: dict[str, Tensor]) -> list[Tensor]:
        y = self.enc_c2_layer(data["content"])
        difference = self.diff_exc_layer(data["difference"])
        for n in range(2):
            y = self.decoder_layers[n](y)
        y = self.decoder_layers[2](y)
        difference = self.diff_dec_layers[0](difference)
        new = torch.tanh(self.dec_p_c(y) + self.dec_p_d(difference))
        gate = torch.sigmoid(self.dec_s_c(y) + self.dec_s_d(difference))
        y = gate * new + (1 - gate) * y
        y = self.decoder_layers[3](y)
        y = self.decoder_layers[4](y)
        return [torch.sigmoid(self.dec_head_layers[-1](y))]


class Network(NamedTuple):
    """One of them, with what it takes and returns.

    Attributes:
        build: makes it.
        shapes: of its inputs, without the batch.
        arguments: the arguments of ``forward``, of inputs by name.
        frames: ``[B, 3, H, W]``, of what ``forward`` returns.
    """

    build: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    arguments: Callable[[dict[str, Tensor]], tuple[Any, ...]]
    frames: Callable[[Any], Tensor]


def _by_name(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    return (inputs,)


def _by_position(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    return tuple(inputs.values())


SMALL = {
    "HNeRV": Network(HNeRV, {"x": (4, 1, 2)}, _by_position, lambda returned: returned[0]),
    "NeRV": Network(NeRV, {"time": (4,)}, _by_position, lambda returned: returned[-1]),
    "E-NeRV": Network(ENeRV, {"time": (4,)}, _by_name, lambda returned: returned["output_list"][-1]),
    "DNeRV": Network(DNeRV, {"content": (4, 1, 2), "difference": (2, 6, 12)}, _by_name, lambda returned: returned[-1]),
    "NVR-RRCP": Network(NVRRRCP, {"x": (4, 1, 1), "time": (8,)}, _by_position, lambda returned: returned),
}

# HNeRV and NVR-RRCP have the widths of their published 1.5 M, the others theirs scaled down to that; frames are a
# quarter of the papers', 320 x 640 (NeRV and E-NeRV: 360 x 640), so that two cores take a second for a training step.
_STRIDES, _KERNELS = (5, 4, 4, 2, 2), (1, 3, 5, 5, 5)


def _hnerv(*widths: int) -> HNeRV:
    return HNeRV(16, widths, _STRIDES, _KERNELS, spread=1)


NETWORKS = {
    "HNeRV": SMALL["HNeRV"]._replace(build=lambda: _hnerv(68, 57, 48, 40, 33, 28), shapes={"x": (16, 1, 2)}),
    "NeRV": SMALL["NeRV"]._replace(
        build=lambda: NeRV(160, 288, (9, 16), (26, 26, 48, 48, 48), (5, 2, 2, 2)), shapes={"time": (160,)}
    ),
    "E-NeRV": SMALL["E-NeRV"]._replace(
        build=lambda: ENeRV(160, 320, 128, 96, 64, (9, 16), (64, 192, 96, 48, 32), (5, 2, 2, 2)),
        shapes={"time": (160,)},
    ),
    "DNeRV": SMALL["DNeRV"]._replace(
        build=lambda: DNeRV(16, 64, _STRIDES, _KERNELS, 4), shapes={"content": (16, 1, 2), "difference": (2, 20, 40)}
    ),
    "NVR-RRCP": SMALL["NVR-RRCP"]._replace(
        build=lambda: NVRRRCP(
            _hnerv(60, 50, 42, 35, 29, 24),
            (5, 10),
            (20, 40),
            ((9, 8, 7, 6, 5), (21, 18, 15, 12, 10)),
            (4, 4, 2, 2),
            (3, 5, 5, 5),
        ),
        shapes={"x": (16, 1, 2), "time": (60,)},
    ),
}
