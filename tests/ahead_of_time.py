"""The GPUs that kernels are compiled for ahead of time, by compute capability."""

from __future__ import annotations

#: The PTX instruction of the tensor cores.
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


def limits(capability):
    """Return the device's capability, shared memory of one program and multiprocessors, as the kernels' tables ask."""
    from hflfnerv.triton_kernels._tiles import Limits

    shared, multiprocessors = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148)}[capability]
    return Limits(divmod(capability, 10), shared, multiprocessors)
