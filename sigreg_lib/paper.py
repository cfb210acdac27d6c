"""The published numbers: the nine rows of Tables 1 to 3, their learning curves and settings.

Accuracies are CIFAR-100 test accuracies in percent, from one unseeded run a row. The tables print
the best epoch on the test set; the learning curves, with them the last epoch, and how well the
runs fit what they are trained on are those of the published logs
(github.com/kreasof-ai/sigreg).

Source: arXiv 2603.05924, Tables 1 to 3, and the logs published with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sigreg_lib._names import suggest

TITLE = "Weak-SIGReg: Covariance Regularization for Stable Deep Learning"
ARXIV = "2603.05924"
VENUE = "ICLR 2026"
CITATION = f"{TITLE}, {VENUE}, arXiv {ARXIV}"

EPOCHS = 400
BATCH_SIZE = 128
STEPS_PER_EPOCH = 391  # 50,000 images; the last batch has 80
CURVE_EPOCHS = (1, 5, 10, 40, 200, 400)
FIT_EPOCHS = (1, 2, 3, 5, 10, 40, 100, 400)


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper's tables.

    Attributes:
        name: the recipe, "vit/weak".
        table: number of the table, 1 to 3.
        best_test: the table's figure, the highest test accuracy of all epochs, in percent.
        best_epoch: the epoch that had it, counted from 1.
        curve: test accuracy in percent by epoch, at `CURVE_EPOCHS`.
        train_accuracy: on augmented (and mixed) images during an epoch, in percent, at
            `FIT_EPOCHS`.
        train_loss: cross-entropy of the same, in nats; the logs hold 1 - lambda times it.
        regularizer: value of R, averaged over the tapped layers, at epochs 1 and 400; None for a
            row without regularizer.
        seconds_per_epoch: (least, most) wall time of an epoch of such a run, on an unnamed GPU.
    """

    name: str
    table: int
    best_test: float
    best_epoch: int
    curve: Mapping[int, float] = field(hash=False)
    train_accuracy: Mapping[int, float] = field(hash=False)
    train_loss: Mapping[int, float] = field(hash=False)
    regularizer: Mapping[int, float] | None = field(hash=False)
    seconds_per_epoch: tuple[float, float]

    @property
    def family(self) -> str:
        """The network, "vit", "expert" or "mlp"."""
        return self.name.split("/")[0]

    @property
    def method(self) -> str:
        """The regularizer, "none", "strong" or "weak"."""
        return self.name.split("/")[1]

    @property
    def last_test(self) -> float:
        """Test accuracy of the last epoch, in percent."""
        return self.curve[EPOCHS]

    @property
    def source(self) -> str:
        """Where the row stands, for a caption."""
        return f"arXiv {ARXIV}, Table {self.table}"


_SECONDS = {"vit": (26.0, 28.0), "expert": (25.0, 25.0), "mlp": (9.0, 11.0)}

# (1 - lambda) times the training loss (nats) and training accuracy (%) at FIT_EPOCHS, as logged
_LOGGED = {
    "vit/none": (
        (3.9753, 3.8729, 3.8653, 3.8255, 3.8137, 3.8072, 3.7280, 3.6239),
        (3.8, 5.5, 5.7, 6.3, 6.7, 6.8, 8.6, 10.7),
    ),
    "vit/strong": (
        (4.3481, 4.1782, 4.1678, 4.1707, 4.1092, 3.4847, 2.7229, 2.1347),
        (4.2, 6.8, 7.2, 7.1, 8.1, 20.6, 38.0, 53.7),
    ),
    "vit/weak": (
        (3.9121, 3.7374, 3.6968, 3.5831, 3.3702, 2.7935, 2.2285, 1.6470),
        (5.0, 8.1, 8.9, 11.3, 15.9, 30.3, 45.6, 61.8),
    ),
    "expert/none": (
        (4.0297, 3.8663, 3.7919, 3.7000, 3.5645, 3.0640, 2.5239, 1.7219),
        (3.3, 5.3, 6.7, 8.6, 11.4, 22.8, 37.5, 60.2),
    ),
    "expert/strong": (
        (4.4109, 4.2285, 4.1407, 4.0105, 3.7859, 3.2260, 2.7624, 1.8430),
        (3.9, 6.0, 7.5, 9.7, 13.9, 26.1, 37.6, 61.9),
    ),
    "expert/weak": (
        (4.0098, 3.8060, 3.7151, 3.6061, 3.4621, 2.8148, 2.4172, 1.7616),
        (3.9, 6.8, 8.3, 10.3, 13.3, 28.8, 40.4, 59.5),
    ),
    "mlp/none": (
        (4.1038, 3.7169, 3.5495, 3.3573, 3.1201, 2.5178, 1.6044, 0.1026),
        (2.4, 6.2, 8.5, 12.3, 16.7, 29.2, 50.5, 96.4),
    ),
    "mlp/strong": (
        (4.4841, 4.1822, 4.0069, 3.8118, 3.5449, 2.8553, 2.0562, 0.0924),
        (2.0, 4.6, 7.0, 9.6, 14.6, 27.6, 44.6, 98.4),
    ),
    "mlp/weak": (
        (4.1171, 3.7617, 3.5795, 3.4141, 3.1851, 2.6745, 2.2041, 0.7646),
        (1.9, 5.6, 8.4, 11.6, 16.0, 26.3, 37.1, 76.0),
    ),
}


def _row(
    name: str, best: float, epoch: int, curve: tuple[float, ...], r: tuple[float, float] | None
) -> PublishedRow:
    family, method = name.split("/")
    share = 0.99 if method == "strong" else 0.9  # 1 - lambda, which the baselines keep
    losses, accuracies = _LOGGED[name]
    return PublishedRow(
        name=name,
        table=1 + list(_SECONDS).index(family),
        best_test=best,
        best_epoch=epoch,
        curve=MappingProxyType(dict(zip(CURVE_EPOCHS, curve, strict=True))),
        train_accuracy=MappingProxyType(dict(zip(FIT_EPOCHS, accuracies, strict=True))),
        train_loss=MappingProxyType(
            {e: logged / share for e, logged in zip(FIT_EPOCHS, losses, strict=True)}
        ),
        regularizer=r and MappingProxyType({1: r[0], EPOCHS: r[1]}),
        seconds_per_epoch=_SECONDS[family],
    )


_ROWS = (
    _row("vit/none", 20.73, 347, (6.85, 10.60, 11.70, 12.19, 18.33, 20.51), None),
    _row("vit/strong", 70.20, 317, (10.34, 13.19, 15.13, 38.50, 66.66, 69.96), (10.0, 2.0)),
    _row("vit/weak", 72.02, 358, (12.01, 21.16, 29.88, 50.45, 68.31, 71.95), (7.6, 5.7)),
    _row("expert/none", 70.76, 354, (6.97, 17.38, 22.83, 43.70, 63.96, 70.58), None),
    _row("expert/strong", 72.71, 385, (8.48, 20.46, 28.15, 46.11, 66.96, 72.55), (10.0, 5.0)),
    _row("expert/weak", 71.65, 374, (9.76, 20.06, 26.81, 50.34, 66.60, 71.36), (6.8, 6.0)),
    _row("mlp/none", 26.77, 73, (3.59, 12.26, 15.48, 23.07, 25.35, 25.56), None),
    _row("mlp/strong", 35.99, 399, (3.65, 9.71, 14.01, 21.86, 33.06, 35.20), (30.0, 7.0)),
    _row("mlp/weak", 42.17, 316, (2.89, 11.47, 14.82, 25.50, 39.42, 41.58), (7.7, 7.3)),
)
PUBLISHED: Mapping[str, PublishedRow] = MappingProxyType({row.name: row for row in _ROWS})
"""The nine rows by recipe name, in the order of the tables."""


def published(name: str) -> PublishedRow:
    """The published row of a recipe, such as "vit/weak".

    Raises:
        ValueError: no such row; the nearest is named.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown published row {name!r}; {suggest(name, PUBLISHED)}")
    return PUBLISHED[name]


def table(number: int) -> tuple[PublishedRow, ...]:
    """The three rows of Table 1 (vit), 2 (expert) or 3 (mlp).

    Raises:
        ValueError: another number.
    """
    rows = tuple(row for row in PUBLISHED.values() if row.table == number)
    if not rows:
        raise ValueError(f"number={number!r}: expected table 1, 2 or 3")
    return rows
