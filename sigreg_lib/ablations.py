"""Grids of runs: from axes to runs, from records to one row a run, and to a picture of all cells.

A cell that has no run, or too few, is shown as such with the reason; nothing is filled in.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigreg_lib import report
from sigreg_lib.records import Record, read
from sigreg_lib.train import Run, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

OUTCOMES = (
    *("accuracy", "train_accuracy", "best", "effective_dim", "regularizer", "floor", "probe"),
    *("weight", "epoch", "status"),
)


def grid(recipe: str, seeds: Sequence[int], /, **axes: Sequence[Any]) -> list[Run]:
    """A run for each combination of settings and seed; ``grid("mlp/weak", [0, 1], lam=[0.1, 1])``.

    The last axis runs fastest, seeds within it.
    """
    cells = itertools.product(*axes.values())
    changes = [dict(zip(axes, cell, strict=True)) for cell in cells]
    return [Run(recipe, seed, change) for change in changes for seed in seeds]


def study(
    runs: Iterable[Run],
    group: str,
    budget: str,
    *,
    records: str | Path,
    smoke: Iterable[Run] = (),
    epochs: int | None = None,
    costly: bool = False,
    **options: Any,
) -> DataFrame:
    """One row a run: read from the records, or trained first where the budget asks for it.

    Args:
        runs: of the grid.
        group: subfolder of ``records``.
        budget: ``recorded`` reads; ``smoke`` trains the runs of ``smoke`` and keeps nothing;
            ``cpu`` and ``full`` train what is missing into ``records``, resuming what was stopped.
        records: folder of records.
        epochs: how far a run is to go, all of its schedule by default; a run that has not come
            there counts as missing.
        costly: only ``full`` trains these runs; any other budget reads their records.
        options: for :func:`~sigreg_lib.train.sweep` (data, device, workers, checkpoints, ...).

    Returns:
        columns ``run``, ``recipe``, ``seed``, every setting of the recipe, and :data:`OUTCOMES`,
        see :func:`outcome`. A run without a record has status ``missing``.

    Raises:
        ValueError: an unknown budget, no folder of records, or a record that is not the run's.
    """
    if budget not in report.BUDGETS:
        raise ValueError(f"budget={budget!r}: expected one of {', '.join(report.BUDGETS)}")
    if costly and budget != "full":
        budget = "recorded"
    runs = list(runs)
    if budget == "smoke":
        runs = list(smoke)
        with tempfile.TemporaryDirectory() as folder:
            places = {"results": f"{folder}/r", "checkpoints": f"{folder}/c"}
            found = sweep(runs, group=group, epochs=epochs, **(options | places))
        return rows(runs, {record.name: record for record in found}, epochs)
    if budget in ("cpu", "full"):
        sweep(runs, group=group, results=records, epochs=epochs, **options)
    if not Path(records).is_dir():
        raise ValueError(f"no folder of records: {records}")
    paths = {run.name: Path(records, group, f"{run.name}.json") for run in runs}
    return rows(runs, {n: read(path) for n, path in paths.items() if path.exists()}, epochs)


def cases(named: Mapping[str, Sequence[Run]], group: str, budget: str, **options: Any) -> DataFrame:
    """:func:`study` of runs under names of one's own, one row a run; column ``case`` has the name.

    Args:
        named: the runs of each case, in the order of the table.
        group, budget, options: as in :func:`study`.
    """
    import pandas as pd

    frames = [study(runs, group, budget, **options).assign(case=c) for c, runs in named.items()]
    return pd.concat(frames, ignore_index=True)


def require(frame: DataFrame) -> DataFrame:
    """The table of :func:`study` itself, for pages that cannot do without it.

    Raises:
        ValueError: none of its runs has come far enough.
    """
    if not (frame["status"] == "done").any():
        first = f", such as {frame['run'].iloc[0]}" if len(frame) else ""
        raise ValueError(f"no record of any of {len(frame)} runs{first}; budget='cpu' trains them")
    return frame


def rows(runs: Sequence[Run], found: Mapping[str, Record], epochs: int | None = None) -> DataFrame:
    """The table of :func:`study` from records by the runs' names.

    Raises:
        ValueError: a record has other settings than its run.
    """
    import pandas as pd

    configs = [run.resolve().as_dict() for run in runs]
    lines = []
    for run, config in zip(runs, configs, strict=True):
        settings = {key: _cell(value) for key, value in config.items() if key != "name"}
        line = {"run": run.name, "recipe": run.recipe, "seed": run.seed, **settings}
        record = found.get(run.name)
        if record is not None and record.config != config:
            raise ValueError(f"the record of {run.name} has other settings")
        lines.append(line | outcome(record, epochs))
    return pd.DataFrame(lines)


def outcome(record: Record | None, epochs: int | None = None) -> dict[str, Any]:
    """What became of a run, after ``epochs`` (default: all of its schedule).

    ``accuracy`` (test, that epoch), ``train_accuracy`` (on training images while the weights
    changed) and ``best`` (the optimistic figure) in percent, ``effective_dim`` of the last layer,
    ``regularizer`` and its ``floor``, averages over layers, and ``probe``: Weak of the same sketch
    (K = 64) for every run, average over layers (NaN if a layer's was not finite), so that runs of
    different K compare. ``weight``: lam, the setting or what "auto" found, once it is found.
    ``status``: ``done``, ``diverged``, ``partial`` (not come so far), ``untested`` after that
    epoch, or ``missing``; only ``done`` has the other figures.
    """
    nothing = dict.fromkeys(OUTCOMES, math.nan)
    if record is None:
        return nothing | {"status": "missing", "epoch": 0}
    nothing["weight"] = _number(record.provenance.get("lam", record.config["lam"]))
    stop = record.epochs_planned if epochs is None else epochs
    ended_badly = record.status == "diverged" and record.epochs <= stop
    if record.epochs < stop or ended_badly:
        status = "diverged" if ended_badly else "partial"
        return nothing | {"status": status, "epoch": record.epochs}
    at = record.at(stop)
    if at["test_accuracy"] is None:
        return nothing | {"status": "untested", "epoch": stop}
    accuracies = [a for e, a in record.measured("test_accuracy").items() if e <= stop]
    looked = dict(zip(record.layers["epoch"], record.layers.get("weak", ()), strict=False))
    probe = looked.get(stop)
    return nothing | {
        "accuracy": at["test_accuracy"],
        "train_accuracy": _number(at["train_accuracy"]),
        "best": max(accuracies),
        "effective_dim": at["effective_dim"],
        "regularizer": _number(at["regularizer"]),
        "floor": _number(at["regularizer_floor"]),
        "probe": sum(probe) / len(probe) if probe and None not in probe else math.nan,
        "epoch": stop,
        "status": "done",
    }


def cell_values(frame: DataFrame, value: str, **settings: Any) -> list[float]:
    """The values of the finished runs with these settings."""
    return [float(v) for v in _done(frame, settings)[value]]


def paired(
    frame: DataFrame, value: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[float]:
    """Differences, first minus second, of the runs of the same seed; seeds that lack one are left
    out."""
    sides = []
    for settings in (first, second):
        chosen = _done(frame, settings)
        if chosen["seed"].duplicated().any():
            raise ValueError(f"{dict(settings)} is more than one setting")
        sides.append(dict(zip(chosen["seed"], chosen[value], strict=True)))
    return [float(sides[0][seed] - sides[1][seed]) for seed in sides[0] if seed in sides[1]]


def seed_table(frame: DataFrame, index: str, value: str = "accuracy", digits: int = 2) -> DataFrame:
    """A line a value of the column ``index``, a column a seed: the outcome as text, or why there is
    none (``not measured``, ``missing``, or the status with the epoch that the run came to).

    Raises:
        ValueError: two runs in one place.
    """

    def text(number: float, status: str, epoch: int) -> str:
        if status == "done":
            return "not measured" if math.isnan(number) else f"{number:.{digits}f}"
        return status + (f" (epoch {epoch})" if epoch else "")

    texts = map(text, frame[value], frame["status"], frame["epoch"])
    named = frame.assign(text=list(texts), seed=[f"seed {seed}" for seed in frame["seed"]])
    table = named.pivot(index=index, columns="seed", values="text")
    return table.reindex(index=frame[index].unique(), columns=named["seed"].unique()).fillna("")


def epoch_table(
    named: Mapping[str, Sequence[Run]],
    group: str,
    epochs: Iterable[int],
    *,
    records: str | Path,
    value: str = "accuracy",
    digits: int = 2,
) -> DataFrame:
    """:func:`seed_table` of named runs after each of several epochs, from the records.

    A line a case; columns are pairs of epoch and seed.
    """
    import pandas as pd

    tables = {}
    for epoch in epochs:
        found = cases(named, group, "recorded", records=records, epochs=epoch)
        tables[epoch] = seed_table(found, "case", value, digits)
    return pd.concat(tables, axis=1, names=["epoch"])


def heat_map(
    ax: Axes,
    frame: DataFrame,
    *,
    x: str,
    y: str,
    value: str,
    columns: Sequence[Any],
    lines: Sequence[Any],
    reasons: Mapping[tuple[Any, Any], str] | None = None,
    digits: int = 1,
    **style: Any,
) -> None:
    """Mean of each cell as colour and number, the half width of its 95% interval below it.

    Args:
        ax: where.
        frame: of :func:`rows`.
        x, y: settings along the axes; ``columns`` and ``lines`` are their values.
        value: one of the outcomes.
        reasons: why a cell is not to be there, by (column, line), a word or two. A cell without
            runs and without a reason says "missing", one whose runs all diverged "diverged".
        digits: of the numbers.
        style: for ``seaborn.heatmap`` (vmin, vmax, cmap, ...).
    """
    import numpy as np
    import seaborn as sns
    from seaborn.utils import relative_luminance

    means = np.full((len(lines), len(columns)), math.nan)
    texts = np.empty(means.shape, dtype=object)
    for (i, line), (j, column) in itertools.product(enumerate(lines), enumerate(columns)):
        found = cell_values(frame, value, **{x: column, y: line})
        if found:
            means[i, j], half, n = report.mean_interval(found)
            below = f"\n±{half:.{digits}f}" if n > 1 else "\nn = 1"
            texts[i, j] = f"{means[i, j]:.{digits}f}{below}"
        else:
            there = _with(frame, {x: column, y: line})
            diverged = len(there) and (there["status"] == "diverged").all()
            texts[i, j] = (reasons or {}).get((column, line), "diverged" if diverged else "missing")
    look = {"cmap": "cividis", "cbar": False, "linewidths": 0.5, "annot_kws": {"size": 6}} | style
    ticks = {"xticklabels": columns, "yticklabels": lines}
    sns.heatmap(means, ax=ax, annot=texts, fmt="", **ticks, **look)
    shades = ax.collections[-1].get_facecolors()[~np.isnan(means).ravel()]
    for text, shade in zip(ax.texts, shades, strict=True):
        # where black and white contrast alike; seaborn leaves white on shades up to 0.408
        text.set_color("black" if relative_luminance(shade) > 0.179 else "white")
    for i, j in zip(*np.where(np.isnan(means)), strict=True):  # seaborn leaves these blank
        ax.text(j + 0.5, i + 0.5, texts[i, j], size=6, ha="center", va="center", style="italic")
    ax.set(xlabel=x, ylabel=y)
    ax.tick_params(length=0)


def _with(frame: DataFrame, settings: Mapping[str, Any]) -> DataFrame:
    """The rows with these settings; a table holds None as NaN, and lists as tuples."""
    import numpy as np

    for name, wanted in settings.items():
        own = _cell(wanted)
        same = [v is None or v != v if own is None else v == own for v in frame[name]]
        frame = frame.loc[np.array(same, dtype=bool)]
    return frame


def _done(frame: DataFrame, settings: Mapping[str, Any]) -> DataFrame:
    return _with(frame[frame["status"] == "done"], settings)


def _cell(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # a table's cells must be hashable


def _number(value: float | str | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
