"""The progress bar of training."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..codec import EncodeObserver
from ..train import Trainer

__all__ = ["progress_observer"]

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.fields[detail]}"),
    TimeRemainingColumn(elapsed_when_finished=True),
)
_STAGES = {"load": "reading frames", "train": "training", "code": "coding", "check": "decoding to check"}


class _Bar:
    """Shows stage, epoch, PSNR of the last epoch, steps per second and the time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def stage(self, name: str) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(_STAGES[name], total=None, detail="")

    def step(self, trainer: Trainer) -> None:
        assert self.task is not None
        if self.progress.tasks[0].total is None:
            self.progress.reset(self.task, total=trainer.total_steps, completed=trainer.resumed_from)
        epoch = min(trainer.step // trainer.steps_per_epoch + 1, trainer.config.epochs)
        psnr = f"{trainer.history[-1].psnr_db:.2f} dB" if trainer.history else "-- dB"
        speed = self.progress.tasks[0].speed
        rate = f"{speed:.1f} steps/s" if speed else ""
        self.progress.update(
            self.task, completed=trainer.step, detail=f"epoch {epoch}/{trainer.config.epochs}  {psnr}  {rate}"
        )


class _Lines:
    """For logs: a line when a stage begins, and one every ten seconds of training."""

    seconds = 10.0

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()

    def stage(self, name: str) -> None:
        print(f"{_STAGES[name]} ...", file=sys.stderr, flush=True)
        self.started = self.last = time.monotonic()

    def step(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if now - self.last < self.seconds or trainer.step % trainer.steps_per_epoch:
            return
        self.last = now
        rate = (trainer.step - trainer.resumed_from) / (now - self.started)
        left = datetime.timedelta(seconds=round((trainer.total_steps - trainer.step) / rate))
        last = trainer.history[-1]
        print(
            f"epoch {last.epoch}/{trainer.config.epochs}  {last.psnr_db:.2f} dB  {rate:.1f} steps/s  {left} left",
            file=sys.stderr,
            flush=True,
        )


class _Quiet:
    def stage(self, name: str) -> None:
        pass

    def step(self, trainer: Trainer) -> None:
        pass


@contextmanager
def progress_observer(*, quiet: bool) -> Iterator[EncodeObserver]:
    """Yield an observer that reports on standard error: a bar on a terminal, lines elsewhere, or nothing."""
    if quiet:
        yield _Quiet()
        return
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines()
        return
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        yield _Bar(progress)
