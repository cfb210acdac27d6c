"""The command line: ``sigreg`` or ``python -m sigreg_lib``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sigreg_lib import bench, records
from sigreg_lib.recipes import RECIPES, Recipe, find, parse_override
from sigreg_lib.train import Run, sweep, train


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a diverged or failed run, 2 for bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.act(options)
    except BrokenPipeError:  # `sigreg list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sigreg: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"sigreg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "sigreg: stopped; the same command goes on from the last whole epoch", file=sys.stderr
        )
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe = _resolve(options.recipe, dict(map(parse_override, options.set)))
    record = train(recipe, seed=options.seed, **_train_options(options))
    _note_data(options, [recipe.name])
    return 1 if record.status == "diverged" else 0


def _sweep(options: argparse.Namespace) -> int:
    overrides = dict(map(parse_override, options.set))
    for name in options.recipes:
        _resolve(name, overrides)  # a word on its lambda, or an error, before anything runs
    runs = [Run(recipe, seed, overrides) for recipe in options.recipes for seed in options.seeds]
    print(f"{len(runs)} runs; a line as each ends", flush=True)
    how = {"workers": options.workers, "threads": options.threads, "batched": options.batched}
    found = sweep(runs, **how, **_train_options(options))
    _note_data(options, options.recipes)
    return 1 if any(record.status == "diverged" for record in found) else 0


def _resolve(name: str, overrides: dict[str, Any]) -> Recipe:
    """A recipe with its overrides; tells on stderr where its loss changes and lambda does not."""
    named = find(name)
    recipe = named.override(**overrides)
    other = (recipe.regularizer, recipe.mode) != (named.regularizer, named.mode)
    if other and "none" not in (named.regularizer, recipe.regularizer) and "lam" not in overrides:
        print(f"sigreg: note: lam stays {name}'s, chosen for its own loss", file=sys.stderr)
    return recipe


def _note_data(options: argparse.Namespace, names: list[str]) -> None:
    """Tells on stderr that rows of CIFAR-100 were trained on the digits, the default data."""
    others = [name for name in names if not name.startswith("digits")]
    if options.data == "digits" and others:
        print(
            f"sigreg: note: {', '.join(others)}: settings for CIFAR-100, trained on the 8 x 8 "
            "digits; see --data",
            file=sys.stderr,
        )


def _list(options: argparse.Namespace) -> int:
    width = max(map(len, RECIPES))
    for name, r in RECIPES.items():
        parts = [f"{r.model} {r.depth} x {r.width}", f"norm {r.norm}"]
        parts.append("residual" if r.residual else "no residual")
        parts.append(f"{r.optimizer} {r.lr:g}")
        task = "(1 - lam) CE" if r.convex else "CE"
        if r.regularizer != "none":
            parts.append(f"{task} + lam {r.regularizer.title()}, lam {r.lam:g}, K {r.sketch_dim}")
        else:
            parts.append(f"{task}, lam {r.lam:g}" if r.convex else task)
        print(f"{name:{width}}  {', '.join(parts)}, {r.epochs} epochs")
    return 0


def _show(options: argparse.Namespace) -> int:
    recipe = _resolve(options.recipe, dict(map(parse_override, options.set)))
    for name, value in recipe.as_dict().items():
        print(f"{name:18} {json.dumps(value)}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    parts = tuple(options.parts) or bench.PARTS
    if options.processes > 1:
        found = _bench_in_processes(parts, options)
    else:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        found = bench.run(parts, rounds=options.rounds, device=options.device)
    print("\n".join(bench.table(found)))
    before = json.loads(options.json.read_text()) if options.json.exists() else {}
    content = json.dumps(before | found, indent=1) + "\n"
    records.write_atomically(options.json, content.encode())
    print(f"{', '.join(found)} written to {options.json}")
    return 0


def _bench_in_processes(parts: tuple[str, ...], options: argparse.Namespace) -> dict:
    found = []
    for _ in range(options.processes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "bench.json")
            command = [sys.executable, "-m", "sigreg_lib", "bench", *parts, "--json", str(path)]
            for name in ("rounds", "threads", "device"):
                if (value := getattr(options, name)) is not None:
                    command += [f"--{name}", str(value)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(json.loads(path.read_text()))
    one = bench.pooled([{part: each[part]["rows"] for part in parts} for each in found])
    processes = {"processes": options.processes}
    return {
        part: {"provenance": found[0][part]["provenance"] | processes, "rows": one[part]}
        for part in parts
    }


def _train_options(options: argparse.Namespace) -> dict:
    names = ("data", "epochs", "device", "results", "group", "checkpoints", "compile", "download")
    names += ("capture", "evaluate_every")
    return {name: getattr(options, name) for name in names}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the recipe, such as lam=0.3 (repeatable; see `sigreg show`)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="digits (embedded, default), cifar100 (found through SIGREG_DATA), or a folder",
    )
    add("--download", action="store_true", help="let torchvision download CIFAR-100")
    add("--epochs", type=int, help="stop after this many epochs of the schedule (default: all)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--threads", type=_positive, help="CPU threads (of each worker)")
    add("--results", default=".out/records", help="folder of records (default: %(default)s)")
    add("--group", help="subfolder of records (default: the data set's name)")
    add(
        "--checkpoints", default=".checkpoints", help="folder of checkpoints (default: %(default)s)"
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the step (default: for long runs of vision transformers)",
    )
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay steps from a CUDA graph (default: on CUDA)",
    )
    add(
        "--evaluate-every",
        type=_positive,
        default=1,
        metavar="N",
        help="test after every Nth epoch and the last (default: 1)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sigreg",
        description="SIGReg losses for supervised training: run the recipes of the collection.",
        epilog="Example: sigreg run vit/weak --seed 0 --epochs 10 --data PATH --set lam=0.3",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run one recipe, or go on with it",
        description="Run one recipe with one seed. A run that was stopped goes on from its last "
        "whole epoch; one that is done is not repeated.",
    )
    run.add_argument("recipe", help="such as vit/weak; see `sigreg list`")
    run.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    _add_training(run)
    run.set_defaults(act=_run)

    many = commands.add_parser(
        "sweep",
        help="run recipes x seeds, several at a time",
        description="Run every recipe with every seed, skipping finished runs and resuming "
        "stopped ones, with one summary line a run.",
    )
    many.add_argument("recipes", nargs="+", help="such as mlp/none mlp/weak")
    many.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    many.add_argument("--workers", type=_positive, default=1, help="runs at a time (default: 1)")
    many.add_argument(
        "--batched", action="store_true", help="train all seeds of a recipe at once (mlp only)"
    )
    _add_training(many)
    many.set_defaults(act=_sweep)

    timing = commands.add_parser(
        "bench",
        help="time the losses and whole steps beside plain ones",
        description="Time losses, whole steps and the parts of an epoch, ours beside plain "
        "versions in the same process (minutes; leave the machine alone meanwhile). Ratios are "
        "medians over rounds, with quartiles. In the file, other parts are left as they are.",
    )
    timing.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(bench.PARTS)} (default: all)",
    )
    timing.add_argument("--rounds", type=_positive, help="(default: 5 to 31, by part)")
    timing.add_argument(
        "--processes",
        type=_positive,
        default=1,
        metavar="N",
        help="measure in N processes, one after the other, and quote the median (default: 1)",
    )
    timing.add_argument("--threads", type=_positive, help="CPU threads")
    timing.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    timing.add_argument(
        "--json", type=Path, default=Path(".out/bench.json"), help="(default: %(default)s)"
    )
    timing.set_defaults(act=_bench)

    listing = commands.add_parser("list", help="list the recipes, a line each")
    listing.set_defaults(act=_list)

    show = commands.add_parser("show", help="print every setting of a recipe")
    show.add_argument("recipe", help="such as vit/weak")
    _add_settings(show)
    show.set_defaults(act=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
