"""The compiled module ``hflfnerv._C``, loaded when it is first needed.

Nothing of hflfnerv needs it to be imported. What runs only there asks :func:`load`, which says what is missing and how
to build it; an implementation table asks :func:`unavailable`.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from .errors import BackendUnavailable

__all__ = ["load", "unavailable", "unavailable_cuda"]

_REMEDY = (
    "install a C++17 compiler (Debian/Ubuntu: apt install g++), then run `pip install --force-reinstall --no-deps .` "
    "in a checkout, or `python setup.py build_ext --inplace` to use the checkout itself"
)
_CUDA_REMEDY = "install CUDA's nvcc and build again with HFLFNERV_CUDA=1"


@functools.cache
def _module() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("hflfnerv._C"), None
    except ImportError as error:
        return None, f"the extension hflfnerv._C is not usable: {_cause(error)}; {_REMEDY}"


def _record() -> dict[str, Any] | None:
    """Return what setup.py wrote about the build, or None if there is nothing to be read."""
    try:
        record: dict[str, Any] = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def _cause(error: ImportError) -> str:
    record = _record()
    if record is None:
        return "it was never built" if isinstance(error, ModuleNotFoundError) else str(error)
    if not record["built"]:
        return f"its build failed ({record['reason']})"
    return str(error)


def unavailable() -> str | None:
    """Return why ``hflfnerv._C`` cannot be used and how to build it, or None if it can."""
    return _module()[1]


def unavailable_cuda() -> str | None:
    """Return why there are no CUDA kernels in ``hflfnerv._C`` and how to build them, or None if there are."""
    module, reason = _module()
    if reason is not None or hasattr(module, "cuda_architectures"):
        return reason
    cause = (_record() or {}).get("no_cuda") or "the build kept no reason"
    return f"hflfnerv._C was built without CUDA ({cause}); {_CUDA_REMEDY}"


def load() -> Any:
    """Return the module ``hflfnerv._C``.

    Raises:
        BackendUnavailable: it was not built or cannot be loaded; the message says why and how to build it.
    """
    module, reason = _module()
    if reason is not None:
        raise BackendUnavailable(reason)
    return module
