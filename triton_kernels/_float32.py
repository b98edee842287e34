"""How products of float32 are computed."""

import torch


def precision_of(dtype):
    """Return "tf32" or "ieee": for float32 what PyTorch's convolutions are told to, other dtypes have no choice."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
