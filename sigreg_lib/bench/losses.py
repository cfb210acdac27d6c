"""The losses by themselves, forward and backward: at the tables' sizes, and against C and K."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sigreg_lib.attach import attach
from sigreg_lib.bench.timing import alternate, extra_memory, plain, ratio
from sigreg_lib.losses import strong_sigreg, weak_sigreg
from sigreg_lib.recipes import find
from sigreg_lib.sketch import directions, gaussian

SIZES = ((128, 256, 64), (128, 1024, 64), (8192, 768, 64))  # N, C, K
LAYERS = 6  # of a vit, tapped at 128 x 256 each
TRANSFORMERS = ("vit", "expert")
CHANNELS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLUMNS = (8, 16, 32, 64, 128, 256, 512)


def loss_functions(
    loss: str, n: int, c: int, k: int, *, layers: int = 1, device: str = "cpu"
) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of a loss on ``layers`` Gaussian batches: ours and plain.

    ``loss`` is ``weak``, ``strong`` or ``covariance``, Weak without a sketch. Ours takes all layers
    in one call. ``products`` are the matrix products of ours by themselves: what no version of it
    can do without.
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

    @torch.no_grad()
    def products() -> None:
        y = z if matrix is None else z @ matrix
        if loss != "strong":
            y = y @ (y.mT @ y)
        if matrix is not None:
            y @ matrix.mT

    return {"ours": ours, "plain": plainly, "products": products}


Case = tuple[str, int, int, int, int]  # loss, N, C, K, layers


def bench_cases(
    cases: list[Case], *, rounds: int = 15, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Time and extra memory of losses, forward and backward.

    All cases are timed in every round: what disturbs the machine for some seconds then falls on one
    round of each, not on all rounds of one.
    """
    functions = {
        (i, version): function
        for i, (*size, layers) in enumerate(cases)
        for version, function in loss_functions(*size, layers=layers, device=device).items()
    }
    times = alternate(functions, rounds=rounds)
    rows = []
    for i, (loss, n, c, k, layers) in enumerate(cases):
        own = {version: times[i, version] for version in ("plain", "ours", "products")}
        rows.append(
            {
                "loss": loss,
                "n": n,
                "c": c,
                "k": None if loss == "covariance" else k,
                "layers": layers,
                "seconds": {version: statistics.median(values) for version, values in own.items()},
                "bytes": {v: extra_memory(functions[i, v], device) for v in ("plain", "ours")},
                "ratio": ratio(own, "plain", "ours"),
            }
        )
    return rows


def bench_losses(*, rounds: int = 31, device: str = "cpu") -> list[dict[str, Any]]:
    """The losses at the three sizes, and all layers of a vit in one call."""
    cases = [(loss, *size, 1) for loss in ("strong", "weak", "covariance") for size in SIZES]
    cases += [(loss, *SIZES[0], LAYERS) for loss in ("strong", "weak")]
    return bench_cases(cases, rounds=rounds, device=device)


def bench_scaling(
    *,
    channels: tuple[int, ...] = CHANNELS,
    columns: tuple[int, ...] = COLUMNS,
    rounds: int = 15,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Cost against C (N = 128, K = 64) and against K (N = 128, C = 1024)."""
    cases = [(x, 128, c, 64, 1) for c in channels for x in ("covariance", "weak", "strong")]
    cases += [(x, 128, 1024, k, 1) for k in columns if k != 64 for x in ("weak", "strong")]
    return bench_cases(cases, rounds=rounds, device=device)


def bench_sketches(*, rounds: int = 31, device: str = "cpu") -> list[dict[str, Any]]:
    """All tapped layers of the transformers through `attach`: a sketch each, or one for all.

    Drawing, loss and its gradient, in one call; ``ratio`` is of one each over one for all.
    """
    ways = {"one each": False, "one for all": True}
    cases = [(family, loss) for family in TRANSFORMERS for loss in ("weak", "strong")]
    functions = {
        (*case, way): _drawn(*case, shared=shared, device=device)
        for case in cases
        for way, shared in ways.items()
    }
    times = alternate(functions, rounds=rounds)
    rows = []
    for family, loss in cases:
        own = {way: times[family, loss, way] for way in ways}
        recipe = find(f"{family}/{loss}")
        rows.append(
            {
                "family": family,
                "loss": loss,
                "shape": [recipe.depth, recipe.batch_size, recipe.width],
                "seconds": {way: statistics.median(values) for way, values in own.items()},
                "ratio": ratio(own, *ways),
            }
        )
    return rows


def _drawn(family: str, loss: str, *, shared: bool, device: str) -> Callable[[], None]:
    """One call of a handle on as many Gaussian layers as the family has, backward included."""
    recipe = find(f"{family}/{loss}")
    g = torch.Generator(device).manual_seed(0)
    shape = recipe.depth, recipe.batch_size, recipe.width
    features = torch.randn(shape, generator=g, device=device).requires_grad_()
    model = nn.ModuleList(nn.Identity() for _ in range(recipe.depth))
    handle = attach(model, "*", recipe.build_regularizer(g), shared_sketch=shared)
    for layer, z in zip(model, features, strict=True):
        layer(z)

    def call() -> None:
        # what came before the loss, here the cut into layers, is kept for the next call
        torch.autograd.grad(handle.loss(), features, retain_graph=True)

    return call
