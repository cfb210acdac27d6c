"""A row of Tables 1 to 3: the published numbers, our runs of it, and what they say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigreg_lib import report
from sigreg_lib._names import suggest
from sigreg_lib.paper import EPOCHS, PUBLISHED, PublishedRow
from sigreg_lib.records import Record, select
from sigreg_lib.train import Run, sweep

if TYPE_CHECKING:
    from pandas import DataFrame

LABELS = {"none": "No regularizer", "strong": "Strong", "weak": "Weak"}
TOLERANCE = {"vit": 3.0, "expert": 3.0, "mlp": 1.5}
"""Points of test accuracy by which a mean may differ from the published curve, by network."""
DATASET = "cifar100"

_TINY_VIT = {"width": 32, "depth": 3, "heads": 2, "precision": "float32", "epochs": 10}
SMOKE: Mapping[str, dict[str, Any]] = {
    "vit": _TINY_VIT,
    "expert": _TINY_VIT,
    "mlp": {"width": 256, "depth": 3, "batch_size": 20, "precision": "float32", "epochs": 12},
}
"""Settings of a family's networks that the digits train in seconds; the rest is as published."""
CPU_EPOCHS = {"vit": 40, "expert": 40, "mlp": EPOCHS}
CPU_SEEDS = {"vit": 1, "expert": 1, "mlp": 3}


@dataclass(frozen=True)
class Row:
    """A published row and our runs of it.

    Attributes:
        published: the row of the paper.
        asked: seeds that were asked for.
        records: runs by seed; only those with a test accuracy at some epoch.
        sources: files of these records by seed.
        judged: the runs are of the published recipe on CIFAR-100, so that they can be compared.
    """

    published: PublishedRow
    asked: tuple[int, ...]
    records: Mapping[int, Record]
    sources: Mapping[int, Path]
    judged: bool = True

    @property
    def label(self) -> str:
        """The regularizer, in words."""
        return LABELS[self.published.method]

    @property
    def seeds(self) -> list[int]:
        """Seeds that have a run."""
        return sorted(self.records)

    @property
    def missing(self) -> list[int]:
        """Seeds that were asked for and have none."""
        return [seed for seed in self.asked if seed not in self.records]

    def accuracies(self, epoch: int) -> list[float]:
        """Test accuracies (%) after an epoch, of the runs that were tested then."""
        tested = [self.records[seed].measured("test_accuracy") for seed in self.seeds]
        return [accuracies[epoch] for accuracies in tested if epoch in accuracies]

    @property
    def shared(self) -> list[int]:
        """Epochs after which every run of the row was tested."""
        tested = [set(self.records[seed].measured("test_accuracy")) for seed in self.seeds]
        return sorted(set.intersection(*tested)) if tested else []

    @property
    def compared(self) -> list[int]:
        """Published epochs after which a run was tested, each judged by the runs that were.

        For runs that are not comparable: all shared epochs.
        """
        if not self.judged:
            return self.shared
        return [epoch for epoch in self.published.curve if self.accuracies(epoch)]

    @property
    def epoch(self) -> int | None:
        """The latest epoch to compare at; None without one."""
        return self.compared[-1] if self.compared else None

    def difference(self, epoch: int) -> float:
        """Mean of our runs minus the published curve after an epoch, in points."""
        return report.mean_interval(self.accuracies(epoch))[0] - self.published.curve[epoch]

    @property
    def longest(self) -> Record | None:
        """The run that got furthest, of these the one of the smallest seed; None without runs."""
        return max(self.records.values(), key=lambda r: (r.epochs, -r.seed), default=None)


def collect(
    folder: str | Path,
    family: str,
    seeds: Sequence[int],
    *,
    group: str = DATASET,
    overrides: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The three rows of a family with the runs that are in ``folder/group``.

    Args:
        folder: folder of records.
        family: "vit", "expert" or "mlp".
        seeds: runs of other seeds are left out.
        group: subfolder; a group that does not exist is one without records.
        overrides: settings that differ from the named recipe; runs of others are left out.

    Raises:
        ValueError: no such family or folder, or a file in the group is no valid record.
    """
    if family not in TOLERANCE:
        raise ValueError(f"unknown family {family!r}; {suggest(family, TOLERANCE)}")
    if not Path(folder).is_dir():
        raise ValueError(f"no folder of records: {folder}")
    group_folder = Path(folder) / group
    found = list(select(group_folder)) if group_folder.is_dir() else []
    rows = []
    for method in LABELS:
        name = f"{family}/{method}"
        wanted = Run(name, 0, dict(overrides or {})).resolve().differences()
        runs = {
            record.seed: (path, record)
            for path, record in found
            if record.recipe == name
            and record.overrides == wanted
            and record.seed in seeds
            and record.measured("test_accuracy")
        }
        datasets = {record.dataset for _, record in runs.values()}
        rows.append(
            Row(
                published=PUBLISHED[name],
                asked=tuple(seeds),
                records={seed: record for seed, (_, record) in runs.items()},
                sources={seed: path for seed, (path, _) in runs.items()},
                judged=not wanted and group == DATASET and datasets <= {DATASET},
            )
        )
    return rows


def train_family(
    family: str, budget: str, seeds: Sequence[int], *, results: str | Path, **options: Any
) -> list[Row]:
    """Train what a budget affords, skipping finished runs and resuming partial ones; the rows.

    ``smoke``: small networks on the embedded digits, the first seed. ``cpu``: the published recipes
    on CIFAR-100, 400 epochs of the mlp for three seeds, or the first 40 of 400 of a transformer for
    one. ``full``: 400 epochs, all seeds.

    Args:
        family: "vit", "expert" or "mlp".
        budget: as above.
        seeds: one run a row and seed.
        results: folder of records, made if absent; runs that it has are not repeated.
        options: for :func:`~sigreg_lib.train.sweep`; ``data`` and ``group`` are ignored in smoke.

    Raises:
        ValueError: an unknown family or budget, or what ``sweep`` refuses.
    """
    if budget not in ("smoke", "cpu", "full"):
        raise ValueError(f"budget={budget!r}: smoke, cpu and full train")
    overrides: dict[str, Any] = {}
    group = options.pop("group", DATASET)
    if budget == "smoke":
        overrides, group, seeds = dict(SMOKE[family]), "digits", list(seeds)[:1]
        options |= {"data": "digits", "download": False, "device": "cpu"}
    if budget == "cpu":
        seeds = list(seeds)[: CPU_SEEDS[family]]
        options["epochs"] = CPU_EPOCHS[family]
    runs = [Run(f"{family}/{method}", seed, overrides) for seed in seeds for method in LABELS]
    sweep(runs, results=results, group=group, **options)
    return collect(results, family, seeds, group=group, overrides=overrides)


# ------------------------------------------------------------------ tables


def curve_table(rows: Iterable[Row]) -> DataFrame:
    """Our runs at the published epochs: a line an epoch, and for each row accuracy and difference.

    A cell is "24.33 ± 7.24, -1.17 (n = 2)": mean and 95% interval in percent, mean minus published
    in points, runs that were tested after that epoch. "-": none was.
    """
    import pandas as pd

    rows = list(rows)
    table: dict[str, dict[int, str]] = {}
    for row in rows:
        epochs = row.published.curve if row.judged else row.compared
        ours = {}
        for epoch in epochs:
            values = row.accuracies(epoch)
            if values and row.judged:
                mean, n = report.format_mean(values, digits=2).split(" (")
                ours[epoch] = f"{mean}, {row.difference(epoch):+.2f} ({n}"
            else:
                ours[epoch] = report.format_mean(values, digits=2) if values else "-"
        if row.judged:
            table[f"{row.label}: published"] = {
                e: f"{a:.2f}" for e, a in row.published.curve.items()
            }
        table[f"{row.label}: ours"] = ours
    return pd.DataFrame(table).fillna("-").rename_axis("epoch").sort_index()


def caption(rows: Iterable[Row]) -> str:
    """How many runs there are of each row and how far they are, for a caption."""
    parts = []
    for row in rows:
        ends = sorted({row.records[seed].epochs for seed in row.seeds})
        upto = f" to epoch {', '.join(map(str, ends))}" if ends else ""
        parts.append(f"{row.label} n = {len(row.seeds)}{upto}")
    return "; ".join(parts)


def furthest(rows: Iterable[Row]) -> list[Row]:
    """The rows with the run alone that got furthest, for what is shown of one run (n = 1)."""
    return [replace(row, records={run.seed: run} if (run := row.longest) else {}) for row in rows]


def sources(rows: Iterable[Row]) -> list[Path]:
    """Files of the records behind rows, for `report.save_figure`."""
    return [row.sources[seed] for row in rows for seed in row.seeds]


def whence(rows: Iterable[Row]) -> list[str]:
    """One line a run: state, device, precision, hours and whether the package was unchanged."""
    lines = []
    for row in rows:
        for seed in row.seeds:
            record = row.records[seed]
            p = record.provenance
            clean = {True: "", False: ", package edited", None: ", package state unknown"}
            lines.append(
                f"{record.name}: {record.status}, epoch {record.epochs}/{record.epochs_planned}, "
                f"{p.get('device')}, {p.get('precision')}, torch {p.get('torch')}, "
                f"{p.get('wall_seconds', 0) / 3600:.2f} h{clean[p.get('clean')]}"
                + (f", resumed {len(p['later'])} times elsewhere" if p.get("later") else "")
            )
        lines += [f"{row.published.name}: missing, seed {seed}" for seed in row.missing]
    return lines
