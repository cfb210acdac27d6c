"""Time and memory of the losses and of whole steps, ours beside plain ones.

Comparisons alternate in one process, and what is quoted is the median over rounds of the ratio
within a round, with its quartiles: on a shared machine both sides then meet the same disturbances.
The plain versions live in ``tests/`` (``reference.py``, ``reference_step.py``), so that a
comparison needs a checkout; they are float32, eager, one call a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from sigreg_lib.bench.losses import bench_cases, bench_losses, bench_scaling, bench_sketches
from sigreg_lib.bench.profile import bench_profile, profile
from sigreg_lib.bench.steps import (
    FAMILIES,
    bench_epoch,
    bench_products,
    bench_steps,
    bench_variants,
)
from sigreg_lib.bench.targets import Target, targets
from sigreg_lib.bench.timing import alternate, extra_memory, plain, pooled, ratio
from sigreg_lib.train.run import code, device_name

__all__ = [
    "PARTS",
    "Target",
    "alternate",
    "as_part",
    "bench_cases",
    "bench_epoch",
    "bench_losses",
    "bench_products",
    "bench_profile",
    "bench_scaling",
    "bench_sketches",
    "bench_steps",
    "bench_variants",
    "extra_memory",
    "plain",
    "pooled",
    "profile",
    "ratio",
    "run",
    "table",
    "targets",
]

PARTS = ("losses", "sketches", "scaling", "products", "steps", "variants", "epoch", "profile")


def run(
    parts: tuple[str, ...] = PARTS, *, rounds: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """All the measurements of some parts.

    Args:
        parts: of ``losses``, ``sketches`` (one each or one for all layers), ``scaling`` (against C
            and K), ``products`` (the machine's speed), ``steps``, ``variants`` (of the vit's
            step), ``epoch``, ``profile`` (operators by kind).
        rounds: default 31 for losses and sketches, 15 for scaling and products, 7 for steps and
            variants, 5 for epochs, 3 for profiles.
        device: ``cpu`` or ``cuda``; there is no plain step on a GPU.

    Returns:
        for each part its ``rows`` and the ``provenance``: code, versions, machine, threads, date.

    Raises:
        ValueError: an unknown part, or fewer than one round.
        FileNotFoundError: outside a checkout; see :func:`plain`.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts are of {', '.join(PARTS)}, not {part!r}")
    options: dict[str, Any] = {"device": device}
    if rounds is not None:
        options["rounds"] = rounds
    measure = {
        "losses": lambda: bench_losses(**options),
        "sketches": lambda: bench_sketches(**options),
        "scaling": lambda: bench_scaling(**options),
        "products": lambda: bench_products(**options),
        "steps": lambda: [bench_steps(family, **options) for family in FAMILIES],
        "variants": lambda: bench_variants(**options),
        "epoch": lambda: [bench_epoch(f"{family}/weak", **options) for family in FAMILIES],
        "profile": lambda: bench_profile(**options),
    }
    return {part: as_part(measure[part](), device) for part in parts}


def as_part(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Rows with what their measurement depends on: code, versions, machine, threads."""
    provenance = {
        **code(),
        "torch": torch.__version__,
        "device": device_name(torch.device(device)),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {"provenance": provenance, "rows": rows}


def table(found: Mapping[str, Any]) -> list[str]:
    """The lines of one table: what, plain and ours in milliseconds, ratio and its quartiles."""

    def part(name: str) -> list[dict[str, Any]]:
        return found[name]["rows"] if name in found else []

    rows = [("what", "plain ms", "ours ms", "ratio", "quartiles", "plain MB", "ours MB")]
    for row in [*part("losses"), *part("scaling")]:
        k = "" if row["k"] is None else f", K {row['k']}"
        layers = f"{row['layers']} x " if row["layers"] > 1 else ""
        size = f"{row['loss']}, {layers}N {row['n']}, C {row['c']}{k}"
        rows.append((size, *_times(row["seconds"], row["bytes"], "plain", "ours", row["ratio"])))
    for row in part("sketches"):
        layers, n, c = row["shape"]
        for way, seconds in row["seconds"].items():
            name = f"{row['loss']}, {layers} x N {n}, C {c}, sketch {way}"
            last = _quoted(row["ratio"] if way == "one each" else None)
            rows.append((name, "", f"{1e3 * seconds:.2f}", *last, "", ""))
    for row in part("products"):
        for precision, speed in row["gflops"].items():
            name = f"{row['family']} product {'x'.join(map(str, row['shape']))}, {precision}"
            rows.append((name, "", "", f"{speed:.0f}", "1e9 operations/s", "", ""))
    for row in part("steps"):
        for method in ("none", "weak", "strong"):
            name = f"{row['family']} step, {method}"
            of = row["ratio"][method] if "ratio" in row else None
            columns = f"plain {method}", f"ours {method}"
            rows.append((name, *_times(row["seconds"], row["bytes"], *columns, of)))
        for method, added in row["added"].items():
            share = [f"{100 * (added[key] - 1):+.1f}%" for key in ("median", "least", "most")]
            name = f"{row['family']} step, {method} over none (95% interval)"
            rows.append((name, "", "", share[0], f"{share[1]} {share[2]}", "", ""))
    for row in part("variants"):
        name = f"vit step, {row['variant']}"
        rows.append((name, "", f"{1e3 * row['seconds']:.0f}", *_quoted(row["ratio"]), "", ""))
    for row in part("epoch"):
        for name, seconds in row["seconds"].items():
            share = f"{100 * seconds / row['epoch']:.1f}%"
            name = f"{row['recipe']} epoch, {name}"
            rows.append((name, "", f"{1e3 * seconds:.0f}", share, "of the epoch", "", ""))
    for row in part("profile"):
        for kind, share in row["share"].items():
            name = f"{row['what']}, {kind}"
            rows.append((name, "", "", f"{100 * share:.0f}%", "of our time", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def _times(seconds, held, plain_name, ours_name, of) -> tuple[str, ...]:
    def cells(values, scale, digits) -> list[str]:
        return [
            f"{scale * values[name]:.{digits}f}" if name in values else ""
            for name in (plain_name, ours_name)
        ]

    return *cells(seconds, 1e3, 2), *_quoted(of), *cells(held, 1e-6, 1)


def _quoted(of: Mapping[str, float] | None) -> tuple[str, str]:
    """A ratio's median and quartiles, empty where there is none."""
    return ("", "") if of is None else (f"{of['median']:.2f}", f"{of['low']:.2f} {of['high']:.2f}")
