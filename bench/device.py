"""The machine under measurement: a CUDA device timed by events, or the CPU standing in for it in a dry run.

A dry run goes through the same code on tiny shapes with the implementations that need no GPU; its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from .registry import Contender, Point
from .run import environment, line

__all__ = ["Machine", "cuda_kernels", "driver_version", "require_close", "without_autotuning"]

Row = dict[str, Any]
_COMPILING = 30.0  # seconds that a point with torch.compile takes at least
_WARM_UP = 5  # calls before the clock; a captured training step takes three as they are, and captures in the fourth
_FLUSH_BYTES = 2**30  # long enough to write that the host is ahead of the device when a contender begins


def require_close(
    what: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    same_dtype: torch.Tensor,
    factor: float = 2.0,
    *,
    terms: int = 0,
) -> float:
    """Raise unless ``actual`` is as near to the float64 result as can be asked of its dtype; return its error.

    ``‖actual - expected‖ <= (factor ‖same_dtype - expected‖ + 2 u ‖expected‖)``, all over ``‖expected‖``, with u the
    unit roundoff of the dtype and ``same_dtype`` PyTorch's own result in it. A sum of ``terms`` products may be taken
    in any order: one after the other in float32 it is off by about 2^-24 sqrt(terms) of its size (Higham and Mary, "A
    new approach to probabilistic rounding error analysis", 2019), whatever order PyTorch's has.
    """
    if actual.shape != expected.shape or actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{what}: got {actual.dtype} {tuple(actual.shape)}, not {tuple(expected.shape)}")
    norm = max(float(expected.double().norm()), 1e-30)
    error, unavoidable = (float((t.double() - expected.double()).norm()) / norm for t in (actual, same_dtype))
    allowed = factor * unavoidable + torch.finfo(actual.dtype).eps + 2.0**-24 * terms**0.5
    if not error <= allowed:
        raise AssertionError(f"{what}: relative error {error:.3e} is over {allowed:.3e}")
    return error


@contextlib.contextmanager
def without_autotuning() -> Iterator[None]:
    """Let cuDNN take its first choice: what runs once, such as a reference in float64, is not worth a search."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


@functools.cache
def cuda_kernels() -> tuple[str, ...]:
    """Return the name of the CUDA implementation where it can run here; say why not otherwise."""
    from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU

    entry = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "cuda")
    reason = entry.unavailable()
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        reason = "the device is not of the Hopper generation"
    if reason is not None:
        print(f"without the CUDA kernel: {reason}", file=sys.stderr)
    return () if reason else (entry.name,)


#: The modes of torch.compile that contenders use.
COMPILE_MODES = ("max-autotune", "default")


class LeftOut(Exception):
    """A contender is not wanted in this run."""


class Machine:
    """A device, its clock, and what was measured on it so far.

    Args:
        dry: use the CPU, tiny shapes and one run of everything.
        seconds: time for each contender.
        deadline: ``time.monotonic()`` after which no further point begins.
        only: measure only points whose name contains this.
        clip: the video of the parts that need a real one; None for the one in the folder of shared data.
        compile_modes: modes of ``torch.compile`` whose contenders are wanted; for ``"max-autotune"`` it searches for
            minutes.
    """

    def __init__(
        self,
        *,
        dry: bool,
        seconds: float,
        deadline: float,
        only: str = "",
        clip: str | None = None,
        compile_modes: Collection[str] = COMPILE_MODES,
    ) -> None:
        self.dry = dry
        self.seconds_each = 0.0 if dry else seconds
        self.deadline = deadline
        self.only = only
        self.clip = clip
        self.compile_modes = compile_modes
        self.left_out: list[str] = []
        self.failures: list[str] = []  # points and contenders that could not be measured, and why
        self._dropped: set[str] = set()  # contenders of the point under way
        self._compiling = 0
        self.device = torch.device("cpu" if dry else "cuda")
        self.implementation = "reference" if dry else "triton"  # of our operations

    def shape(self, true: Sequence[int], tiny: Sequence[int]) -> tuple[int, ...]:
        """Return the shape to use: ``tiny`` in a dry run."""
        return tuple(tiny if self.dry else true)

    def wants(self, name: str, *, seconds: float = 10.0) -> bool:
        """Return whether to measure a point: it was asked for, and there is time for it, compilation included."""
        if self.only not in name:
            return False
        if self.dry and seconds >= _COMPILING:
            # Compiling is what takes the time of a dry run, and two points go through all of a part's code.
            self._compiling += 1
            return self._compiling <= 2
        if time.monotonic() + seconds > self.deadline:
            self.left_out.append(name)
            return False
        return True

    def compile(self, function: Callable[..., Any], mode: str = "max-autotune") -> Callable[..., Any]:
        """Return ``torch.compile(mode=mode)`` of a function.

        Without its own CUDA graphs: every contender is captured in one by :meth:`seconds`, which spares this one the
        copies of its inputs into static buffers. Before PyTorch 2.13 convolutions are chosen among cuDNN's alone: the
        Triton templates with 8 warps return wrong results there for kernels larger than 1x1 (pytorch/pytorch#173068).
        """
        if mode not in self.compile_modes:

            def left_out(*args: Any) -> Any:
                raise LeftOut

            return left_out
        if self.dry:
            return torch.compile(function, backend="aot_eager", dynamic=False)
        if mode == "default":
            return torch.compile(function, dynamic=False)
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            from torch._inductor import config

            config.max_autotune_conv_backends = "ATEN"
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def trying(self, contender: str) -> Iterator[None]:
        """Leave a contender out of the point under way where the block fails; the others are measured all the same."""
        try:
            yield
            self.synchronize()
        except LeftOut:
            self._dropped.add(contender)
        except Exception as error:
            self._dropped.add(contender)
            self._note(contender, error)

    def _note(self, what: str, error: Exception) -> None:
        """Note a failure, and let go of what it holds; raise it again where the device is lost with it."""
        traceback.print_exception(error)
        first = next(iter(str(error).strip().splitlines()), "")
        self.failures.append(f"{what}: {type(error).__name__}: {first[:200]}")
        traceback.clear_frames(error.__traceback__)  # tensors among them
        try:
            self.synchronize()
        except Exception:
            raise error from None

    def _captured(self, run: Callable[[], Any], pool: Any) -> Callable[[], Any]:
        """Return the replay of a CUDA graph of ``run``, so that launching takes no part in the time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    @functools.cached_property
    def _flush_buffer(self) -> torch.Tensor:
        return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def seconds(
        self, contenders: Sequence[Contender], *, launched: Collection[str] = (), flush: bool = True
    ) -> dict[str, list[float]]:
        """Time the contenders in turn, round after round; those that fail are left out of the result.

        The graphs share their memory: each replay writes whatever it reads, and what it returns is not looked at.

        Args:
            contenders: what to run; each has run before.
            launched: names of those that are launched anew; of the others a CUDA graph is replayed.
            flush: overwrite the L2 cache before each run.
        """
        times: dict[str, list[float]] = {}
        if self.dry:
            for contender in contenders:
                with self.trying(contender.name):
                    spent = []
                    for _ in range(3):
                        started = time.perf_counter()
                        contender.run()
                        spent.append(time.perf_counter() - started)
                    times[contender.name] = spent
            return times
        pool, runs = torch.cuda.graph_pool_handle(), []
        for contender in contenders:
            with self.trying(contender.name):
                run = contender.run if contender.name in launched else self._captured(contender.run, pool)
                for _ in range(_WARM_UP):
                    run()
                runs.append(run)
                times[contender.name] = []
        self.synchronize()
        deadline = time.perf_counter() + self.seconds_each * len(runs)
        rounds = 0
        while runs and (rounds < 10 or (time.perf_counter() < deadline and rounds < 2000)):
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
            for run, (begin, end) in zip(runs, events, strict=True):
                if flush:
                    self._flush_buffer.zero_()
                begin.record()
                run()
                end.record()
            self.synchronize()
            rounds += 1
            for spent, (begin, end) in zip(times.values(), events, strict=True):
                spent.append(begin.elapsed_time(end) * 1e-3)
        return times

    def measure(
        self,
        point: Point,
        *,
        share_of: tuple[str, float] | None = None,
        launched: Collection[str] = (),
        flush: bool = True,
    ) -> list[Row]:
        """Check a point, time it, and return its rows; contenders that fail, here or in the check, have none.

        Args:
            point: the operation and its contenders.
            share_of: name and value, in the point's unit, of the limit whose share is noted in each row.
            launched: see :meth:`seconds`.
            flush: see :meth:`seconds`.
        """
        self._dropped.clear()
        point.check()
        right = [contender for contender in point.contenders if contender.name not in self._dropped]
        times = self.seconds(right, launched=launched, flush=flush)
        now = self.environment()
        rows = []
        for contender in (contender for contender in right if contender.name in times):
            row = line(point, contender, times[contender.name])
            row["milliseconds"] = round(sorted(times[contender.name])[len(times[contender.name]) // 2] * 1e3, 5)
            if share_of is not None:
                row[f"share_of_{share_of[0]}"] = round(row["p50"] / share_of[1], 4)
            rows.append(row | now)
        print(f"{point.what}, {point.data}: done", file=sys.stderr, flush=True)
        return rows

    def environment(self) -> Row:
        """Return what a figure depends on besides the code under test."""
        row = environment()
        if self.dry:
            return row | {"dry_run": True}
        return row | {"device": torch.cuda.get_device_name(), "driver": driver_version(), "cpu": row["device"]}

    def peak_bytes(self, make: Callable[[], Callable[[], Any]]) -> int | None:
        """Return the device memory that ``make`` and its second call take at most; None in a dry run.

        As PyTorch's allocator counts it, tensors that were there before left out. The first call may try algorithms.
        """
        if self.dry:
            return None
        gc.collect()
        before = torch.cuda.memory_allocated()
        run = make()
        run()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @functools.cached_property
    def copy_gb_per_second(self) -> float:
        """Bandwidth of a large copy on the device, bytes read and written."""
        (size,) = self.shape([2**30], [2**12])
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        contender = Contender("copy", lambda: target.copy_(source), 2 * size)
        times = sorted(self.seconds([contender], flush=False)["copy"])
        return 2 * size / times[len(times) // 2] / 1e9

    @functools.cached_property
    def matmul_tflop_per_second(self) -> float:
        """Rate of a large bf16 matrix product on random data."""
        (n,) = self.shape([8192], [16])
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        contender = Contender("matmul", lambda: a @ b, 2 * n**3)
        times = sorted(self.seconds([contender], flush=False)["matmul"])
        return 2 * n**3 / times[len(times) // 2] / 1e12

    @contextlib.contextmanager
    def room(self, name: str) -> Iterator[None]:
        """Free what the point of this name used when it is done; note where it fails, and go on with the next."""
        try:
            yield
        except Exception as error:
            self._note(name, error)
        finally:
            torch.compiler.reset()
            gc.collect()
            if not self.dry:
                torch.cuda.empty_cache()


@functools.cache
def driver_version() -> str:
    """Return the version of the GPU's driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"unknown (CUDA {torch.version.cuda}, {os.uname().release})"
