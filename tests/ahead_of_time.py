"""The GPUs that kernels are compiled for ahead of time, by compute capability, and what depends on Triton's version."""

from __future__ import annotations

import importlib.metadata
import re

#: The PTX instruction of the tensor cores.
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def limits(capability):
    """Return the device's capability, shared memory of one program and multiprocessors, as the kernels' tables ask."""
    from hflfnerv.triton_kernels._tiles import Limits

    shared, multiprocessors = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148)}[capability]
    return Limits(divmod(capability, 10), shared, multiprocessors)


def triton_version():
    """Return the major and the minor number of the Triton that compiles."""
    major, minor = re.findall(r"\d+", importlib.metadata.version("triton"))[:2]
    return int(major), int(minor)


def matrix_int8(capability):
    """Return the PTX instruction of the tensor cores for 8-bit integers; before 3.8 Triton keeps sm_80's on sm_100."""
    return MATRIX[80] if capability == 100 and triton_version() < (3, 8) else MATRIX[capability]
