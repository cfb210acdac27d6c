"""The dtype of statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """float32; float64 stays float64."""
    return value if value.dtype == torch.float64 else value.float()
