"""Folders of images as videos."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .._optional import Lazy
from ..errors import MediaError
from .color import drop_alpha

if TYPE_CHECKING:
    import PIL
    from PIL import Image, ImageOps
else:
    PIL, Image, ImageOps = (Lazy(name, "images") for name in ("PIL", "PIL.Image", "PIL.ImageOps"))

__all__ = ["IMAGE_SUFFIXES", "list_images", "natural_key", "read_image"]

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".tga", ".jp2")
)

_HIGH_BYTE_FORMATS = ("PNG", "PPM")


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Return a sorting key that puts ``frame2`` before ``frame10``.

    Runs of digits compare as numbers, the rest without regard to case; equal names (``a01``, ``a1``) compare as text.
    """
    # Odd positions are always the digits, so strings are never compared with numbers.
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if index % 2 else part.casefold() for index, part in enumerate(parts)), name


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder, sorted naturally; hidden files, subfolders and other files are left out.

    Raises:
        MediaError: there are none, or the folder cannot be read.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    except OSError as error:
        raise MediaError(f"{folder} cannot be read: {error.strerror}") from error
    if not entries:
        raise MediaError(f"{folder} is an empty folder; it must contain images (png, jpg, bmp, tif, webp, ppm, ...)")
    if not images:
        raise MediaError(f"{folder} contains no images (png, jpg, bmp, tif, webp, ppm, ...)")
    return sorted(images, key=lambda path: natural_key(path.name))


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as 8-bit RGB.

    Grey, black-and-white and palette images become RGB; of 16-bit samples the upper 8 bits are kept (exact for images
    that were 8-bit once); the EXIF orientation is applied; embedded colour profiles are not.

    Returns:
        ``[H, W, 3]``, uint8, full range.

    Raises:
        MediaError: it is no image or damaged, it has transparent pixels or several frames, or it stores colours that
            have no obvious RGB (CMYK, Lab, floating point).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise MediaError(f"{path} has several frames; give it as a video, or split it into images")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), image.format, path)
    except PIL.UnidentifiedImageError as error:
        raise MediaError(f"{path} is not an image that can be read") from error
    except MediaError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} cannot be read: {error}") from error


def _to_rgb(image: Image.Image, format_name: str | None, path: Path) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or (image.mode == "I" and format_name in _HIGH_BYTE_FORMATS):
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("1", "L", "P", "RGB", "RGBX", "YCbCr") and "transparency" not in image.info:
        return np.array(image.convert("RGB"))
    if image.mode in ("1", "L", "P", "RGB", "LA", "PA", "La", "RGBA", "RGBa"):
        return drop_alpha(np.asarray(image.convert("RGBA")), str(path))
    raise MediaError(f"{path} stores its colours as {image.mode}; convert it to 8-bit RGB first")
