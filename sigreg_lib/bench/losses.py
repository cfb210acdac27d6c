"""The losses by themselves, forward and backward: at the tables' sizes, and against C and K."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from sigreg_lib.bench.timing import alternate, extra_memory, plain, ratio
from sigreg_lib.losses import strong_sigreg, weak_sigreg
from sigreg_lib.sketch import directions, gaussian

SIZES = ((128, 256, 64), (128, 1024, 64), (8192, 768, 64))  # N, C, K
LAYERS = 6  # of a vit, tapped at 128 x 256 each
CHANNELS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLUMNS = (8, 16, 32, 64, 128, 256, 512)


def loss_functions(
    loss: str, n: int, c: int, k: int, *, layers: int = 1, device: str = "cpu"
) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of a loss on ``layers`` Gaussian batches: ours and plain.

    ``loss`` is ``weak``, ``strong`` or ``covariance``, Weak without a sketch. Ours takes all layers
    in one call.
    """
    reference = plain("reference")
    g = torch.Generator(device).manual_seed(0)
    shape = (n, c) if layers == 1 else (layers, n, c)
    z = torch.randn(shape, generator=g, device=device).requires_grad_()
    each = [layer.detach().clone().requires_grad_() for layer in z.view(-1, n, c)]
    make = {"weak": gaussian, "strong": directions}
    matrix = make[loss](c, k, generator=g, device=device) if loss in make else None
    ours_function = strong_sigreg if loss == "strong" else weak_sigreg
    plain_function = reference.strong if loss == "strong" else reference.weak

    def ours() -> None:
        torch.autograd.grad(ours_function(z, matrix), z)

    def plainly() -> None:
        value = sum(plain_function(layer, matrix) for layer in each) / layers
        torch.autograd.grad(value, each)

    return {"ours": ours, "plain": plainly}


def bench_loss(
    loss: str, n: int, c: int, k: int, *, layers: int = 1, rounds: int = 15, device: str = "cpu"
) -> dict[str, Any]:
    """Time and extra memory of one loss at one size, forward and backward."""
    functions = loss_functions(loss, n, c, k, layers=layers, device=device)
    times = alternate(functions, rounds=rounds)
    return {
        "loss": loss,
        "n": n,
        "c": c,
        "k": None if loss == "covariance" else k,
        "layers": layers,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "bytes": {name: extra_memory(f, device) for name, f in functions.items()},
        "ratio": ratio(times, "plain", "ours"),
    }


def bench_losses(*, rounds: int = 15, device: str = "cpu") -> list[dict[str, Any]]:
    """The losses at the three sizes, and all layers of a vit in one call."""
    rows = [
        bench_loss(loss, *size, rounds=rounds, device=device)
        for loss in ("strong", "weak", "covariance")
        for size in SIZES
    ]
    for loss in ("strong", "weak"):
        rows.append(bench_loss(loss, *SIZES[0], layers=LAYERS, rounds=rounds, device=device))
    return rows


def bench_scaling(
    *,
    channels: tuple[int, ...] = CHANNELS,
    columns: tuple[int, ...] = COLUMNS,
    rounds: int = 7,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Cost against C (N = 128, K = 64) and against K (N = 128, C = 1024)."""
    sizes = [(c, 64) for c in channels] + [(1024, k) for k in columns if k != 64]
    rows = []
    for c, k in sizes:
        for loss in ("covariance", "weak", "strong") if k == 64 else ("weak", "strong"):
            rows.append(bench_loss(loss, 128, c, k, rounds=rounds, device=device))
    return rows
