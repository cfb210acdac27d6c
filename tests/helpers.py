"""What several test files share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent  # the project's root


def seeded(seed: int) -> torch.Generator:
    """A new CPU generator with this seed: every draw of a test names its own."""
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Inside, whatever waits for the CUDA device raises RuntimeError."""

    def set_mode(mode: str) -> None:
        with warnings.catch_warnings():  # each change says that the mode is a prototype
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)

    try:
        set_mode("error")
        yield
    finally:
        set_mode("default")
