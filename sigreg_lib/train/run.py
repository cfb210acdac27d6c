"""One run, from its checkpoint if there is one: it can be killed at any moment and resumed."""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigreg_lib import records
from sigreg_lib.data import ImageData, load
from sigreg_lib.recipes import Recipe
from sigreg_lib.records import Record
from sigreg_lib.train.loop import Trainer

PACKAGE = Path(__file__).resolve().parents[1]
SPECTRUM_EPOCHS = (1, 10, 100)  # and the last of a run


def looked_at(epoch: int) -> bool:
    """Epochs after which every layer is measured: 1 to 10, then every 5th, from 50 every 10th."""
    return epoch <= 10 or epoch % (5 if epoch <= 50 else 10) == 0


def train(
    recipe: Recipe,
    *,
    seed: int = 0,
    data: ImageData | str | Path = "digits",
    epochs: int | None = None,
    device: str = "auto",
    results: str | Path = ".out/records",
    group: str | None = None,
    checkpoints: str | Path = ".checkpoints",
    compile: bool | None = None,
    download: bool = False,
    quiet: bool = False,
) -> Record:
    """Run a recipe, from its checkpoint if there is one, and keep its record up to date.

    Every epoch ends with a checkpoint and the record, each written in one piece: a killed run goes
    on after its last whole epoch and ends with the same weights (on the CPU without compilation:
    to the bit). A run whose record already has the epochs asked for, or that diverged, is not
    repeated.

    Args:
        recipe: all settings, ``recipe.epochs`` the length of the schedule.
        seed: of everything random, 0 to 2^31.
        data: a data set, or what :func:`sigreg_lib.data.load` takes.
        epochs: stop after this many epochs of the schedule; default all.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``.
        results: folder of records; the run's file is ``results/group/<run>.json``.
        group: default the data set's name.
        checkpoints: folder of checkpoints, never to be committed.
        compile: default: for the vision transformers where an epoch has at least 100 steps.
        download: let the data set be downloaded.
        quiet: print nothing.

    Returns:
        the record: ``finished``, ``partial`` (the schedule goes on) or ``diverged`` (a loss became
        NaN or infinite).

    Raises:
        ValueError: a bad argument, or a checkpoint of other settings.
    """
    stop, device = check(recipe, seed, epochs, device)
    if not isinstance(data, ImageData):
        data = load(data, download=download, holdout=recipe.holdout)
    data = data.to(device)

    record = Record(
        recipe=recipe.name,
        overrides=recipe.differences(),
        config=recipe.as_dict(),
        seed=seed,
        dataset=data.name,
        epochs_planned=recipe.epochs,
    )
    path = Path(results) / (group or data.name) / f"{record.name}.json"
    checkpoint = Path(checkpoints) / (group or data.name) / f"{record.name}.pt"
    say = _silent if quiet else _say
    if path.exists():
        found = records.read(path)
        if (found.config, found.dataset) != (record.config, record.dataset):
            raise ValueError(f"{path} is of other settings or data ({found.dataset}): use a group")
        if found.status == "diverged" or found.epochs >= stop:
            say(f"{record.name}: already there, {found.status} at epoch {found.epochs} ({path})")
            return found

    steps = -(-len(data.train_images) // recipe.batch_size)
    if compile is None:
        compile = recipe.model == "vit" and steps >= 100
    trainer = Trainer(recipe, data, seed=seed, compile=compile)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        before = Record.from_json(saved["record"])
        if (before.config, before.dataset) != (record.config, record.dataset):
            raise ValueError(f"{checkpoint} is of a run with other settings: move it away")
        trainer.load_state(saved)
        record = before
        say(f"{record.name}: resuming after epoch {record.epochs}")
    floor = trainer.floor()
    _note_session(record, _provenance(trainer, compile))
    while record.epochs < stop and record.status == "partial":
        epoch = record.epochs
        start = time.perf_counter()
        with _progress(quiet, f"{record.name} epoch {epoch + 1}/{stop}") as progress:
            trained = trainer.train_epoch(epoch, progress)
        tested = trainer.evaluate()
        _append(record, trainer, trained, tested, floor, start, last=epoch + 1 == stop)
        state = trainer.state() | {"record": record.to_json()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        records.write_atomically(checkpoint, buffer.getbuffer())
        record.write(path)
        say(_line(record, stop))
    record.write(path)
    return record


def check(recipe: Recipe, seed: int, epochs: int | None, device: str) -> tuple[int, torch.device]:
    """The epoch to stop after and the device; ValueError for what :func:`train` refuses."""
    stop = recipe.epochs if epochs is None else epochs
    if not 1 <= stop <= recipe.epochs:
        raise ValueError(f"epochs must lie in 1..{recipe.epochs}, the schedule, not {epochs!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be an integer in [0, 2^31), not {seed!r}")
    return stop, _device(device)


def _append(record: Record, trainer: Trainer, trained, tested, floor, start, last: bool) -> None:
    """Add an epoch to the record; a loss or a feature that is not finite ends the run."""
    epoch = record.epochs + 1
    (tested, features) = tested
    look = last or looked_at(epoch)
    layers = None
    if np.isfinite((trained["objective"], trained["grad_norm"], tested["test_loss"])).all():
        layers = trainer.diagnose(features, look, last or epoch in SPECTRUM_EPOCHS)
    diverged = layers is None
    layers = layers or {"effective_dim": [None]}
    entry = {
        "epoch": epoch,
        "regularizer_floor": floor,
        "effective_dim": layers["effective_dim"][-1],
        "seconds": time.perf_counter() - start,
        **{k: v for k, v in (trained | tested).items() if k in records.HISTORY},
    }
    for name in records.HISTORY:
        record.history[name].append(records.round_floats(entry[name]))
    record.layers.setdefault("names", list(trainer.handle.names))
    if look and not diverged:
        row = {"epoch": epoch, "regularizer": trained["layers"], "spectrum": None} | layers
        for name, values in row.items():
            if values != []:
                record.layers.setdefault(name, []).append(records.round_floats(values, 4))
    if diverged:
        record.status = "diverged"
    elif epoch == record.epochs_planned:
        record.status = "finished"
    record.provenance["end"] = _now()
    spent = record.provenance["wall_seconds"] + time.perf_counter() - start
    record.provenance["wall_seconds"] = round(spent, 3)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, not {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA GPU is available here; use cpu or auto")
    return device


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no history


@functools.cache
def _code() -> dict[str, Any]:
    """Commit of the package, and whether it is unchanged; asked once, near the import."""
    changes = _git("status", "--porcelain", "--", ".")
    return {"commit": _git("rev-parse", "HEAD"), "clean": None if changes is None else not changes}


def _provenance(trainer: Trainer, compile: bool) -> dict[str, Any]:
    device = trainer.device
    return {
        **_code(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": trainer.recipe.precision,
        "compiled": compile,
        "mean": [round(v, 6) for v in trainer.normalization[0]],
        "std": [round(v, 6) for v in trainer.normalization[1]],
    }


def _note_session(record: Record, now: dict[str, Any]) -> None:
    """The first session's provenance stands; a later one that differs is listed in ``later``."""
    if not record.provenance:
        record.provenance = now | {"start": _now(), "end": _now(), "wall_seconds": 0.0}
        return
    before = record.provenance
    for session in before.get("later", []):
        before = before | session
    changed = {k: v for k, v in now.items() if before.get(k) != v}
    if changed:
        record.provenance.setdefault("later", []).append(
            {"from_epoch": record.epochs + 1} | changed
        )


def _processor() -> str:
    with contextlib.suppress(OSError):  # not on every system
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "cpu"


def _line(record: Record, stop: int) -> str:
    last = record.last
    r = "" if last["regularizer"] is None else f"  R {last['regularizer']:.3g}"
    number = {k: float("nan") if v is None else v for k, v in last.items() if k != "regularizer"}
    return (
        f"{record.name} epoch {number['epoch']}/{stop}  loss {number['train_loss']:.3f}{r}  "
        f"test {number['test_accuracy']:.2f}%  effective dim {number['effective_dim']:.1f}  "
        f"{number['seconds']:.1f} s" + ("  DIVERGED" if record.status == "diverged" else "")
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


@contextlib.contextmanager
def _progress(quiet: bool, label: str):
    """A bar on a terminal (if tqdm is installed); elsewhere the plain line an epoch is enough."""
    if quiet or not sys.stderr.isatty():
        yield lambda steps: steps
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda steps: steps
        return
    yield lambda steps: tqdm(steps, desc=label, leave=False, unit="step")
