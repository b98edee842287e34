"""The command line from end to end, on a clip of a few small frames."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from published_checkpoints import published_names

from hflfnerv import Decoder
from hflfnerv.cli import main
from hflfnerv.data import VideoWriter, load_video, write_frames
from hflfnerv.models import MODELS, build_model

SMALL = ["--size", "60k", "--epochs", "3", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, moving_frames):
    """A folder with the clip as images, and its encoding."""
    folder = tmp_path_factory.mktemp("cli")
    write_frames(folder / "images", moving_frames, fps=25)
    assert main(["encode", str(folder / "images"), "-o", str(folder / "clip.hflf"), *SMALL]) == 0
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments, code=1):
    """Run a command that must fail with one clear line, and return that line."""
    assert run(*arguments) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("hflfnerv: error: ")
    assert "\n" not in error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("model", ["hflf", "hnerv", "nerv"])
def test_encode_decode_eval_info(model, folder, tmp_path, moving_frames, capsys):
    coded = tmp_path / "clip.hflf"
    report = tmp_path / "report.json"
    assert run("encode", folder / "images", "-o", coded, "--model", model, "--json", report, *SMALL) == 0
    report = json.loads(report.read_text())
    pixels = np.prod(moving_frames.shape[:3])
    assert report["bytes"] == coded.stat().st_size
    assert report["bits_per_pixel"] == 8 * coded.stat().st_size / pixels
    assert len(report["epochs"]) == 3
    assert not (tmp_path / "clip.hflf.work").exists()

    assert run("decode", coded, "-o", tmp_path / "out.npy", "--precision", "fp32") == 0
    decoded = np.load(tmp_path / "out.npy")
    assert decoded.shape == moving_frames.shape
    mse = ((decoded.astype(float) - moving_frames) ** 2).mean(axis=(1, 2, 3))
    assert report["psnr_db"] == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), abs=1e-9)

    capsys.readouterr()
    assert run("eval", coded, "--reference", folder / "images", "--json") == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["psnr_db"] == pytest.approx(report["psnr_db"], abs=1e-9)
    assert evaluation["bits_per_pixel"] == report["bits_per_pixel"]
    assert len(evaluation["per_frame"]["psnr_db"]) == len(moving_frames)

    assert run("info", coded, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["bits_per_pixel"] == report["bits_per_pixel"]
    assert sum(info["section_bytes"].values()) == info["bytes"] == coded.stat().st_size
    assert info["parameters"] == report["parameters"]
    assert run("info", coded) == 0
    text = capsys.readouterr().out
    assert f"{coded.stat().st_size:,} bytes" in text
    assert info["key_interval"] in (0, 32)
    assert ("whole every 32 frames" in text) == (info["key_interval"] == 32)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.y4m", "out"])
def test_decode_formats(name, folder, tmp_path):
    assert run("decode", folder / "clip.hflf", "-o", tmp_path / name, "--frames", "1:4") == 0
    video = load_video(tmp_path / name)
    expected = Decoder(folder / "clip.hflf")[1:4]
    assert video.frames.shape == expected.shape
    assert video.fps == 25
    difference = video.frames.numpy().astype(float) - expected
    if name == "out":  # PNG
        assert not difference.any()
    elif name == "out.y4m":  # 8-bit YUV 4:4:4: half a level each of Y, Cb and Cr, times at most 1.8
        assert np.abs(difference).max() <= 3
    else:  # 4:2:0 halves the chroma, so look at the luma of BT.709; CRF 12 is visually lossless
        assert np.abs(difference @ [0.2126, 0.7152, 0.0722]).mean() < 2


def test_eval_knows_frames_resize_and_crop(folder, tmp_path, capsys):
    coded = tmp_path / "part.hflf"
    options = ["--frames", "2:5", "--resize", "24x40", "--crop", "17x31"]
    report = tmp_path / "report.json"
    assert run("encode", folder / "images", "-o", coded, "--json", report, *options, *SMALL) == 0
    assert json.loads(report.read_text())["config"]["frames"] == "2:5"
    assert Decoder(coded).shape == (3, 17, 31, 3)
    capsys.readouterr()
    assert run("eval", coded, "--reference", folder / "images", "--json") == 0
    implied = json.loads(capsys.readouterr().out)
    assert run("eval", coded, "--reference", folder / "images", "--json", *options) == 0
    assert json.loads(capsys.readouterr().out) == implied
    assert run("decode", coded, "-o", tmp_path / "frames") == 0
    assert run("eval", coded, "--reference", tmp_path / "frames", "--json") == 0


def test_eval_resizes_and_crops_to_the_size_of_the_source(folder, tmp_path, capsys):
    """The coded size is the source's, the coded frames are not: only the middle of each."""
    coded, report = tmp_path / "middle.hflf", tmp_path / "report.json"
    options = ["--resize", "96x128", "--crop", "48x64"]
    assert run("encode", folder / "images", "-o", coded, "--json", report, *options, *SMALL) == 0
    capsys.readouterr()
    assert run("eval", coded, "--reference", folder / "images", "--json") == 0
    psnr_db = json.loads(capsys.readouterr().out)["psnr_db"]
    assert psnr_db == pytest.approx(json.loads(report.read_text())["psnr_db"], abs=1e-9)


def test_encode_weighs_the_rate(folder, tmp_path, capsys):
    sizes = {}
    for weight in ("0", "0.2", "2"):
        report = tmp_path / f"{weight}.json"
        options = ["--rate-weight", weight, "--quantization-share", "0.4", "--json", report]
        assert run("encode", folder / "images", "-o", tmp_path / "clip.hflf", *options, *SMALL) == 0
        config = json.loads(report.read_text())["config"]
        assert (config["rate_weight"], config["quantization_share"]) == (float(weight), 0.4)
        sizes[weight] = (tmp_path / "clip.hflf").stat().st_size
    assert sizes["0"] > sizes["0.2"] >= sizes["2"]
    for option, value, rule in (
        ("--rate-weight", "-1", "rate_weight must be at least 0, got -1.0"),
        ("--quantization-share", "2", "quantization_share must be in [0, 1], got 2.0"),
    ):
        error = fails(capsys, "encode", folder / "images", "-o", tmp_path / "x.hflf", option, value, *SMALL)
        assert rule in error
        assert not (tmp_path / "x.hflf").exists()


def test_decode_in_a_fresh_process_without_the_original(folder, tmp_path):
    command = [sys.executable, "-m", "hflfnerv", "decode", folder / "clip.hflf", "-o", tmp_path / "out.npy"]
    subprocess.run([str(part) for part in command], check=True, cwd=tmp_path, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "out.npy"), Decoder(folder / "clip.hflf")[:])


def test_one_frame_and_tiny_frames(tmp_path, moving_frames):
    for name, frames in (("one", moving_frames[:1]), ("tiny", moving_frames[:, :17, :31])):
        write_frames(tmp_path / f"{name}.mkv", frames, fps=30)
        assert run("encode", tmp_path / f"{name}.mkv", "-o", tmp_path / f"{name}.hflf", *SMALL) == 0
        decoder = Decoder(tmp_path / f"{name}.hflf")
        assert decoder.shape == frames.shape
        assert decoder.fps == 30


def test_ctrl_c_then_the_same_command_gives_the_same_file(folder, tmp_path):
    def command(output):
        options = ["--size", "60k", "--epochs", "40", "--checkpoint-seconds", "0", "--quiet"]
        return [sys.executable, "-m", "hflfnerv", "encode", str(folder / "images"), "-o", str(output), *options]

    whole, broken = tmp_path / "whole.hflf", tmp_path / "broken.hflf"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), check=True, env=environment)
    process = subprocess.Popen(command(broken), stderr=subprocess.PIPE, text=True, env=environment)
    work = tmp_path / "broken.hflf.work"
    deadline = time.monotonic() + 60
    while not (work / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "the same command goes on from there" in error
    assert not broken.exists()
    subprocess.run(command(broken), check=True, env=environment)
    assert broken.read_bytes() == whole.read_bytes()
    assert not work.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_decode_that_is_stopped_leaves_nothing(folder, tmp_path, number, code):
    slow = (
        "import sys, time\n"
        "from hflfnerv.cli import main\n"
        "from hflfnerv.data import VideoWriter\n"
        "write = VideoWriter.write\n"
        "VideoWriter.write = lambda self, frames: (write(self, frames), time.sleep(60))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", slow, "decode", folder / "clip.hflf", "-o", tmp_path / "out.y4m"]
    # Tests that were started in the background ignore Ctrl-C, and so would the command.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input(folder, tmp_path, capsys):
    out = tmp_path / "out.hflf"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    write_frames(tmp_path / "mixed", np.zeros((1, 8, 8, 3), np.uint8), fps=25)
    write_frames(tmp_path / "mixed2", np.zeros((1, 8, 9, 3), np.uint8), fps=25)
    (tmp_path / "mixed2" / "frame_00000.png").rename(tmp_path / "mixed" / "frame_00001.png")
    write_frames(tmp_path / "other", np.zeros((6, 8, 8, 3), np.uint8), fps=25)
    images = folder / "images"

    def encode(*arguments):
        return fails(capsys, "encode", *SMALL, *arguments)

    assert "missing.mp4" in encode(tmp_path / "missing.mp4", "-o", out)
    assert "empty" in encode(tmp_path / "empty", "-o", out)
    assert "text.mp4" in encode(tmp_path / "text.mp4", "-o", out)
    assert "8x9" in encode(tmp_path / "mixed", "-o", out)
    assert "size must be at least" in encode(images, "-o", out, "--size", "1k")
    assert "crop" in encode(images, "-o", out, "--crop", "64x64")
    assert "frames" in encode(images, "-o", out, "--frames", "9:12")
    assert "epochs must be at least 1" in encode(images, "-o", out, "--epochs", "0")
    assert "no/such/folder" in encode(images, "-o", tmp_path / "no/such/folder/out.hflf")
    assert str(tmp_path) in encode(images, "-o", tmp_path)
    assert "cuda" in encode(images, "-o", out, "--device", "cuda:99")
    assert "missing.hflf" in fails(capsys, "decode", tmp_path / "missing.hflf", "-o", tmp_path / "o.mp4")
    assert "--frames" in fails(capsys, "decode", folder / "clip.hflf", "-o", tmp_path / "o.mp4", "--frames", "6:")
    assert ".xyz" in fails(capsys, "decode", folder / "clip.hflf", "-o", tmp_path / "o.xyz")
    fails(capsys, "info", tmp_path / "text.mp4")
    fails(capsys, "decode", tmp_path / "text.mp4", "-o", tmp_path / "o.mp4")
    assert "decoded shape" in fails(capsys, "eval", folder / "clip.hflf", "--reference", tmp_path / "other")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"empty", "text.mp4", "mixed", "mixed2", "other"}


def test_a_frame_rate_can_be_given(folder, tmp_path, capsys):
    coded = tmp_path / "clip.hflf"
    assert run("encode", folder / "images", "-o", coded, "--fps", "24000/1001", *SMALL) == 0
    assert Decoder(coded).fps == Fraction(24000, 1001)
    assert run("encode", folder / "images", "-o", coded, "--fps", "1/3600", *SMALL) == 0
    assert Decoder(coded).fps == Fraction(1, 3600)
    for command in (["encode", "images", "-o", "x.hflf"], ["import", "x.pth", "-o", "x.hflf"], ["rd", "images"]):
        with pytest.raises(SystemExit):
            run(*command, "--fps", "inf")
        assert "argument --fps: fps must be positive" in capsys.readouterr().err


@pytest.fixture
def untagged(tmp_path, moving_frames):
    """The clip as a video that does not state its matrix."""
    path = tmp_path / "untagged.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for planes in moving_frames.transpose(0, 3, 1, 2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")))
        container.mux(stream.encode(None))
    return path


def test_the_matrix_of_an_untagged_clip_is_kept_with_the_file(untagged, tmp_path, capsys):
    coded, report = tmp_path / "untagged.hflf", tmp_path / "report.json"
    assert run("encode", untagged, "-o", coded, "--untagged-matrix", "bt709", "--json", report, *SMALL) == 0
    made = json.loads(report.read_text())
    assert made["config"]["untagged_matrix"] == "bt709"
    assert Decoder(coded).header.color.matrix == "bt709"
    capsys.readouterr()
    assert run("eval", coded, "--reference", untagged, "--json") == 0
    assert json.loads(capsys.readouterr().out)["psnr_db"] == pytest.approx(made["psnr_db"], abs=1e-9)
    assert run("eval", coded, "--reference", untagged, "--json", "--untagged-matrix", "bt601") == 0
    assert json.loads(capsys.readouterr().out)["psnr_db"] != pytest.approx(made["psnr_db"], abs=1e-3)
    files = ["--hflf", coded, "--codecs", "none", "--json", report, "--quiet"]
    assert run("rd", untagged, *files) == 0
    assert json.loads(report.read_text())["rows"][0]["psnr_db"] == pytest.approx(made["psnr_db"], abs=1e-9)
    error = fails(capsys, "rd", untagged, *files, "--untagged-matrix", "bt601")
    assert "read by the matrix bt709 and not bt601" in error


def test_decoded_video_has_the_colours_of_its_source(folder, tmp_path, moving_frames):
    clip, coded = tmp_path / "clip.mkv", tmp_path / "clip.hflf"
    with VideoWriter(clip, 25, (48, 64), primaries="smpte170m", transfer="smpte170m") as writer:
        writer.write(moving_frames)
    assert run("encode", clip, "-o", coded, *SMALL) == 0
    assert run("decode", coded, "-o", tmp_path / "out.mp4") == 0
    color = load_video(tmp_path / "out.mp4").color
    assert (color.primaries, color.transfer) == ("smpte170m", "smpte170m")
    # What a source does not say is not made up.
    assert run("decode", folder / "clip.hflf", "-o", tmp_path / "out.mp4") == 0
    color = load_video(tmp_path / "out.mp4").color
    assert (color.matrix, color.primaries, color.transfer) == ("bt709", None, None)


def test_decode_can_be_told_what_to_replace(folder, tmp_path, capsys):
    coded, video, images = folder / "clip.hflf", tmp_path / "out.npy", tmp_path / "out"
    for target in (video, images):
        assert run("decode", coded, "-o", target, "--no-overwrite") == 0
        assert "exists already" in fails(capsys, "decode", coded, "-o", target, "--no-overwrite") or target == images
    assert run("decode", coded, "-o", video, "--frames", "1:3") == 0
    assert len(np.load(video)) == 2
    assert "--overwrite" in fails(capsys, "decode", coded, "-o", images)
    (images / "notes.txt").write_text("mine")
    assert run("decode", coded, "-o", images, "--overwrite", "--frames", "1:3") == 0
    assert sorted(path.name for path in images.iterdir()) == ["frame_00000.png", "frame_00001.png", "notes.txt"]


def test_no_file_is_both_read_and_written(folder, tmp_path, moving_frames, capsys):
    clip, coded, report = tmp_path / "clip.mkv", tmp_path / "clip.hflf", tmp_path / "report.json"
    write_frames(clip, moving_frames, fps=25)
    before = clip.read_bytes()
    same = tmp_path / "." / "clip.hflf"
    assert "--output must be another file than the file that is read" in fails(
        capsys, "encode", clip, "-o", clip, *SMALL
    )
    error = fails(capsys, "encode", clip, "-o", coded, "--json", same, *SMALL)
    assert error.endswith(f"--json must be another file than that of --output, got {same}")
    assert "--output must be another" in fails(capsys, "import", clip, "-o", clip)
    (tmp_path / "link.npy").symlink_to(folder / "clip.hflf")
    assert "--output must be another" in fails(capsys, "decode", folder / "clip.hflf", "-o", tmp_path / "link.npy")
    assert "--plot must be another" in fails(capsys, "rd", clip, "--json", report, "--plot", report)
    assert "--json must be another" in fails(capsys, "rd", clip, "--json", clip)
    assert clip.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mkv", "link.npy"}


def test_no_image_of_the_input_is_written(folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    outside = tmp_path / "frame.hflf"
    (images / "frame_00000.png").rename(outside)
    (images / "frame_00000.png").symlink_to(outside)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    first, new = images / "frame_00000.png", images / "new.png"
    for command in (
        ["encode", images, "-o", images / "frame_00001.png"],
        ["encode", images, "-o", first],
        ["encode", images, "-o", outside],
        ["encode", images, "-o", images / "clip.hflf", "--json", first],
        ["import", folder / "clip.hflf", "--reference", images, "-o", first],
        ["rd", images, "--codecs", "none", "--hflf", folder / "clip.hflf", "--plot", first],
    ):
        assert "must be another file than the images that are read, got " in fails(capsys, *command)
    error = fails(capsys, "rd", images, "--codecs", "none", "--hflf", folder / "clip.hflf", "--plot", new)
    assert error.endswith(f"--plot must not be an image in the folder that is read, got {new}")
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    # Other files may be there: they are not read.
    assert run("encode", images, "-o", images / "clip.hflf", "--json", images / "clip.json", *SMALL) == 0
    assert run("encode", images, "-o", images / "clip.hflf", *SMALL) == 0


def test_a_coded_video_is_named_so(folder, tmp_path, capsys):
    for name in ("clip.mp4", "clip"):
        for command in (["encode", folder / "images"], ["import", folder / "clip.hflf"]):
            error = fails(capsys, *command, "-o", tmp_path / name)
            assert error.endswith(f"--output must end in .hflf, got {tmp_path / name}")
    assert list(tmp_path.iterdir()) == []


def test_of_its_folder_only_checkpoints_are_removed(folder, tmp_path):
    work = tmp_path / "clip.hflf.work"
    work.mkdir()
    for name in ("notes.txt", ".checkpoint-killed.part.safetensors"):
        (work / name).write_text("something")
    options = ["--checkpoint-seconds", "0", *SMALL]
    assert run("encode", folder / "images", "-o", tmp_path / "clip.hflf", *options) == 0
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["encode", "images", "-o", "out.hflf", *SMALL], "--workdir"),
        (["encode", "images", "-o", "out.hflf", *SMALL], "--tensorboard"),
        (["rd", "images"], "--workdir"),
        (["demo"], "--output"),
    ],
)
def test_a_file_is_no_folder(command, option, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert fails(capsys, *command, option, "clip.hflf").endswith(f"{option} must be a folder, got the file clip.hflf")


def test_frames_count_from_the_end(folder, tmp_path, capsys):
    decoder = Decoder(folder / "clip.hflf", precision="fp32")
    for number, words in enumerate((["--frames", "-2:"], ["--frames=-2:"], ["--frames", "-4:-2"])):
        out = tmp_path / f"{number}.npy"
        assert run("decode", folder / "clip.hflf", "-o", out, "--precision", "fp32", *words) == 0
        assert np.array_equal(np.load(out), decoder[2:4] if number == 2 else decoder[-2:])
    for frames in ("10:20", "3:1", "6:"):
        error = fails(capsys, "decode", folder / "clip.hflf", "-o", tmp_path / "none.npy", "--frames", frames)
        assert error.endswith(f"--frames must select at least one of the frames 0 to 5, got {frames}")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_file_names_that_are_no_text(folder, tmp_path, encoding):
    names = [
        os.fsdecode(tmp_path / os.fsdecode(name)) for name in (b"\xff\xe9.hflf", b"out-\xff.mkv", b"pictures-\xff")
    ]
    try:
        shutil.copy(folder / "clip.hflf", names[0])
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    for command in (
        ["info", names[0]],
        ["decode", names[0], "-o", names[1]],
        ["decode", names[0], "-o", names[2]],
        ["eval", names[0], "--reference", names[2], "--json"],
    ):
        words = [sys.executable, "-m", "hflfnerv", *command]
        done = subprocess.run(words, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert rb"\udcff" in done.stdout


def test_truncated_file_is_one_clear_line(folder, tmp_path, capsys):
    data = (folder / "clip.hflf").read_bytes()
    damaged = tmp_path / "damaged.hflf"
    damaged.write_bytes(data[: len(data) // 2])
    for command in (
        ["decode", damaged, "-o", tmp_path / "out.npy"],
        ["info", damaged],
        ["eval", damaged, "--reference", folder / "images"],
    ):
        assert fails(capsys, *command).startswith(f"hflfnerv: error: {damaged}: ")
    assert not (tmp_path / "out.npy").exists()


def test_full_disk(folder, tmp_path, tmp_path_factory):
    resource = pytest.importorskip("resource")
    model = build_model(MODELS["hnerv"].plan(60_000, 2, 96, 160))
    checkpoint = tmp_path_factory.mktemp("import")
    torch.save({"epoch": 1, "state_dict": published_names(model.state_dict())}, checkpoint / "model.pth")
    write_frames(checkpoint / "images", np.zeros((2, 96, 160, 3), np.uint8), fps=25)

    def limit_file_size():
        # The nearest thing to a full disk that needs no privileges: writes beyond 10 kB fail.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    for command, target, message in (
        (["encode", folder / "images", *SMALL], "x.hflf", "File too large: {}.work/checkpoint.safetensors"),
        (["decode", folder / "clip.hflf"], "x.npy", "{} cannot be written: File too large"),
        (["decode", folder / "clip.hflf"], "x.y4m", "{} cannot be written: File too large"),
        (["import", checkpoint / "model.pth", "--reference", checkpoint / "images"], "x.hflf", "File too large: {}"),
    ):
        arguments = [sys.executable, "-m", "hflfnerv", *map(str, command), "-o", str(tmp_path / target)]
        result = subprocess.run(arguments, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr == f"hflfnerv: error: {message.format(tmp_path / target)}\n"
        assert list(tmp_path.iterdir()) == []


def test_advice_on_memory_is_for_the_command(folder, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("9 bytes")

    monkeypatch.setattr("hflfnerv.codec.Decoder.iter_frames", fail)
    monkeypatch.setattr("hflfnerv.codec.encoder.load_video", fail)
    error = fails(capsys, "decode", folder / "clip.hflf", "-o", tmp_path / "out.npy")
    assert "not enough memory (9 bytes): the network of this file needs it" in error
    error = fails(capsys, "encode", folder / "images", "-o", tmp_path / "out.hflf", *SMALL)
    advice = "fewer frames a step (--batch-size), fewer in all (--frames), smaller ones (--resize)"
    assert error.endswith(f"not enough memory (9 bytes): {advice}")


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["encode"], ["encode", "x", "-o", "y", "--size", "big"], ["decode", "x"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "error:" in capsys.readouterr().err


def test_explain_lists_every_table(capsys):
    assert run("explain") == 0
    out = capsys.readouterr().out
    for op in ("pixel_shuffle_gelu", "conv_pixel_shuffle_gelu", "highpass", "huffman"):
        assert op in out
    assert "reference" in out


def test_demo(tmp_path, capsys):
    from PIL import Image

    output = tmp_path / "demo"
    assert run("demo", "-o", output, "--epochs", "1", "--size", "60k", "--resize", "48x96") == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert f"{report['bits_per_pixel']:.4f} bits per pixel" in printed
    assert f"{report['psnr_db']:.2f} dB" in printed
    assert report["total_seconds"] > sum(report["seconds"].values())
    assert report["machine"].keys() == {"processor", "simd", "threads", "gpu", "commit"}
    assert report["bytes"] == (output / "bunny.hflf").stat().st_size
    assert load_video(output / "decoded.mp4").frames.shape == (24, 48, 96, 3)
    with Image.open(output / "comparison.png") as picture:
        assert picture.size[0] == 3 * 96
        sheet = np.asarray(picture)
    decoded = Decoder(output / "bunny.hflf")[12]
    margin = sheet.shape[0] // 2 - 48
    assert np.array_equal(sheet[margin : margin + 48, 96:192], decoded)


def test_progress_is_lines_where_there_is_no_terminal(moving_frames, capsys, monkeypatch):
    from hflfnerv import EncodeConfig, encode
    from hflfnerv.cli import _progress

    monkeypatch.setattr(_progress._Lines, "seconds", 0.0)
    with _progress.progress_observer(quiet=False) as observer:
        encode(moving_frames, EncodeConfig(size="60k", epochs=2), observer=observer)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.endswith(" ...")] == [f"{name} ..." for name in _progress._STAGES.values()]
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["1/2", "2/2"]


def test_progress_bar_on_a_terminal(moving_frames):
    import io

    from rich.console import Console
    from rich.progress import Progress

    from hflfnerv import EncodeConfig, encode
    from hflfnerv.cli import _progress

    class DrawnAtEveryStep(_progress._Bar):
        # Progress draws by the clock; a run as short as this one may end between two drawings.
        def step(self, trainer):
            super().step(trainer)
            self.progress.refresh()

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with Progress(*_progress.COLUMNS, console=console, auto_refresh=False) as progress:
        encode(moving_frames, EncodeConfig(size="60k", epochs=2), observer=DrawnAtEveryStep(progress))
    assert "epoch 2/2" in screen.getvalue()
    assert "dB" in screen.getvalue()
