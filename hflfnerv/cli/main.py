"""Reads the command line and turns every expected error into one line."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from .._memory import keep_freed_memory
from .._version import __version__
from . import bench, decode, demo, encode, evaluate, explain, import_checkpoint, info, rd

__all__ = ["build_parser", "main"]

_COMMANDS = (encode, decode, info, evaluate, rd, import_checkpoint, demo, bench, explain)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="hflfnerv",
        description="Neural video codec: a video becomes a small network, and any of its frames decodes on its own.",
    )
    parser.add_argument("--version", action="version", version=f"hflfnerv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 1 for an error, 2 for wrong usage, 130 when interrupted, 143 when terminated. Training that was stopped by either
    signal keeps its checkpoint and returns 130.
    """
    # Before torch is loaded. GNU OpenMP's threads spin for about a millisecond when they wait, which makes a training
    # step many times slower as soon as another program wants one of the cores; 30 microseconds cost 8 % on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _print_any_name()
    arguments = build_parser().parse_args(_with_negative_frames(sys.argv[1:] if argv is None else argv))
    keep_freed_memory()
    # Imported late: --help and usage errors need no torch.
    from .._device import device_failure, not_enough_memory
    from ..errors import BitstreamError, HflfnervError, TrainingInterrupted

    decoding = arguments.command in ("decode", "info", "eval")
    try:
        with _termination_as_exception():
            code: int = arguments.run(arguments)
        return code
    except TrainingInterrupted as error:
        print(f"hflfnerv: {error}", file=sys.stderr)
        return 130
    except _Terminated:
        print("hflfnerv: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("hflfnerv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except MemoryError as error:
        print(f"hflfnerv: error: {not_enough_memory(str(error), decoding=decoding)}", file=sys.stderr)
        return 1
    except (HflfnervError, OSError, ValueError, TypeError) as error:
        # The reader of a bitstream does not know which file its bytes are from.
        file = f"{arguments.input}: " if decoding and isinstance(error, BitstreamError) else ""
        print(f"hflfnerv: error: {file}{_one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        failure = device_failure(error, decoding=decoding)
        if failure is None:
            raise
        print(f"hflfnerv: error: {failure}", file=sys.stderr)
        return 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: what is half-written is removed on the way out, as after Ctrl-C."""


@contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Let SIGTERM raise in the block, once: a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # somebody else decides what it does
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _print_any_name() -> None:
    """Let standard output show a file name that is no text in its encoding, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _with_negative_frames(argv: Sequence[str]) -> list[str]:
    """Return the arguments with ``--frames -2:`` as one, since argparse takes ``-2:`` for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--frames" and re.match(r"-\d", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
