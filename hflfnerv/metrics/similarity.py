"""Structural similarity, at one scale and at five."""

from __future__ import annotations

import torch
from torch import Tensor

from .._device import exact_convolutions
from .frames import Frames, per_frame, unit_planes

__all__ = ["MS_SSIM_MIN_SIDE", "ms_ssim", "ssim"]

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: The shorter side of a frame that MS-SSIM needs: the window has to fit at the fifth scale.
MS_SSIM_MIN_SIDE = (_WINDOW - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1


def ssim(a: Frames, b: Frames, *, reduction: str = "none") -> Tensor:
    """Structural similarity per frame (Wang, Bovik, Sheikh and Simoncelli 2004, Eq. 13).

    ``SSIM = mean((2 μa μb + C1)(2 σab + C2) / ((μa² + μb² + C1)(σa² + σb² + C2)))`` with local moments under an 11 x 11
    Gaussian window of deviation 1.5, only where the window fits, ``C1 = 0.01²``, ``C2 = 0.03²``; per colour channel,
    then the mean over channels.

    Args:
        a: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1]; array or tensor.
        b: of the same kind, shape and device.
        reduction: ``"none"`` for one value per frame, ``"mean"`` for their mean.

    Returns:
        float64 on the CPU: ``[T]``, or a scalar; 1 for identical frames.

    Raises:
        TypeError: the frames are neither uint8 nor floating point, or not both the same.
        ValueError: the shapes are not as stated or differ, there is no frame, or a side is less than 11.

    Numerics:
        Moments in float32 from samples in [0, 1], one frame at a time.
    """

    def metric(x: Tensor, y: Tensor) -> Tensor:
        planes_x, planes_y = unit_planes(x), unit_planes(y)
        _check_side(planes_x, _WINDOW, "SSIM")
        similarity, _ = _moments(planes_x, planes_y)
        return similarity.mean()

    return per_frame(a, b, metric, reduction)


def ms_ssim(a: Frames, b: Frames, *, reduction: str = "none") -> Tensor:
    """Multi-scale structural similarity per frame (Wang, Simoncelli and Bovik 2003, Eq. 7).

    The contrast-structure terms of scales 1 to 4 and the whole SSIM of scale 5, each raised to its weight
    (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), multiplied; negative ones count as 0. Scales are halved by 2 x 2 means; an
    odd side is padded with one zero at both ends before, as in the implementation that NeRV papers report with
    (pytorch-msssim). Per colour channel, then the mean over channels.

    Args:
        a: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1]; array or tensor.
        b: of the same kind, shape and device.
        reduction: ``"none"`` for one value per frame, ``"mean"`` for their mean.

    Returns:
        float64 on the CPU: ``[T]``, or a scalar; 1 for identical frames.

    Raises:
        TypeError: the frames are neither uint8 nor floating point, or not both the same.
        ValueError: the shapes are not as stated or differ, there is no frame, or a side is less than 161: the window
            must fit at the fifth scale.

    Numerics:
        Moments in float32 from samples in [0, 1], one frame at a time.
    """

    def metric(x: Tensor, y: Tensor) -> Tensor:
        planes_x, planes_y = unit_planes(x), unit_planes(y)
        _check_side(planes_x, MS_SSIM_MIN_SIDE, "MS-SSIM")
        product = torch.ones((), dtype=torch.float64, device=planes_x.device)
        for scale, weight in enumerate(_SCALE_WEIGHTS):
            similarity, contrast = _moments(planes_x, planes_y)
            last = scale == len(_SCALE_WEIGHTS) - 1
            product = product * (similarity if last else contrast).clamp(min=0) ** weight
            if not last:
                planes_x, planes_y = _halve(planes_x), _halve(planes_y)
        return product.mean()

    return per_frame(a, b, metric, reduction)


def _check_side(planes: Tensor, least: int, name: str) -> None:
    height, width = planes.shape[-2:]
    if min(height, width) < least:
        raise ValueError(f"{name} needs frames of at least {least} pixels on each side, got {height}x{width}")


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean SSIM and the mean contrast-structure term of ``[1, 3, H, W]``, each ``[3]`` in float64."""
    means = _blur(torch.cat((x, y, x * x, y * y, x * y), dim=1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.chunk(5, dim=1)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    contrast = (2 * (mean_xy - product) + _C2) / (mean_xx + mean_yy - squares + _C2)
    similarity = (2 * product + _C1) / (squares + _C1) * contrast
    return similarity.mean(dim=(0, 2, 3), dtype=torch.float64), contrast.mean(dim=(0, 2, 3), dtype=torch.float64)


def _blur(planes: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=torch.float32, device=planes.device) - _WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    channels = planes.shape[1]
    vertical = window.view(1, 1, _WINDOW, 1).expand(channels, 1, _WINDOW, 1)
    with exact_convolutions():  # TF32 would show in the fourth digit
        planes = torch.nn.functional.conv2d(planes, vertical, groups=channels)
        return torch.nn.functional.conv2d(planes, vertical.transpose(2, 3), groups=channels)


def _halve(planes: Tensor) -> Tensor:
    height, width = planes.shape[-2:]
    return torch.nn.functional.avg_pool2d(planes, 2, padding=(height % 2, width % 2))
