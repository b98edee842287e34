"""How the C library treats memory that is freed."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# The numbers of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors, and return whether that could be set.

    PyTorch takes the memory of each large tensor on the CPU from the C library, and the GNU C library gives it back to
    the system when the tensor is freed. The next one then begins with a page fault every 4 KiB, which takes longer than
    many an operation on it. It is a setting of the whole process, so it is for programs to call, not for libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
