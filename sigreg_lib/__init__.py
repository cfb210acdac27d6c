"""SIGReg-style regularization for supervised deep learning.

The losses: :func:`weak_sigreg`, :func:`strong_sigreg`, and the modules :class:`WeakSIGReg` and
:class:`SIGReg` that draw their own random matrix. :func:`attach` taps layers of any model,
:func:`combine` forms the objective, :data:`RECIPES` holds every experiment and :func:`train` runs
one.
"""

from sigreg_lib.attach import attach
from sigreg_lib.losses import (
    STRONG_GRIDS,
    SIGReg,
    WeakSIGReg,
    combine,
    strong_floor,
    strong_sigreg,
    weak_floor,
    weak_sigreg,
)
from sigreg_lib.recipes import RECIPES, Recipe
from sigreg_lib.train import Run, sweep, train

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "STRONG_GRIDS",
    "Recipe",
    "Run",
    "SIGReg",
    "WeakSIGReg",
    "attach",
    "combine",
    "strong_floor",
    "strong_sigreg",
    "sweep",
    "train",
    "weak_floor",
    "weak_sigreg",
]
