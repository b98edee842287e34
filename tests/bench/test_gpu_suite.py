"""The GPU suite without a GPU: its command line, a dry run of all parts, and what it does when a part fails."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from bench import check, encode, gpu, networks
from bench.device import LeftOut, Machine, require_close
from bench.registry import Contender, Point
from hflfnerv.models.hflf import HFLFNeRV
from hflfnerv.models.hnerv import HNeRV

ROOT = Path(gpu.__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_help_and_list():
    assert "--parts" in run("--help").stdout
    done = run("--list")
    assert done.returncode == 0
    assert [text.split()[0] for text in done.stdout.splitlines()] == [*gpu.PARTS, *gpu.GROUPS]


def test_unknown_part():
    done = run("--parts", "limits,speed")
    assert done.returncode == 2
    assert "--parts must be of build, tests, limits," in done.stderr
    assert "got 'speed'" in done.stderr


def test_groups():
    assert gpu.parse(["--parts", "models,decode"]).chosen == ["decode", "training"]
    assert gpu.parse(["--parts", "conv"]).chosen == gpu.GROUPS["conv"]
    assert gpu.parse([]).chosen == list(gpu.PARTS)


def test_functions_are_there():
    for part in gpu.PARTS.values():
        if isinstance(part.function, str):
            module, name = part.function.split(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_dry_run(tmp_path, capsys, monkeypatch):
    parts = [name for name, part in gpu.PARTS.items() if isinstance(part.function, str)]
    made = dict.fromkeys(parts, 0)

    def keep(path: Path, row: dict, keep: Callable[[Path, dict], None] = gpu.keep) -> None:
        made[path.stem.removeprefix("gpu-")] += 1
        keep(path, row)

    monkeypatch.setattr(gpu, "keep", keep)
    # The settings that the suite changes are the process's.
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        failed = gpu.main(["--dry-run", "--here", "--parts", ",".join(parts), "--results", str(tmp_path)])
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
    printed = capsys.readouterr().out
    assert failed == 0, printed
    for name in parts:
        rows = rows_of(tmp_path / f"gpu-{name}.jsonl")
        assert rows, name
        assert len(rows) == made[name], "a row took the place of another of the same run"
        for row in rows:
            assert row["dry_run"] is True
            assert {"what", "implementation", "dtype", "data", "metric", "unit", "p50"} <= row.keys()
            assert {"device", "driver", "versions", "commit", "dirty", "time"} <= row.keys()
            if row["metric"] == "throughput":
                assert {"baseline", "shape", "p20", "p80", "milliseconds"} <= row.keys()
        assert rows[0]["what"] in printed
    trained = {row["data"].split(",")[0] for row in rows_of(tmp_path / "gpu-training.jsonl")}
    assert trained == {"hnerv 1.5M", "hflf 1.5M best"}


def test_a_failing_part_leaves_the_others(monkeypatch, tmp_path, capsys):
    def fails(machine):
        yield {"what": "first"} | ROW
        raise RuntimeError("out of order")

    row = {"metric": "throughput", "unit": "GB/s", "baseline": "a", "implementation": "a", "data": "d"}
    ROW = row | {"p20": 1.0, "p50": 2.0, "p80": 3.0, "milliseconds": 0.5, "share_of_copy": 0.5}  # noqa: N806
    monkeypatch.setattr("bench.limits.points", fails)
    monkeypatch.setattr("bench.ops.bench_highpass.gpu_points", lambda machine: iter([{"what": "second"} | ROW]))
    arguments = ["--dry-run", "--here", "--parts", "limits,highpass", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "limits: FAILED: RuntimeError: out of order" in printed
    assert "second (GB/s; ratio to a)" in printed
    assert "1.00 x  copy  50.0 %" in printed
    # What was measured before the failure is kept.
    assert json.loads((tmp_path / "gpu-limits.jsonl").read_text())["what"] == "first"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def fake_row(device: str, data: str, implementation: str, p50: float) -> dict:
    row = {"metric": "throughput", "unit": "GB/s", "baseline": "a", "what": "w", "dtype": "float32", "time": "9999"}
    row |= {"p20": p50, "p80": p50, "milliseconds": 0.5}
    return row | {"device": device, "data": data, "implementation": implementation, "p50": p50}


def test_a_run_replaces_what_it_measures_again_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "gpu-limits.jsonl"
    old = [fake_row(device, data, name, 1.0) for device in ("A", "B") for data in ("d", "e") for name in ("a", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))

    def points(machine):
        # Nothing is gone before there is something to put in its place.
        assert rows_of(path) == old
        yield fake_row("A", "d", "a", 2.0)
        assert len(rows_of(path)) == len(old)
        raise KeyboardInterrupt  # whatever ends the run

    monkeypatch.setattr("bench.limits.points", points)
    arguments = ["--dry-run", "--here", "--parts", "limits", "--only", "d", "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(arguments)
    assert rows_of(path) == [*old[1:], fake_row("A", "d", "a", 2.0)]


def test_a_part_that_cannot_begin_leaves_the_rows(monkeypatch, tmp_path):
    path = tmp_path / "gpu-limits.jsonl"
    path.write_text(json.dumps(fake_row("A", "d", "a", 1.0)) + "\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--here", "--parts", "limits", "--results", str(tmp_path)]) == 1
    assert rows_of(path) == [fake_row("A", "d", "a", 1.0)]


def test_the_steps_of_an_encode_are_those_it_took():
    (hnerv,) = encode.points(machine(only="hnerv"))
    # 2 epochs of 6 frames, one a step.
    assert hnerv["p50"] == pytest.approx(12 / hnerv["seconds"]["train"], rel=1e-3)


def test_summary_has_one_line_for_each_point():
    common = {"metric": "throughput", "what": "w", "data": "d", "unit": "GB/s", "baseline": "eager"}
    rows = [
        common | {"implementation": "triton a", "p50": 2.0, "share_of_copy": 0.25},
        common | {"implementation": "triton b", "p50": 4.0, "share_of_copy": 0.5},
        common | {"implementation": "eager", "p50": 1.0, "share_of_copy": 0.125},
        common | {"implementation": "torch.compile max-autotune", "p50": 2.0, "share_of_copy": 0.25},
        common | {"data": "e", "implementation": "C_in = 33", "p50": 2.0, "baseline": "C_in = 33"},
        common | {"data": "e", "implementation": "C_in = 40", "p50": 3.0, "baseline": "C_in = 33"},
    ]
    assert list(gpu.summary(rows)) == [
        "w, d: triton b 4.0 GB/s, 50 % of copy, 2.00 x torch.compile max-autotune",
        "w, e: C_in = 40 3.0 GB/s, 1.50 x C_in = 33",
    ]


def test_parts_in_processes_of_their_own(tmp_path):
    done = run("--dry-run", "--parts", "limits,highpass", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.rstrip().splitlines()[-5:]
    assert [text.split(",")[0] for text in last] == ["limits.copy", *["limits.matmul"] * 2, *["highpass"] * 2]


def test_warming_up_leaves_no_rows(tmp_path, monkeypatch):
    ran = []

    def start(name, arguments, *options, **pipes):
        ran.append((name, *options[2:]))
        folder = Path(options[1])
        assert folder != tmp_path
        (folder / f"gpu-{name}.jsonl").write_text("{}")
        return subprocess.Popen(["sleep", "0" if name == "highpass" else "60"], preexec_fn=os.setpgrp, **pipes)

    monkeypatch.setattr(gpu, "start", start)
    arguments = gpu.parse(["--parts", "build,limits,highpass,loss", "--results", str(tmp_path), "--minutes", "0.01"])
    gpu.warm_up(arguments)
    assert ran == [(name, "--seconds", str(gpu._WARM_UP_SECONDS)) for name in ("highpass", "loss")]
    assert list(tmp_path.iterdir()) == []


def test_parts_are_warmed_up_once_before_the_first_that_measures(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(gpu, "warm_up", lambda arguments: order.append("warm"))
    monkeypatch.setattr(gpu, "run_apart", lambda name, arguments: order.append(name))
    gpu.main(["--parts", "build,highpass,loss", "--warm", "--results", str(tmp_path)])
    assert order == ["build", "warm", "highpass", "loss"]


@pytest.mark.parametrize(
    ("choice", "wanted"), [("max-autotune", [True, True]), ("default", [False, True]), ("none", [False] * 2)]
)
def test_modes_of_compile(choice, wanted):
    machine = Machine(dry=True, seconds=0, deadline=0, compile_modes=gpu.COMPILE[choice])
    runs = [machine.compile(torch.sin, mode) for mode in ("max-autotune", "default")]
    for run, is_wanted in zip(runs, wanted, strict=True):
        with contextlib.nullcontext() if is_wanted else pytest.raises(LeftOut):
            assert run(torch.zeros(1)) == 0


def test_ending_the_suite_ends_the_part(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--parts", "check", "--results", str(tmp_path)]
    suite = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    parts: list[psutil.Process] = []
    while not parts and suite.poll() is None:
        time.sleep(0.05)
        parts = psutil.Process(suite.pid).children()
    assert parts
    suite.terminate()
    assert suite.wait(timeout=60) == 128 + signal.SIGTERM
    gone, alive = psutil.wait_procs(parts, timeout=60)
    assert (len(gone), alive) == (1, [])


def test_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = run("--parts", "limits", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "PyTorch sees no CUDA device (--dry-run goes through the parts without one)" in done.stderr
    assert "limits: FAILED: exit code 1, see above" in done.stdout


@pytest.mark.parametrize("model", [HNeRV, HFLFNeRV])
def test_decoding_can_be_captured(model, monkeypatch):
    # What waits for the device cannot go into a CUDA graph.
    network = networks._with(networks.network_of(machine(), model, with_encoder=False), "reference")
    assert network.encoder is None
    embeddings, index = torch.randn(2, *network.spec.embedding_shape), torch.arange(2)
    for name in ("cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("a value was read back"))
    with torch.inference_mode():
        assert network.decode(embeddings, index).shape == (2, 3, 96, 160)


def machine(**options) -> Machine:
    return Machine(**{"dry": True, "seconds": 0.0, "deadline": float("inf"), **options})


def point(contenders: dict[str, Callable[[], object]], check: Callable[[], None], baseline: str = "a") -> Point:
    runs = [Contender(name, run, 1) for name, run in contenders.items()]
    return Point("op", "data", "float32", (3,), "GB/s", 1e9, runs, baseline, check)


def test_wrong_results_are_not_timed():
    one = machine()

    def check() -> None:
        for name, result in (("a", torch.ones(3)), ("b", torch.zeros(3))):
            with one.trying(name):
                require_close("it", result, torch.zeros(3), torch.zeros(3))

    rows = one.measure(point({"a": pytest.fail, "b": int}, check))
    assert [row["implementation"] for row in rows] == ["b"]
    assert [text.split(": ")[:3] for text in one.failures] == [["a", "AssertionError", "it"]]
    # The next point has contenders of these names too.
    assert len(one.measure(point({"a": int, "b": int}, lambda: None))) == 2


def test_a_failing_contender_leaves_the_others():
    one = machine()

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it.\nMore lines.")

    rows = one.measure(point({"a": fails, "b": int, "c": int}, lambda: None))
    assert [row["implementation"] for row in rows] == ["b", "c"]
    assert one.failures == ["a: OutOfMemoryError: CUDA out of memory. Tried to allocate it."]
    # Neither a baseline nor a contender of ours need be left for the tables.
    assert list(gpu.table(rows))[2].lstrip().startswith("b ")
    assert next(gpu.summary(rows)).startswith(("op, data: b ", "op, data: c "))
    assert next(gpu.summary([row | {"implementation": "eager"} for row in rows])).startswith("op, data: eager ")


def test_a_failing_point_leaves_the_others(monkeypatch, tmp_path, capsys):
    def points(machine):
        for name in ("first", "second"):
            with machine.room(name):
                yield from measure(machine, name)

    def measure(machine, name):
        if name == "first":
            raise ValueError("out of order")
        yield from machine.measure(point({"a": int}, lambda: None))

    monkeypatch.setattr("bench.limits.points", points)
    assert gpu.main(["--dry-run", "--here", "--parts", "limits", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "limits: FAILED: PartFailed: 1 of its points and contenders:\n  first: ValueError: out of order" in printed
    assert "op (GB/s; ratio to a)" in printed
    assert len((tmp_path / "gpu-limits.jsonl").read_text().splitlines()) == 1


def test_a_lost_device_ends_the_part(monkeypatch):
    one = machine()
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize() -> None:
        raise lost

    def measure() -> None:
        with one.room("a point"), one.trying("a contender"):
            pass

    monkeypatch.setattr(one, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure()
    assert len(one.failures) == 2


@pytest.mark.parametrize("reason", [None, "nvcc not found"])
def test_built_without_cuda_is_a_failure(reason, monkeypatch, tmp_path):
    (tmp_path / "hflfnerv").mkdir()
    record = json.dumps({"no_cuda": reason})
    code = f"import pathlib\npathlib.Path('hflfnerv/_build.json').write_text({record!r})\n"
    (tmp_path / "setup.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    if reason is None:
        gpu.build(argparse.Namespace(dry_run=False))
    else:
        with pytest.raises(gpu.PartFailed, match="built, but without its CUDA kernels: nvcc not found"):
            gpu.build(argparse.Namespace(dry_run=False))


@pytest.mark.parametrize("missing", ["setuptools", "pytest", "torch"])
def test_what_is_missing_is_said(missing, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    part = {"setuptools": "build", "pytest": "tests", "torch": "limits"}[missing]
    assert gpu.main(["--here", "--dry-run", "--parts", part, "--results", str(tmp_path)]) == 1
    names = {"torch": "PyTorch"}
    assert re.search(f"{part}: FAILED: PartFailed: .*{names.get(missing, missing)}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("actual", "passes"),
    [
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1.0, 2.00001]), False),
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, 2.0]).double(), False),
        (torch.tensor([[1.0, 2.0]]), False),
    ],
)
def test_require_close(actual, passes):
    expected = torch.tensor([1.0, 2.0]).double()
    if passes:
        assert require_close("x", actual, expected, expected.float()) == 0
    else:
        with pytest.raises(AssertionError, match="x: "):
            require_close("x", actual, expected, expected.float())


def test_no_point_begins_after_the_deadline():
    late = machine(deadline=0.0)
    assert not late.wants("a point")
    assert late.left_out == ["a point"]
    chosen = machine(only="s5")
    assert chosen.wants("s5, batch 1")
    assert not chosen.wants("s4, batch 1")
    assert chosen.left_out == []


def test_check_names_what_is_wrong(monkeypatch):
    monkeypatch.setattr(check.ops, "highpass", lambda x, removed, impl: torch.zeros_like(x))
    with pytest.raises(check.CheckFailed, match="9 wrong results:\n  highpass, 2x3x64x96, float32"):
        list(check.points(machine()))


def test_check_in_several_processes():
    # 9 comparisons of the high-pass filter.
    one, two = (machine(only="highpass, ", deadline=float("inf")) for _ in range(2))
    rows, others = ({row["data"]: row["p50"] for row in check.points(m, n)} for m, n in ((one, 1), (two, 2)))
    assert len(rows) == 9
    assert rows == others
    late = machine(only="highpass, 2x3x64x96, float32", deadline=0.0)
    assert list(check.points(late, 2)) == []
    assert late.left_out == ["highpass, 2x3x64x96, float32, fft"]


def ends(*_arguments) -> None:
    os._exit(3)


def test_a_check_that_ends_early_is_said(monkeypatch):
    monkeypatch.setattr(check, "_work", ends)
    with pytest.raises(check.CheckFailed, match="share 1 of 2: the process ended with 3"):
        list(check.points(machine(), 2))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_l2_kernel_reads_past_l1_with_16_bytes(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench import l2

    signature = {"x_ptr": "*fp32", "sums_ptr": "*fp32", "blocks": "i32", "REPEATS": "constexpr", "BLOCK": "constexpr"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(3)}
    source = ASTSource(l2.l2_read_kernel, signature, {"REPEATS": 128, "BLOCK": l2.BLOCK}, aligned)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert re.search(r"ld\.global\.cg\.v4\.b32", ptx)
    assert not re.search(r"ld\.global\.(v4\.)?b32", ptx)


def test_checkout_is_importable_without_installation(tmp_path):
    # As on a bare machine: no finder of an editable installation, no package in site-packages.
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', str(f)).lower()]\n"
        "import bench.checkout\n"
        "import hflfnerv.triton_kernels.conv_pixel_shuffle_gelu as kernels\n"
        "print(kernels.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "triton_kernels" / "conv_pixel_shuffle_gelu.py"
