from __future__ import annotations

import numpy as np
import pytest

from hflfnerv import Decoder, EncodeConfig, encode
from hflfnerv.codec import bjontegaard, conventional_point, file_point, mean_points, plot_points
from hflfnerv.data import CONVENTIONAL_CODECS, Video, load_video
from hflfnerv.metrics import bits_per_pixel, psnr


def row(implementation: str, clip: str, setting: str, rate: float, quality: float, ssim: float | None = 0.9) -> dict:
    point = {"implementation": implementation, "clip": clip, "setting": setting}
    return point | {"bits_per_pixel": rate, "psnr_db": quality, "ms_ssim": ssim}


def test_a_conventional_point(moving_frames) -> None:
    codec = CONVENTIONAL_CODECS["x265"]
    if codec.unavailable() is not None:
        pytest.skip(codec.unavailable())
    point = conventional_point(load_video(moving_frames), codec, crf=30, preset="fast")
    assert point["implementation"] == "x265 fast"
    assert point["setting"] == "CRF 30"
    assert point["shape"] == list(moving_frames.shape)
    assert point["bits_per_pixel"] == bits_per_pixel(point["bytes"], moving_frames.shape)
    assert point["settings"]["matrix"] == "bt709"  # of RGB frames
    assert point["ms_ssim"] is None  # too small
    assert 15 < point["psnr_db"] < 40


def test_a_file_point(moving_frames) -> None:
    result = encode(moving_frames, EncodeConfig(size="60k", epochs=2))
    decoder = Decoder(result.bitstream)
    point = file_point(load_video(moving_frames), decoder, setting="60k")
    assert point["implementation"] == "hflf best"
    assert point["bytes"] == len(result.bitstream)
    assert point["bits_per_pixel"] == result.report["bits_per_pixel"]
    assert point["psnr_db"] == pytest.approx(float(psnr(decoder[:], moving_frames).mean()), abs=1e-12)
    assert point["settings"]["parameters"] == result.report["parameters"]["total"]
    with pytest.raises(ValueError, match="decoded shape"):
        file_point(Video(load_video(moving_frames[:3]).frames), decoder, setting="60k")


def test_a_file_point_is_of_the_frames_that_were_coded(moving_frames) -> None:
    chosen = {"frames": (0, 3), "resize": (64, 96), "crop": (32, 64)}
    decoder = Decoder(encode(moving_frames, EncodeConfig(size="60k", epochs=1, **chosen)).bitstream)
    point = file_point(load_video(moving_frames, **chosen), decoder, setting="60k")
    for other in ({"frames": (3, 6)}, {"resize": (48, 80)}, {"resize": None}):
        with pytest.raises(ValueError, match=r"video must be what the file was made of \(frames from 0, .* got"):
            file_point(load_video(moving_frames, **{**chosen, **other}), decoder, setting="60k")
    # Prepared by other means, it has another size, and is taken as it is.
    prepared = load_video(load_video(moving_frames, **chosen).frames)
    assert file_point(prepared, decoder, setting="60k")["psnr_db"] == point["psnr_db"]


def test_means_are_over_clips_that_have_the_point() -> None:
    rows = [row("x265", "a", "28", 0.1, 30), row("x265", "b", "28", 0.3, 36), row("x265", "a", "32", 0.05, 28)]
    rows.append(row("hflf", "a", "1M", 0.2, 31, None))
    rows.append(row("hflf", "b", "1M", 0.4, 33))
    means = mean_points(rows)
    assert [(m["implementation"], m["setting"], m["clips"]) for m in means] == [("x265", "28", 2), ("hflf", "1M", 2)]
    assert means[0]["bits_per_pixel"] == pytest.approx(0.2)
    assert means[0]["psnr_db"] == pytest.approx(33)
    assert means[0]["ms_ssim"] == pytest.approx(0.9)
    assert means[1]["ms_ssim"] is None


def test_bjontegaard_against_an_anchor() -> None:
    rates, qualities = (0.05, 0.1, 0.2, 0.4), (28.0, 31.0, 34.0, 37.0)
    points = [row("x265", "a", str(i), *values) for i, values in enumerate(zip(rates, qualities, strict=True))]
    points += [row("half", "a", str(i), r / 2, q) for i, (r, q) in enumerate(zip(rates, qualities, strict=True))]
    points += [row("far", "a", str(i), r, q - 20) for i, (r, q) in enumerate(zip(rates, qualities, strict=True))]
    half, far = bjontegaard(points, "x265")
    assert (half["implementation"], half["anchor"]) == ("half", "x265")
    assert half["bd_rate_percent"] == pytest.approx(-50)
    assert half["bd_psnr_db"] > 0
    assert "unavailable" not in half
    assert far["bd_rate_percent"] is None
    assert far["bd_psnr_db"] == pytest.approx(-20)
    assert "must overlap in quality" in far["unavailable"]
    points[1]["psnr_db"] = 20.0  # which is an obstacle to both figures
    (reason,) = {delta["unavailable"] for delta in bjontegaard(points, "x265")}
    assert reason.count("anchor must rise in quality") == 1
    with pytest.raises(ValueError, match="anchor must be one of x265, half, far, got 'vvc'"):
        bjontegaard(points, "vvc")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, suffix) -> None:
    pytest.importorskip("matplotlib")
    points = [row("x265", "a", str(i), 0.1 * 2**i, 28 + 3 * i) for i in range(4)]
    points += [row("paper-hflf", "a", "1M", 0.1, 27)]
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        plot_points(points, path, title="a clip")
    assert first.read_bytes() == second.read_bytes()
    if suffix == "svg":
        assert "<svg" in first.read_text()
    else:
        from PIL import Image

        with Image.open(first) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
