"""Sums over processes, for losses computed on the batch of all of them.

A loss of the whole batch is the same number in every process. Data-parallel training averages the
processes' gradients, which divides by their number W; so a loss multiplies its local gradient by W
and the average is the gradient of the one loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def process_count(gather: bool) -> int:
    """W, the number of processes that share a batch; 1 when ``gather`` is off.

    Raises:
        RuntimeError: ``gather`` is on and no process group has been initialized.
    """
    if not gather:
        return 1
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "gather_distributed=True needs an initialized process group: call "
            "torch.distributed.init_process_group first, or leave it False in a single process"
        )
    return dist.get_world_size()


def sum_over_processes(tensor: Tensor, gather: bool) -> Tensor:
    """The sum of ``tensor`` over all processes (any shape), without a gradient.

    Returns ``tensor`` itself when ``gather`` is off or there is one process.
    """
    if process_count(gather) == 1:
        return tensor
    total = tensor.detach().contiguous().clone()
    dist.all_reduce(total)
    return total


def sample_count(local: int, device: torch.device, gather: bool) -> int:
    """N over all processes, which may hold different numbers of samples."""
    if process_count(gather) == 1:
        return local
    return int(sum_over_processes(torch.tensor(float(local), device=device), gather).item())
