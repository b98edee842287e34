"""The ConvNeXt encoder of HNeRV, which the paper keeps: frame in, embedding out. It is not part of the coded video."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._concurrent import concurrently
from ..ops._channel_norm import channel_norm
from ..ops._check import compute_dtype
from ..ops._depthwise_conv2d import depthwise_conv2d
from ..ops._inverted_bottleneck import Bottleneck, inverted_bottleneck
from ..ops._scale_residual import scale_residual
from ..ops._triton import unavailable
from ..ops.pixel_shuffle_gelu import pixel_shuffle_gelu

__all__ = ["ConvNeXtEncoder", "DetailEncoder", "larger_patches", "use_pytorch"]

_NORM_EPSILON = 1e-6
_LAYER_SCALE = 1e-6
_DETAIL_WIDTH = 32


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of ``[B, C, H, W]``.

    Args:
        channels: C.
        for_product: whether a convolution takes the result, which then has the dtype in which that computes. Otherwise
            it is what blocks add to, which autocast leaves in float32.
    """

    impl = "auto"

    def __init__(self, channels: int, *, for_product: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self._for_product = for_product

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        dtype = compute_dtype(x) if self._for_product else None
        pixels = x.permute(0, 2, 3, 1)
        y = channel_norm(pixels, self.weight, self.bias, shift, eps=_NORM_EPSILON, out_dtype=dtype, impl=self.impl)
        return y.permute(0, 3, 1, 2)


class DepthwiseConv(nn.Conv2d):
    """Convolution of each channel with a kernel of its own, by kernels of ours where those are faster."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        return depthwise_conv2d(x, self.weight, self.bias, padding=(rows // 2, columns // 2))


class PatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel's size: a product of patches and weights.

    Libraries take long for the gradients of such a kernel, the larger it is, where that product is one like any other;
    on the CPU for those of images alone.
    """

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__(channels, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.in_channels > 3:
            return super().forward(x)
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with this bias."""
        size = self.kernel_size[0]
        rows, columns = x.shape[2] // size, x.shape[3] // size
        pixels = x[:, :, : rows * size, : columns * size].permute(0, 2, 3, 1)
        patches = pixels.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
        # The cast is the copy that patches are.
        patches = patches.to(compute_dtype(x), memory_format=torch.contiguous_format).flatten(3)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def _biases_apart(x: Tensor) -> bool:
    """Return whether the kernels behind linear layers are to add their biases.

    They make the gradients of these as well, each of which is a pass over the pixels otherwise.
    """
    half = x.is_cuda and compute_dtype(x).itemsize == 2
    return half and unavailable() is None and not torch.compiler.is_compiling()


class Stem(nn.Sequential):
    """The first patches, and their norm."""

    def __init__(self, conv: PatchConv, norm: ChannelNorm) -> None:
        super().__init__(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        assert isinstance(conv, PatchConv)
        assert isinstance(norm, ChannelNorm)
        if norm.impl == "auto" and _biases_apart(x):
            return norm.forward(conv.product(x, None), conv.bias)
        y: Tensor = norm(conv(x))
        return y


class _Branches(torch.autograd.Function):
    """A cast of a tensor and the tensor, whose gradients are added in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.to(dtype), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_cast, of_x = gradients
        return of_x + of_cast, None


class ConvNeXtBlock(nn.Module):
    """``x + gamma * pwconv2(GELU(pwconv1(LayerNorm(dwconv7x7(x)))))`` (Liu et al., "A ConvNet for the 2020s")."""

    impl = "auto"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(channels, 7)
        self.norm = nn.LayerNorm(channels, eps=_NORM_EPSILON)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), _LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        norm, dtype = self.norm, compute_dtype(x)
        fused = self.impl == "auto" and _biases_apart(x)
        y, x = _Branches.apply(x, dtype) if fused and x.dtype != dtype else (x, x)  # type: ignore[no-untyped-call]
        y, x = self.dwconv(y).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        if fused:
            y = channel_norm(y, norm.weight, norm.bias, eps=norm.eps, out_dtype=dtype)
            y = F.linear(y, self.pwconv1.weight).permute(0, 3, 1, 2)
            y = pixel_shuffle_gelu(y, 1, self.pwconv1.bias).permute(0, 2, 3, 1)
            x = scale_residual(x, self.gamma, F.linear(y, self.pwconv2.weight), self.pwconv2.bias)
        else:
            first, second = self.pwconv1, self.pwconv2
            parameters = Bottleneck(
                norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, self.gamma
            )
            x = inverted_bottleneck(x, y, parameters, eps=norm.eps, impl=self.impl)
        return x.permute(0, 3, 1, 2)


class ConvNeXtEncoder(nn.Module):
    """Strided ConvNeXt with one block a stage.

    Args:
        strides: downscale factor of each stage; a stage begins with a convolution of that kernel size and stride.
        channels: width of all stages but the last, 64 in the papers.
        embedding_channels: width of the last stage, 16 in the papers.

    Shape:
        ``[B, 3, H, W]`` with H and W divisible by the product of the strides, to ``[B, embedding_channels, h, w]``.
    """

    def __init__(self, strides: Sequence[int], channels: int = 64, embedding_channels: int = 16) -> None:
        super().__init__()
        widths = [channels] * (len(strides) - 1) + [embedding_channels]
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        previous = 3
        for index, (stride, width) in enumerate(zip(strides, widths, strict=True)):
            conv = PatchConv(previous, width, stride)
            self.downsample_layers.append(
                nn.Sequential(ChannelNorm(previous, for_product=True), conv)
                if index
                else Stem(conv, ChannelNorm(width, for_product=False))
            )
            self.stages.append(nn.Sequential(ConvNeXtBlock(width)))
            previous = width
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x


def use_pytorch(model: nn.Module) -> None:
    """Let the layers of all encoders in a model be PyTorch's own operations, gradients included."""
    for module in model.modules():
        if isinstance(module, (DepthwiseConv, PatchConv)):
            module.forward = functools.partial(nn.Conv2d.forward, module)  # type: ignore[method-assign]
        elif isinstance(module, (ChannelNorm, ConvNeXtBlock)):
            module.impl = "reference"


def larger_patches(strides: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of an encoder whose first stage goes as far as the first two of ``strides``.

    The stage on the finest grid takes most of an encoder's time, and embeddings are no better for it. Fewer than three
    strides stay as they are.
    """
    if len(strides) < 3:
        return tuple(strides)
    first, second, *others = strides
    return first * second, *others


class DetailEncoder(nn.Module):
    """Two encoders: one for an embedding as in HNeRV, one for a finer embedding of few channels.

    Both begin with :func:`larger_patches`.

    Args:
        strides: downscale factor of each block of the decoder. The finer embedding lies on the grid after the first.
        embedding_channels: of the coarse embedding.
        detail_channels: of the fine one.

    Shape:
        ``[B, 3, H, W]``, to ``[B, embedding_channels + detail_channels * strides[0]**2, h, w]``: the fine embedding
        follows the coarse one, as PixelShuffle takes it.
    """

    def __init__(self, strides: Sequence[int], *, embedding_channels: int, detail_channels: int) -> None:
        super().__init__()
        self.coarse = ConvNeXtEncoder(larger_patches(strides), embedding_channels=embedding_channels)
        self.fine = ConvNeXtEncoder(larger_patches(strides[1:]), _DETAIL_WIDTH, detail_channels)
        self._stride = strides[0]

    def forward(self, x: Tensor) -> Tensor:
        coarse, fine = concurrently(functools.partial(self.coarse, x), functools.partial(self.fine, x))
        return torch.cat([coarse, F.pixel_unshuffle(fine, self._stride)], 1)
