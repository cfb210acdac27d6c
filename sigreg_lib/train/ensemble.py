"""Several seeds of one MLP recipe at once: the steps of all of them in one batched step.

Small networks leave a card idle between launches; S of them take little longer than one. Each
member has its own weights, data order, augmentation and sketches, drawn as in a run of its own, and
its own clipping; parameters are stacked along a leading dimension of seeds and stepped by one
optimizer, which acts on every element alone. So each member is the separate run of its seed, up to
the rounding of sums.
"""

from __future__ import annotations

import contextlib
import operator
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigreg_lib._dtype import at_least_float32
from sigreg_lib.attach import Matrices, attach
from sigreg_lib.data import ImageData, with_holdout
from sigreg_lib.losses import combine
from sigreg_lib.models import MLP
from sigreg_lib.recipes import Recipe
from sigreg_lib.records import Record
from sigreg_lib.train import run
from sigreg_lib.train.capture import CapturedStep, Graph
from sigreg_lib.train.lock import locked
from sigreg_lib.train.loop import AUGMENT_AT_ONCE, Trainer
from sigreg_lib.train.optimizer import build_optimizer, load_optimizer, set_learning_rate
from sigreg_lib.train.precision import products


def check_batched(recipe: Recipe, compile: bool | None = None) -> None:
    """ValueError, with the reason, for a recipe whose seeds cannot be trained at once."""
    reasons = {
        f"model={recipe.model!r}: only the mlp is small enough to gain": recipe.model != "mlp",
        f"norm={recipe.norm!r}: its running statistics are not stacked": (
            recipe.norm not in ("none", "layer")
        ),
        "MixUp and CutMix are not drawn for each seed": recipe.mixup_alpha + recipe.cutmix_alpha,
        "dropout is not drawn for each seed": recipe.dropout,
        "sketch_dim: one K a layer is for separate runs": recipe.columns,
        "shared_sketch=false: each member has one matrix for all layers of a width": (
            not recipe.shared_sketch
        ),
        "lam='auto' is sought in each run by itself": recipe.lam == "auto",
        "compile=True: batched steps are not compiled": compile,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{recipe.name} cannot be trained batched: {reason}")


class _Linear(nn.Module):
    """S linear maps, (S, N, in) to (S, N, out)."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight, self.bias = _stacked(maps, "weight"), _stacked(maps, "bias")

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class _LayerNorm(nn.Module):
    """S layer norms of (S, N, C)."""

    def __init__(self, norms: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.weight, self.bias = _stacked(norms, "weight"), _stacked(norms, "bias")
        self.eps = norms[0].eps

    def forward(self, x: Tensor) -> Tensor:
        z = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return z * self.weight[:, None] + self.bias[:, None]


class StackedMLP(nn.Module):
    """S networks of one shape as one, their submodules and parameters under the same names.

    Parameters are stacked along a first dimension S. Images (S, N, C, H, W) give logits
    (S, N, n_classes).
    """

    def __init__(self, models: Sequence[MLP]) -> None:
        super().__init__()
        self.residual = models[0].residual
        self.layers = nn.ModuleList(map(_Linear, zip(*(m.layers for m in models), strict=True)))
        norms = zip(*(m.norms for m in models), strict=True)
        self.norms = nn.ModuleList(
            _LayerNorm(each) if isinstance(each[0], nn.LayerNorm) else nn.Identity()
            for each in norms
        )
        self.head = _Linear([m.head for m in models])

    def forward(self, images: Tensor) -> Tensor:
        h = images.flatten(2)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            out = F.relu(norm(layer(h)))
            h = h + out if self.residual and i > 0 else out
        return self.head(h)


class Ensemble:
    """Trainers of one recipe and data set whose steps are taken together.

    Args:
        members: trainers that differ in the seed alone, not compiled, not captured. Their weights
            become views of the stacked parameters: evaluation and diagnostics are theirs.
        capture: as in :class:`~sigreg_lib.train.loop.Trainer`.
    """

    def __init__(self, members: Sequence[Trainer], *, capture: type[Graph] | None = None) -> None:
        self.members, self.first = list(members), members[0]
        self.recipe, self.data = self.first.recipe, self.first.data
        check_batched(self.recipe)
        self.model = StackedMLP([member.model for member in self.members])
        self.parameters = dict(self.model.named_parameters())
        for i, member in enumerate(self.members):
            for name, parameter in member.model.named_parameters():
                parameter.data = self.parameters[name].detach()[i]
        self.handle = attach(
            self.model, self.recipe.taps, None, on=self.recipe.tap_on, pool=lambda z: z
        )
        self.optimizer = build_optimizer(
            self.recipe, list(self.parameters.values()), on_device=capture is not None
        )
        self.whole_step = self._step
        if capture is not None:
            graph = capture(self.first.device)
            self.whole_step = CapturedStep(self._step, self.optimizer, graph)

    # -------------------------------------------------------------- one step

    def _objective(
        self, images: Tensor, labels: Tensor, matrices: Matrices
    ) -> tuple[Tensor, Tensor]:
        """The objective of each member, (S,), and its statistics, (S, 3 + layers), as a Trainer's.

        Images (S, N, C, H, W), labels (S, N), a matrix (S, C, K) for each number of channels C.
        """
        recipe, n = self.recipe, labels.shape[1]
        x = (images.float() - self.first.mean) / self.first.std
        reduced = recipe.precision == "bfloat16"
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=reduced):
            logits = at_least_float32(self.model(x))
        features = [self.handle.features[name] for name in self.handle.names]
        self.handle.clear()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        task = each.view(-1, n).mean(1)
        accuracy = (logits.argmax(2) == labels).float().mean(1)
        r = self._regularize(features, matrices) if matrices else torch.zeros_like(task)[None]
        loss = combine(task, r.mean(0), recipe.lam, convex=recipe.convex)
        return loss, torch.cat([torch.stack([task, accuracy, loss]), r]).T.detach()

    def _regularize(self, features: list[Tensor], matrices: Matrices) -> Tensor:
        """R of each layer and member, (layers, S), of features (S, N, C)."""
        values: list[Tensor | None] = [None] * len(features)
        for shape in {z.shape for z in features}:
            group = [i for i, z in enumerate(features) if z.shape == shape]
            stacked = torch.stack([features[i] for i in group])
            found = self.first.regularizer.values(stacked, matrices[shape[-1]])
            for i, value in zip(group, found.unbind(), strict=True):
                values[i] = value
        return torch.stack(values)

    def _step(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Statistics (S, 3 + layers) and the norm of each member's gradient (S,)."""
        loss, stats = self._objective(*inputs)
        self.optimizer.zero_grad()
        loss.sum().backward()
        gradients = [p.grad for p in self.parameters.values()]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        norm = torch.linalg.vector_norm(norms, dim=0)
        if self.recipe.clip_norm is not None:
            share = (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1)
            for g in gradients:
                g.mul_(share.view(-1, *[1] * (g.ndim - 1)))
        self.optimizer.step()
        return stats, norm

    # -------------------------------------------------------------- one epoch

    def train_epoch(self, epoch: int, progress=lambda steps: steps) -> list[dict[str, Any]]:
        """Train every member on every image once; what a Trainer returns, for each."""
        totals = self.run_steps(epoch, progress).cpu()  # the epoch's one wait
        return [m.read(own) for m, own in zip(self.members, totals, strict=True)]

    def run_steps(self, epoch: int, progress=lambda steps: steps) -> Tensor:
        """All steps of an epoch; a row a member, as :meth:`Trainer.run_steps` gives it."""
        members, labels = self.members, self.data.train_labels
        set_learning_rate(self.optimizer, self.recipe.learning_rate(epoch))
        batches = list(zip(*(m.begin_epoch(epoch) for m in members), strict=True))
        at_once = max(1, AUGMENT_AT_ONCE // self.recipe.batch_size)
        totals, norms = 0.0, 0.0
        for step in progress(range(len(batches))):
            if step % at_once == 0:
                following = zip(*batches[step : step + at_once], strict=True)
                images = [
                    m._augmented(own, epoch, step)
                    for m, own in zip(members, following, strict=True)
                ]
            n = len(batches[step][0])
            x = torch.stack([own[step % at_once] for own in images])
            y = labels[torch.stack(batches[step])]
            run_step = self.whole_step if n == self.recipe.batch_size else self._step
            with products(self.first.by_float32):
                stats, norm = run_step(x, y, self._matrices(n, epoch, step))
            totals, norms = totals + stats * n, norms + norm
        return torch.cat([totals / len(labels), norms[:, None]], 1)

    def _matrices(self, n: int, epoch: int, step: int) -> Matrices:
        drawn = [member._draw(n, epoch, step)[1] for member in self.members]
        return {
            width: None if own is None else torch.stack([d[width] for d in drawn])
            for width, own in drawn[0].items()
        }

    # -------------------------------------------------------------- between epochs

    def state(self) -> dict[str, Any]:
        """What the next epoch depends on; its draws start from (seed, epoch)."""
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        return {"parameters": parameters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])  # in place: members hold views
        load_optimizer(self.optimizer, state["optimizer"])
        if isinstance(self.whole_step, CapturedStep):
            self.whole_step.forget()


def _stacked(modules: Sequence[nn.Module], name: str) -> nn.Parameter:
    return nn.Parameter(torch.stack([getattr(module, name).detach() for module in modules]))


def train_seeds(
    recipe: Recipe,
    seeds: Iterable[int],
    *,
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
) -> list[Record]:
    """:func:`~sigreg_lib.train.train` for several seeds of an MLP recipe, trained at once.

    Each seed has the record of a separate run, equal to it up to rounding; ``seconds`` is its share
    of the time. All seeds together have one checkpoint an epoch: stopped and started again with the
    same seeds, they go on after their last whole epoch to the same weights. Seeds whose records are
    done are left out. A seed that diverges ends, the others go on.

    Args:
        recipe: all settings; an ``mlp`` without batch normalization, MixUp and CutMix.
        seeds: one or more, each once.
        compile: not offered: None or False.
        data, epochs, device, results, group, checkpoints, capture, evaluate_every, download,
            quiet: as in ``train``.

    Returns:
        the records, in the order of ``seeds``.

    Raises:
        ValueError: a recipe that cannot be trained batched (with the reason), or what ``train``
            refuses, or a seed that was begun in a separate run or in another group of seeds: its
            record would be lost.
        RuntimeError: another process is training one of these runs.
    """
    seeds = list(seeds)
    check_batched(recipe, compile)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be one or more different integers, not {seeds}")
    for seed in seeds:
        stop, place = run.check(recipe, seed, epochs, device, evaluate_every)
    graph = run.graph_for(capture, place)
    seeds = list(map(operator.index, seeds))
    data = with_holdout(data, recipe.holdout, download=download).to(place)
    folder, kept = Path(results) / (group or data.name), Path(checkpoints) / (group or data.name)
    say = run.speaker(quiet)

    fresh = {seed: run.new_record(recipe, data, seed) for seed in seeds}
    paths = {seed: folder / f"{record.name}.json" for seed, record in fresh.items()}
    with contextlib.ExitStack() as stack:
        if not all(run.done(run.earlier(paths[seed], r), stop) for seed, r in fresh.items()):
            for record in fresh.values():
                stack.enter_context(locked(kept / f"{record.name}.pt"))
        done, begun = {}, []
        for seed, record in fresh.items():
            found = run.earlier(paths[seed], record)
            if run.done(found, stop):
                say(f"{found.name}: already there, {found.status} at epoch {found.epochs}")
                done[seed] = found
            elif found is not None:
                begun.append(found.name)
        if len(done) == len(seeds):
            return [done[seed] for seed in seeds]
        checkpoint = kept / _checkpoint_name(fresh)  # also of those that ended before the others
        if not checkpoint.exists():
            fresh = {seed: record for seed, record in fresh.items() if seed not in done}
            checkpoint = kept / _checkpoint_name(fresh)
        for record in fresh.values():
            if (kept / f"{record.name}.pt").exists():
                raise ValueError(
                    f"{record.name} has a checkpoint of a separate run: finish that first"
                )
        if begun and not checkpoint.exists():
            raise ValueError(
                f"{', '.join(begun)}: begun, but not together ({checkpoint} is not there): go on "
                "with the same seeds as before, or move the records away"
            )

        members = [Trainer(recipe, data, seed=seed, compile=False) for seed in fresh]
        ensemble, held = Ensemble(members, capture=graph), list(fresh.values())
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location=place, weights_only=True)
            texts = zip(saved["records"], held, strict=True)
            held = [run.resumed(text, record, checkpoint) for text, record in texts]
            ensemble.load_state(saved)
            say(f"{checkpoint.stem}: resuming after epoch {max(r.epochs for r in held)}")
        floor = members[0].floor()
        now = run.provenance(members[0], False, graph) | {"batched": list(fresh)}
        for record in held:
            run.note_session(record, now)
        while active := [
            i for i, r in enumerate(held) if r.status == "partial" and r.epochs < stop
        ]:
            epoch = held[active[0]].epochs + 1
            start = time.perf_counter()
            with run.progress_bar(quiet, f"{checkpoint.stem} epoch {epoch}/{stop}") as progress:
                trained = ensemble.train_epoch(epoch - 1, progress)
            how = {"every": evaluate_every, "last": epoch == stop}
            outcomes = {i: run.conclude(members[i], trained[i], epoch, **how) for i in active}
            share = (time.perf_counter() - start) / len(active)
            for i, outcome in outcomes.items():
                run.append(held[i], outcome, floor, share)
            run.save(checkpoint, ensemble.state() | {"records": [r.to_json() for r in held]})
            for i in active:
                held[i].write(paths[held[i].seed])
                say(run.line(held[i], stop))
        for record in held:
            record.write(paths[record.seed])
            done[record.seed] = record
        return [done[seed] for seed in seeds]


def _checkpoint_name(records: dict[int, Record]) -> str:
    """Of a group of seeds: the name of its runs with all of the seeds."""
    first = next(iter(records.values()))
    listed = "_".join(map(str, records))
    if len(listed) > 60:  # file names are short
        more = f"{len(records) - 1}_more_{zlib.crc32(listed.encode()):08x}"
        listed = f"{first.seed}_and_{more}"
    return f"{first.name.removesuffix(f'-s{first.seed}')}-s{listed}-batched.pt"
