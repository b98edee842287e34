"""The suite of hflfnerv.fuse: its networks, its gate, and how it measures memory."""

from __future__ import annotations

import json

import pytest
import torch

from bench import memory, readme, run
from bench.ops import bench_fuse
from bench.published import NETWORKS, SMALL
from bench.registry import Contender, Point


def test_networks_are_the_small_ones_at_full_size():
    assert NETWORKS.keys() == SMALL.keys() == {"HNeRV", "NeRV", "E-NeRV", "DNeRV", "NVR-RRCP"}
    for name, network in NETWORKS.items():
        count = sum(parameter.numel() for parameter in network.build().parameters())
        assert 1.4e6 < count < 1.7e6, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", bench_fuse.UNITS)
@pytest.mark.parametrize("name", SMALL)
def test_point(name, what, dtype):
    point = bench_fuse._point(name, what, dtype, SMALL, bench_fuse.CPU, 2, len, {})
    point.check()
    assert [contender.name for contender in point.contenders] == ["hflfnerv.fuse", "eager"]
    assert point.facts["blocks"] >= 2
    row = run.line(point, point.contenders[0], [1.0, 1.0, 1.0])
    assert row["peak_bytes"] == len("hflfnerv.fuse")
    assert row["p50"] == (2 if what == "inference" else 1)


@pytest.mark.parametrize("part", ["frames", "gradients"])
def test_the_gate_closes(part):
    exact = bench_fuse.make_run("HNeRV", "training", "float32", "eager", networks=SMALL, exact=True)
    plain = bench_fuse.make_run("HNeRV", "training", "float32", "eager", networks=SMALL)

    def wrong():
        frames, gradients = plain()
        return [frames * 1.001, gradients] if part == "frames" else [frames, gradients * 1.001]

    with pytest.raises(AssertionError, match="some network: relative error"):
        bench_fuse._check("some network", {"eager": plain, "hflfnerv.fuse": wrong}, exact, bench_fuse.WINOGRAD_FACTOR)


@pytest.mark.skipif(not memory.sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_peak_memory(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(
        "def small(megabytes):\n    return lambda: None\n"
        "def make(megabytes):\n"
        "    kept = b'x' * 1_000_000 * int(megabytes)\n"
        "    return lambda: (kept, b'x' * 2_000_000 * int(megabytes))[0]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = b"x" * 300_000_000  # of this process, which must not count
    assert memory.peak_bytes("hungry:make", "hungry:small", "20") == pytest.approx(60e6, abs=2e6)
    assert len(before) == 300_000_000


def test_table(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.tables("fuse") == "Not measured yet: `python -m bench.run fuse`."
    rows = []
    for what, unit in bench_fuse.UNITS.items():
        contenders = [
            Contender(name, lambda: None, units, facts=lambda units=units: {"peak_bytes": int(units * 1e8)})
            for name, units in (("hflfnerv.fuse", 3), ("eager", 2))
        ]
        facts = {"threads": 2}
        point = Point(f"fuse.{what}", "Net", "float32", (1,), unit, 1, contenders, "eager", torch.ones, facts)
        rows += [
            run.line(point, contender, [1.0] * 3) | {"device": "CPU", "commit": "c" * 40} for contender in contenders
        ]
    (tmp_path / "fuse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = readme.tables("fuse").splitlines()
    assert "| Net | 2.00 → 3.00 (1.50 x) | 200 → 300 MB | 2.00 → 3.00 (1.50 x) | 200 → 300 MB |" in lines
