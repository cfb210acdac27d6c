"""One run, from its checkpoint if there is one: it can be killed at any moment and resumed."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sigreg_lib import records
from sigreg_lib._types import is_integer
from sigreg_lib.data import ImageData, with_holdout
from sigreg_lib.recipes import Recipe
from sigreg_lib.records import Record
from sigreg_lib.train.capture import CudaGraph
from sigreg_lib.train.lock import locked
from sigreg_lib.train.loop import Trainer
from sigreg_lib.train.precision import worth_compiling

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
    capture: bool | None = None,
    evaluate_every: int = 1,
    download: bool = False,
    quiet: bool = False,
) -> Record:
    """Run a recipe, from its checkpoint if there is one, and keep its record up to date.

    Every epoch ends with a checkpoint and the record, each written in one piece: a killed run goes
    on after its last whole epoch and ends with the same weights (on the CPU without compilation:
    to the bit). A run whose record already has the epochs asked for, or that diverged, is not
    repeated. One that has to begin again, its checkpoint lost, leaves the record it has until it
    has as many epochs, or diverges.

    Args:
        recipe: all settings, ``recipe.epochs`` the length of the schedule.
        seed: of everything random, 0 to 2^31.
        data: a data set with the recipe's holdout, or what :func:`sigreg_lib.data.load` takes.
        epochs: stop after this many epochs of the schedule; default all.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``.
        results: folder of records; the run's file is ``results/group/<run>.json``.
        group: default the data set's name.
        checkpoints: folder of checkpoints, never to be committed.
        compile: default: for the vision transformers where an epoch has at least 100 steps, except
            in bfloat16 on a processor without its products (:mod:`sigreg_lib.train.precision`).
        capture: replay whole steps from a CUDA graph; default: on CUDA.
        evaluate_every: test, and look at the layers, after every so many epochs and after the last
            of the run; other epochs have None in those columns.
        download: let the data set be downloaded.
        quiet: print nothing.

    Returns:
        the record: ``finished``, ``partial`` (the schedule goes on) or ``diverged`` (a loss became
        NaN or infinite).

    Raises:
        ValueError: a bad argument, or a checkpoint of other settings.
        RuntimeError: another process is training this run.
    """
    stop, device = check(recipe, seed, epochs, device, evaluate_every)
    graph = graph_for(capture, device)
    data = with_holdout(data, recipe.holdout, download=download).to(device)

    record = new_record(recipe, data, seed := operator.index(seed))
    path = Path(results) / (group or data.name) / f"{record.name}.json"
    checkpoint = Path(checkpoints) / (group or data.name) / f"{record.name}.pt"
    say = speaker(quiet)
    with contextlib.ExitStack() as stack:
        if not done(found := earlier(path, record), stop):
            stack.enter_context(locked(checkpoint))
            found = earlier(path, record)  # another process may just have brought it further
        if done(found, stop):
            say(f"{record.name}: already there, {found.status} at epoch {found.epochs} ({path})")
            return found
        if found is not None and found.provenance.get("batched") and not checkpoint.exists():
            seeds = " ".join(map(str, found.provenance["batched"]))
            raise ValueError(f"{path} was trained batched: go on with seeds {seeds}, batched")

        steps = -(-len(data.train_images) // recipe.batch_size)
        if compile is None:
            compile = worth_compiling(recipe, device) and steps >= 100
        trainer = Trainer(recipe, data, seed=seed, compile=compile, capture=graph)
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            record = resumed(saved["record"], record, checkpoint)
            trainer.load_state(saved)
            say(f"{record.name}: resuming after epoch {record.epochs}")
        elif found is not None:
            say(f"{record.name}: no checkpoint, beginning again; {path} stays until it is as long")
        floor = trainer.floor()
        note_session(record, provenance(trainer, compile, graph))
        while record.epochs < stop and record.status == "partial":
            epoch = record.epochs + 1
            start = time.perf_counter()
            with progress_bar(quiet, f"{record.name} epoch {epoch}/{stop}") as progress:
                trained = trainer.train_epoch(epoch - 1, progress)
            outcome = conclude(trainer, trained, epoch, every=evaluate_every, last=epoch == stop)
            append(record, outcome, floor, time.perf_counter() - start)
            if trainer.balance is not None and trainer.balance.done:
                record.provenance["lam"] = records.round_floats(trainer.balance.weight().item())
            save(checkpoint, trainer.state() | {"record": record.to_json()})
            if found is None or record.epochs >= found.epochs or record.status == "diverged":
                record.write(path)
            say(line(record, stop))
        record.write(path)
        say(f"{record.name}: {record.status} at epoch {record.epochs}, record {path}")
        return record


def check(
    recipe: Recipe, seed: int, epochs: int | None, device: str, evaluate_every: int = 1
) -> tuple[int, torch.device]:
    """The epoch to stop after and the device; ValueError for what :func:`train` refuses."""
    stop = recipe.epochs if epochs is None else epochs
    if not is_integer(stop) or not 1 <= stop <= recipe.epochs:
        raise ValueError(
            f"epochs must lie in 1..{recipe.epochs}, the schedule, and be whole, not {epochs!r}"
        )
    if not is_integer(seed) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be an integer in [0, 2^31), not {seed!r}")
    if not is_integer(evaluate_every) or evaluate_every < 1:
        raise ValueError(f"evaluate_every must be an integer >= 1, not {evaluate_every!r}")
    return operator.index(stop), _device(device)


def graph_for(capture: bool | None, device: torch.device) -> type[CudaGraph] | None:
    """What records steps on the device; None where they run as they are."""
    if capture and device.type != "cuda":
        raise ValueError(f"capture=True records a CUDA graph, but the device is {device.type}")
    return CudaGraph if capture or (capture is None and device.type == "cuda") else None


def new_record(recipe: Recipe, data: ImageData, seed: int) -> Record:
    """The record of a run that has not begun."""
    return Record(
        recipe=recipe.name,
        overrides=recipe.differences(),
        config=recipe.as_dict(),
        seed=seed,
        dataset=data.name,
        epochs_planned=recipe.epochs,
        provenance=dict(data.checksums),
    )


def done(found: Record | None, stop: int) -> bool:
    """Whether a run's record has the epochs asked for, or ended before."""
    return found is not None and (found.status == "diverged" or found.epochs >= stop)


def earlier(path: Path, record: Record) -> Record | None:
    """The record that the run already has; ValueError if it is of another one."""
    if not path.exists():
        return None
    found = records.read(path)
    if (found.config, found.dataset) != (record.config, record.dataset):
        raise ValueError(f"{path} is of other settings or data ({found.dataset}): use a group")
    _check_same("images", found, record, path)
    return found


def resumed(text: str, record: Record, checkpoint: Path) -> Record:
    """The record in a checkpoint; ValueError if it is of another run."""
    before = Record.from_json(text)
    if (before.config, before.dataset, before.seed) != (
        record.config,
        record.dataset,
        record.seed,
    ):
        raise ValueError(f"{checkpoint} is of a run with other settings: move it away")
    _check_same("images", before, record, checkpoint)
    _check_same("order", before, record, checkpoint)  # steps would take other images
    return before


def _check_same(what: str, before: Record, record: Record, path: Path) -> None:
    """ValueError if a run was on other images, or on them in another order; older do not tell."""
    old, new = before.provenance.get(what), record.provenance[what]
    if old not in (None, new):
        kind = {"images": "other images", "order": "the images in another order"}[what]
        raise ValueError(
            f"{path} is of {kind}, named {record.dataset!r} too (checksums {old}, here {new}): "
            "use a group"
        )


def save(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one piece."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    records.write_atomically(checkpoint, buffer.getbuffer())


class Outcome(NamedTuple):
    """What an epoch adds to a record: history entry, row of layers if looked at, end of the run."""

    entry: dict[str, Any]
    names: dict[str, list[str]]
    layers: dict[str, list] | None
    diverged: bool


def conclude(
    trainer: Trainer, trained: dict[str, Any], epoch: int, *, every: int, last: bool
) -> Outcome:
    """Test and look at the layers where it is due; what is not finite ends the run."""
    fine = bool(np.isfinite((trained["objective"], trained["grad_norm"])).all())
    tested: dict[str, Any] = {"test_loss": None, "test_accuracy": None}
    layers, look = {"effective_dim": [None]}, False
    if last or epoch % every == 0 or not fine:
        tested, features = trainer.evaluate()
        look, found = last or looked_at(epoch), None
        if fine and np.isfinite(tested["test_loss"]):
            found = trainer.diagnose(features, look, last or epoch in SPECTRUM_EPOCHS)
        fine, layers = found is not None, found or layers
    entry = {
        "epoch": epoch,
        "effective_dim": layers["effective_dim"][-1],
        **{k: v for k, v in (trained | tested).items() if k in records.HISTORY},
    }
    row = {"epoch": epoch, "regularizer": trained["layers"], "spectrum": None} | layers
    names = {"names": list(trainer.looking.names)}
    if trainer.handle is not trainer.looking:
        names["tapped"] = list(trainer.handle.names)
    return Outcome(entry, names, row if look and fine else None, not fine)


def append(record: Record, outcome: Outcome, floor: float | None, seconds: float) -> None:
    """Add an epoch to the record."""
    entry = outcome.entry | {"regularizer_floor": floor, "seconds": seconds}
    for name in records.HISTORY:
        record.history[name].append(records.round_floats(entry[name]))
    record.layers = outcome.names | record.layers
    for name, values in (outcome.layers or {}).items():
        if values != []:
            record.layers.setdefault(name, []).append(records.round_floats(values, 4))
    if outcome.diverged:
        record.status = "diverged"
    elif record.epochs == record.epochs_planned:
        record.status = "finished"
    record.provenance["end"] = now()
    record.provenance["wall_seconds"] = round(record.provenance["wall_seconds"] + seconds, 3)


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


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no history


@functools.cache
def code() -> dict[str, Any]:
    """Commit of the package, and whether it is unchanged; asked once, near the import."""
    changes = _git("status", "--porcelain", "--", ".")
    return {"commit": _git("rev-parse", "HEAD"), "clean": None if changes is None else not changes}


def provenance(trainer: Trainer, compile: bool, graph: type | None) -> dict[str, Any]:
    """What a run ran under."""
    device = trainer.device
    if device.type == "cuda":
        own = {"captured": graph is not None}
    else:
        own = {"kernels": torch.backends.cpu.get_cpu_capability()}
    return {
        **code(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": trainer.recipe.precision + ", products in float32" * trainer.by_float32,
        "compiled": compile,
        **own,
        "mean": [round(v, 6) for v in trainer.normalization[0]],
        "std": [round(v, 6) for v in trainer.normalization[1]],
    }


def note_session(record: Record, current: dict[str, Any]) -> None:
    """The first session's provenance stands; a later one that differs is listed in ``later``."""
    if "start" not in record.provenance:
        record.provenance |= current | {"start": now(), "end": now(), "wall_seconds": 0.0}
        return
    before = record.provenance
    for session in before.get("later", []):
        before = before | session
    changed = {k: v for k, v in current.items() if before.get(k, v) != v}  # older ones lack some
    if changed:
        record.provenance.setdefault("later", []).append(
            {"from_epoch": record.epochs + 1} | changed
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # not on every system
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "cpu"


def line(record: Record, stop: int) -> str:
    """The last epoch in one line; what was not measured is left out."""
    last = record.last
    parts = [f"{record.name} on {record.dataset}, epoch {last['epoch']}/{stop}"]
    parts.append(f"loss {float('nan') if last['train_loss'] is None else last['train_loss']:.3f}")
    if last["regularizer"] is not None:
        parts.append(f"R {last['regularizer']:.3g}")
    if last["test_accuracy"] is not None:
        parts.append(f"test {last['test_accuracy']:.2f}%")
    if last["effective_dim"] is not None:
        parts.append(f"effective dim {last['effective_dim']:.1f}")
    if record.config["lam"] == "auto":
        found = record.provenance.get("lam")
        parts.append("lam still sought" if found is None else f"lam {found:.3g}")
    parts.append(f"{last['seconds']:.1f} s")
    return "  ".join(parts + ["DIVERGED"] * (record.status == "diverged"))


def speaker(quiet: bool) -> Callable[[str], None]:
    """What prints a line, at once; or nothing."""
    return (lambda text: None) if quiet else functools.partial(print, flush=True)


@contextlib.contextmanager
def progress_bar(quiet: bool, label: str):
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
