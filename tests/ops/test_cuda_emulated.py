"""The CUDA kernels without a GPU: by threads of the processor, on an emulation of what they use of one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kernels", KERNELS)
def test_emulated_ahead_of_time(kernels, tmp_path):
    program, source = tmp_path / "emulation", CSRC / "tests" / f"test_{kernels}_cuda.cpp"
    options = ["-std=c++17", "-O1", "-pthread", "-fno-strict-aliasing"]
    paths = [f"-I{CSRC / 'tests' / 'emulation'}", f"-I{CSRC}"]
    subprocess.run(["c++", *options, *paths, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
