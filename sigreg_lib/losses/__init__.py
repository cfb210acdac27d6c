"""Losses on batches of representations: Weak and Strong SIGReg."""

from sigreg_lib.losses.sigreg import (
    STRONG_GRIDS,
    SIGReg,
    WeakSIGReg,
    combine,
    strong_floor,
    strong_sigreg,
    strong_values,
    weak_floor,
    weak_sigreg,
    weak_values,
)

__all__ = [
    "STRONG_GRIDS",
    "SIGReg",
    "WeakSIGReg",
    "combine",
    "strong_floor",
    "strong_sigreg",
    "strong_values",
    "weak_floor",
    "weak_sigreg",
    "weak_values",
]
