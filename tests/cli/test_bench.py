"""``hflfnerv bench`` on a tiny network."""

from __future__ import annotations

import json

import pytest

from hflfnerv.cli import main

TINY = ["bench", "--size", "60k", "--resolution", "48x64", "--frames", "3", "--seconds", "0.01", "--device", "cpu"]


@pytest.mark.parametrize("model", ["hflf", "hnerv", "nerv"])
def test_every_figure(model, capsys):
    assert main([*TINY, "--models", model, "--batches", "1,2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    figures = [(row["what"], row["implementation"], row["batch"]) for row in rows]
    batch = 1 if model == "hflf" else 2
    assert figures == [
        ("open to first frame", "hflfnerv", 1),
        ("decode", "hflfnerv", 1),
        ("decode", "eager fp32", 1),
        ("decode", "hflfnerv", 2),
        ("decode", "eager fp32", 2),
        ("training step", "hflfnerv", batch),
        ("training step", "eager fp32", batch),
    ]
    assert all(row["value"] > 0 and row["peak_memory_mb"] > 10 and row["model"] == model for row in rows)
    assert [row["unit"] for row in rows[::3]] == ["s", "frames/s", "steps/s"]


def test_lines(capsys):
    assert main([*TINY, "--models", "nerv", "--batches", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("nerv, open to first frame, batch 1 hflfnerv (auto)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "hflf,x"], "--models must be of hflf, hnerv, nerv"),
        *((["--batches", text], "--batches must be whole numbers of at least 1") for text in ("0", "a", "1,", "1.5")),
        *((["--frames", text], "--frames must be a whole number of at least 1") for text in ("0", "all")),
        *((["--seconds", text], "--seconds must be a positive number") for text in ("0", "-1", "nan", "inf", "s")),
    ],
)
def test_rejects(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err
