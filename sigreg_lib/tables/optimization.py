"""How a table's runs train: gradients and clipping, speed, jitter, and what a best epoch is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sigreg_lib.recipes import find
from sigreg_lib.records import Record
from sigreg_lib.tables.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame


def optimization_table(rows: Iterable[Row]) -> DataFrame:
    """How the run that got furthest (n = 1) trains at its last tested epoch, a line a row.

    The gradient's norm is an epoch's mean before clipping. ``step / gradient`` is the length of an
    update over that of the gradient, lr min(1, clip / norm), with that norm and the learning rate
    of that epoch. Given for SGD without weight decay; "-" for AdamW, whose steps are not
    proportional to the gradient. Training accuracy is measured on augmented images while the
    weights change.
    """
    import pandas as pd

    lines = []
    for row in rows:
        if (run := row.longest) is None:
            continue
        epoch = max(run.measured("test_accuracy"))
        at, clip = run.at(epoch), run.config["clip_norm"]
        norms = list(run.measured("grad_norm").values())
        clipped = sum(clip is not None and g > clip for g in norms)
        above = "no clip" if clip is None else f"{clipped} of {len(norms)}"
        gap = _minus(at["train_accuracy"], at["test_accuracy"])
        lines.append(
            {
                "regularizer": row.label,
                "epoch": epoch,
                "train loss (nats)": _number(at["train_loss"], ".2f"),
                "train - test (points)": _number(gap, "+.1f"),
                "gradient's norm": _number(at["grad_norm"], ".2f"),
                "epochs above the clip": above,
                "step / gradient": _number(_rate_in_effect(run, epoch), ".3g"),
            }
        )
    columns = ["regularizer", "epoch", "train loss (nats)", "train - test (points)"]
    columns += ["gradient's norm", "epochs above the clip", "step / gradient"]
    return pd.DataFrame(lines, columns=columns).set_index("regularizer")


def training_table(rows: Iterable[Row]) -> DataFrame:
    """How well runs fit their augmented training images, beside the published logs.

    A line an epoch. A cell is "22.8%, 3.404": accuracy and cross-entropy (nats) during it, ours the
    mean of the runs that got there, with their number; "-": none did.
    """
    import pandas as pd

    table: dict[str, dict[int, str]] = {}
    for row in rows:
        p, ours = row.published, {}
        for epoch in p.train_accuracy if row.judged else row.compared:
            there = [run.at(epoch) for run in row.records.values() if run.epochs >= epoch]
            if there:
                accuracy, loss = (
                    math.fsum(at[name] for at in there) / len(there)
                    for name in ("train_accuracy", "train_loss")
                )
                ours[epoch] = f"{accuracy:.1f}%, {loss:.3f} (n = {len(there)})"
            else:
                ours[epoch] = "-"
        if row.judged:
            table[f"{row.label}: published"] = {
                e: f"{a:.1f}%, {p.train_loss[e]:.3f}" for e, a in p.train_accuracy.items()
            }
        table[f"{row.label}: ours"] = ours
    return pd.DataFrame(table).fillna("-").rename_axis("epoch").sort_index()


def clipping(rows: Iterable[Row]) -> str:
    """One sentence: how often each row's longest run is clipped, and its rate in effect at last.

    The latter for SGD only, as in :func:`optimization_table`.
    """
    rows = [row for row in rows if row.longest]
    if not rows:
        return "No run has been clipped yet: there is none."
    found = optimization_table(rows)
    parts = []
    for row, (_, at) in zip(rows, found.iterrows(), strict=True):
        share, step = at["epochs above the clip"], at["step / gradient"]
        said = f"{row.published.name} is {'not' if share == 'no clip' else f'in {share} epochs'}"
        if step != "-":
            said += f" (step at epoch {at['epoch']}: {step} of the gradient)"
        parts.append(said)
    return f"Clipped, by the mean norm of an epoch: {', '.join(parts)}."


def milestones(rows: Iterable[Row], levels: Sequence[float]) -> DataFrame:
    """The first epoch at which the run that got furthest (n = 1) tests at a level (%) or above.

    "-": it has not yet; "missing": there is no run.
    """
    import pandas as pd

    table = {}
    for row in rows:
        tested = row.longest.measured("test_accuracy") if row.seeds else {}
        first = {lv: next((str(e) for e, a in tested.items() if a >= lv), "-") for lv in levels}
        table[row.label] = first if row.seeds else dict.fromkeys(levels, "missing")
    return pd.DataFrame(table).T.rename_axis("first epoch at (%)")


def fit_table(runs: Mapping[str, Record], levels: Sequence[float]) -> DataFrame:
    """Test accuracy (%) where a run first trains at a level (%): runs that fit alike, side by side.

    A cell is "23.11 (40)": the accuracy by linear interpolation between the tested epochs below and
    above the level, and the latter's epoch. "-": the run has not been on both sides of it.
    Training accuracy is measured on augmented images while the weights change.

    Args:
        runs: by the name of their line.
        levels: training accuracies, a column each.
    """
    import pandas as pd

    table: dict[str, dict[float, str]] = {}
    for name, run in runs.items():
        found = {level: _at_level(run, level) for level in levels}
        table[name] = {lv: f"{at[0]:.2f} ({at[1]})" if at else "-" for lv, at in found.items()}
    return pd.DataFrame(table).T.rename_axis("test at a training accuracy of (%)")


def gain_at_equal_fit(
    run: Record, base: Record, level: float | None = None
) -> tuple[float, float, int, int] | None:
    """How far a run tests above another where both train at a level, as in :func:`fit_table`.

    Args:
        run, base: the two.
        level: training accuracy (%); default: the highest of the run that has fitted less.

    Returns:
        level, difference (points), epochs of ``run`` and ``base``; None where one of them was not
        tested on both sides of the level.
    """
    pairs = [fits(run), fits(base)]
    if not all(pairs):
        return None
    if level is None:
        level = min(max(trained for _, trained, _ in each) for each in pairs)
    own, theirs = _at_level(run, level), _at_level(base, level)
    return (level, own[0] - theirs[0], own[1], theirs[1]) if own and theirs else None


def compared_fit(name: str, run: Record, other_name: str, other: Record) -> str:
    """One line: how two runs train and test at their last common epoch, and at equal training.

    The latter by :func:`gain_at_equal_fit`; what was not measured is left out.
    """
    epochs = sorted({e for e, *_ in fits(run)} & {e for e, *_ in fits(other)})
    parts = []
    if epochs:
        own, theirs = ({e: rest for e, *rest in fits(r)}[epochs[-1]] for r in (run, other))
        parts.append(
            f"at epoch {epochs[-1]} train at {own[0]:.1f} and {theirs[0]:.1f}%, test at "
            f"{own[1]:.2f} and {theirs[1]:.2f}%"
        )
    if found := gain_at_equal_fit(run, other):
        level, gained, first, second = found
        side = "above" if gained >= 0 else "below"
        parts.append(
            f"where both train at {level:.1f}% (epochs {first} and {second}) {name} tests "
            f"{abs(gained):.2f} points {side}"
        )
    return f"{name} and {other_name}: {'; '.join(parts) or 'nothing in common was measured'}"


def _at_level(run: Record, level: float) -> tuple[float, int] | None:
    """Test accuracy where the training accuracy first comes to a level, and the epoch after it."""
    before = None
    for epoch, trained, tested in fits(run):
        if trained == level:
            return tested, epoch
        if trained > level:
            if before is None:
                return None
            share = (level - before[0]) / (trained - before[0])
            return before[1] + share * (tested - before[1]), epoch
        before = trained, tested
    return None


def fits(run: Record) -> list[tuple[int, float, float]]:
    """Epoch, training and test accuracy (%) of every tested epoch."""
    trained = run.measured("train_accuracy")
    tested = run.measured("test_accuracy").items()
    return [(epoch, trained[epoch], a) for epoch, a in tested if epoch in trained]


def jitter(record: Record, window: int = 30, end: int | None = None) -> float | None:
    r"""Standard deviation of the test accuracy from epoch to epoch, in points.

    .. math:: s^2 = \tfrac16 \, \overline{(a_{i+1} - 2 a_i + a_{i-1})^2}

    over the last ``window`` tested epochs up to ``end`` (default: the last there is): second
    differences cancel a linear trend, and for independent noise have 6 times its variance. None for
    fewer than 12 epochs.
    """
    tested = record.measured("test_accuracy").items()
    values = [accuracy for epoch, accuracy in tested if end is None or epoch <= end][-window:]
    if len(values) < 12:
        return None
    seconds = [c - 2 * b + a for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(sum(x * x for x in seconds) / len(seconds) / 6)


def expected_best(count: int) -> float:
    r"""Expected largest of ``count`` independent standard normal numbers.

    .. math:: \int x \, d\,\Phi(x)^{count}
    """
    x = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    return torch.trapezoid(x, torch.special.ndtr(x) ** count).item()


def _rate_in_effect(run: Record, epoch: int) -> float | None:
    """Length of an update over that of the gradient, in an epoch counted from 1; SGD only."""
    recipe, norm = find(run.recipe).override(**run.overrides), run.at(epoch)["grad_norm"]
    if recipe.optimizer != "sgd" or recipe.weight_decay or norm is None:
        return None
    shrink = 1.0 if recipe.clip_norm is None or not norm else min(1.0, recipe.clip_norm / norm)
    return recipe.learning_rate(epoch - 1) * shrink  # a recipe counts epochs from 0


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
