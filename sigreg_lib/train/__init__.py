"""The training loop: one step, one epoch, one run, many runs."""

from sigreg_lib.train.ensemble import train_seeds
from sigreg_lib.train.loop import Trainer
from sigreg_lib.train.run import train
from sigreg_lib.train.sweep import Run, sweep

__all__ = ["Run", "Trainer", "sweep", "train", "train_seeds"]
