"""Packages that are loaded when they are used: what runs without them, and what says that they are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hflfnerv._optional import Lazy
from hflfnerv.data import load_video, write_frames
from hflfnerv.errors import BackendUnavailable

FRAMES = np.zeros((2, 4, 6, 3), np.uint8)


def test_lazy_says_what_needs_a_missing_package(monkeypatch):
    lazy = Lazy("no_such_package.part", "flying carpets")
    with pytest.raises(
        BackendUnavailable, match=r"^flying carpets need the package no_such_package \(.*\): pip install"
    ):
        _ = lazy.fly
    assert Lazy("json", "nothing").dumps(1) == "1"


def test_nothing_but_torch_and_numpy_is_needed_to_import():
    # As on a bare machine: what decodes, trains and measures there.
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['av', 'PIL', 'psutil', 'safetensors', 'rich', 'constriction'])\n"
        "import bench.checkout, bench.networks, bench.encode, bench.check, hflfnerv.cli\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_arrays_need_no_pyav(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "av")
    write_frames(tmp_path / "clip.npy", FRAMES, 25)
    assert load_video(tmp_path / "clip.npy").shape == (2, 4, 6)
    assert "av" not in sys.modules
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(BackendUnavailable, match="video files need the package av"):
        load_video(tmp_path / "clip.mp4")
