"""Makes a checkout importable where the package cannot be installed: ``import bench.checkout``.

Installed, ``triton_kernels/`` is the package ``hflfnerv.triton_kernels``. In a checkout it lies beside ``hflfnerv/``,
where Python does not look for it, so the checkout's root is added to the places where hflfnerv's submodules are looked
for. As a pytest plugin (``PYTEST_PLUGINS=bench.checkout`` with the root in PYTHONPATH) it does the same for the tests
and the processes that they start. Where the package is installed, nothing changes.
"""

from __future__ import annotations

import importlib.util
import pathlib

import hflfnerv

ROOT = pathlib.Path(__file__).resolve().parents[1]

if importlib.util.find_spec("hflfnerv.triton_kernels") is None:
    hflfnerv.__path__.append(str(ROOT))
