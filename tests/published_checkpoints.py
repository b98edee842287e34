"""Training checkpoints in the names of the published code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one of our networks by the names that HNeRV and NVR-RRCP give them."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in ("decoder", "hfd"):
            name = {
                "stem": f"decoder.0.conv.downconv.{parts[-1]}",
                "head": f"head_layer.{parts[-1]}",
            }.get(parts[1]) or f"decoder.{int(parts[2]) + 1}.conv.upconv.0.{parts[-1]}"
        elif parts[0] in ("lfd1", "lfd2"):
            number = parts[0][-1]
            name = {
                "stem": f"lr_decoder{number}.0.0.{parts[-1]}",
                "head": f"lr_head_layer{number}.{parts[-1]}",
            }.get(parts[1]) or f"lr_decoder{number}.{int(parts[2]) + 1}.conv.upconv.0.{parts[-1]}"
        renamed[name] = tensor
    return renamed
