from __future__ import annotations

import hashlib
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from hflfnerv.data import Video, count_frames, load_video, probe_video, reader, write_frames
from hflfnerv.errors import MediaError


def staircase(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """RGB frames whose first sample is their number."""
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = np.arange(count)
    return frames


def noise(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(16, 236, (count, height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, write_rgb_clip: Any) -> Path:
    return write_rgb_clip(tmp_path_factory.mktemp("clip") / "stairs.mov", staircase(12))


def test_frames_arrive_whole_and_in_order(clip: Path) -> None:
    video = load_video(clip)
    assert isinstance(video, Video)
    assert (len(video), video.shape, video.name, video.fps) == (12, (12, 32, 48), "stairs", Fraction(25))
    assert video.sample_aspect_ratio == 1
    assert video.frames.dtype == torch.uint8
    assert video.frames.is_contiguous()
    assert np.array_equal(video.frames.numpy(), staircase(12))


def test_presentation_order_is_not_decoding_order(tmp_path: Path, write_grey_clip: Any) -> None:
    luma = np.repeat(np.arange(20, 220, 10, dtype=np.uint8), 64 * 64).reshape(20, 64, 64)
    options = {"bf": "3", "b-adapt": "0", "crf": "1"}
    video = load_video(write_grey_clip(tmp_path / "clip.mp4", luma, options=options))
    means = video.frames.float().mean(dim=(1, 2, 3))
    assert len(means) == 20
    assert (means.diff() > 5).all()


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ("0:4", range(4)),
        ((3, None), range(3, 12)),
        (slice(None, 2), range(2)),
        ("5:100", range(5, 12)),
        ("-4:-1", range(8, 11)),
        ("2:-8", range(2, 4)),
        ("-100:2", range(2)),
        (None, range(12)),
    ],
)
def test_frames_select_like_slices(clip: Path, frames: Any, expected: range) -> None:
    assert load_video(clip, frames=frames).frames[:, 0, 0, 0].tolist() == list(expected)
    array = load_video(staircase(12), frames=frames)
    assert array.frames[:, 0, 0, 0].tolist() == list(expected)


@pytest.mark.parametrize("frames", ["4:4", "7:3", "12:", "-3:-5", "-3:2", ":-12", "100:200"])
def test_an_empty_selection_is_refused(clip: Path, frames: str) -> None:
    for source in (clip, staircase(12)):
        with pytest.raises(MediaError, match=f"--frames {frames} selects no frame of .*, which has 12 frames"):
            load_video(source, frames=frames)


def test_decoding_stops_after_the_selection(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = reader._decode

    def counting(*args: Any) -> Any:
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(reader, "_decode", counting)
    load_video(clip, frames="1:3")
    # One for the description, then frames 0, 1, 2.
    assert len(decoded) == 1 + 3


def test_resize_then_crop(clip: Path) -> None:
    whole = load_video(clip)
    both = load_video(clip, frames="2:", resize=(16, 16), crop=(8, 10))
    assert (both.source_size, both.first_frame) == ((32, 48), 2)
    assert (both.resize, both.crop) == ((16, 16), (4, 3, 8, 10))
    assert both.shape == (10, 8, 10)
    assert both.frames.is_contiguous()
    from_array = load_video(whole.frames, frames="-10:", resize=(16, 16), crop=(8, 10))
    assert (from_array.source_size, from_array.first_frame) == ((32, 48), 2)
    assert torch.equal(both.frames, from_array.frames)
    assert torch.equal(load_video(clip, crop=(8, 10)).frames, whole.frames[:, 12:20, 19:29])
    # The shown shape stays 32:48 after a resize to 16x16, as with FFmpeg's scale filter.
    assert both.sample_aspect_ratio == Fraction(48, 32)
    with pytest.raises(ValueError, match="crop must be at least 1x1 and fit into the frames of 16x16"):
        load_video(clip, resize=(16, 16), crop=(17, 10))
    with pytest.raises(ValueError, match="resize must be"):
        load_video(clip, resize=(0, 10))


@pytest.mark.parametrize("shape", [(1, 32, 48), (1, 17, 31), (3, 17, 31), (2, 1, 1)])
def test_small_and_odd_videos(tmp_path: Path, write_rgb_clip: Any, shape: tuple[int, int, int]) -> None:
    frames = staircase(*shape)
    video = load_video(write_rgb_clip(tmp_path / "clip.mov", frames))
    assert np.array_equal(video.frames.numpy(), frames)


def test_frames_are_counted(tmp_path: Path, write_rgb_clip: Any) -> None:
    assert count_frames(write_rgb_clip(tmp_path / "clip.mov", staircase(4))) == count_frames(staircase(4)) == 4


def test_frame_rates(tmp_path: Path, write_rgb_clip: Any, write_grey_clip: Any) -> None:
    ntsc = Fraction(30000, 1001)
    path = write_rgb_clip(tmp_path / "ntsc.mov", staircase(4), fps=ntsc)
    assert load_video(path).fps == ntsc
    assert load_video(path, fps=12.5).fps == Fraction(25, 2)
    assert load_video(staircase(2), fps=ntsc).fps == ntsc
    # One frame an hour; what it means is not for a default to say.
    assert load_video(staircase(2), fps=1 / 3600).fps == load_video(path, fps="1/3600").fps == Fraction(1, 3600)
    with pytest.raises(ValueError, match="fps must be positive"):
        load_video(path, fps=0)
    # 1 s at 10 frames per second, then 1 s at 20.
    pts = [*range(0, 100, 10), *range(100, 200, 5)]
    options = {"fps": 100, "pts": pts, "time_base": Fraction(1, 100), "options": {"bf": "0"}}
    path = write_grey_clip(tmp_path / "variable.mp4", noise(30), **options)
    video = load_video(path)
    assert len(video) == 30
    assert isinstance(video.fps, Fraction)
    # The last frame has no successor to end it: it lasts between one tick and the longest interval.
    assert Fraction(30 * 100, 195 + 10) <= video.fps <= Fraction(30 * 100, 195 + 1)


def test_sample_aspect_ratio(tmp_path: Path, write_rgb_clip: Any) -> None:
    path = write_rgb_clip(tmp_path / "clip.mov", staircase(2), sample_aspect_ratio=Fraction(16, 11))
    assert load_video(path).sample_aspect_ratio == Fraction(16, 11)
    path = write_rgb_clip(tmp_path / "odd.mov", staircase(1), sample_aspect_ratio=Fraction(65521, 65519))
    exact = Fraction(65521, 65519) * Fraction(48 * 16001, 2 * 32)
    found = load_video(path, resize=(16001, 2)).sample_aspect_ratio
    # A coded video holds terms of 31 bits.
    assert max(exact.numerator, exact.denominator) >= 2**31 > max(found.numerator, found.denominator)
    assert found == pytest.approx(exact, rel=1e-9)


def test_probe_reads_one_frame(clip: Path, tmp_path: Path, write_grey_clip: Any) -> None:
    info = probe_video(clip)
    assert (info.name, info.height, info.width, info.num_frames, info.fps) == ("stairs", 32, 48, 12, 25)
    stream = write_grey_clip(tmp_path / "raw.h264", noise(4), format="h264")
    assert probe_video(stream).num_frames is None


def test_arrays(tmp_path: Path) -> None:
    frames = staircase(4)
    video = load_video(frames)
    assert video.frames.data_ptr() == frames.ctypes.data
    assert np.array_equal(load_video(torch.from_numpy(frames)).frames.numpy(), frames)
    assert np.array_equal(load_video(frames[::-1]).frames.numpy(), frames[::-1])
    frozen = frames.copy()
    frozen.flags.writeable = False
    assert np.array_equal(load_video(frozen).frames.numpy(), frames)
    np.save(tmp_path / "clip.npy", frames)
    stored = load_video(tmp_path / "clip.npy", frames="1:3")
    assert np.array_equal(stored.frames.numpy(), frames[1:3])
    assert stored.name == "clip"

    with pytest.raises(TypeError, match="frames must be uint8, got float32"):
        load_video(frames.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\]"):
        load_video(frames[0])
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\]"):
        load_video(frames[:0])
    with pytest.raises(TypeError, match="source must be a path"):
        load_video(7)  # type: ignore[arg-type]
    np.save(tmp_path / "bad.npy", frames.astype(np.int32))
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    for name in ("bad", "code"):
        with pytest.raises(MediaError, match=r"is not a \.npy file of uint8 frames"):
            load_video(tmp_path / f"{name}.npy")


def test_a_clip_that_does_not_fit_is_refused_before_decoding(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = 12 * 32 * 48 * 3
    assert len(load_video(clip, max_bytes=need)) == 12
    message = r"12 frames of 32x48 of stairs need 54\.0 KiB of memory, but the limit is 54\.0 KiB.*--frames.*--resize"
    with pytest.raises(MediaError, match=message):
        load_video(clip, max_bytes=need - 1)
    assert len(load_video(clip, max_bytes=need - 1, frames=":11")) == 11
    assert len(load_video(clip, max_bytes=need - 1, resize=(16, 24))) == 12

    class Memory:
        available = need

    monkeypatch.setattr(reader.psutil, "virtual_memory", lambda: Memory)
    with pytest.raises(MediaError, match=r"but 54\.0 KiB are free, of which 80% may be used"):
        load_video(clip)


def test_a_clip_of_unknown_length_is_refused_while_it_grows(
    tmp_path: Path, write_grey_clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_grey_clip(tmp_path / "raw.h264", noise(20), format="h264")
    frame_bytes = 64 * 64 * 3
    monkeypatch.setattr(reader, "_GROWTH_BYTES", 3 * frame_bytes)
    video = load_video(path)
    assert video.shape == (20, 64, 64)
    assert video.fps == 25
    assert torch.equal(load_video(path, max_bytes=20 * frame_bytes).frames, video.frames)
    assert len(load_video(path, frames=":1000000000")) == 20
    with pytest.raises(MediaError, match="20 frames of 64x64 of raw and more need at least"):
        load_video(path, max_bytes=20 * frame_bytes - 1)
    with pytest.raises(MediaError, match=r"selects no frame of raw$"):
        load_video(path, frames="20:")


@pytest.mark.parametrize("suffix", ["mp4", "h264"])
def test_frames_are_in_memory_once(
    tmp_path: Path, write_grey_clip: Any, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = write_grey_clip(tmp_path / f"clip.{suffix}", noise(48, 128, 128), format=suffix)
    frame_bytes = 128 * 128 * 3
    monkeypatch.setattr(reader, "_GROWTH_BYTES", 3 * frame_bytes)
    tracemalloc.start()
    try:
        assert len(load_video(path)) == 48
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The frames, the growth of an eighth, and a few single frames on their way.
    assert 48 * frame_bytes <= peak <= 60 * frame_bytes


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_video(tmp_path / "missing.mp4")
    for name, content in (("empty.mp4", b""), ("text.mp4", b"text\n" * 99), ("noise.mp4", noise(2).tobytes())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=f"{name} is not a video that can be read"):
            load_video(tmp_path / name)
    # FFmpeg would render it.
    (tmp_path / "readme.txt").write_text("text\n" * 99)
    with pytest.raises(MediaError, match=r"readme\.txt is not a video"):
        load_video(tmp_path / "readme.txt")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(MediaError, match="has no video stream"):
        load_video(tmp_path / "sound.wav")
    with pytest.raises(MediaError, match="neither a regular file nor a folder"):
        load_video("/dev/null")


def test_a_name_is_not_a_protocol(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a:b %d.mov").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(load_video("a:b %d.mov")) == 12


def test_a_playlist_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(MediaError):
        load_video(tmp_path / "list.m3u8")


def test_a_video_stream_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "nothing.y4m"
    path.write_bytes(b"YUV4MPEG2 W32 H32 F25:1 C420\n")
    with pytest.raises(MediaError, match="no frame of it can be decoded"):
        load_video(path)


def test_changing_size_is_refused(tmp_path: Path, write_grey_clip: Any) -> None:
    first = write_grey_clip(tmp_path / "1.h264", noise(3), format="h264").read_bytes()
    second = write_grey_clip(tmp_path / "2.h264", noise(3, 48, 64), format="h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(first + second)
    with pytest.raises(MediaError, match="frame 3 is 48x64, the frames before it are 64x64"):
        load_video(tmp_path / "both.h264")


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory, write_grey_clip: Any) -> Path:
    """Twelve frames, each coded on its own, with the index in front of them."""
    path = tmp_path_factory.mktemp("mp4") / "whole.mp4"
    return write_grey_clip(path, noise(12), options={"g": "1"}, container_options={"movflags": "faststart"})


def packets(path: Path) -> list[tuple[int, int]]:
    with av.open(str(path)) as container:
        return [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]


def test_damage_in_the_middle_is_reported(tmp_path: Path, mp4: Path) -> None:
    content = bytearray(mp4.read_bytes())
    position, size = packets(mp4)[6]
    # The first slice of the packet is real, its coded samples are not.
    content[position + size // 2 : position + size] = bytes(size - size // 2)
    (tmp_path / "damaged.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"damaged\.mp4 is damaged (at|near) frame \d+"):
        load_video(tmp_path / "damaged.mp4")


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_cut_file_is_reported(tmp_path: Path, mp4: Path, kept: float) -> None:
    position, size = packets(mp4)[6]
    (tmp_path / "cut.mp4").write_bytes(mp4.read_bytes()[: position + int(kept * size)])
    with pytest.raises(MediaError, match=r"cut\.mp4 is (damaged|cut off) near frame \d+"):
        load_video(tmp_path / "cut.mp4")
    assert len(load_video(mp4)) == 12


@pytest.fixture(scope="module")
def matroska(tmp_path_factory: pytest.TempPathFactory, write_grey_clip: Any) -> Path:
    path = tmp_path_factory.mktemp("mkv") / "whole.mkv"
    return write_grey_clip(path, noise(12), options={"g": "1"}, format="matroska")


@pytest.mark.parametrize("kept", [0.4, 0.75, 0.999])
def test_a_cut_matroska_file_is_reported(tmp_path: Path, matroska: Path, kept: float) -> None:
    content = matroska.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(MediaError, match=rf"cut\.mkv is (cut off .* have {len(content)} bytes and has|damaged near)"):
        load_video(tmp_path / "cut.mkv")
    assert len(load_video(tmp_path / "cut.mkv", frames=":2")) == 2
    assert len(load_video(matroska)) == 12


def test_matroska_without_a_stated_size_is_read(tmp_path: Path, write_grey_clip: Any) -> None:
    """As live streams are written: nothing tells where they end."""
    path = write_grey_clip(tmp_path / "live.mkv", noise(4), format="matroska", container_options={"live": "1"})
    assert len(load_video(path)) == 4


def test_a_video_may_be_shorter_than_its_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("ffv1", rate=25), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt, sound.layout = 32, 32, "yuv420p", "mono"
        frames = [av.VideoFrame.from_ndarray(frame, "rgb24") for frame in staircase(3, 32, 32)]
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), "s16", "mono")
        samples.sample_rate = 8000
        for stream, given in ((video, frames), (sound, [samples])):
            for frame in (*given, None):
                container.mux(stream.encode(frame))
    assert len(load_video(path)) == 3


@pytest.mark.parametrize("missing", [1, 3000, 32 * 48 * 3])
def test_a_cut_y4m_file_is_reported(tmp_path: Path, missing: int) -> None:
    write_frames(tmp_path / "whole.y4m", staircase(5), 25)
    content = (tmp_path / "whole.y4m").read_bytes()
    (tmp_path / "cut.y4m").write_bytes(content[:-missing])
    left = 32 * 48 * 3 - missing + len(b"FRAME\n")
    with pytest.raises(MediaError, match=rf"cut\.y4m is cut off in frame 4, of which it has {left} bytes"):
        load_video(tmp_path / "cut.y4m")
    assert len(load_video(tmp_path / "cut.y4m", frames=":4")) == 4
    assert len(load_video(tmp_path / "whole.y4m")) == 5


# SHA-256 of the RGB samples of the published PNGs 0001, 0002, 0066 and 0132 of "Bunny".
BUNNY = {
    0: "11c11336300727897e62a84dc4273391a16dd32039c863b947f10b74f5897802",
    1: "62ae192f9280c8d1d7d8997285f7acc544c85d0c44f79193e83dac65e88ddc14",
    65: "66a166ad458e2733901bd3bc16beaee2e8fff3b84cc2d2336a6ea242a429f0fa",
    131: "fdbb028604488a72751766ec8eba01dbfac27bcd719bd6a7a894975de825fb89",
}


@pytest.mark.shared_data
def test_bunny_is_bit_exact(shared_data: Path) -> None:
    for index, digest in BUNNY.items():
        video = load_video(shared_data / "bunny.mp4", frames=(index, index + 1))
        assert video.shape == (1, 720, 1280)
        assert hashlib.sha256(video.frames.numpy().tobytes()).hexdigest() == digest
    info = probe_video(shared_data / "bunny.mp4")
    assert (info.num_frames, info.fps) == (132, 25)
    assert (info.color.matrix, info.color.range, info.color.matrix_tagged) == ("bt601", "limited", False)


@pytest.mark.shared_data
def test_davis_is_a_folder_of_images(shared_data: Path) -> None:
    video = load_video(shared_data / "davis480p" / "soapbox", frames="0:2", resize=(160, 320))
    assert (video.name, video.shape) == ("soapbox", (2, 160, 320))
