"""lam="auto": the regularizer's weight from the gradients of the first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 100  # that are looked at
TARGET = 0.03  # norm of the weighted gradient of R over that of the task; 21 says how it was chosen

MOST = 9.0  # of lam / (1 - lam), or lam: a regularizer without a gradient must not silence the task
TINY = 1e-12  # a norm below it counts as none


class Balance:
    r"""A weight that gives the regularizer's gradient a set share of the task's.

    With q the geometric mean over the first steps of :math:`\lVert \nabla R \rVert / \lVert \nabla
    \mathrm{task} \rVert`, both in all parameters and neither weighted,

    .. math:: \lambda q = \rho \ \text{(additive)}, \qquad
              \frac{\lambda}{1 - \lambda}\, q = \rho \ \text{(convex)}.

    lam is at most 0.9 (convex) or 9 (additive). Steps in which either gradient is zero, as R's is
    where all samples are equal, do not enter the mean; if all are such, q counts as 1. While it
    looks, a step is taken with the weight found so far; afterwards the weight stays. Nothing waits
    for the device.

    Args:
        convex: as in :func:`~sigreg_lib.losses.combine`.
        device: of the gradients.
        target: :math:`\rho`, dimensionless.
        steps: how many to look at.
    """

    def __init__(
        self,
        *,
        convex: bool,
        device: torch.device,
        target: float = TARGET,
        steps: int = STEPS,
    ) -> None:
        self.convex, self.target, self.steps = convex, target, steps
        self.seen = 0
        self.log_ratio, self.alive = (torch.zeros((), device=device) for _ in range(2))
        """Sum of the logarithm of the two norms' ratio, and over how many of the steps seen."""

    @property
    def done(self) -> bool:
        """Enough steps were seen: the weight no longer changes."""
        return self.seen >= self.steps

    def see(self, task: Sequence[Tensor], regularizer: Sequence[Tensor]) -> None:
        """Take account of a step's gradients, one tensor a parameter."""
        norms = torch.stack([torch.nn.utils.get_total_norm(g) for g in (regularizer, task)])
        alive = (norms > TINY).all() & norms.isfinite().all()
        logs = norms.log()
        self.log_ratio = self.log_ratio + torch.where(alive, logs[0] - logs[1], 0.0)
        self.alive = self.alive + alive
        self.seen += 1

    def weight(self) -> Tensor:
        """lam of the steps seen so far, scalar.

        Raises:
            RuntimeError: none was seen.
        """
        if not self.seen:
            raise RuntimeError("lam='auto' has seen no step yet")
        mean = self.log_ratio / self.alive.clamp_min(1)
        log_odds = (math.log(self.target) - mean).clamp(max=math.log(MOST))
        return torch.sigmoid(log_odds) if self.convex else log_odds.exp()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seen": self.seen, "log_ratio": self.log_ratio, "alive": self.alive}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        device = self.log_ratio.device
        self.seen = state["seen"]
        self.log_ratio, self.alive = (state[key].to(device) for key in ("log_ratio", "alive"))
