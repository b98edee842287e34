"""Peak memory on the CPU, measured in a process of its own.

The figure is the high-water mark of the process's resident memory (Linux's VmHWM) while something is made and runs
twice, less what was resident before that. So it counts what PyTorch's allocator holds at once, and as well what no
profiler of PyTorch sees: the scratch memory and packed weights of oneDNN and of this package's kernels.

Two things are left out. Code, up to 150 MB of it loaded when it is first needed: the same on something small comes
first. And what malloc keeps of freed blocks, which depends on the order in which they came and differs by 50 MB from
one program to the next: it is told to give them back at once, so that figures repeat to 0.1 %.

It takes a process of its own, because memory that something else left behind would serve again unseen. And it is not
getrusage's ru_maxrss, which survives exec and would be the parent's.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .run import ROOT

__all__ = ["peak_bytes"]

# With a fixed threshold every larger block is a mapping of its own.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_bytes(field: str) -> int:
    """Return VmRSS, the resident memory of this process, or VmHWM, the most that it was."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_bytes(make: str, small: str, *arguments: str) -> int | None:
    """Return the peak memory of a function's result, None where the system does not tell it.

    Args:
        make: ``"module:function"``; what ``function(*arguments)`` returns is called without arguments.
        small: a function that makes the same, but small.
        arguments: of both.
    """
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", "bench.memory", make, small, *arguments]
    environment = os.environ | _MALLOC
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def _function(name: str) -> Callable[..., Callable[[], Any]]:
    module, attribute = name.split(":")
    function: Callable[..., Callable[[], Any]] = getattr(importlib.import_module(module), attribute)
    return function


def main(argv: Sequence[str]) -> int:
    """Print the peak memory of what the command line names."""
    make, small, *arguments = argv
    _function(small)(*arguments)()
    before = resident_bytes("VmRSS")
    run = _function(make)(*arguments)
    for _ in range(2):
        run()
    print(resident_bytes("VmHWM") - before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
