"""lam="auto": the regularizer's weight from the gradients of the first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 100  # that are looked at
TARGET = 1.0  # norm of the weighted gradient of R over that of the task: as strong as it


class Balance:
    r"""A weight that gives the regularizer's gradient a set share of the task's.

    With q the geometric mean over the first steps of :math:`\lVert \nabla R \rVert / \lVert \nabla
    \mathrm{task} \rVert`, both in all parameters and neither weighted,

    .. math:: \lambda q = \rho \ \text{(additive)}, \qquad
              \frac{\lambda}{1 - \lambda}\, q = \rho \ \text{(convex)}.

    While it looks, a step is taken with the weight found so far; afterwards the weight stays.
    Nothing waits for the device.

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
        self.log_ratio = torch.zeros((), device=device)
        """Sum over the steps seen of the logarithm of the two norms' ratio."""

    @property
    def done(self) -> bool:
        """Enough steps were seen: the weight no longer changes."""
        return self.seen >= self.steps

    def see(self, task: Sequence[Tensor], regularizer: Sequence[Tensor]) -> None:
        """Take account of a step's gradients, one tensor a parameter."""
        norms = torch.stack([torch.nn.utils.get_total_norm(g) for g in (regularizer, task)])
        logs = norms.clamp_min(1e-30).log()  # of a dead network both are 0
        self.log_ratio = self.log_ratio + (logs[0] - logs[1])
        self.seen += 1

    def weight(self) -> Tensor:
        """lam of the steps seen so far, scalar.

        Raises:
            RuntimeError: none was seen.
        """
        if not self.seen:
            raise RuntimeError("lam='auto' has seen no step yet")
        odds = torch.exp(math.log(self.target) - self.log_ratio / self.seen)
        return odds / (1 + odds) if self.convex else odds

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seen": self.seen, "log_ratio": self.log_ratio}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self.seen, self.log_ratio = state["seen"], state["log_ratio"].to(self.log_ratio.device)
