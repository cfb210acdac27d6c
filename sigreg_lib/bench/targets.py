"""Speed targets, and what a measurement says of each.

They were set beforehand, for two cores of a processor whose matrix units make bfloat16 products six
times as fast as float32 ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AT_LEAST = {  # plain time over ours, by loss, N, C and layers
    ("strong", 128, 256, 1): 8,
    ("strong", 128, 1024, 1): 8,
    ("strong", 8192, 768, 1): 12,
    ("strong", 128, 256, 6): 12,
    ("weak", 128, 256, 1): 1.5,
    ("weak", 128, 1024, 1): 1.5,
    ("weak", 8192, 768, 1): 1.5,
    ("weak", 128, 256, 6): 3,
}
STEP_AT_LEAST = {"vit": 5, "expert": 5, "mlp": 2}
ADDED_AT_MOST = {  # percent of the step without a regularizer
    ("vit", "weak"): 2,
    ("vit", "strong"): 4,
    ("mlp", "weak"): 10,
    ("mlp", "strong"): 25,
}
EPOCH_AT_MOST = {"augmentation": 5, "evaluation": 2}  # percent of an epoch of the vit


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        what: in words.
        target: a ratio at least, or a percentage at most.
        measured: likewise.
        bound: the ratio that would be reached if the matrix products were all that ours does, at
            the speed measured beside it (a loss) or the machine's best (a step); NaN where it says
            nothing.
        met: ``yes``, ``no``, or ``not resolved`` where the target lies within the 95% interval of
            the median of a ratio, or of what was added to a step.
    """

    what: str
    target: str
    measured: float
    bound: float
    met: str


def targets(found: Mapping[str, list[dict[str, Any]]]) -> list[Target]:
    """The targets that the rows of a measurement (by part) can judge, in a fixed order."""
    rows = []
    for (loss, n, c, layers), target in AT_LEAST.items():
        for row in found.get("losses", ()):
            if (row["loss"], row["n"], row["c"], row["layers"]) == (loss, n, c, layers):
                got, met, seconds = (
                    row["ratio"]["median"],
                    _reached(row["ratio"], target),
                    row["seconds"],
                )
                what = f"{loss}, {layers} x ({n}, {c}), plain / ours"
                bound = seconds["plain"] / seconds["products"]
                rows.append(Target(what, f">= {target}", got, bound, met))
    steps = {row["family"]: row for row in found.get("steps", ()) if "ratio" in row}
    speed = {row["family"]: row["gflops"] for row in found.get("products", ())}
    for family, target in STEP_AT_LEAST.items():
        if family in steps:
            row, bound = steps[family], math.nan
            got = row["ratio"]["none"]["median"]
            if family in speed:
                least = row["operations"] / (1e9 * max(speed[family].values()))
                bound = row["seconds"]["plain none"] / least
            what = f"{family} step, plain / ours"
            met = _reached(row["ratio"]["none"], target)
            rows.append(Target(what, f">= {target}", got, bound, met))
    for (family, method), target in ADDED_AT_MOST.items():
        if family in steps:
            share = {k: 100 * (v - 1) for k, v in steps[family]["added"][method].items()}
            met = _word(share["median"] <= target)
            if share["least"] <= target < share["most"]:
                met = "not resolved"
            what = f"{method} added to a {family} step, %"
            rows.append(Target(what, f"<= {target}", share["median"], math.nan, met))
    for row in found.get("epoch", ()):
        if row["recipe"] == "vit/weak":
            for part, target in EPOCH_AT_MOST.items():
                got = 100 * row["seconds"][part] / row["epoch"]
                what = f"{part} in a vit epoch, %"
                rows.append(Target(what, f"<= {target}", got, math.nan, _word(got <= target)))
    return rows


def _reached(ratio: Mapping[str, float], target: float) -> str:
    if ratio["least"] < target <= ratio["most"]:
        return "not resolved"
    return _word(ratio["median"] >= target)


def _word(met: bool) -> str:
    return "yes" if met else "no"
