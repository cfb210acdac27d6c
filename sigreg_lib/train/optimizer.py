"""The recipe's optimizer, its learning rate and its state, kept where a CUDA graph finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigreg_lib.recipes import Recipe


def build_optimizer(
    recipe: Recipe, parameters: list[Tensor], *, on_device: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer; ``on_device`` puts its learning rate into a tensor there."""
    lr: float | Tensor = recipe.lr
    if on_device:
        lr = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer]
    return make(parameters, lr=lr, weight_decay=recipe.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """In place where it is a tensor: a captured step reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over a state, but not where its learning rate lay: it may be of another device."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
