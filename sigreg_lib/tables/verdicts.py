"""What our runs of a row say of the published one: one rule, and what weakens its word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sigreg_lib import report
from sigreg_lib.paper import EPOCHS, PUBLISHED, PublishedRow
from sigreg_lib.tables.rows import DATASET, LABELS, TOLERANCE, Row

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Verdict:
    """What the runs of a row say of the published one.

    Attributes:
        word: "reproduced", "reproduced in part", "not reproduced", "missing"; "not judged" where
            the runs are of another recipe or data set.
        epoch: the latest epoch compared at; None without one.
        reason: one line with the numbers.
    """

    word: str
    epoch: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.word} (to epoch {self.epoch})" if "part" in self.word else self.word


def verdict(row: Row, tolerance: float | None = None) -> Verdict:
    """Judge a row by one rule, at the published epochs that its runs have reached.

    The mean at an epoch is over the runs tested after it. *reproduced*: it lies within the
    tolerance at every published epoch that was tested, the last of the schedule among them;
    *reproduced in part (to epoch E)*: the same, and E is the latest; *not reproduced*: it lies
    outside at one of them, or a run diverged; *missing*: no run was tested at a published epoch.

    The reason names what weakens the word: epochs that not all runs have reached, other published
    rows that the runs would pass as too (:func:`passes_as`), and epochs at which the runs' 95%
    interval is wider than the tolerance.

    Args:
        row: published numbers and runs.
        tolerance: in points, inclusive; default :data:`TOLERANCE` of the family.
    """
    tolerance = TOLERANCE[row.published.family] if tolerance is None else tolerance
    gaps = f"; missing: {_seeds(row.missing)}" if row.missing and row.seeds else ""
    if not row.judged and row.seeds:
        dataset = row.records[row.seeds[0]].dataset
        return Verdict("not judged", row.epoch, f"small networks on {dataset}, not {DATASET}{gaps}")
    diverged = [s for s in row.seeds if row.records[s].status == "diverged"]
    if diverged:
        when = ", ".join(f"seed {s} at epoch {row.records[s].epochs}" for s in diverged)
        return Verdict("not reproduced", row.epoch, f"diverged: {when}{gaps}")
    if row.epoch is None:
        why = "no published epoch was tested" if row.seeds else "no record"
        return Verdict("missing", None, why + gaps)
    few = [
        f"{epoch} ({n} of {len(row.seeds)} runs)"
        for epoch in row.compared
        if (n := len(row.accuracies(epoch))) < len(row.seeds)
    ]
    gaps += f"; not all runs are there: epoch {', '.join(few)}" if few else ""
    at_last = _against(row, row.epoch)
    gaps = _weaknesses(row, tolerance) + gaps
    off = [e for e in row.compared if _outside(row, row.published, e, tolerance)]
    if off:
        where = ", ".join(f"{row.difference(e):+.2f} points at epoch {e}" for e in off)
        reason = f"{where}, tolerance {tolerance:g}; {at_last}{gaps}"
        return Verdict("not reproduced", row.epoch, reason)
    epochs = ", ".join(map(str, row.compared))
    word = "reproduced" if row.epoch == EPOCHS else "reproduced in part"
    reason = f"within {tolerance:g} points at epoch {epochs}; {at_last}{gaps}"
    return Verdict(word, row.epoch, reason)


def passes_as(row: Row, tolerance: float | None = None) -> list[PublishedRow]:
    """Other rows of the family that our runs would pass as: the judged epochs do not separate them.

    Those whose published values lie within the tolerance of our mean at every judged epoch. None
    for runs that are not judged, diverged or have no published epoch.

    Args:
        row: published numbers and runs.
        tolerance: in points, inclusive; default :data:`TOLERANCE` of the family.
    """
    family = row.published.family
    tolerance = TOLERANCE[family] if tolerance is None else tolerance
    diverged = any(record.status == "diverged" for record in row.records.values())
    if not row.judged or diverged or row.epoch is None:
        return []
    others = [PUBLISHED[f"{family}/{method}"] for method in LABELS]
    return [
        other
        for other in others
        if other.name != row.published.name
        and not any(_outside(row, other, epoch, tolerance) for epoch in row.compared)
    ]


def statement(rows: Iterable[Row]) -> str:
    """One sentence: each row's verdict, with the accuracies that it rests on.

    Other rows that it would pass as are named.
    """
    parts = []
    for row in rows:
        found = verdict(row)
        numbers = "" if row.epoch is None or not row.judged else f", {_against(row, row.epoch)}"
        if found.word == "not reproduced":  # the epoch that decided it
            numbers = f", {found.reason.split(';')[0]}"
        parts.append(f"{row.published.name} is {found}{numbers}{_alike(row, ', ')}")
    return "; ".join(parts) + "."


def _outside(row: Row, published: PublishedRow, epoch: int, tolerance: float) -> bool:
    """Our mean and a published value differ by more than the tolerance, rounding aside."""
    mean = report.mean_interval(row.accuracies(epoch))[0]
    return abs(mean - published.curve[epoch]) > tolerance + 1e-9


def _alike(row: Row, before: str, tolerance: float | None = None) -> str:
    """ ", would pass as mlp/weak too", or nothing; without "too" where the row itself fails."""
    tolerance = TOLERANCE[row.published.family] if tolerance is None else tolerance
    names = " and ".join(other.name for other in passes_as(row, tolerance))
    if not names:
        return ""
    fails = any(_outside(row, row.published, e, tolerance) for e in row.compared)
    return f"{before}would pass as {names}{'' if fails else ' too'}"


def _weaknesses(row: Row, tolerance: float) -> str:
    wide = [e for e in row.compared if report.mean_interval(row.accuracies(e))[1] > tolerance]
    where = f"; interval wider than the tolerance at epoch {', '.join(map(str, wide))}"
    return _alike(row, "; ", tolerance) + (where if wide else "")


def _against(row: Row, epoch: int) -> str:
    mean, half, n = report.mean_interval(row.accuracies(epoch))
    spread = "" if n == 1 else f" ± {half:.2f}"
    return (
        f"{mean:.2f}{spread}% against {row.published.curve[epoch]:.2f}% at epoch {epoch}, n = {n}"
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def results_table(rows: Iterable[Row]) -> DataFrame:
    """The table, a column a row of the paper, cells as text; accuracies in percent.

    Best is the highest test accuracy of all epochs, as published; last is the row's primary figure.
    Both are given for the epochs that our runs have, with these in brackets, run by run where runs
    differ in length; the comparison is made at the latest published epoch that a run has, n being
    the runs that have it. "Would pass as" names the other rows that :func:`passes_as` finds.
    """
    import pandas as pd

    lines = []
    for row in rows:
        found, curve, epoch = verdict(row), row.published.curve, row.epoch
        values = [] if epoch is None else row.accuracies(epoch)
        best = f"{row.published.best_test:.2f} ({row.published.best_epoch})"
        published = {
            "published best (epoch)": best if row.judged else "-",
            f"published last ({EPOCHS})": f"{row.published.last_test:.2f}" if row.judged else "-",
        }
        there = {
            "epoch compared": "-" if epoch is None else str(epoch),
            "published": f"{curve[epoch]:.2f}" if row.judged and values else "-",
            "ours": report.format_mean(values, digits=2).split(" (")[0] if values else "missing",
            "n": _of_all(len(values), len(row.seeds)),
            "difference": f"{row.difference(epoch):+.2f}" if row.judged and values else "-",
        }
        runs = [row.records[s] for s in row.seeds]
        bests = [(r.best_test["epoch"], r.best_test["test_accuracy"]) for r in runs]
        lasts = [list(r.measured("test_accuracy").items())[-1] for r in runs]
        alike = len({epoch for epoch, _ in lasts}) == 1
        ours = {
            "our best (epoch)": _with_epochs(bests, alike),
            "our last (epoch)": _with_epochs(lasts, alike),
        }
        name = {"regularizer": row.label}
        others = ", ".join(LABELS[other.method] for other in passes_as(row)) or "no other row"
        said = {
            "verdict": str(found),
            "would pass as": others if row.judged and values else "-",
        }
        lines.append(name | published | there | ours | said)
    table = pd.DataFrame(lines).set_index("regularizer").T
    return table.rename_axis(index="test accuracy (%)", columns=None)


def _of_all(n: int, runs: int) -> str:
    return str(n) if n == runs else f"{n} of {runs}"


def _with_epochs(pairs: Sequence[tuple[int, float]], alike: bool) -> str:
    """Mean, interval and epochs; one by one where runs of different length have no mean."""
    if not pairs:
        return "missing"
    if not alike:
        return ", ".join(f"{value:.2f} ({epoch})" for epoch, value in pairs)
    mean = report.format_mean([value for _, value in pairs], digits=2).split(" (")[0]
    low, high = min(e for e, _ in pairs), max(e for e, _ in pairs)
    return f"{mean} ({low})" if low == high else f"{mean} ({low} to {high})"
