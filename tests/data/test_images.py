from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflfnerv.data import DEFAULT_FPS, load_video, probe_video
from hflfnerv.data.images import natural_key
from hflfnerv.errors import MediaError

RGB = np.random.default_rng(0).integers(0, 256, (17, 31, 3), dtype=np.uint8)


def test_natural_order() -> None:
    names = ["frame10.png", "Frame2.png", "frame1.png", "a.png", "10.png", "9.png", "frame02.png", "frame1b.png"]
    expected = ["9.png", "10.png", "a.png", "frame1.png", "frame1b.png", "Frame2.png", "frame02.png", "frame10.png"]
    assert sorted(names, key=natural_key) == expected


def test_folder_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    suffixes = ("png", "bmp", "PPM", "tif", "tiff", "PNG", "tga", "png", "png", "png", "png", "png")
    for index, suffix in enumerate(suffixes):
        Image.fromarray(RGB + np.uint8(index)).save(folder / f"frame{index}.{suffix}")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image either")
    (folder / "sub.png").mkdir()

    video = load_video(folder)
    expected = np.stack([RGB + np.uint8(index) for index in range(len(suffixes))])
    assert np.array_equal(video.frames.numpy(), expected)
    assert (video.name, video.fps) == ("clip", DEFAULT_FPS)
    assert DEFAULT_FPS == 25
    assert np.array_equal(load_video(folder, frames="-3:-1").frames.numpy(), expected[-3:-1])
    assert probe_video(str(folder)).num_frames == len(suffixes)


def test_one_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "one.png")
    video = load_video(tmp_path / "one.png")
    assert np.array_equal(video.frames.numpy(), RGB[None])


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_formats_are_read_as_pillow_reads_them(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"one.{suffix}", quality=90)
    with Image.open(tmp_path / f"one.{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_video(tmp_path / f"one.{suffix}").frames[0].numpy(), expected)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    def read(image: Image.Image, name: str = "image.png", **options: object) -> np.ndarray:
        image.save(tmp_path / name, **options)
        frame = load_video(tmp_path / name).frames[0].numpy()
        assert frame.dtype == np.uint8
        return frame

    grey = RGB[..., 0]
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(read(Image.fromarray(grey)), grey_rgb)
    assert np.array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257)), grey_rgb)
    assert np.array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257), "grey.tif"), grey_rgb)
    assert np.array_equal(read(Image.fromarray(grey > 127)), np.where(grey_rgb > 127, 255, 0))
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(read(palette), np.asarray(palette.convert("RGB")))
    opaque = np.dstack([RGB, np.full(grey.shape, 255, np.uint8)])
    assert np.array_equal(read(Image.fromarray(opaque)), RGB)
    assert np.array_equal(read(Image.merge("LA", [Image.fromarray(grey), Image.new("L", (31, 17), 255)])), grey_rgb)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_video(tmp_path / "turned.png").frames[0].numpy(), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        (Image.new("RGBA", (8, 8), (1, 2, 3, 254)), "a.png", "transparent pixels"),
        (Image.new("LA", (8, 8), (1, 0)), "a.png", "transparent pixels"),
        (Image.new("CMYK", (8, 8)), "a.jpg", "stores its colours as CMYK"),
        (Image.new("F", (8, 8)), "a.tif", "stores its colours as F"),
        (Image.new("I", (8, 8)), "a.tif", "stores its colours as I"),
    ],
)
def test_images_without_an_obvious_rgb_are_refused(tmp_path: Path, image: Image.Image, name: str, message: str) -> None:
    image.save(tmp_path / name)
    with pytest.raises(MediaError, match=message):
        load_video(tmp_path / name)


def test_a_transparent_palette_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB).quantize(16).save(tmp_path / "a.png", transparency=0)
    with pytest.raises(MediaError, match="transparent pixels"):
        load_video(tmp_path / "a.png")


def test_an_animation_is_refused(tmp_path: Path) -> None:
    images = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:])
    with pytest.raises(MediaError, match="several frames"):
        load_video(tmp_path / "a.webp")


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "1.png")
    Image.fromarray(RGB[:16]).save(tmp_path / "2.png")
    with pytest.raises(MediaError, match=r"1\.png is 17x31 and .*2\.png is 16x31"):
        load_video(tmp_path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is an empty folder"):
        load_video(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(MediaError, match="contains no images"):
        load_video(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_video(tmp_path / "missing")


def test_damaged_images(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "1.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"2\.png cannot be read"):
        load_video(tmp_path)
    (tmp_path / "2.png").write_bytes(b"text")
    with pytest.raises(MediaError, match=r"2\.png is not an image"):
        load_video(tmp_path)
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(MediaError, match=r"2\.png is not an image"):
        load_video(tmp_path)
    # Nothing after the selection is read.
    assert len(load_video(tmp_path, frames=":1")) == 1
