"""What a network learns by how its steps are computed: the named operations are left out, and rows tell the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hflfnerv
from bench import learning
from hflfnerv._impl import tables
from hflfnerv.ops import _cuda

BUNNY = Path(hflfnerv.__file__).parent / "assets" / "bunny_320x640.mp4"


@pytest.mark.parametrize("names", [learning.ways(on_gpu=False)[learning.BASELINE].plain, ("stream_loss", "lists"), ()])
def test_named_operations_are_pytorchs_own_meanwhile(names):
    select, rejects = {table.op: table.select for table in tables()}, _cuda.rejects_list
    with learning.plain_operations(names):
        for table in tables():
            if table.op in names:
                assert table.select("auto").name == table.select(table.names[0]).name == table.names[-1] == "reference"
            else:
                assert table.select == select[table.op]
        assert (_cuda.rejects_list([]) == "left out by a benchmark") == ("lists" in names)
    assert {table.op: table.select for table in tables()} == select
    assert _cuda.rejects_list is rejects


def test_each_operation_of_a_step_is_left_out_once():
    ways = learning.ways(on_gpu=True).values()
    each = [way.plain[0] for way in ways if len(way.plain) == 1]
    assert len(each) == len(set(each))
    assert {way.plain for way in ways if len(way.plain) > 1} == {tuple(each)}
    # Of the other tables training uses none on a GPU, or one before its first step.
    others = {"conv_pixel_shuffle_gelu_int8", "decode", "highpass", "huffman", "inverted_bottleneck"}
    others |= {"output_stage", "quantize_int8"}
    assert {*each, *others} - {"lists"} == {table.op for table in tables()}


def test_changes_reach_the_trainer(monkeypatch):
    trainers = []

    class Watched(learning.Trainer):
        def run(self):
            trainers.append((self.training_step.concurrent, self._taker() is self.training_step))
            super().run()

    monkeypatch.setattr(learning, "Trainer", Watched)
    video = learning.load_video(torch.randint(0, 256, (2, 96, 160, 3), dtype=torch.uint8))
    config = learning.EncodeConfig(model="hnerv", size="100k", epochs=1).resolved()
    ways = learning.ways(on_gpu=True)
    for name in ("bf16 on one stream", "bf16 without a graph"):
        learning.learn(video, config, ways[name]._replace(precision="fp32"), torch.device("cpu"))
    assert trainers == [(False, True), (True, True)]


def test_rows_on_a_cpu(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ["--clip", str(BUNNY), "--resize", "90x160", "--crop", "80x160", "--size", "100k", "--epochs", "1"]
    for only in (": fp32", ": fp32", ": bf16"):
        assert learning.main([*options, "--results", str(path), "--only", only]) == 0
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        assert row["data"] == "hnerv 100k, bunny_320x640 80x160, 24 frames, 1 epochs"
        assert row["shape"] == [24, 80, 160, 3]
        assert len(row["epochs_psnr_db"]) == 1
        assert 5 < row["p50"] < 40


def half_a_gradient(trainer):
    trainer.model.get_parameter("encoder.stages.0.0.gamma").register_hook(lambda gradient: gradient / 2)


def no_update(trainer):
    weight, optimizer = trainer.model.get_parameter("encoder.downsample_layers.0.0.weight"), trainer.optimizers[0]
    step = optimizer.step

    def step_without_it():
        before = weight.detach().clone()
        step()
        weight.data.copy_(before)

    optimizer.step = step_without_it


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (half_a_gradient, {"gradients": ["encoder.stages.0.0.gamma"], "updates": ["encoder.stages.0.0.gamma"]}),
        (no_update, {"gradients": [], "updates": ["encoder.downsample_layers.0.0.weight"]}),
    ],
)
def test_what_is_wrong_in_a_step_is_named(monkeypatch, change, named):
    """However small it is beside the others."""
    monkeypatch.setattr("hflfnerv.train.muon.multiplies_bfloat16", lambda x: False)  # all of it is to be in float32
    ways = {name: way._replace(precision="fp32") for name, way in learning.ways(on_gpu=False).items()}
    ways["wrong"] = learning.Way("fp32", change=change)
    monkeypatch.setattr(learning, "ways", lambda *, on_gpu: ways)
    video = learning.load_video(torch.randint(0, 256, (2, 96, 160, 3), dtype=torch.uint8))
    rows = list(learning.step_rows(video, "noise", "hnerv", torch.device("cpu"), size="100k", epochs=1))
    assert [row["implementation"] for row in rows] == [name for name in ways for _ in named]
    # Updates amplify what gradients differ by: an error in the small eigenvalues of a matrix grows to 2e-3 in float32.
    bounds = {"gradients of a step": 1e-3, "updates of a step": 1e-2}
    assert all(row["p50"] < bounds[row["what"]] for row in rows[:-2])
    assert [learning._complaints(row) for row in rows[:-2]] == [[]] * 8
    assert {row["what"].split()[0]: row["wrong"] for row in rows[-2:]} == named
    complaints = [complaint for row in rows[-2:] for complaint in learning._complaints(row)]
    assert complaints[-1].startswith(
        "hnerv 100k, noise, batch 1, after 1 epochs, wrong: updates of a step are wrong (encoder."
    )
    if named["gradients"]:
        assert complaints[0].endswith("wrong: gradients of a step are wrong (encoder.stages.0.0.gamma 5.0e-01)")
