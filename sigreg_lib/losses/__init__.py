"""Losses on batches of representations: Weak and Strong SIGReg, their neighbours, whitening."""

from sigreg_lib.losses.floors import strong_floor, weak_floor
from sigreg_lib.losses.neighbours import (
    DeCov,
    VCReg,
    barlow_twins,
    covariance_term,
    decov,
    invariance_term,
    variance_term,
    vicreg,
)
from sigreg_lib.losses.parts import (
    LogWeakSIGReg,
    WeakPart,
    log_weak_sigreg,
    log_weak_values,
    weak_parts,
)
from sigreg_lib.losses.sigreg import (
    STRONG_GRIDS,
    SIGReg,
    WeakSIGReg,
    combine,
    strong_sigreg,
    strong_values,
    weak_sigreg,
    weak_values,
)
from sigreg_lib.losses.whitening import (
    WHITENINGS,
    batch_normalize,
    iterative_whiten,
    whiten,
    whitening_penalty,
)

__all__ = [
    "STRONG_GRIDS",
    "WHITENINGS",
    "DeCov",
    "LogWeakSIGReg",
    "SIGReg",
    "VCReg",
    "WeakPart",
    "WeakSIGReg",
    "barlow_twins",
    "batch_normalize",
    "combine",
    "covariance_term",
    "decov",
    "invariance_term",
    "iterative_whiten",
    "log_weak_sigreg",
    "log_weak_values",
    "strong_floor",
    "strong_sigreg",
    "strong_values",
    "variance_term",
    "vicreg",
    "weak_floor",
    "weak_parts",
    "weak_sigreg",
    "weak_values",
    "whiten",
    "whitening_penalty",
]
