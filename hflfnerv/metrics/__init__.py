"""What a coded video is measured by."""

from .bjontegaard import bd_psnr, bd_rate
from .distortion import bits_per_pixel, psnr
from .perceptual import lpips, lpips_unavailable
from .similarity import MS_SSIM_MIN_SIDE, ms_ssim, ssim

__all__ = [
    "MS_SSIM_MIN_SIDE",
    "bd_psnr",
    "bd_rate",
    "bits_per_pixel",
    "lpips",
    "lpips_unavailable",
    "ms_ssim",
    "psnr",
    "ssim",
]
