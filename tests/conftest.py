"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import ROOT

# One thread a process: sums are made in the same order on every machine, and the parallel workers
# of pytest-xdist do not compete for the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """Folder of CIFAR-100: SIGREG_DATA if set, else ../shared/data/cifar100, else a skip.

    A SIGREG_DATA that points nowhere is an error of the user's, not a reason to skip.
    """
    named = os.environ.get("SIGREG_DATA")
    root = Path(named).expanduser() if named else ROOT.parent / "shared" / "data" / "cifar100"
    if root.is_dir():
        return root
    if named:
        pytest.fail(f"SIGREG_DATA={named} is not a folder")
    pytest.skip("CIFAR-100 is not here: set SIGREG_DATA to its folder")


@pytest.fixture(autouse=True)
def _global_generator() -> None:
    """Whoever draws from torch's own generator draws the same, whatever ran before it."""
    torch.manual_seed(0)
