"""Pictures of a table's rows: learning curves, and each layer over training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sigreg_lib import report
from sigreg_lib.records import Record, spectrum_ranks
from sigreg_lib.tables.optimization import fits
from sigreg_lib.tables.rows import LABELS, Row
from sigreg_lib.tables.verdicts import passes_as, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VARIANTS = (  # of seaborn's colorblind what no row has, with dashes to tell them apart in grey
    ("#029e73", "-."),
    ("#cc78bc", (0, (1, 1))),
    ("#d55e00", (0, (6, 2))),
    ("#56b4e9", (0, (4, 1, 1, 1, 1, 1))),
)


def plot_curves(rows: Sequence[Row]) -> Figure:
    """Test accuracy over epochs, a panel a row, over the published points.

    Titles: table, recipe and data; of each panel the verdict with n at its epoch, and other rows
    that the runs would pass as.

    Mean and 95% interval as far as all runs of a row go; beyond, and where runs differ in length,
    each run by itself as a thin line.
    """
    fig, panels = _panels(rows)
    highest = 1.0
    for ax, row in zip(panels, rows, strict=True):
        method = row.published.method
        if row.judged:
            points = row.published.curve
            look = report.method_style("published") | {"zorder": 3}
            ax.plot(list(points), list(points.values()), **look, label="published, one run")
            highest = max(highest, *points.values())
        for seed in row.seeds:
            tested = row.records[seed].measured("test_accuracy")
            style = report.method_style(method) | {"marker": "", "linewidth": 0.6, "alpha": 0.7}
            ax.plot(list(tested), list(tested.values()), **style)
            highest = max(highest, *tested.values())
        if row.shared:
            groups = [row.accuracies(epoch) for epoch in row.shared]
            few = "o" if len(groups) < 4 else ""
            label = f"ours, n = {len(row.seeds)}"
            report.plot_mean(ax, row.shared, groups, method, marker=few, markersize=2, label=label)
        elif not row.judged:
            _missing(ax)
        others = ", ".join(LABELS[other.method] for other in passes_as(row))
        alike = f"would pass as {others}" if others else ""
        at = f" at epoch {row.epoch}"
        runs = f", n = {len(row.accuracies(row.epoch))}{at}" if row.judged and row.epoch else ""
        ax.set_title(f"{row.label}{runs}:\n{verdict(row)}\n{alike}")
        ax.set(xscale="log", xlabel="epoch")
        _epoch_ticks(ax, 400 if row.judged else max(row.shared, default=10))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper left", fontsize=7, handlelength=2)
    panels[0].set(ylabel="test accuracy (%)", ylim=(0, 1.35 * highest))  # room for the legends
    of, data = rows[0].published, "CIFAR-100" if rows[0].judged else "the digits"
    fig.suptitle(f"Table {of.table}: {of.family} on {data}, means and 95% intervals")
    return fig


def plot_layers(
    rows: Sequence[Row],
    measure: str,
    ylabel: str,
    *,
    log: bool = True,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """A measure of every layer over training, a panel a row, of the run that got furthest (n = 1).

    Args:
        rows: rows of the paper.
        measure: a key of a record's ``layers``.
        ylabel: with the unit.
        log: logarithmic axis.
        levels: for a method, horizontal lines by label; each panel then has a scale of its own.
    """
    fig, panels = _panels(rows, share=levels is None)
    runs = [row.longest for row in rows]
    depth = max((len(run.layers["names"]) for run in runs if run), default=1)
    ends = [run.layers["epoch"][-1] for run in runs if run and run.layers.get(measure)]
    for ax, row, run in zip(panels, rows, runs, strict=True):
        ax.set_yscale("log" if log else "linear")
        found = run.layers.get(measure) if run else None
        if found:
            for layer, values in enumerate(zip(*found, strict=True)):
                drawn = [_positive(v) for v in values]
                ax.plot(run.layers["epoch"], drawn, **_look(layer, depth))
            change = [_text(found[i][-1]) for i in (0, -1)]
            ax.set_title(f"{row.label}\nlast layer: {change[0]} to {change[1]}")
        else:
            _missing(ax)
            ax.set_title(f"{row.label}\n")
        looks = zip(
            (levels or {}).get(row.published.method, {}).items(), (":", "--", "-."), strict=False
        )
        for (text, level), style in looks:
            ax.axhline(level, color="0.4", linewidth=0.8, linestyle=style)
            place = ax.get_yaxis_transform()
            ax.text(0.01, level, text, transform=place, fontsize=6, va="bottom")
        ax.set(xscale="log", xlabel="epoch")
        _epoch_ticks(ax, max(ends, default=10))
        if log:
            _plain_ticks(ax)
    panels[0].set_ylabel(ylabel)
    if any(runs):
        _layer_bar(fig, panels, depth)
    return fig


def plot_spectra(rows: Sequence[Row]) -> Figure:
    """Eigenvalues of every layer's covariance by rank, of the run that got furthest (n = 1).

    A panel a row, at the last look that has spectra.
    """
    fig, panels = _panels(rows)
    runs = [row.longest for row in rows]
    depth = max((len(run.layers["names"]) for run in runs if run), default=1)
    for ax, row, run in zip(panels, rows, runs, strict=True):
        epoch, spectra = last_spectrum(run) if run else (None, [])
        for layer, values in enumerate(spectra):
            ranks = spectrum_ranks(run.config["width"])
            ax.plot(ranks, [_positive(v) for v in values], **_look(layer, depth))
        if spectra:
            ax.set_title(f"{row.label}, epoch {epoch}\nlast layer: largest {spectra[-1][0]:.3g}")
        else:
            _missing(ax)
            ax.set_title(f"{row.label}\n")
        ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="rank")
    widest = max((run.config["width"] for run in runs if run), default=10)
    for ax in panels:
        ax.set_xlim(0.9, 1.1 * widest)
    panels[0].set(ylabel="eigenvalue of the covariance", ylim=(1e-6, None))
    if any(runs):
        _layer_bar(fig, panels, depth)
    return fig


def plot_gradients(rows: Sequence[Row], clip: float) -> Figure:
    """Mean gradient norm of an epoch before clipping, of the run of each row that got furthest."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(report.COLUMN, 2.5))
    ends, highest = [10], 2 * clip
    for row in [row for row in rows if row.longest]:
        norms = row.longest.measured("grad_norm")
        look = report.method_style(row.published.method) | {"marker": ""}
        ax.plot(list(norms), list(norms.values()), **look, label=row.label)
        ends, highest = [*ends, *list(norms)[-1:]], max(highest, *norms.values())
    ax.axhline(clip, color="0.4", linewidth=0.8)
    ax.text(0.99, clip, "clip", transform=ax.get_yaxis_transform(), ha="right", va="top")
    ax.set(xlabel="epoch", ylabel="gradient's norm before clipping", xscale="log")
    ax.set_ylim(0, 1.4 * highest)  # room for the legend
    _epoch_ticks(ax, max(ends))
    if len(ends) > 1:
        ax.legend(loc="upper left", handlelength=3, fontsize=7)
    else:
        _missing(ax)
    return fig


def plot_fit(runs: Mapping[str, Record]) -> Figure:
    """Test accuracy over training accuracy, a line a run from epoch to epoch.

    On the dotted diagonal a run tests as it trains. Runs by the names of the rows (``LABELS``) look
    as everywhere, others have colours and dashes of their own.
    """
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(report.COLUMN, 2.7))
    variants = itertools.cycle(_VARIANTS)
    highest = 1.0
    for name, run in runs.items():
        points = fits(run)
        trained, tested = [t for _, t, _ in points], [a for _, _, a in points]
        look = report.method_style(run.config["regularizer"]) | {"marker": ""}
        if name not in LABELS.values():
            look |= dict(zip(("color", "linestyle"), next(variants), strict=True))
        ax.plot(trained, tested, **look, label=name)
        highest = max(highest, *tested)
    ax.axline((0, 0), slope=1, color="0.4", linewidth=0.8, linestyle=":")
    ax.set(xlabel="training accuracy (%)", ylabel="test accuracy (%)", ylim=(0, 1.15 * highest))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower right", fontsize=7, handlelength=3)
    else:
        _missing(ax)
    return fig


def last_spectrum(record: Record) -> tuple[int | None, list[list[float]]]:
    """Epoch and spectra, one a layer, of the last look that has them."""
    looks = zip(record.layers.get("epoch", []), record.layers.get("spectrum", []), strict=True)
    return next(((e, s) for e, s in reversed(list(looks)) if s is not None), (None, []))


def _panels(rows: Sequence[Row], share: bool = True) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib import pyplot as plt

    size = (report.WIDE, 2.5)
    fig, panels = plt.subplots(1, len(rows), figsize=size, sharey=share, squeeze=False)
    return fig, panels[0]


def _look(layer: int, depth: int) -> dict[str, Any]:
    """Shallow layers light, deep ones dark, in greyscale too; the last is dashed."""
    from matplotlib import colormaps

    shade = colormaps["viridis_r"](0.1 + 0.9 * layer / max(depth - 1, 1))
    last = layer == depth - 1
    style = {"linestyle": "--", "linewidth": 1.6} if last else {"linewidth": 1.0}
    return {"color": shade, "marker": ".", "markersize": 3} | style


def _layer_bar(fig: Figure, panels: Sequence[Axes], depth: int) -> None:
    """A key of the layers' shades: they are as many as the network is deep."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = ListedColormap([_look(layer, depth)["color"] for layer in range(depth)])
    norm = BoundaryNorm([i + 0.5 for i in range(depth + 1)], depth)
    bar = fig.colorbar(ScalarMappable(norm, shades), ax=list(panels), pad=0.01, aspect=25)
    bar.set_ticks(sorted({1, depth}), labels=["first", "last"][: len({1, depth})])
    bar.set_label("layer", labelpad=-8)


def _epoch_ticks(ax: Axes, last: float) -> None:
    from matplotlib.ticker import NullLocator

    ticks = [epoch for epoch in (1, 5, 10, 40, 100, 400) if epoch <= max(last, 5)]
    ax.set_xlim(0.9, 1.15 * max(last, 5))
    ax.set_xticks(ticks, labels=list(map(str, ticks)))
    ax.xaxis.set_minor_locator(NullLocator())


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else math.nan


def _missing(ax: Axes) -> None:
    ax.text(0.5, 0.4, "no record", transform=ax.transAxes, ha="center", color="0.4")


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{float(f'{value:.3g}'):,g}"  # no powers of ten


def _plain_ticks(ax: Axes) -> None:
    """1, 2, 5, 10 instead of powers: the range is often less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
