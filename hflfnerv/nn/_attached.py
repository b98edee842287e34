"""What users attach to a module: it acts when the module is called, and not where a kernel does the module's work."""

from __future__ import annotations

from torch import nn

__all__ = ["attached"]

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def attached(module: nn.Module) -> str | None:
    """Return what acts when a module is called, beside its class, in words; or None.

    Pruning, and weight and spectral norm of :mod:`torch.nn.utils`, are forward pre-hooks. Parametrizations are nothing
    of the kind: they act when a parameter is read.
    """
    for attribute, kind in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            return f"has a {kind} ({getattr(hook, '__name__', type(hook).__name__)})"
    if "forward" in vars(module):
        return "has a forward of its own, set on the object"
    return None
