"""The reproduction on a tiny profile: run, interrupted, gone on with, and reported; and the committed results."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from bench import report, reproduce
from hflfnerv import Decoder
from hflfnerv.data import write_frames
from hflfnerv.metrics import lpips_unavailable

ROOT = Path(reproduce.__file__).resolve().parents[1]
PROFILE = """
    description = "Tiny."
    size = "60k"

    [clips]
    folder = "clips"
    names = ["one", "two"]
    frames = "0:4"
    crop = [40, 56]

    [workers]
    processes = 2
    threads = 1

    [figures]
    clip = "one"

    [[encode]]
    networks = ["nerv/paper", "hnerv/paper", "hflf/paper"]
    epochs = 2

    [[encode]]
    networks = ["hnerv/paper", "hflf/paper"]
    clips = ["one"]
    lr = [1e-3, 2e-3]
    epochs = 2

    [[encode]]
    networks = ["hflf/paper"]
    clips = ["one"]
    sizes = ["60k", "90k"]
    epochs = 2

    [codecs.x264]
    preset = "medium"
    crf = [24, 36]
"""


def write_profile(folder: Path, name: str = "tiny", text: str = PROFILE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(textwrap.dedent(text))


def write_clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frames(path, np.zeros((4, 8, 8, 3), np.uint8), fps=25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, moving_frames):
    """Clips, a profile, and its results."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "data" / "clips").mkdir(parents=True)
    write_frames(folder / "data" / "clips" / "one", moving_frames, fps=25)
    write_frames(folder / "data" / "clips" / "two", moving_frames[:, ::-1], fps=25)
    write_profile(folder / "profiles")
    assert run(folder) == 0
    return folder


def run(folder: Path, name: str = "tiny") -> int:
    profile = reproduce.load_profile(name, folder / "profiles")
    return reproduce.run_jobs(profile, folder / "data", folder / "work", folder / "results", "cpu")


def rows_of(folder: Path, name: str = "tiny") -> list[dict]:
    return reproduce.read_rows(reproduce.results_path(name, folder / "results"))


def test_every_job_has_a_row_that_says_everything(folder) -> None:
    rows = rows_of(folder)
    encodes = [row for row in rows if row["what"] == "encode"]
    # 2 clips x 3 networks, 2 more learning rates, 1 more size: what two blocks ask for is done once.
    assert len(encodes) == 2 * 3 + 2 + 1
    assert len(rows) - len(encodes) == 2 * 2
    for row in encodes:
        assert row["shape"] == [4, 40, 56, 3]
        assert row["bits_per_pixel"] == 8 * row["bytes"] / (4 * 40 * 56)
        path = folder / "work" / f"{reproduce.file_stem(row)}.hflf"
        assert row["bytes"] == path.stat().st_size
        blocks = {name: len(stream.strides) for name, stream in Decoder(path).model.spec.streams.items()}
        assert {name: len(cosines) for name, cosines in row["feature_similarity"].items()} == blocks
        assert np.mean(row["per_frame_psnr_db"]) == pytest.approx(row["psnr_db"], abs=1e-3)
        assert len(row["epochs_psnr_db"]) == row["config"]["epochs"] == 2
        assert row["psnr_db_before_quantization"] > 5
        assert row["ms_ssim"] is None
        assert -1 < row["ssim"] < 1
        assert (row["lpips"] is None) == (row["lpips_unscaled"] is None) == (lpips_unavailable() is not None)
        counts = row["parameters"]
        assert counts["total"] == sum(count for name, count in counts.items() if name != "total") > 40_000
        assert row["training_seconds"] > 0
        assert all(-1 <= cosine <= 1 for cosines in row["feature_similarity"].values() for cosine in cosines)
        for name in ("device", "versions", "commit", "dirty", "time", "processes", "threads"):
            assert name in row
    streams = {row["implementation"]: set(row["feature_similarity"]) for row in encodes}
    assert streams == {"nerv/paper": {"decoder"}, "hnerv/paper": {"decoder"}, "hflf/paper": {"hfd", "lfd1", "lfd2"}}
    of_presets = {(r["implementation"], r["config"]["lr"]) for r in encodes if r["preset_settings"]}
    assert of_presets == {("nerv/paper", 1e-3), ("hnerv/paper", 1e-3), ("hflf/paper", 2e-3)}
    assert not list((folder / "work").glob("*.work"))


def test_a_second_run_does_nothing(folder, capfd) -> None:
    before = reproduce.results_path("tiny", folder / "results").read_bytes()
    assert run(folder) == 0
    assert "13 jobs, 13 done before" in capfd.readouterr().err
    assert reproduce.results_path("tiny", folder / "results").read_bytes() == before


def test_what_is_missing_is_done_the_same_way_and_what_fails_is_named(folder, tmp_path, capfd) -> None:
    text = PROFILE.replace("processes = 2", "processes = 1").replace('["60k", "90k"]', '["1k", "60k", "90k"]')
    write_profile(tmp_path / "profiles", text=text)
    path = reproduce.results_path("tiny", tmp_path)
    lines = reproduce.results_path("tiny", folder / "results").read_text().splitlines()
    lost = next(line for line in lines if '"hflf/paper"' in line)
    # A crash while a line was written leaves a part of it.
    path.write_text("\n".join(line for line in lines if line != lost) + "\n" + lost[: len(lost) // 2])
    profile = reproduce.load_profile("tiny", tmp_path / "profiles")
    assert reproduce.run_jobs(profile, folder / "data", tmp_path / "work", tmp_path, "cpu") == 1
    error = capfd.readouterr().err
    assert "ValueError: size must be at least" in error
    assert "1 done, 1 failed" in error
    rows = reproduce.read_rows(path)
    assert len(rows) == len(lines)
    for name in ("clip", "config", "bytes", "psnr_db", "epochs_psnr_db", "feature_similarity"):
        assert rows[-1][name] == json.loads(lost)[name], name


@pytest.mark.slow
def test_interrupted_and_gone_on_with(folder, tmp_path) -> None:
    block = """
    [[encode]]
    networks = ["hflf/paper"]
    clips = ["one"]
    epochs = 60
"""
    text = PROFILE[: PROFILE.index("    [[encode]]")].replace("processes = 2", "processes = 1") + block
    write_profile(tmp_path / "profiles", text=text)
    (tmp_path / "data").symlink_to(folder / "data")
    folders = [f"--{name}={tmp_path / name}" for name in ("profiles", "data", "work", "results")]
    command = [sys.executable, "-m", "bench.reproduce", "run", "tiny", "--device", "cpu", *folders]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    process = start()
    deadline = time.monotonic() + 120
    # The folder of checkpoints is made when training begins.
    while not list((tmp_path / "work").glob("*.work")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "interrupted: the same command goes on from there" in error
    assert rows_of(tmp_path) == []
    assert list((tmp_path / "work").glob("*.work/checkpoint.safetensors"))

    process = start()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    (row,) = rows_of(tmp_path)
    assert len(row["epochs_psnr_db"]) == 60
    assert row["psnr_db"] > 15
    assert not list((tmp_path / "work").glob("*.work"))


def test_tables(folder) -> None:
    profile = reproduce.load_profile("tiny", folder / "profiles")
    results = report.Results(profile, rows_of(folder))
    text = report.block(results)
    of = {(row["implementation"], row["clip"]): row for row in results.table}
    assert len(of) == len(results.table) == 6
    for network in ("nerv/paper", "hnerv/paper", "hflf/paper"):
        mean = np.mean([of[network, clip]["psnr_db"] for clip in ("one", "two")])
        assert any(report.name_of(network) in line and f"| {mean:.2f} |" in line for line in text.splitlines())
    gains = [of["hflf/paper", clip]["psnr_db"] - of["hnerv/paper", clip]["psnr_db"] for clip in ("one", "two")]
    assert f"| {np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f} |" in text
    assert f"{sum(gain > 0 for gain in gains)} of 2" in text
    for title in ("Table I", "Per clip", "Each at its own best", "Road to", "Features of adjacent", "Rate-distortion"):
        assert f"**{title}" in text, title
    rates = {
        network: sorted((values[reproduce.SETTINGS.index("lr")], set(clips)) for values, clips in settings.items())
        for network, settings in results.grid().items()
    }
    assert rates == {network: [(1e-3, {"one"}), (2e-3, {"one"})] for network in ("hnerv/paper", "hflf/paper")}
    clips, points = results.curves()
    assert clips == ["one"]
    assert {(point["implementation"], point["setting"]) for point in points} == {
        ("hflf/paper", "0.06M"),
        ("hflf/paper", "0.09M"),
        ("x264 medium", "CRF 24"),
        ("x264 medium", "CRF 36"),
    }


def test_rows_from_before_a_setting_stand_beside_later_ones(folder) -> None:
    profile = reproduce.load_profile("tiny", folder / "profiles")
    rows = rows_of(folder)
    [row, *_] = [row for row in rows if row.get("implementation") == "hflf/paper" and row["config"]["lr"] == 1e-3]
    later = {**row, "config": {**row["config"], "quantization_share": 0.3}}
    grid = report.Results(profile, [*rows, later]).grid()["hflf/paper"]
    shares = {setting[reproduce.SETTINGS.index("quantization_share")] for setting in grid}
    assert shares == {0.0, 0.3}


def test_seconds_of_several_processors_are_told_apart(folder) -> None:
    profile = reproduce.load_profile("tiny", folder / "profiles")
    rows = rows_of(folder)
    assert "several processors" not in report.block(report.Results(profile, rows))
    moved = [{**row, "device": "another"} if row["implementation"] == "nerv/paper" else row for row in rows]
    text = report.block(report.Results(profile, moved))
    assert text.count("several processors") == 2
    assert re.search(rf"another: {report.name_of('nerv/paper')}[;.]", text)  # in the order in which the jobs ended


def test_the_wall_time_of_what_was_made_in_one_go_is_told(folder) -> None:
    profile = reproduce.load_profile("tiny", folder / "profiles")
    rows = rows_of(folder)
    encodes = [row for row in rows if row["what"] == "encode"]
    at = "2026-01-01T00:{:02}:00+00:00"
    seconds = {"load": 20.0, "train": 100.0}
    timed = [{**row, "time": at.format(2 + i), "seconds": seconds, "commit": "c"} for i, row in enumerate(encodes)]
    in_one_go = report.block(report.Results(profile, timed))
    assert f", {2 + len(encodes) - 1} minutes from start to end." in in_one_go
    timed[0]["commit"] = "another"
    assert "from start to end" not in report.block(report.Results(profile, timed))


def test_rows_of_another_selection_are_left_out(folder, tmp_path) -> None:
    write_profile(tmp_path, text=PROFILE.replace('"0:4"', '"0:3"'))
    profile = reproduce.load_profile("tiny", tmp_path)
    results = report.Results(profile, rows_of(folder))
    assert results.rows == []
    assert report.block(results) == "Tiny. Not run yet: `python -m bench.reproduce run tiny --data DATA`."


def test_figures(folder, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    profile = reproduce.load_profile("tiny", folder / "profiles")
    results = report.Results(profile, rows_of(folder))
    gain, rate = tmp_path / "gain.svg", tmp_path / "rate.svg"
    assert report.draw_gains(results, gain)
    assert report.draw_rates(results, rate)
    assert "<svg" in gain.read_text()
    assert "<svg" in rate.read_text()
    features, frames = tmp_path / "features.jpg", tmp_path / "frames.jpg"
    assert report.draw_features(results, folder / "work", features)
    assert report.draw_frames(results, folder / "data", folder / "work", frames)
    for path in (features, frames):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
    assert not report.draw_features(results, tmp_path / "nowhere", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_report_writes_figures_and_the_document(folder, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "profile_names", lambda: ["tiny"])
    monkeypatch.setattr(report, "load_profile", lambda name: reproduce.load_profile(name, folder / "profiles"))
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    marks = [f"<!-- {name} -->\n\n<!-- /{name} -->\n" for name in ("published", "profile tiny")]
    document = tmp_path / "results.md"
    document.write_text("before\n" + "between\n".join(marks) + "after\n")
    profile = reproduce.load_profile("tiny", folder / "profiles")
    report.write_report(profile, folder / "data", folder / "work", folder / "results", document, tmp_path / "figures")
    text = document.read_text()
    assert text.startswith("before\n<!-- published -->\nDAVIS, ")
    assert text.endswith("<!-- /profile tiny -->\nafter\n")
    assert "| HNeRV | 50, all videos | 30.94 | 0.9160 | 0.2955 |" in text
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["tiny-features.jpg", "tiny-frames.jpg", "tiny-gain.svg", "tiny-rate.svg"]
    assert all(f"](figures/{name})" in text for name in drawn)
    assert report.filled(text, folder / "results") == text
    with pytest.raises(ValueError, match="must have one place marked published, got 0"):
        report.filled("nothing", folder / "results")


@pytest.mark.parametrize(
    ("anchor", "test", "expected"),
    [
        ([(0.5, 22.0), (1.0, 25.0)], [(0.2, 27.0), (0.4, 29.0)], "under -80.0 %"),
        ([(0.2, 27.0), (0.4, 29.0)], [(0.5, 22.0), (1.0, 25.0)], "over +400.0 %"),
        ([(0.5, 22.0), (1.0, 25.0)], [(0.2, 24.0), (0.4, 29.0)], "–"),  # a PSNR in common
        ([(0.5, 22.0), (1.0, 25.0)], [(1.2, 27.0), (1.4, 29.0)], "–"),  # better, but larger too
        ([(0.5, 23.0), (1.0, 22.0)], [(0.4, 24.0)], "under -20.0 %"),
    ],
)
def test_rates_of_curves_without_a_common_quality(anchor, test, expected) -> None:
    assert report.rate_bound(anchor, test) == expected


def test_the_document_is_what_the_results_say() -> None:
    text = report.DOCUMENT.read_text()
    assert report.filled(text) == text


@pytest.mark.parametrize("name", reproduce.profile_names())
def test_profiles_make_jobs(name, tmp_path) -> None:
    profile = reproduce.load_profile(name)
    for clip in profile.clips or ("soapbox",):
        write_clip(tmp_path / profile.folder / clip)
    jobs = profile.jobs(tmp_path, "cpu")
    keys = [json.dumps(job.key, sort_keys=True) for job in jobs]
    assert len(set(keys)) == len(keys)
    assert {reproduce.Encode} <= {type(job) for job in jobs} <= {reproduce.Encode, reproduce.Codec}
    assert profile.figure_clip in {job.clip for job in jobs}
    stems = [reproduce.file_stem(job.key) for job in jobs if isinstance(job, reproduce.Encode)]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize("name", ["cpu", "cpu-grid", "cpu-seeds"])
def test_what_has_rows_is_not_done_again(name, tmp_path) -> None:
    """A new setting must not make the rows from before it another job's: reproduce.BEFORE says what it was then."""
    profile = reproduce.load_profile(name)
    for clip in profile.clips:
        write_clip(tmp_path / profile.folder / clip)
    rows = reproduce.read_rows(reproduce.results_path(name))
    assert [job.title for job in profile.jobs(tmp_path, "cpu") if not reproduce.is_done(job.key, rows)] == []


def test_codecs_of_some_clips(folder, tmp_path) -> None:
    for clips, message in (('["two"]', None), ('["three"]', "clips of a block must be among one, two, got three")):
        write_profile(tmp_path, text=f"{PROFILE}    clips = {clips}\n")
        profile = reproduce.load_profile("tiny", tmp_path)
        if message is None:
            jobs = profile.jobs(folder / "data", "cpu")
            assert {job.clip for job in jobs if isinstance(job, reproduce.Codec)} == {"two"}
        else:
            with pytest.raises(ValueError, match=message):
                profile.jobs(folder / "data", "cpu")


def test_bad_profiles_and_folders(tmp_path, capsys) -> None:
    known = "bunny, cpu, cpu-batches, cpu-grid, cpu-seeds, davis, paper"
    with pytest.raises(FileNotFoundError, match=f"one of {known}, got 'none'"):
        reproduce.load_profile("none")
    write_profile(tmp_path, text=PROFILE.replace('size = "60k"', ""))
    with pytest.raises(ValueError, match="must have 'size'"):
        reproduce.load_profile("tiny", tmp_path)
    write_profile(tmp_path, text=PROFILE.replace("epochs = 2", "epochs = 2\n    speed = 3", 1))
    with pytest.raises(ValueError, match="got speed"):
        reproduce.load_profile("tiny", tmp_path)
    write_profile(tmp_path)
    profile = reproduce.load_profile("tiny", tmp_path)
    with pytest.raises(FileNotFoundError, match="--data must hold the folder 'clips'"):
        profile.jobs(tmp_path, "cpu")
    write_clip(tmp_path / "clips" / "one")
    with pytest.raises(FileNotFoundError, match="got none named two"):
        profile.jobs(tmp_path, "cpu")
    write_clip(tmp_path / "clips" / "two")
    write_profile(tmp_path, text=PROFILE.replace('clips = ["one"]', 'clips = ["three"]'))
    with pytest.raises(ValueError, match="must be among one, two, got three"):
        reproduce.load_profile("tiny", tmp_path).jobs(tmp_path, "cpu")
    assert reproduce.main(["run", "cpu", "--data", str(tmp_path)]) == 1
    assert "--data must hold the folder 'davis480p'" in capsys.readouterr().err
