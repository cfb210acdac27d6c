"""One step, one epoch, one evaluation.

Data and augmentation live on the device, draws depend on (seed, epoch, step) alone, statistics are
float32, and nothing waits for the device inside an epoch. On CUDA whole steps are replayed from a
graph, see :mod:`sigreg_lib.train.capture`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sigreg_lib import diagnostics, records
from sigreg_lib._dtype import at_least_float32
from sigreg_lib.attach import Handle, Matrices, attach
from sigreg_lib.augment import Mix, augment, concatenate, draw, draw_mix, mix
from sigreg_lib.data import ImageData
from sigreg_lib.losses import combine, strong_values, weak_values
from sigreg_lib.models import build_model, redraw_drops
from sigreg_lib.recipes import RECIPES, Recipe
from sigreg_lib.sketch import directions, gaussian
from sigreg_lib.train.balance import Balance
from sigreg_lib.train.capture import CapturedStep, Graph
from sigreg_lib.train.optimizer import build_optimizer, load_optimizer, set_learning_rate
from sigreg_lib.train.precision import lacks_products, products

AUGMENT_AT_ONCE = 4096  # images; large groups share an operation's overhead
EVALUATE_AT_ONCE = 500
ORDER_STREAM, SKETCH_STREAM = 2, 3  # augmentation draws from 0 and 1
DIAGNOSED = 2000  # test images whose features are looked at after each epoch
PROBE_BATCH, PROBE_DIM = 128, 64  # Weak and Strong of every run, baselines too, at the tables' N, K


class Trainer:
    """A model in training: everything that a checkpoint holds, and what acts on it.

    Args:
        recipe: all settings.
        data: images and labels, already on the device to train on.
        seed: of weights, order, augmentation, sketches, drop path and dropout.
        compile: objective and evaluation, leaving slow bfloat16 products as they are (`precision`).
        capture: record whole steps with this graph (``CudaGraph``) and replay them.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageData,
        *,
        seed: int,
        compile: bool,
        capture: type[Graph] | None = None,
    ) -> None:
        self.recipe, self.data, self.seed = recipe, data, seed
        self.device = data.train_images.device
        self.by_float32 = not compile and lacks_products(recipe, self.device)
        shape = (data.channels, data.size, data.size)
        model = build_model(
            recipe.model, shape, data.n_classes, seed=seed, **recipe.model_options()
        )
        self.model = model.to(self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(recipe, self.parameters, on_device=capture is not None)
        self.policy = recipe.policy(data.size)
        mean, std = recipe.mean or data.mean, recipe.std or data.std
        if len(mean) != data.channels:
            if "mean" in recipe.differences() or recipe.name not in RECIPES:
                raise ValueError(f"mean has {len(mean)} values for {data.channels} channels")
            mean, std = data.mean, data.std  # a CIFAR recipe on grey images
        self.normalization = mean, std
        self.mean = 255 * torch.tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=self.device).view(-1, 1, 1)

        self.generator = torch.Generator(self.device)  # sketches, drop path and dropout
        self.regularizer = recipe.build_regularizer(
            self.generator if recipe.resample else None, seed=seed
        )
        last = len(data.train_images) % recipe.batch_size or recipe.batch_size
        if self.regularizer is not None and last < 4:
            raise ValueError(
                f"batch_size={recipe.batch_size} leaves a last batch of {last} of "
                f"{len(data.train_images)} images: too few for a covariance, choose another"
            )
        taps, looks = recipe.tapping, RECIPES.get(recipe.name, recipe).tapping
        drawing = {"columns": recipe.columns, "shared_sketch": recipe.shared_sketch}
        self.handle = self.looking = attach(
            self.model, regularizer=self.regularizer, **drawing, **taps
        )
        if taps != looks:  # all runs of a recipe are measured alike, wherever they are regularized
            self.looking = attach(self.model, regularizer=None, **looks)
            self.looking.in_training = False
        seen = self._look(self.handle, data.train_images[:2])[1]
        widths = {k: z.shape[-1] for k, z in zip(self.handle.matrix_keys(seen), seen, strict=True)}
        self.balance = None
        if recipe.lam == "auto":
            self.balance = Balance(convex=recipe.convex, device=self.device)
        if recipe.columns and max(recipe.columns) >= min(widths.values()):
            raise ValueError(
                f"sketch_dim={recipe.sketch_dim}: K of a layer must lie below its width, "
                f"{min(widths.values())} here"
            )
        self.like = {k: torch.empty(1, c, device=self.device) for k, c in widths.items()}
        self.step = torch.compile(self._loss, dynamic=False) if compile else self._loss
        self.whole_step = partial(self._step, self.step)
        if capture is not None:
            self.whole_step = CapturedStep(self.whole_step, self.optimizer, capture(self.device))
        self.predict = torch.compile(self._logits, dynamic=False) if compile else self._logits

    # -------------------------------------------------------------- one step

    def _logits(self, images: Tensor, m: Mix | None = None) -> Tensor:
        x = (images.float() - self.mean) / self.std
        if m is not None:
            x = mix(x, m)
        reduced = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            logits = self.model(x)
        return at_least_float32(logits)

    def _parts(
        self, images: Tensor, labels: Tensor, m: Mix | None, matrices: Matrices
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Task loss, accuracy, and R of each layer (0 for a baseline)."""
        logits = self._logits(images, m)
        task, correct = cross_entropy(logits, labels), logits.argmax(1) == labels
        accuracy = correct.float().mean()
        if m is not None:  # labels are mixed in the proportion of the pixels
            other = labels[m.partner]
            task = m.lam * task + (1 - m.lam) * cross_entropy(logits, other)
            also = (logits.argmax(1) == other).float().mean()
            accuracy = m.lam * accuracy + (1 - m.lam) * also
        if self.regularizer is None:
            r = torch.zeros(1, device=self.device)
        else:
            r = self.handle.losses(matrices)
        self.handle.clear()
        return task, accuracy, r

    def _loss(
        self, images: Tensor, labels: Tensor, m: Mix | None, matrices: Matrices, lam: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The objective, and (task loss, accuracy, objective, R of each layer) without gradient.

        ``lam``: the weight, a tensor, where the recipe says auto.
        """
        task, accuracy, r = self._parts(images, labels, m, matrices)
        weight = self.recipe.lam if lam is None else lam
        loss = combine(task, r.mean(), weight, convex=self.recipe.convex)
        return loss, torch.cat([torch.stack([task, accuracy, loss]), r]).detach()

    def _update(self, loss: Tensor) -> Tensor:
        """Backward pass and optimizer; returns the gradient's norm before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        return self._apply()

    def _apply(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters, self.recipe.clip_norm, norm, foreach=True
            )
        self.optimizer.step()
        return norm

    def _step(self, objective, *inputs: Any) -> tuple[Tensor, Tensor]:
        """All of a step that is captured; returns statistics and the gradient's norm."""
        loss, stats = objective(*inputs)
        return stats, self._update(loss)

    def gradients(self, *inputs: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients of the task and of R, unweighted, one a parameter, and the statistics.

        Takes what :meth:`_loss` takes; the objective in the statistics is not weighted yet.
        """
        task, accuracy, r = self._parts(*inputs)
        own = [
            torch.autograd.grad(part, self.parameters, retain_graph=True, materialize_grads=True)
            for part in (task, r.mean())
        ]
        stats = torch.cat([torch.stack([task, accuracy, task]), r]).detach()
        return list(own[0]), list(own[1]), stats

    def _seeking_step(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """A step that also looks at both gradients, for lam='auto'."""
        task, r, stats = self.gradients(*inputs)
        self.balance.see(task, r)
        lam = self.balance.weight()
        for p, a, b in zip(self.parameters, task, r, strict=True):
            p.grad = combine(a, b, lam, convex=self.recipe.convex)
        stats[2] = combine(stats[0], stats[3:].mean(), lam, convex=self.recipe.convex)
        return stats, self._apply()

    def _draw(self, n: int, epoch: int, step: int) -> tuple[Mix | None, Matrices]:
        """Mixing and random matrices of a step of n images; drops are drawn into the model."""
        m = draw_mix(self.policy, n, self.data.size, seed=self.seed, epoch=epoch, step=step)
        redraw_drops(self.model, n, self.generator)
        matrices = {}
        if self.regularizer is not None:  # drawn here: a compiled step holds no generator
            matrices = {k: self.regularizer.matrix(z) for k, z in self.like.items()}
        return m if m is None else m.to(self.device), matrices

    def forward(self, x: Tensor, y: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Objective and statistics of one step, as :meth:`_loss` gives them; updates nothing."""
        m, matrices = self._draw(len(y), epoch, step)
        # the short last batch would be compiled for itself
        objective = self.step if len(y) == self.recipe.batch_size else self._loss
        found = () if self.balance is None else (self.balance.weight(),)
        with products(self.by_float32):
            return objective(x, y, m, matrices, *found)

    def _train_step(self, x: Tensor, y: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """One step; what it returns is overwritten by the next where steps are captured."""
        inputs = x, y, *self._draw(len(y), epoch, step)
        with products(self.by_float32):
            if self.balance is not None:
                if not self.balance.done:
                    return self._seeking_step(*inputs)
                inputs = *inputs, self.balance.weight()
            if len(y) == self.recipe.batch_size:
                return self.whole_step(*inputs)
            return self._step(self._loss, *inputs)

    # -------------------------------------------------------------- one epoch

    def begin_epoch(self, epoch: int) -> tuple[Tensor, ...]:
        """Set the learning rate and start the epoch's draws; the images of each step."""
        self.model.train()
        set_learning_rate(self.optimizer, self.recipe.learning_rate(epoch))
        # streams apart from each other, from the weights' and from the augmentation's
        stream, own = (
            np.random.SeedSequence((self.seed, epoch), spawn_key=(key,))
            for key in (ORDER_STREAM, SKETCH_STREAM)
        )
        self.generator.manual_seed(int(own.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        count = len(self.data.train_images)
        order = torch.from_numpy(np.random.default_rng(stream).permutation(count))
        if self.device.type == "cuda":  # it copies from pinned memory only without waiting
            order = order.pin_memory()
        return order.to(self.device, non_blocking=True).split(self.recipe.batch_size)

    def train_epoch(self, epoch: int, progress=lambda steps: steps) -> dict[str, Any]:
        """Train on every image once; ``epoch`` counts from 0. Values are means over samples."""
        return self.read(self.run_steps(epoch, progress))

    def run_steps(self, epoch: int, progress=lambda steps: steps) -> Tensor:
        """All steps of an epoch, none of them waited for.

        Returns:
            means over samples of a step's statistics and, last, the sum of the gradients' norms.
        """
        batches = self.begin_epoch(epoch)
        at_once = max(1, AUGMENT_AT_ONCE // self.recipe.batch_size)
        totals, norms = 0.0, 0.0
        for step in progress(range(len(batches))):
            if step % at_once == 0:
                images = self._augmented(batches[step : step + at_once], epoch, step)
            batch, x = batches[step], images[step % at_once]
            stats, norm = self._train_step(x, self.data.train_labels[batch], epoch, step)
            totals = totals + stats * len(batch)
            norms = norms + norm
        return torch.cat([totals / len(self.data.train_images), norms[None]])

    def read(self, totals: Tensor) -> dict[str, Any]:
        """What :meth:`run_steps` found, as numbers: the epoch's one wait for the device."""
        task, accuracy, objective, *r, norms = totals.tolist()
        r = r if self.regularizer is not None else []
        return {
            "train_loss": task,
            "train_accuracy": 100 * accuracy,
            "objective": objective,
            "layers": r,
            "regularizer": sum(r) / len(r) if r else None,
            "grad_norm": norms / -(-len(self.data.train_images) // self.recipe.batch_size),
        }

    def _augmented(self, batches: tuple[Tensor, ...], epoch: int, first: int) -> tuple[Tensor, ...]:
        """Augmented images of several steps; each step's depend on (seed, epoch, step) alone."""
        drawn = [
            draw(self.policy, len(batch), seed=self.seed, epoch=epoch, step=first + i)
            for i, batch in enumerate(batches)
        ]
        images = self.data.train_images[torch.cat(batches)]
        images = augment(images, concatenate(drawn), self.policy)
        return images.split([len(batch) for batch in batches])

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Loss (nats) and accuracy (%) on all test images; features of the first of them.

        Features are of each layer that the named recipe taps, (min(DIAGNOSED, N), C), float32.
        """
        images, labels = self.data.test_images, self.data.test_labels
        loss, correct, parts = 0.0, 0.0, []
        for i in range(0, len(labels), EVALUATE_AT_ONCE):
            x, y = images[i : i + EVALUATE_AT_ONCE], labels[i : i + EVALUATE_AT_ONCE]
            predict = self.predict if len(x) == EVALUATE_AT_ONCE else self._logits
            logits, features = self._look(self.looking, x, predict)
            loss = loss + cross_entropy(logits, y, reduction="sum")
            correct = correct + (logits.argmax(1) == y).sum()
            if i < DIAGNOSED:
                parts.append(features)
        found = {
            "test_loss": float(loss) / len(labels),
            "test_accuracy": 100 * float(correct) / len(labels),
        }
        return found, [torch.cat(layer)[:DIAGNOSED] for layer in zip(*parts, strict=True)]

    @torch.no_grad()
    def _look(self, handle: Handle, images: Tensor, predict=None) -> tuple[Tensor, list[Tensor]]:
        """Logits and the features of every layer of the handle, in eval mode."""
        self.model.eval()
        handle.always = True
        with products(self.by_float32):
            logits = (predict or self._logits)(images)
        features = [handle.features[name] for name in handle.names]
        handle.always = False
        handle.clear()
        return logits, features

    @torch.no_grad()
    def diagnose(
        self, features: list[Tensor], fully: bool = True, spectrum: bool = True
    ) -> dict[str, list] | None:
        """Measures of each layer; see :class:`~sigreg_lib.records.Record`.

        Only the effective dimension unless ``fully``, with or without the spectrum; None where a
        layer's features or their squares are not finite.
        """
        measures: dict[str, list] = {}
        for shape in {z.shape for z in features}:
            members = [i for i, z in enumerate(features) if z.shape == shape]
            z = torch.stack([features[i] for i in members])  # layers of one shape at once
            if not z.square().sum((1, 2)).isfinite().all():
                return None
            found = {"effective_dim": diagnostics.participation_ratio(z)}
            if fully:
                found |= self._measure(z)
            if fully and spectrum:
                values = diagnostics.covariance_spectrum(z)
                ranks = torch.tensor(records.spectrum_ranks(values.shape[-1]), device=z.device)
                found["spectrum"] = values[:, ranks - 1]
            for name, values in found.items():
                column = measures.setdefault(name, [None] * len(features))
                for i, value in zip(members, values.tolist(), strict=True):
                    column[i] = value
        return measures

    def _measure(self, z: Tensor) -> dict[str, Tensor]:
        """Each measure of each layer; z of shape (layers, N, C)."""
        size = z.shape[-1], PROBE_DIM
        g = torch.Generator().manual_seed(0)  # the same probe for every run and epoch
        sketch = gaussian(*size, generator=g, device=z.device)
        slices = directions(*size, generator=g, device=z.device)
        size_n = min(PROBE_BATCH, z.shape[1])
        batches = z[:, : z.shape[1] // size_n * size_n].unflatten(1, (-1, size_n))
        narrow = z.shape[-1] <= PROBE_DIM
        return {
            "feature_norm": diagnostics.feature_norm(z),
            "mean_cosine": diagnostics.mean_cosine(z),
            "weak": weak_values(batches, None if narrow else sketch).mean(1),
            "strong": strong_values(batches, slices).mean(1),
        }

    # -------------------------------------------------------------- between epochs

    def state(self) -> dict[str, Any]:
        """What the next epoch depends on; its draws start from (seed, epoch)."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.balance is None else state | {"balance": self.balance.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.balance is not None:
            self.balance.load_state(state["balance"])
        if isinstance(self.whole_step, CapturedStep):
            self.whole_step.forget()

    def floor(self) -> float | None:
        """Expected R of whitened Gaussian features, averaged over the tapped layers."""
        if self.regularizer is None:
            return None
        _, features = self._look(self.handle, self.data.train_images[:2])
        n = self.recipe.batch_size * (len(features[0]) // 2)
        floors = [
            self.regularizer.floor(n, z.shape[-1], columns)
            for z, columns in zip(features, self.handle.columns, strict=True)
        ]
        return sum(floors) / len(floors)
