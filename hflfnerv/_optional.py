"""Packages that are loaded when they are first used, and missed no earlier."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import BackendUnavailable

__all__ = ["Lazy"]


class Lazy:
    """Stands for a module until something of it is asked for.

    Args:
        name: of the module.
        purpose: what needs it, in the plural.

    Raises:
        BackendUnavailable: on the first use, where it is not installed; says what needs it.
    """

    def __init__(self, name: str, purpose: str) -> None:
        self._name = name
        self._purpose = purpose

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
        except ImportError as error:
            package = self._name.partition(".")[0]
            raise BackendUnavailable(
                f"{self._purpose} need the package {package} ({error}): pip install {package}"
            ) from error
        return getattr(module, attribute)
