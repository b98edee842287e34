"""``hflfnerv bench`` on a tiny network."""

from __future__ import annotations

import json

import pytest
import torch

from bench.ops import bench_train_cpu
from hflfnerv.cli import main
from hflfnerv.codec.benchmark import PlainMuon
from hflfnerv.config import PRESETS
from hflfnerv.train import Muon

TINY = ["bench", "--size", "60k", "--resolution", "48x64", "--frames", "3", "--seconds", "0.01", "--device", "cpu"]


@pytest.mark.parametrize("preset", ["best", "paper"])
@pytest.mark.parametrize("model", ["hflf", "hnerv", "nerv"])
def test_every_figure(model, preset, capsys):
    options = ["--preset", preset] if preset == "paper" else []
    assert main([*TINY, "--models", model, "--batches", "1,2", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    figures = [(row["what"], row["implementation"], row["batch"]) for row in rows]
    batch = 1 if preset == "best" or model == "hflf" else 2
    assert {row["preset"] for row in rows} == {preset}
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
    assert lines[0].startswith("nerv best, open to first frame, batch 1 hflfnerv (auto)")


def test_the_rival_takes_the_steps_of_muon():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((24, 6, 3, 3), (8, 40), (40, 8))]
    both = [[torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2)]
    for optimizer in (PlainMuon(both[0], lr=0.02), Muon(both[1], lr=0.02)):
        gradients = torch.Generator().manual_seed(1)
        for _ in range(3):
            for weight in optimizer.param_groups[0]["params"]:
                weight.grad = torch.randn(weight.shape, generator=gradients)
            optimizer.step()
    for plain, ours, before in zip(*both, start, strict=True):
        assert (plain - ours).norm() < 1e-4 * (ours - before).norm()


def test_the_suite_measures_every_preset(monkeypatch):
    monkeypatch.setattr(bench_train_cpu, "SIZES", [(60_000, 48, 64)])
    monkeypatch.setattr(bench_train_cpu, "FRAMES", 3)
    points = list(bench_train_cpu.points())
    assert [point.data for point in points] == [
        f"{name} 0.06M {preset}, 48 x 64, batch {PRESETS[preset][name].batch_size}"
        for name in ("hflf", "hnerv", "nerv")
        for preset in ("paper", "best")
    ]
    for point in points:
        point.check()
        point.contenders[-1].run()


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
