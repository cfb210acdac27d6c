"""Where the time of our losses and steps goes, by kind of operation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from sigreg_lib.bench.losses import LAYERS, SIZES, loss_functions
from sigreg_lib.bench.steps import FAMILIES, Steps, fake_images
from sigreg_lib.recipes import find
from sigreg_lib.train.precision import worth_compiling

KINDS: dict[str, tuple[str, ...]] = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear_pointwise", "convolution"),
    "copies and casts": ("copy_", "cat"),
    "sines and cosines": ("polar",),
    "sums": ("sum", "mean"),
    "norm and clipping": ("linalg_vector_norm", "mul_"),
    "update": ("fused_sgd_", "fused_adamw_"),
}
"""Kinds of operations by the names of operators; what is not named is ``elementwise and other``.

Every ``mul_`` counts as clipping, which it is in a step; Strong scales its powers with one too.
"""


def kind_of(event: str) -> str:
    """The kind that an event of the profiler belongs to.

    Operators are told apart by name; what lies between the products of a compiled step is one kind,
    and what is no operator is Python and autograd.
    """
    if "CompiledFxGraph" in event:
        return "compiled, between products"
    scope, _, name = event.rpartition("::")
    if scope not in ("aten", "mkldnn", "mkl"):
        return "Python and autograd"
    for kind, names in KINDS.items():
        if name.removeprefix("_") in names:
            return kind
    return "elementwise and other"


def profile(function: Callable[[], Any], *, repeats: int = 10) -> dict[str, Any]:
    """How many operators a call runs, and the share of each kind in its time.

    Times are an operator's own, without those that it calls, on the thread that starts it. The
    profiler adds some microseconds to each: many small operators look more expensive than they are.

    Args:
        function: called twice beforehand.
        repeats: calls looked at.

    Returns:
        ``operators`` a call, views included, and ``share`` of each kind, largest first; shares add
        up to 1.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it talks on standard error
    for _ in range(2):
        function()
    with torch.profiler.profile(acc_events=True) as found:
        for _ in range(repeats):
            function()
    times: dict[str, float] = {}
    operators = 0
    for event in found.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
        operators += event.count if "::" in event.key and kind != "Python and autograd" else 0
    total = sum(times.values())
    share = {kind: t / total for kind, t in sorted(times.items(), key=lambda pair: -pair[1])}
    return {"operators": operators / repeats, "share": share}


def bench_profile(*, rounds: int = 3, device: str = "cpu") -> list[dict[str, Any]]:
    """Profiles of the losses at 128 samples, and of a step of each family without regularizer.

    ``rounds`` steps are looked at, of the losses ten times as many calls. On a GPU the times are
    those of the thread that launches.
    """
    rows = []
    for loss in ("strong", "weak"):
        for (n, c, k), layers in ((SIZES[0], 1), (SIZES[1], 1), (SIZES[0], LAYERS)):
            ours = loss_functions(loss, n, c, k, layers=layers, device=device)["ours"]
            what = f"{loss}, {layers} x ({n}, {c})"
            rows.append({"what": what, **profile(ours, repeats=10 * rounds)})
    data = fake_images(256, 16, device)
    for family in FAMILIES:
        compile = worth_compiling(find(f"{family}/none"), data.train_images.device)
        steps = Steps(f"{family}/none", data, compile=compile, compare=False)
        rows.append({"what": f"{family} step", **profile(steps.ours, repeats=rounds)})
    return rows
