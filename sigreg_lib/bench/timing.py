"""Timing in turn, ratios within a round, and the memory that a call holds at its peak."""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[2] / "tests"

Timed = dict[Hashable, list[float]]  # seconds a call, one entry a round


def alternate(
    functions: Mapping[Hashable, Callable[[], Any]], *, rounds: int, at_least: float = 0.02
) -> Timed:
    """Time functions in turn, ``rounds`` times over.

    Args:
        functions: what to time, by name. Each is called twice before the first round.
        rounds: how often each is timed, at least 1.
        at_least: seconds; shorter calls are repeated within a round to reach it. Calls below five
            times that are made before the clock starts, too, once or half as often: what another
            function left in caches and threads would be counted as theirs.

    Returns:
        seconds a call of each function in each round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds!r}")
    repeats, before = {}, {}
    for name, function in functions.items():
        function()
        seconds = max(_seconds(function, 1), 1e-7)
        repeats[name] = max(1, round(at_least / seconds))
        before[name] = max(repeats[name] // 2, int(seconds < 5 * at_least))
    times: Timed = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                for _ in range(before[name]):
                    function()
                times[name].append(_seconds(function, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def _seconds(function: Callable[[], Any], repeats: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Timed, above: Hashable, below: Hashable) -> dict[str, float]:
    """Of the ratio of two functions' times within a round: ``median``, quartiles ``low``, ``high``.

    ``least`` and ``most`` are the 95% interval of the median: the values of rank (n -+ 1.96 root
    n) / 2 of n rounds, whatever their distribution; all of the range below 8 rounds.
    """
    values = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    rank = max(1, math.floor((len(values) - 1.96 * math.sqrt(len(values))) / 2))
    ends = {"least": values[rank - 1], "most": values[-rank]}
    return {"median": middle, "low": low, "high": high, **ends}


def pooled(found: Sequence[Any]) -> Any:
    """Measurements of several processes as one, of the same structure.

    Processes on a shared machine differ by more than rounds within one. Numbers become their
    median over processes; of a :func:`ratio`, quartiles and the ends of the interval become the
    outermost ones.

    Raises:
        ValueError: they differ in something that is no number.
    """
    first = found[0]
    if isinstance(first, Mapping):
        if any(each.keys() != first.keys() for each in found):
            raise ValueError(f"measurements of different keys: {sorted(first)}")
        ends = {"low": min, "least": min, "high": max, "most": max} if "median" in first else {}
        return {
            key: ends.get(key, pooled)([each[key] for each in found])  # type: ignore[operator]
            for key in first
        }
    if isinstance(first, list):
        return [pooled(each) for each in zip(*found, strict=True)]
    if isinstance(first, int | float) and not isinstance(first, bool):
        middle = statistics.median(found)
        return round(middle) if isinstance(first, int) else middle
    if any(each != first for each in found):
        raise ValueError(f"measurements of different things: {found}")
    return first


def extra_memory(
    function: Callable[[], Any],
    device: torch.device | str = "cpu",
    *,
    before: Callable[[], Any] | None = None,
) -> int:
    """Bytes that a call holds at its peak beyond what was held before it.

    It is called once before, so that what is made once stays out; then ``before``, to let go of
    what the call would free.
    """
    function()
    if before is not None:
        before()
    if torch.device(device).type == "cuda":
        _wait()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _wait()
        return torch.cuda.max_memory_allocated() - held
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks on standard error
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(max(0, held.max(initial=0)))


def plain(module: str) -> ModuleType:
    """A module of plain versions, from the folder ``tests`` of the checkout.

    Raises:
        FileNotFoundError: the package does not lie in a checkout.
    """
    if not (TESTS / f"{module}.py").exists():
        raise FileNotFoundError(f"the plain versions are in a checkout's tests/, not at {TESTS}")
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module(module)
