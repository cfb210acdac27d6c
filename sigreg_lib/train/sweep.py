"""Many runs, a bounded number at a time, skipping finished ones and resuming the rest."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch

from sigreg_lib.data import ImageData, load
from sigreg_lib.recipes import Recipe, find
from sigreg_lib.records import Record, run_name
from sigreg_lib.train.run import check, train


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
    verbose: bool = True,
    **options: Any,
) -> list[Record]:
    """Do every run and print one summary line for each as it ends.

    Args:
        runs: what to do; all are checked before the first starts.
        workers: processes at a time; 1 runs them here, one after the other.
        threads: of each worker; default: the cores shared out evenly.
        verbose: print the summary lines; failures are printed in any case.
        options: for :func:`~sigreg_lib.train.train` (data, epochs, results, ...).

    Returns:
        the records, in the order of ``runs``.

    Raises:
        ValueError: an unknown recipe or setting, two runs of one name, or a bad worker count.
        RuntimeError: a run failed; raised after all others have ended, naming each failure.
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
        check(run.resolve(), run.seed, options.get("epochs"), options.get("device", "auto"))
    holdouts = {run.resolve().holdout for run in runs}
    if not isinstance(options.get("data", "digits"), ImageData):
        download = options.get("download", False)
        loaded = [
            load(options.get("data", "digits"), download=download, holdout=h) for h in holdouts
        ]
        if workers == 1 and len(loaded) == 1:
            options["data"] = loaded[0]
    records: dict[str, Record] = {}
    failures: list[str] = []

    def ended(run: Run, outcome: Record | str) -> None:
        if isinstance(outcome, str):
            failures.append(run.name)
            print(f"{run.name}: FAILED\n{outcome}", flush=True)
        else:
            records[run.name] = outcome
        if verbose and run.name in records:
            print(f"[{len(records)}/{len(runs)}] {summary(outcome)}", flush=True)

    if workers == 1:
        for run in runs:
            ended(run, _do(run, threads, options))
    else:
        threads = threads or max(1, (os.cpu_count() or 1) // workers)
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        with ProcessPoolExecutor(min(workers, len(runs)) or 1, mp_context=context) as pool:
            futures = {pool.submit(_do, run, threads, options): run for run in runs}
            for future in as_completed(futures):
                ended(futures[future], future.result())
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(runs)} runs failed: {', '.join(failures)}")
    return [records[name] for name in names]


def summary(record: Record) -> str:
    """One line: name, status, epochs, last and best test accuracy, time."""
    last, best = record.last, record.best_test
    dimension = last["effective_dim"]
    return (
        f"{record.name}: {record.status}, epoch {last['epoch']}/{record.epochs_planned}, "
        f"test {last['test_accuracy']:.2f}% (best {best['test_accuracy']:.2f}% at "
        f"{best['epoch']}), effective dim "
        f"{'-' if dimension is None else format(dimension, '.1f')}, "
        f"{record.provenance['wall_seconds']:.0f} s"
    )


def _do(run: Run, threads: int | None, options: dict[str, Any]) -> Record | str:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return train(run.resolve(), seed=run.seed, **options)
    except Exception:  # reported with the run's name; the other runs go on
        return traceback.format_exc()
    finally:
        torch.set_num_threads(before)
