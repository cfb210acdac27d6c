"""Many runs, a bounded number at a time, skipping finished ones and resuming the rest."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from sigreg_lib.data import with_holdout
from sigreg_lib.recipes import Recipe, find
from sigreg_lib.records import Record, run_name
from sigreg_lib.train.ensemble import check_batched, train_seeds
from sigreg_lib.train.lock import Busy
from sigreg_lib.train.processes import ProcessDied, each
from sigreg_lib.train.run import check, graph_for, now, train


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a named recipe, settings that differ, a seed."""

    recipe: str
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> Recipe:
        """The recipe with its overrides; ValueError if either is unknown."""
        return find(self.recipe).override(**self.overrides)

    @property
    def name(self) -> str:
        """As in the record's file."""
        return run_name(self.recipe, self.resolve().differences(), self.seed)


def sweep(
    runs: Iterable[Run],
    *,
    workers: int = 1,
    threads: int | None = None,
    batched: bool = False,
    **options: Any,
) -> list[Record]:
    """Do every run and print one summary line for each as it ends, or was found done.

    Args:
        runs: what to do; all are checked before the first starts.
        workers: processes at a time; 1 runs them here, one after the other.
        threads: of each worker; default: the cores shared out evenly.
        batched: train runs that differ in the seed alone at once, see
            :func:`~sigreg_lib.train.train_seeds`.
        options: for :func:`~sigreg_lib.train.train` (data, epochs, results, ...).

    Returns:
        the records, in the order of ``runs``.

    Raises:
        ValueError: an unknown recipe or setting, two runs of one name, a bad worker count, data
            that hold out other images than a run, or a recipe that cannot be trained batched.
        RuntimeError: a run failed; raised after all others have ended, naming each failure. (With
            several workers that is also a run whose process was killed.)
    """
    runs = list(runs)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers!r}")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"runs given twice: {', '.join(twice)}")
    options = {"quiet": True, **options}
    for run in runs:  # bad input stops the sweep before its first run
        asked = options.get("epochs"), options.get("device", "auto")
        _, device = check(run.resolve(), run.seed, *asked, options.get("evaluate_every", 1))
        graph_for(options.get("capture"), device)
        if batched:
            check_batched(run.resolve(), options.get("compile"))
    holdouts = {run.resolve().holdout for run in runs}
    data, download = options.get("data", "digits"), options.get("download", False)
    loaded = [with_holdout(data, h, download=download) for h in holdouts]
    if workers == 1 and len(loaded) == 1:
        options["data"] = loaded[0]
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.resolve() if batched else run.name, []).append(run)
    records: dict[str, Record] = {}
    failures: list[str] = []
    started = now()

    def ended(group: list[Run], outcome: list[Record] | str) -> None:
        if isinstance(outcome, str):
            failures.extend(run.name for run in group)
            print(f"{', '.join(run.name for run in group)}: FAILED\n{outcome}", flush=True)
            return
        for run, record in zip(group, outcome, strict=True):
            records[run.name] = record
            before = ", was already there" if record.provenance["end"] < started else ""
            print(f"[{len(records)}/{len(runs)}] {summary(record)}{before}", flush=True)

    if workers == 1:
        for group in groups.values():
            ended(group, _do(group, threads, batched, options))
    else:
        threads = threads or max(1, (os.cpu_count() or 1) // workers)
        do = functools.partial(_do, threads=threads, batched=batched, options=options)
        for group, outcome in each(do, groups.values(), workers):
            ended(group, str(outcome) if isinstance(outcome, ProcessDied) else outcome)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(runs)} runs failed: {', '.join(failures)}")
    return [records[name] for name in names]


def summary(record: Record) -> str:
    """One line: name, status, epochs, last and best test accuracy, time; - for what is missing."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    last = record.last
    best = record.best_test or {"epoch": None, "test_accuracy": None}
    return (
        f"{record.name}: {record.status}, epoch {last['epoch']}/{record.epochs_planned}, "
        f"test {text(last['test_accuracy'], '.2f')}% (best {text(best['test_accuracy'], '.2f')}% "
        f"at {text(best['epoch'], 'd')}), effective dim {text(last['effective_dim'], '.1f')}, "
        f"{record.provenance['wall_seconds']:.0f} s"
    )


def _do(
    group: list[Run], threads: int | None, batched: bool, options: dict[str, Any]
) -> list[Record] | str:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        recipe, seeds = group[0].resolve(), [run.seed for run in group]
        if batched:
            return train_seeds(recipe, seeds, **options)
        return [train(recipe, seed=seeds[0], **options)]
    except (ValueError, OSError, Busy) as error:  # bad input: the message says it
        return f"{type(error).__name__}: {error}"
    except Exception:  # reported with the runs' names; the others go on
        return traceback.format_exc()
    finally:
        torch.set_num_threads(before)
