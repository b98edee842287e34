"""Rate-distortion on the command line, on a clip of a few small frames."""

from __future__ import annotations

import json

import pytest

from hflfnerv.cli import main, rd
from hflfnerv.data import CONVENTIONAL_CODECS, write_frames

TRAINING = ["--sizes", "60k,90k", "--epochs", "2", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, moving_frames):
    """Two clips as images, and an encoding of the second."""
    folder = tmp_path_factory.mktemp("rd")
    write_frames(folder / "one", moving_frames, fps=25)
    write_frames(folder / "two", moving_frames[::-1], fps=25)
    command = ["encode", str(folder / "two"), "-o", str(folder / "two-small.hflf"), "--size", "60k", "--epochs", "2"]
    assert main([*command, "--quiet"]) == 0
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.skipif(
    any(CONVENTIONAL_CODECS[name].unavailable() for name in ("x264", "x265")), reason="PyAV without x264 or x265"
)
def test_codecs_networks_json_and_plot(folder, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    report, plot = tmp_path / "rd.json", tmp_path / "rd.svg"
    codecs = ["--codecs", "x264,x265", "--x264-crf", "20,40", "--x265-crf", "20,40", "--x265-preset", "fast"]
    outputs = ["--json", report, "--plot", plot]
    assert run("rd", folder / "one", folder / "two", *codecs, *TRAINING, *outputs) == 0
    out = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert len(found["rows"]) == 2 * (2 + 2 + 2)
    assert {row["clip"] for row in found["rows"]} == {"one", "two"}
    curves = {(row["implementation"], row["setting"]) for row in found["mean"]}
    assert curves == {(c, f"CRF {crf}") for c in ("x264 medium", "x265 fast") for crf in (20, 40)} | {
        ("hflf best", "60k"),
        ("hflf best", "90k"),
    }
    of_point = [row for row in found["rows"] if (row["implementation"], row["setting"]) == ("x265 fast", "CRF 20")]
    (mean,) = [row for row in found["mean"] if (row["implementation"], row["setting"]) == ("x265 fast", "CRF 20")]
    assert mean["psnr_db"] == pytest.approx(sum(row["psnr_db"] for row in of_point) / 2)
    assert {row["anchor"] for row in found["bjontegaard"]} == {"x265 fast"}
    assert "x264 medium against x265 fast: BD-rate " in out
    assert f"{mean['bits_per_pixel']:.5f} bits per pixel" in out
    assert "<svg" in plot.read_text()


def test_files_go_to_their_clip(folder, tmp_path, capsys) -> None:
    report = tmp_path / "rd.json"
    files = ["--hflf", folder / "two-small.hflf", "--codecs", "none", "--json", report, "--quiet"]
    assert run("rd", folder / "one", folder / "two", *files) == 0
    found = json.loads(report.read_text())
    assert [(row["clip"], row["implementation"], row["setting"]) for row in found["rows"]] == [
        ("two", "hflf best", "file 1")
    ]
    assert found["mean"][0]["bits_per_pixel"] == found["rows"][0]["bits_per_pixel"]
    assert found["rows"][0]["bytes"] == (folder / "two-small.hflf").stat().st_size


def test_the_same_command_goes_on_in_its_workdir(folder, tmp_path) -> None:
    arguments = ["rd", folder / "one", "--codecs", "none", *TRAINING, "--workdir", tmp_path / "work", "--json"]
    assert run(*arguments, tmp_path / "first.json") == 0
    made = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert [name for name in made if name.endswith(".hflf")] == ["one-hflf-best-60k.hflf", "one-hflf-best-90k.hflf"]
    assert run(*arguments, tmp_path / "second.json") == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["mean"] == second["mean"]


def test_nothing_is_replaced_but_what_it_made(folder, tmp_path, capsys) -> None:
    work = tmp_path / "work"
    work.mkdir()
    theirs = work / "two-hflf-best-60k.hflf"
    theirs.write_bytes((folder / "two-small.hflf").read_bytes())
    before = theirs.read_bytes()
    arguments = ["rd", folder / "two", "--codecs", "none", *TRAINING, "--workdir", work, "--quiet"]
    assert run(*arguments, "--hflf", theirs) == 1
    assert "must be another file than the file that is read" in capsys.readouterr().err
    assert run(*arguments) == 1
    assert "--workdir must not hold files of others" in capsys.readouterr().err
    assert run(*arguments, "--json", work / "two-hflf-best-90k.hflf") == 1
    assert "must be another file than that of --json" in capsys.readouterr().err
    assert [path.name for path in work.iterdir()] == [theirs.name]
    assert theirs.read_bytes() == before


def test_a_broken_file_is_named(folder, tmp_path, capsys) -> None:
    broken = tmp_path / "two-broken.hflf"
    broken.write_bytes((folder / "two-small.hflf").read_bytes()[:-1000])
    assert run("rd", folder / "two", "--codecs", "none", "--hflf", broken, "--quiet") == 1
    assert f"error: {broken}: the file should have" in capsys.readouterr().err


def test_a_missing_codec_is_a_note(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("av.codecs_available", {"libx264", "h264"})
    command = ["rd", folder / "one", "--codecs", "x264,svt-av1", "--x264-crf", "30", "--quiet"]
    assert run(*command) == 0
    captured = capsys.readouterr()
    assert "svt-av1 is left out: this build of PyAV has no encoder libsvtav1" in captured.err
    assert "x264 medium" in captured.out
    assert run("rd", folder / "one", "--codecs", "svt-av1") == 1
    assert "must name something to measure" in capsys.readouterr().err


def test_an_unknown_anchor_loses_nothing(folder, tmp_path, capsys) -> None:
    report = tmp_path / "rd.json"
    files = ["--hflf", folder / "two-small.hflf", "--codecs", "none", "--json", report, "--anchor", "vvc", "--quiet"]
    assert run("rd", folder / "two", *files) == 1
    captured = capsys.readouterr()
    assert "--anchor must be one of the curves (hflf best), got 'vvc'" in captured.err
    assert "hflf best" in captured.out
    assert len(json.loads(report.read_text())["rows"]) == 1


def test_help_names_the_defaults() -> None:
    said = {name: (preset, tuple(map(int, crfs.split(",")))) for name, (preset, crfs) in rd._CODECS.items()}
    assert said == {name: (codec.preset, codec.crfs) for name, codec in CONVENTIONAL_CODECS.items()}


def test_errors_are_one_line(folder, tmp_path, capsys) -> None:
    def fails(*arguments) -> str:
        assert run("rd", *arguments, "--quiet") == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("hflfnerv: error: ")
        assert "\n" not in error
        return error

    one, two = folder / "one", folder / "two"
    assert "missing" in fails(tmp_path / "missing", "--codecs", "x264")
    assert "different names" in fails(one, one, "--codecs", "x264")
    assert "two-small.hflf" in fails(one, folder, "--hflf", folder / "two-small.hflf")
    assert "decoded shape" in fails(two, "--frames", "0:2", "--hflf", folder / "two-small.hflf")
    assert "preset must be one of" in fails(one, "--sizes", "60k", "--preset", "no-such")
    assert "no/such" in fails(one, "--json", tmp_path / "no/such/rd.json")
    assert "plot must end in .svg, .png, .pdf, got " in fails(one, "--codecs", "x264", "--plot", tmp_path / "rd.bmp")
    for wrong in (["--codecs", "vvc"], ["--x265-crf", "a"], ["--x265-crf", ","], ["--x265-crf", "-3"]):
        with pytest.raises(SystemExit) as caught:
            run("rd", one, *wrong)
        assert caught.value.code == 2
        assert "error:" in capsys.readouterr().err
