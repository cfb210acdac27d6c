"""Whole steps of the recipes, ours beside plain ones, and where an epoch goes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sigreg_lib import _blocks
from sigreg_lib.bench.timing import alternate, extra_memory, plain, ratio
from sigreg_lib.data import ImageData
from sigreg_lib.recipes import find
from sigreg_lib.train.loop import Trainer
from sigreg_lib.train.precision import lacks_products, products, worth_compiling

FAMILIES = ("vit", "expert", "mlp")
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of CIFAR-100
PLAIN_IMAGES = 64  # augmented one by one


def fake_images(train: int, test: int, device: str = "cpu") -> ImageData:
    """Random images of CIFAR-100's shapes: speed does not depend on what they show."""
    g = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
        return images, torch.randint(0, 100, (n,), generator=g)

    names = tuple(f"class {i}" for i in range(100))
    data = ImageData("random", *split(train), *split(test), names, (0.5,) * 3, (0.25,) * 3)
    return data.to(device)


class Steps:
    """Steps of one recipe: ours, and plainly from the same weights on the same batch."""

    def __init__(
        self,
        name: str,
        data: ImageData,
        *,
        compile: bool,
        compare: bool = True,
        **overrides: Any,
    ) -> None:
        recipe = find(name).override(**overrides)
        self.trainer = Trainer(recipe, data, seed=0, compile=compile)
        self.trainer.model.train()
        n = recipe.batch_size
        self.images, self.labels = data.train_images[:n], data.train_labels[:n]
        self.normalised = (self.images.float() - self.trainer.mean) / self.trainer.std
        state = self.trainer.model.state_dict()
        self.plain_step = plain("reference_step").PlainStep(recipe, state) if compare else None

    def ours(self) -> None:
        """One step of ours, MixUp or CutMix, sketches and drop path drawn."""
        self.trainer._train_step(self.images, self.labels, 0, 0)

    def plainly(self) -> None:
        """One plain step, mixed likewise."""
        x, y = self.normalised, self.labels
        if not self.trainer.policy.mixup_alpha:
            self.plain_step(x, y)
            return
        partner, lam = torch.randperm(len(x)), float(np.random.default_rng(0).beta(0.8, 0.8))
        self.plain_step(lam * x + (1 - lam) * x[partner], y, partner, lam)


PRODUCTS = {"vit": (8192, 256, 512), "expert": (8320, 192, 768), "mlp": (128, 1024, 1024)}
"""The largest share of each recipe's products: (rows, in, out) of a batch through a layer."""


def bench_products(*, rounds: int = 15, device: str = "cpu") -> list[dict[str, Any]]:
    """Best speed over rounds of a product of each recipe's shape, in 1e9 operations a second.

    With :func:`count_operations` it gives the time that a step's products would take at least.
    """
    rows = []
    for family, (n, a, b) in PRODUCTS.items():
        x, w = torch.ones(n, a, device=device), torch.ones(b, a, device=device)
        x16, w16 = x.bfloat16(), w.bfloat16()
        functions = {
            "float32": partial(torch.nn.functional.linear, x, w),
            "bfloat16": partial(torch.nn.functional.linear, x16, w16),
        }
        times = alternate(functions, rounds=rounds)
        speed = {t: 2e-9 * n * a * b / min(v) for t, v in times.items()}
        rows.append({"family": family, "shape": [n, a, b], "gflops": speed})
    return rows


def count_operations(family: str) -> int:
    """Additions and multiplications in the matrix products of a step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = Steps(f"{family}/none", fake_images(128, 2), compile=False, compare=False)
    with FlopCounterMode(display=False) as counter, products(steps.trainer.by_float32):
        loss, _ = steps.trainer.forward(steps.images, steps.labels, 0, 0)
        loss.backward()
    return counter.get_total_flops()


def bench_steps(family: str, *, rounds: int = 7, device: str = "cpu") -> dict[str, Any]:
    """A whole step of a family of recipes without and with a regularizer, ours and plain."""
    data = fake_images(256, 16, device)
    compile = worth_compiling(find(f"{family}/none"), data.train_images.device)
    compare = device == "cpu"
    functions: dict[str, Callable[[], None]] = {}
    forget: dict[str, Callable[[], None]] = {}
    for method in ("none", "weak", "strong"):
        steps = Steps(f"{family}/{method}", data, compile=compile, compare=compare)
        functions[f"ours {method}"] = steps.ours
        forget[f"ours {method}"] = steps.trainer.optimizer.zero_grad
        if compare:
            functions[f"plain {method}"] = steps.plainly
            forget[f"plain {method}"] = steps.plain_step.forget
    times = alternate(functions, rounds=rounds)
    # what a loss adds is a small difference: it takes more rounds, without the slow plain steps
    names = [f"ours {method}" for method in ("none", "weak", "strong")]
    more = alternate({name: functions[name] for name in names}, rounds=6 * rounds)
    found: dict[str, Any] = {
        "family": family,
        "operations": count_operations(family),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "added": {m: ratio(more, f"ours {m}", "ours none") for m in ("weak", "strong")},
        "bytes": {
            name: extra_memory(f, device, before=forget[name]) for name, f in functions.items()
        },
    }
    if compare:
        found["ratio"] = {
            m: ratio(times, f"plain {m}", f"ours {m}") for m in ("none", "weak", "strong")
        }
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "float32, eager": {"precision": "float32", "compile": False},
    "float32, compiled": {"precision": "float32", "compile": True},
    "bfloat16, eager": {"compile": False},
    "bfloat16, compiled, fused attention": {"compile": True, "fused": True},
    "bfloat16, compiled": {"compile": True},
}
"""Ways to take a step of the vit that were tried.

The last is the one in use, but on a processor without bfloat16 products, where the eager one is.
"""


def bench_variants(*, rounds: int = 7, device: str = "cpu") -> list[dict[str, Any]]:
    """A step of ``vit/none`` taken in each of :data:`VARIANTS`, and plainly.

    Those that compile bfloat16 are left out where its products are scalar loops.
    """
    data = fake_images(256, 16, device)
    slow = lacks_products(find("vit/none"), data.train_images.device)
    functions: dict[Hashable, Callable[[], None]] = {}
    for name, options in VARIANTS.items():
        if slow and options["compile"] and "precision" not in options:
            continue
        options = dict(options)
        fused = options.pop("fused", False)
        steps = Steps("vit/none", data, compare=not functions and device == "cpu", **options)
        if steps.plain_step is not None:
            functions["plain"] = steps.plainly
        with _fused_attention(fused):
            steps.ours()  # what is compiled is compiled here
        functions[name] = steps.ours
    times = alternate(functions, rounds=rounds)
    of = "plain" if "plain" in functions else next(iter(VARIANTS))
    return [
        {
            "variant": name,
            "seconds": statistics.median(times[name]),
            "ratio": ratio(times, of, name),
        }
        for name in functions
    ]


@contextlib.contextmanager
def _fused_attention(on: bool) -> Iterator[None]:
    """PyTorch's fused attention in place of plain products."""
    before = _blocks._attend
    if on:
        _blocks._attend = torch.nn.functional.scaled_dot_product_attention
    try:
        yield
    finally:
        _blocks._attend = before


def bench_epoch(name: str, *, rounds: int = 5, device: str = "cpu") -> dict[str, Any]:
    """Where an epoch of a recipe goes, in seconds of an epoch of CIFAR-100.

    Timed on some images and scaled to all: augmentation on 4,096, evaluation on 1,000, a step on
    one batch. Plain augmentation goes image by image through torchvision.
    """
    recipe = find(name)
    data = fake_images(4096, 1000, device)
    compile = worth_compiling(recipe, data.train_images.device)
    steps = Steps(name, data, compile=compile, compare=False)
    trainer, n = steps.trainer, recipe.batch_size
    batches = torch.arange(4096, device=device).split(n)

    def augmentation() -> None:
        trainer._augmented(batches, 0, 0)

    def forward() -> Tensor:
        return trainer.forward(steps.images, steps.labels, 0, 0)[0]

    def forward_and_backward() -> None:
        trainer.optimizer.zero_grad()
        with products(trainer.by_float32):
            forward().backward()

    def evaluation() -> None:
        trainer.evaluate()
        trainer.model.train()

    functions = {
        "augmentation": augmentation,
        "forward": forward,
        "both": forward_and_backward,
        "step": steps.ours,
        "evaluation": evaluation,
    }
    if device == "cpu":
        functions["plain augmentation"] = _plain_augmentation(recipe, data, trainer.normalization)
    times = alternate(functions, rounds=rounds)
    seconds = {part: statistics.median(values) for part, values in times.items()}
    per_epoch = -(-TRAIN_IMAGES // n)
    found = {
        "augmentation": seconds["augmentation"] * TRAIN_IMAGES / 4096,
        "forward": seconds["forward"] * per_epoch,
        "backward": (seconds["both"] - seconds["forward"]) * per_epoch,
        "optimizer": (seconds["step"] - seconds["both"]) * per_epoch,
        "evaluation": seconds["evaluation"] * TEST_IMAGES / 1000,
    }
    whole = sum(found.values())
    if "plain augmentation" in seconds:
        found["plain augmentation"] = seconds["plain augmentation"] * TRAIN_IMAGES / PLAIN_IMAGES
    return {"recipe": name, "seconds": found, "epoch": whole}


def _plain_augmentation(recipe, data: ImageData, normalization) -> Callable[[], None]:
    from PIL import Image

    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in data.train_images[:PLAIN_IMAGES]]
    transform = plain("reference_step").plain_augmentation(recipe, *normalization)
    return lambda: torch.stack([transform(image) for image in images])
