"""The run record: one JSON file a run, small enough to read, the only thing that feeds a table."""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
HISTORY = (
    "epoch", "train_loss", "train_accuracy", "regularizer", "regularizer_floor", "test_loss",
    "test_accuracy", "effective_dim", "grad_norm", "seconds",
)  # fmt: skip
LATER_SETTINGS = {  # younger than some records, and what those runs had
    "dropout": 0.0,
    "shared_sketch": True,
}
STATUSES = ("partial", "finished", "diverged")


@dataclass
class Record:
    """What a run was and did. Accuracies in percent, losses in nats, times in seconds.

    Attributes:
        recipe: name of the recipe.
        overrides: settings that differ from the named recipe.
        config: all settings as used.
        seed: of everything random.
        dataset: name of the data set.
        history: one list a column of :data:`HISTORY`, one entry an epoch; None where a value does
            not exist (the regularizer of a baseline; test columns and effective dimension of an
            epoch without evaluation) or is not finite (a diverged run).
        layers: ``names`` of the layers that the named recipe taps, whichever this run does (where
            those are others, ``tapped`` names them, for ``regularizer``), ``epoch`` of each look at
            them (the first ten, then every 5th, from 50 every 10th, and the last of a run; if they
            were tested), and one row a look with a value a layer, floats at 4 digits:
            ``regularizer`` (training batches) and, on the first 2,000 test images (tokens, where
            these are the samples), ``effective_dim`` (participation ratio), ``weak``, ``strong``
            (K = 64, batches of 128), ``feature_norm``, ``mean_cosine``, ``spectrum`` (eigenvalues
            of the covariance at :func:`spectrum_ranks`; None but for epochs 1, 10, 100 and the
            last).
        epochs_planned: length of the schedule.
        status: ``partial`` (the schedule goes on), ``finished`` or ``diverged``.
        provenance: commit and whether the package was unchanged, torch, device, threads, precision,
            compiled, captured (CUDA), kernels (CPU: the instructions of PyTorch's own), mean and
            std of the normalization as used, checksums of the images and of their order, start,
            end, wall seconds; ``lam`` the weight found, where the recipe says auto and its steps of
            seeking are over; ``batched`` the seeds that were trained at once, if so: times are then
            this run's share; ``later`` lists sessions that resumed the run under something else,
            with their first epoch.
    """

    recipe: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    seed: int
    dataset: str
    epochs_planned: int
    history: dict[str, list] = field(default_factory=lambda: {name: [] for name in HISTORY})
    layers: dict[str, Any] = field(default_factory=dict)
    status: str = "partial"
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.history["epoch"])

    @property
    def name(self) -> str:
        """The file's stem: recipe, overrides and seed."""
        return run_name(self.recipe, self.overrides, self.seed)

    @property
    def last(self) -> dict[str, Any] | None:
        """The last epoch's history entry.

        Test columns can be None in a run that diverged, or that was killed between evaluations.
        """
        return self.at(self.epochs) if self.epochs else None

    def measured(self, name: str) -> dict[int, float]:
        """A column of the history by epoch, counted from 1, where it has a value."""
        pairs = zip(self.history["epoch"], self.history[name], strict=True)
        return {epoch: value for epoch, value in pairs if value is not None}

    @property
    def best_test(self) -> dict[str, Any] | None:
        """Epoch and value of the highest test accuracy: as published, an optimistic figure."""
        accuracies = self.measured("test_accuracy")
        if not accuracies:
            return None
        epoch = max(accuracies, key=lambda e: (accuracies[e], -e))
        return {"epoch": epoch, "test_accuracy": accuracies[epoch]}

    def at(self, epoch: int) -> dict[str, Any]:
        """The history entry of an epoch, counted from 1.

        Raises:
            ValueError: the run did not get there.
        """
        if not 1 <= epoch <= self.epochs:
            raise ValueError(f"{self.name} has epochs 1 to {self.epochs}, not {epoch}")
        return {name: column[epoch - 1] for name, column in self.history.items()}

    def recent_mean(self, name: str, epoch: int, over: int = 10) -> float | None:
        """Mean of a column over the ``over`` epochs up to ``epoch``, so that the jitter of single
        ones weighs less; None where one of them was not measured."""
        values = self.measured(name)
        wanted = range(epoch - over + 1, epoch + 1)
        return sum(values[e] for e in wanted) / over if values.keys() >= set(wanted) else None

    def to_json(self) -> str:
        """The file's text: floats at 6 significant digits, history by column, NaN as null."""
        content = asdict(self) | {"last": self.last, "best_test": self.best_test}
        order = ("schema", "recipe", "overrides", "seed", "dataset", "status", "epochs_planned")
        order += ("last", "best_test", "config", "provenance", "history", "layers")
        lines = [f" {json.dumps(k)}: {_compact(content[k])}" for k in order]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read and validate.

        Raises:
            ValueError: not a record of this schema, or one that contradicts itself.
        """
        content = json.loads(text)
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"not a run record: schema {schema!r}, expected {SCHEMA}")
        stated = content.pop("last"), content.pop("best_test")
        if isinstance(content.get("config"), dict):
            content["config"] |= {
                k: v for k, v in LATER_SETTINGS.items() if k not in content["config"]
            }
        try:
            record = cls(**content)
        except TypeError as error:
            raise ValueError(f"not a run record: {error}") from None
        record.validate()
        if stated != (record.last, record.best_test):
            raise ValueError("last or best_test disagrees with the history")
        return record

    def validate(self) -> None:
        """Check what every reader relies on.

        Raises:
            ValueError: a missing column, columns of different length, epochs out of order, an
                unknown status, accuracies outside [0, 100], or ``finished`` before the end.
        """
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")
        if set(self.history) != set(HISTORY):
            raise ValueError(f"history has columns {sorted(self.history)}, not {sorted(HISTORY)}")
        lengths = {name: len(column) for name, column in self.history.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"history columns differ in length: {lengths}")
        if self.history["epoch"] != list(range(1, self.epochs + 1)):
            raise ValueError("history must hold epochs 1, 2, 3, ...")
        for name in ("train_accuracy", "test_accuracy"):
            if any(a is not None and not 0 <= a <= 100 for a in self.history[name]):
                raise ValueError(f"{name} is in percent, between 0 and 100")
        if (self.status == "finished") != (
            self.epochs >= self.epochs_planned and self.status != "diverged"
        ):
            raise ValueError(
                f"status {self.status!r} after {self.epochs} of {self.epochs_planned} epochs"
            )

    def write(self, path: str | Path) -> None:
        """Validate and write the file in one piece, or not at all."""
        self.validate()
        write_atomically(Path(path), self.to_json().encode())


def run_name(recipe: str, overrides: dict[str, Any], seed: int) -> str:
    """``vit-weak+lam=0.3-s0``: a run's name in files."""
    parts = [recipe.replace("/", "-")]
    for name, value in overrides.items():
        text = "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        text = text.translate(str.maketrans("/*?", "-@_"))  # what file names may hold anywhere
        if len(text) > 60:  # and they are short
            text = f"{text[:40]}..{zlib.crc32(str(value).encode()):08x}"
        parts.append(f"{name}={text}")
    name = "+".join(parts)
    if len(name) > 200:  # the whole, too, must fit into a file's name
        name = f"{name[:180]}..{zlib.crc32(name.encode()):08x}"
    return f"{name}-s{seed}"


def read(path: str | Path) -> Record:
    """Read a record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a valid record; the message names the file.
    """
    try:
        return Record.from_json(Path(path).read_text())
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def select(
    folder: str | Path, *, recipe: str | None = None, seed: int | None = None, **config: Any
) -> Iterator[tuple[Path, Record]]:
    """Records below ``folder``, sorted by path, that have this recipe, seed and settings.

    Raises:
        ValueError: ``folder`` does not exist, or a file in it is not a valid record.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"no folder of records: {folder}")
    for path in sorted(Path(folder).rglob("*.json")):
        record = read(path)
        if recipe in (None, record.recipe) and seed in (None, record.seed):
            wanted = json.loads(json.dumps(config))
            if all(record.config.get(k) == v for k, v in wanted.items()):
                yield path, record


def spectrum_ranks(n_values: int, most: int = 32) -> list[int]:
    """Which eigenvalues a record keeps: at most ``most`` ranks from 1 to n, evenly in the log."""
    if n_values <= most:
        return list(range(1, n_values + 1))
    steps = [round(n_values ** (i / (most - 1))) for i in range(most)]
    return sorted(set(steps))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, meets the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def round_floats(value: Any, digits: int = 6) -> Any:
    """Floats at so many significant digits, not-finite ones as None, through lists and dicts."""
    if isinstance(value, dict):
        return {str(k): round_floats(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_floats(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _compact(value: Any, depth: int = 1) -> str:
    """JSON with one line for each entry of the outer dictionaries, lists on one line."""
    if isinstance(value, dict) and value and depth < 3:
        pad = " " * (depth + 1)
        inner = [f"{pad}{json.dumps(str(k))}: {_compact(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"
    return json.dumps(round_floats(value), allow_nan=False)
