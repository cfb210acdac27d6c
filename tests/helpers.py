"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent  # the project's root


def seeded(seed: int) -> torch.Generator:
    """A new CPU generator with this seed: every draw of a test names its own."""
    return torch.Generator().manual_seed(seed)
