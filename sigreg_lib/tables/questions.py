"""What a table's runs are asked beside their accuracy: what collapsed, what the loss gained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from sigreg_lib import report
from sigreg_lib.finite_batch import best_scale
from sigreg_lib.recipes import Recipe
from sigreg_lib.records import Record
from sigreg_lib.tables.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame

ALIKE = 0.9  # mean cosine of two images' features from which on they count as alike
FEW = 10.0  # effective dimension up to which few directions carry all: a tenth of the classes
SCALE = 3.0  # factor of the norm sqrt(C) of standard Gaussian features


def held(expectation: str, holds: bool | None, seen: str = "") -> str:
    """One line that says whether an expectation was met; None: nothing to test it on."""
    answer = {True: "holds", False: "does NOT hold", None: "not measured"}[holds]
    return f"expected: {expectation}: {answer}" + (f" ({seen})" if seen else "")


def held_at_end(expectation: str, holds: bool | None, record: Record | None, seen: str = "") -> str:
    """:func:`held` for what is expected at the end of training: not measured before it.

    The epoch that the run has reached and what was seen there are given instead.
    """
    if record is None or record.status == "finished":
        return held(expectation, holds if record else None, seen)
    where = f"epoch {record.epochs} of {record.epochs_planned}"
    return held(expectation, None, f"{where}; {seen}" if seen else where)


def shown(frame: DataFrame) -> DataFrame | str:
    """A table for display; words instead of an empty one."""
    return "no run to show yet" if frame.empty else frame


# ------------------------------------------------------------------ layers


def look(record: Record, epoch: int) -> dict[str, list]:
    """The measures of every layer that the record has of an epoch; without the spectrum.

    Raises:
        ValueError: the layers were not looked at after that epoch.
    """
    epochs = looks(record)
    if epoch not in epochs:
        raise ValueError(f"{record.name} has its layers at epochs {epochs}, not {epoch}")
    i = record.layers["epoch"].index(epoch)
    apart = ("names", "tapped", "epoch", "spectrum")
    return {k: v[i] for k, v in record.layers.items() if k not in apart}


def looks(record: Record) -> list[int]:
    """Epochs after which the layers were looked at."""
    return list(record.layers.get("epoch", []))


def common_look(records: Iterable[Record]) -> int | None:
    """The latest epoch after which the layers of all records were looked at; None without one."""
    epochs = [set(looks(record)) for record in records]
    return max(set.intersection(*epochs), default=None) if epochs else None


def shared_look(rows: Iterable[Row]) -> int | None:
    """The latest published epoch after which each row that has runs has one that was looked at."""
    there = [row for row in rows if row.seeds]
    epochs = [set(row.compared) & set().union(*map(looks, row.records.values())) for row in there]
    return max(set.intersection(*epochs), default=None) if epochs else None


def layer_table(rows: Iterable[Row], measure: str, epoch: int | None = None) -> DataFrame:
    """A measure of each layer: a line a row of the paper, a column a layer, means over its runs.

    Args:
        rows: rows without runs are left out.
        measure: a key of a record's ``layers``.
        epoch: after which; default: for each row the latest look that its runs have in common.
    """
    import pandas as pd

    lines = {}
    for row in rows:
        runs = [row.records[seed] for seed in row.seeds]
        at = common_look(runs) if epoch is None else epoch
        runs = [record for record in runs if at in looks(record)]
        if at is None or not runs or measure not in look(runs[0], at):
            continue
        columns = zip(*(look(record, at)[measure] for record in runs), strict=True)
        values = [_mean(v) for v in columns]
        key = f"{row.label}, epoch {at}, n = {len(runs)}"
        lines[key] = dict(zip(runs[0].layers["names"], values, strict=True))
    return pd.DataFrame(lines).T.rename_axis(measure)


def features(rows: Iterable[Row], epoch: int | None = None) -> DataFrame:
    """What the last tapped layer's features of the test images look like; means over a row's runs.

    Effective dimension: participation ratio of the covariance. Length: mean over images, in units
    of the square root of C that standard Gaussian features of C channels have. Cosine: mean over
    pairs of images. See :func:`symptoms` for the last column.
    """
    import pandas as pd

    lines = []
    for row in rows:
        runs = [row.records[seed] for seed in row.seeds]
        at = common_look(runs) if epoch is None else epoch
        runs = [record for record in runs if at in looks(record)]
        if at is None or not runs:
            continue
        found = [measures(record, at) for record in runs]
        mean = {k: _mean([f[k] for f in found]) for k in found[0]}
        lines.append(
            {
                "regularizer": row.label,
                "epoch": at,
                "n": len(runs),
                "effective dimension": round(mean["dimension"], 1),
                "length / sqrt(C)": round(mean["length"], 2),
                "mean cosine": round(mean["cosine"], 2),
                "symptoms": ", ".join(symptoms(**mean)) or "none",
            }
        )
    columns = ["regularizer", "epoch", "n", "effective dimension", "length / sqrt(C)"]
    columns += ["mean cosine", "symptoms"]
    return pd.DataFrame(lines, columns=columns).set_index("regularizer")


def measures(record: Record, epoch: int) -> dict[str, float]:
    """Effective dimension, length over sqrt(C) and mean cosine of the last tapped layer, or NaN."""
    found = look(record, epoch)
    names = {"dimension": "effective_dim", "length": "feature_norm", "cosine": "mean_cosine"}
    values = {k: _mean([found[name][-1]]) for k, name in names.items()}
    return values | {"length": values["length"] / math.sqrt(record.config["width"])}


def symptoms(*, dimension: float, length: float, cosine: float) -> list[str]:
    """Ways in which features can have gone wrong, each by a fixed threshold.

    *images look alike*: two images' features have a mean cosine of at least 0.9; *few directions*:
    an effective dimension of at most 10, a tenth of CIFAR-100's classes; *blown up*: features at
    least 3 times as long as standard Gaussian ones; *shrunk*: at most a third. NaN is no symptom.
    """
    found = {
        "images look alike": cosine >= ALIKE,
        "few directions": dimension <= FEW,
        "blown up": length >= SCALE,
        "shrunk": length <= 1 / SCALE,
    }
    return [name for name, there in found.items() if there]


def described(rows: Iterable[Row], epoch: int | None = None) -> str:
    """One sentence: the last layer of each row, means over its runs that were looked at there.

    Args:
        rows: rows without such a run are left out.
        epoch: after which; default: the latest look that all runs have in common.
    """
    rows = list(rows)
    if epoch is None:
        epoch = common_look(row.records[seed] for row in rows for seed in row.seeds)
    rows = [row for row in rows if any(epoch in looks(run) for run in row.records.values())]
    if not rows:
        return "The layers have not been looked at yet."
    parts = []
    for row, (_, found) in zip(rows, features(rows, epoch).iterrows(), strict=True):
        numbers = f"an effective dimension of {found['effective dimension']:.1f}"
        numbers += f", a length of {found['length / sqrt(C)']:.2f} √C"
        numbers += f" and a mean cosine of {found['mean cosine']:.2f}"
        ill = found["symptoms"].replace("none", "none of the symptoms below")
        parts.append(f"{row.published.name} has {numbers} ({ill}; n = {found['n']})")
    return f"At epoch {epoch} the last layer of " + ", that of ".join(parts) + "."


def levels(recipe: Recipe) -> dict[str, float]:
    r"""What R of a recipe's regularizer is at marked features, N = batch size, C = width.

    ``collapsed``: all features at one point. ``whitened``: independent standard Gaussian ones, the
    floor in the records. Weak also ``least, Gaussian``: a finite batch and sketch move the minimum
    to a smaller variance s*, where the root of E R^2 is :math:`\sqrt{K (1 - s^*)}`.

    Raises:
        ValueError: the recipe has no regularizer, or a K for each layer.
    """
    if recipe.columns:
        raise ValueError(f"R has no marks common to layers of K = {recipe.sketch_dim}")
    n, c, k = recipe.batch_size, recipe.width, recipe.sketch_dim
    regularizer = recipe.build_regularizer(seed=0)
    if regularizer is None:
        raise ValueError(f"{recipe.name} has no regularizer, so no levels of one")
    found = {"collapsed": regularizer(torch.zeros(n, c)).item()}
    found["whitened"] = regularizer.floor(n, c)
    if recipe.regularizer == "weak":
        directions = min(k, c)  # no sketch where the layer is not wider than it
        scale = best_scale(n, c, k if c > k else None)
        found["least, Gaussian"] = math.sqrt(directions * (1 - scale))
    return found


# ------------------------------------------------------------------ differences


def interval_of_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95
) -> tuple[float, float]:
    r"""Difference of two means and the half width of Welch's interval.

    .. math:: \bar a - \bar b \pm t_{\nu} \sqrt{s_a^2 / n_a + s_b^2 / n_b}, \quad
        \nu = \frac{(s_a^2/n_a + s_b^2/n_b)^2}
                   {(s_a^2/n_a)^2/(n_a - 1) + (s_b^2/n_b)^2/(n_b - 1)}

    Args:
        a, b: one number a run.
        level: coverage.

    Returns:
        difference and half width, NaN where a side has one run.
    """
    import numpy as np
    from scipy.stats import t

    difference = report.mean_interval(a)[0] - report.mean_interval(b)[0]
    if min(len(a), len(b)) < 2:
        return difference, math.nan
    parts = [(np.var(v, ddof=1) / len(v), len(v) - 1) for v in (a, b)]
    total = sum(p for p, _ in parts)
    if total == 0:
        return difference, 0.0
    freedom = total**2 / sum(p**2 / f for p, f in parts)
    return difference, float(t.ppf((1 + level) / 2, freedom) * math.sqrt(total))


def sampling_half_width(
    p: float, q: float, *, n_images: int = 10_000, correlation: float = 0.0
) -> float:
    r"""Half width of the 95% interval of a difference of two accuracies, from the test images.

    .. math:: 1.96 \sqrt{\bigl(p(1-p) + q(1-q) - 2 \varrho \sqrt{p(1-p)\,q(1-q)}\bigr) / M}

    with p and q the shares of images that two trained networks get right and the correlation of
    their hits on the same images. It says nothing of how much training again would change.

    Args:
        p, q: accuracies in percent.
        n_images: M.
        correlation: of the two networks' hits, in [0, 1]; 0 for independent ones.

    Returns:
        points.
    """
    a, b = (x / 100 * (1 - x / 100) for x in (p, q))
    return 196 * math.sqrt((a + b - 2 * correlation * math.sqrt(a * b)) / n_images)


def differences(rows: Sequence[Row]) -> DataFrame:
    """Each regularizer minus none at the published epochs that both rows have: ours, published.

    The published differences are of one run a side. Ours have Welch's 95% interval where both rows
    have two runs or more.
    """
    import pandas as pd

    base, *others = rows
    lines = []
    for row in others:
        for epoch in [e for e in row.compared if e in base.compared]:
            a, b = row.accuracies(epoch), base.accuracies(epoch)
            mean, half = interval_of_difference(a, b)
            n = f"{len(a)} and {len(b)}"
            line = {"difference": f"{row.label} - none", "epoch": epoch, "n": n}
            line |= {"ours": f"{mean:+.2f}", "95% interval": _interval(mean, half)}
            if row.judged:
                there = row.published.curve[epoch] - base.published.curve[epoch]
                line["published"] = f"{there:+.2f}"
            lines.append(line)
    columns = ["difference", "epoch", "n", "ours", "95% interval", "published"]
    return pd.DataFrame(lines, columns=columns).set_index("difference").fillna("-")


def _mean(values: Sequence[float | None]) -> float:
    """NaN where a value does not exist: of features that are all zero there is no cosine."""
    values = [math.nan if v is None else v for v in values]
    return math.fsum(values) / len(values)


def _interval(mean: float, half: float) -> str:
    return "none" if math.isnan(half) else f"{mean - half:+.2f} to {mean + half:+.2f}"


def lead(row: Row, base: Row, epoch: int) -> float | None:
    """Mean test accuracy of a row minus that of another after an epoch, points; None without."""
    values = row.accuracies(epoch), base.accuracies(epoch)
    if not all(values) or not (row.judged and base.judged):
        return None
    return interval_of_difference(*values)[0]


def gain(rows: Sequence[Row]) -> list[str]:
    """For each regularizer one line: is its gain over none at the latest common epoch resolved?

    Resolved: Welch's 95% interval excludes 0.
    """
    base, *others = rows
    lines = []
    for row in others:
        both = [epoch for epoch in row.compared if epoch in base.compared]
        if not both:
            lines.append(f"{row.label} - none: not measured")
            continue
        mean, half = interval_of_difference(row.accuracies(both[-1]), base.accuracies(both[-1]))
        text = f"{row.label} - none at epoch {both[-1]}: {mean:+.2f} points"
        if math.isnan(half):
            lines.append(f"{text}, undecided (a row has n = 1: no interval)")
        else:
            side = "gain" if mean > half else "loss" if mean < -half else "undecided"
            lines.append(f"{text}, {side} (95% interval {_interval(mean, half)})")
    return lines
