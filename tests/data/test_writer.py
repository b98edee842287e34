from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from hflfnerv.data import VideoWriter, load_video, write_frames
from hflfnerv.errors import MediaError

TARGETS = ["clip.mp4", "clip.mov", "clip.mkv", "clip.y4m", "clip.npy", "frames"]
NTSC = Fraction(30000, 1001)


def noise(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, without filling one: every write beyond `size` fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["clip.npy", "frames"])
@pytest.mark.parametrize("shape", [(5, 48, 64), (1, 48, 64), (3, 17, 31)])
def test_lossless_targets_are_exact(tmp_path: Path, target: str, shape: tuple[int, int, int]) -> None:
    frames = noise(*shape)
    write_frames(tmp_path / target, frames, 25)
    assert names(tmp_path) == [target]
    assert np.array_equal(load_video(tmp_path / target).frames.numpy(), frames)


def test_npy_and_png_are_what_others_read(tmp_path: Path) -> None:
    frames = noise(3)
    write_frames(tmp_path / "clip.npy", frames, 25)
    assert np.array_equal(np.load(tmp_path / "clip.npy"), frames)
    write_frames(f"{tmp_path}/v1.0/", frames, 25)
    assert names(tmp_path / "v1.0") == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "clip.npy").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "v1.0").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("target", TARGETS)
def test_batches_of_any_kind_give_the_same(tmp_path: Path, target: str) -> None:
    frames = noise(6)
    tensor = torch.from_numpy(frames)
    (tmp_path / "once").mkdir()
    (tmp_path / "batches").mkdir()
    write_frames(tmp_path / "once" / target, frames, 25)
    strided = frames.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
    batches = [tensor[:2], frames[2], strided[3:5], frames[5:5], tensor[5]]
    write_frames(tmp_path / "batches" / target, iter(batches), 25)
    once, other = (load_video(tmp_path / name / target).frames for name in ("once", "batches"))
    assert len(once) == 6
    assert torch.equal(once, other)


@pytest.mark.parametrize("target", ["clip.mp4", "clip.mov", "clip.mkv", "clip.y4m"])
@pytest.mark.parametrize("size", [(48, 64), (17, 31), (18, 31), (2, 2), (1, 1)])
def test_videos_keep_size_rate_aspect_and_order(tmp_path: Path, target: str, size: tuple[int, int]) -> None:
    frames = np.repeat(np.arange(20, 220, 20, dtype=np.uint8), size[0] * size[1] * 3).reshape(10, *size, 3)
    write_frames(tmp_path / target, frames, NTSC, sample_aspect_ratio=Fraction(4, 3))
    assert names(tmp_path) == [target]
    video = load_video(tmp_path / target)
    assert video.shape == (10, *size)
    # Matroska stores the time of a frame in milliseconds.
    assert abs(video.fps - NTSC) <= (Fraction(1, 100) if target.endswith("mkv") else 0)
    # A single pixel that is not square would round to none: FFmpeg takes its shape as unknown.
    if size != (1, 1) or target.endswith("y4m"):
        assert video.sample_aspect_ratio == Fraction(4, 3)
    assert (video.frames[:, 0, 0, 0].int().diff() > 10).all()


@pytest.mark.parametrize("target", ["clip.mp4", "clip.mov", "clip.mkv"])
@pytest.mark.parametrize(("size", "pixel_format"), [((48, 64), "yuv420p"), ((47, 63), "yuv444p")])
def test_h264_is_tagged_and_right(
    tmp_path: Path, colorimetry: Any, target: str, size: tuple[int, int], pixel_format: str
) -> None:
    for color in colorimetry.COLORS:
        write_frames(tmp_path / target, np.full((1, *size, 3), color, np.uint8), 25)
        with av.open(str(tmp_path / target)) as container:
            frame = next(container.decode(video=0))
            assert frame.format.name == pixel_format
            # Limited range, BT.709.
            assert (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
            planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
            widths = [plane.width for plane in frame.planes]
        # Rounding to a code, and half a quantisation step (at most 4 codes at this quality) of the flat block's mean.
        for plane, width, code in zip(planes, widths, colorimetry.to_yuv(color, "bt709", False, 8), strict=True):
            assert np.abs(plane[:, :width].astype(int) - code).max() <= 1 + 4 // 2


@pytest.mark.parametrize("target", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize(
    ("primaries", "transfer", "codes"),
    [("smpte170m", "smpte170m", (6, 6)), ("bt470bg", "srgb", (5, 13)), (None, "no such", (2, 2))],
)
def test_h264_is_tagged_with_the_frames_own_colours(
    tmp_path: Path, target: str, primaries: str | None, transfer: str | None, codes: tuple[int, int]
) -> None:
    with VideoWriter(tmp_path / target, 25, (48, 64), primaries=primaries, transfer=transfer) as writer:
        writer.write(noise(2))
    with av.open(str(tmp_path / target)) as container:
        frame = next(container.decode(video=0))
        assert (frame.color_range, frame.colorspace) == (1, 1)
        assert (frame.color_primaries, frame.color_trc) == codes
    color = load_video(tmp_path / target).color
    assert (color.primaries, color.transfer) == (primaries, transfer if codes[1] != 2 else None)


@pytest.mark.parametrize("target", ["clip.mp4", "clip.mkv", "clip.y4m"])
def test_slow_videos_keep_their_rate(tmp_path: Path, target: str) -> None:
    write_frames(tmp_path / target, noise(3), "1/60")
    assert load_video(tmp_path / target).fps == Fraction(1, 60)


def test_y4m_reads_back_as_written(tmp_path: Path, colorimetry: Any) -> None:
    frames = noise(4, 17, 31)
    write_frames(tmp_path / "clip.y4m", frames, 25)
    video = load_video(tmp_path / "clip.y4m")
    assert (video.color.matrix, video.color.range) == ("bt601", "limited")
    # One code of error in luma and chroma, seen through the matrix (blue is the worst), and the rounding to a level.
    bound = 255 / 219 + 1.772 * 255 / 224 + 0.5
    assert np.abs(video.frames.numpy().astype(int) - frames).max() <= bound
    for color in colorimetry.COLORS:
        write_frames(tmp_path / "clip.y4m", np.full((1, 4, 6, 3), color, np.uint8), 25)
        # By the definition of BT.601 at limited range, of what the file holds.
        codes = np.frombuffer((tmp_path / "clip.y4m").read_bytes()[-3 * 4 * 6 :], np.uint8).reshape(3, -1)[:, 0]
        assert np.abs(codes - np.array(colorimetry.to_yuv(color, "bt601", False, 8))).max() <= 1


@pytest.mark.parametrize("target", TARGETS[:-1])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_an_existing_file_untouched(tmp_path: Path, target: str, error: type[BaseException]) -> None:
    (tmp_path / target).write_bytes(b"precious")
    writer = VideoWriter(tmp_path / target, 25, (48, 64))

    def fail_midway() -> None:
        with writer:
            writer.write(noise(3))
            assert len(names(tmp_path)) == 2
            raise error

    with pytest.raises(error):
        fail_midway()
    assert names(tmp_path) == [target]
    assert (tmp_path / target).read_bytes() == b"precious"
    with pytest.raises(ValueError, match="is closed"):
        writer.write(noise(1))
    writer.close()
    assert (tmp_path / target).read_bytes() == b"precious"

    write_frames(tmp_path / target, noise(3), 25)
    assert load_video(tmp_path / target).shape == (3, 48, 64)
    assert names(tmp_path) == [target]


@pytest.mark.parametrize("target", TARGETS)
def test_a_failing_source_leaves_nothing(tmp_path: Path, target: str) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield noise(2)
        raise RuntimeError("the decoder failed")

    with pytest.raises(RuntimeError, match="the decoder failed"):
        write_frames(tmp_path / target, frames(), 25)
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_one_clear_error(tmp_path: Path, target: str) -> None:
    frames = noise(20, 128, 128)
    with files_no_larger_than(20_000), pytest.raises(MediaError, match=f"{target} cannot be written: File too large$"):
        write_frames(tmp_path / target, frames, 25)
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", ["clip.mp4", "clip.mkv"])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, target: str) -> None:
    writer = VideoWriter(tmp_path / target, 25, (48, 64))
    writer.write(noise(1))
    with files_no_larger_than(10), pytest.raises(MediaError, match=f"{target} cannot be written: File too large$"):
        writer.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_write(tmp_path: Path, target: str) -> None:
    with pytest.raises(MediaError, match="there are no frames"):
        write_frames(tmp_path / target, [], 25)
    with pytest.raises(MediaError, match="there are no frames"), VideoWriter(tmp_path / target, 25, (4, 6)):
        pass
    assert names(tmp_path) == []


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    for path, message in (
        (tmp_path / "missing" / "clip.mp4", "there is no folder"),
        (tmp_path / "missing" / "frames", "there is no folder"),
        (tmp_path / "file.txt" / "clip.npy", "there is no folder"),
        (tmp_path / "clip.avi", "must end in .*mp4.*, got .avi"),
        (tmp_path / "file.txt", "must end in"),
        (f"{tmp_path}/file.txt/", "exists and is not a folder"),
    ):
        with pytest.raises(MediaError, match=message):
            VideoWriter(path, 25, (48, 64))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(MediaError, match="is not a regular file"):
        VideoWriter(tmp_path / "pipe.npy", 25, (48, 64))
    assert names(tmp_path) == ["file.txt", "pipe.npy"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody may create files")
@pytest.mark.parametrize("target", TARGETS)
def test_an_unwritable_folder(target: str) -> None:
    with pytest.raises(MediaError, match=f"/proc/{target} cannot be written"):
        VideoWriter(f"/proc/{target}", 25, (48, 64))


def test_existing_files_may_be_kept(tmp_path: Path) -> None:
    (tmp_path / "clip.npy").write_bytes(b"precious")
    with pytest.raises(MediaError, match="exists already"):
        VideoWriter(tmp_path / "clip.npy", 25, (4, 6), overwrite=False)
    write_frames(tmp_path / "clip.npy", noise(1), 25, overwrite=True)
    assert names(tmp_path) == ["clip.npy"]
    assert np.array_equal(np.load(tmp_path / "clip.npy"), noise(1))


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.npy").symlink_to(tmp_path / "clip.npy")
    write_frames(tmp_path / "link.npy", noise(1), 25)
    assert (tmp_path / "link.npy").is_symlink()
    assert np.array_equal(np.load(tmp_path / "clip.npy"), noise(1))


def test_a_folder_that_exists_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be where somebody works, or a mount point, which cannot be replaced."""
    folder = tmp_path / "frames"
    folder.mkdir()
    before = folder.stat().st_ino
    monkeypatch.chdir(folder)
    tmp_path.chmod(0o555)  # nothing is written beside it
    try:
        write_frames(".", noise(3), 25)
    finally:
        tmp_path.chmod(0o755)
    assert folder.stat().st_ino == before
    assert names(folder) == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    assert np.array_equal(load_video(".").frames.numpy(), noise(3))
    with VideoWriter(tmp_path / "new", 25, (48, 64)) as writer:
        writer.write(noise(1))
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["frames", "new"]


def test_folders_are_never_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    write_frames(folder, noise(3), 25)
    (folder / "notes.txt").write_text("mine")
    for overwrite in (None, False):
        with pytest.raises(MediaError, match="a folder that is not empty"):
            write_frames(folder, noise(2), 25, overwrite=overwrite)
    with pytest.raises(ValueError, match="frames must be"):
        write_frames(folder, [255 - noise(1), noise(1, 8, 8)], 25, overwrite=True)
    assert np.array_equal(load_video(folder).frames.numpy(), noise(3))

    write_frames(folder, 255 - noise(2), 25, overwrite=True)
    assert names(folder) == ["frame_00000.png", "frame_00001.png", "notes.txt"]
    assert np.array_equal(load_video(folder).frames.numpy(), 255 - noise(2))
    assert names(tmp_path) == ["frames"]


def test_rejects_arguments(tmp_path: Path) -> None:
    for arguments, message in (
        ({"fps": 0}, "fps must be positive"),
        ({"fps": float("nan")}, "fps must be positive"),
        ({"size": (0, 4)}, "size must be"),
        ({"crf": 52}, "crf must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoWriter(tmp_path / "clip.mp4", **{"fps": 25, "size": (4, 6), **arguments})
    rate = Fraction(2_000_001)  # which a .hflf file may state
    with pytest.raises(ValueError, match="fps must be positive, from"):
        VideoWriter(tmp_path / "clip.mp4", rate, (4, 6))
    assert not (tmp_path / "clip.mp4").exists()
    write_frames(tmp_path / "fast.npy", noise(2), rate)
    assert np.array_equal(np.load(tmp_path / "fast.npy"), noise(2))
    with VideoWriter(tmp_path / "clip.npy", 25, (48, 64)) as writer:
        with pytest.raises(ValueError, match=r"frames must be \[n, 48, 64, 3\], got \[2, 64, 48, 3\]"):
            writer.write(noise(2, 64, 48))
        with pytest.raises(TypeError, match="uint8"):
            writer.write(noise(2).astype(np.float32))  # type: ignore[arg-type]
        writer.write(noise(2))
    assert np.array_equal(np.load(tmp_path / "clip.npy"), noise(2))
