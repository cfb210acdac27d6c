"""The published numbers agree with themselves and with the tables they are said to come from."""

from __future__ import annotations

import dataclasses

import pytest

from sigreg_lib.paper import (
    CURVE_EPOCHS,
    EPOCHS,
    FIT_EPOCHS,
    PUBLISHED,
    STEPS_PER_EPOCH,
    published,
    table,
)
from sigreg_lib.recipes import find

# name, table, best test % and its epoch, last test %: the nine rows, typed a second time
ROWS = [
    ("vit/none", 1, 20.73, 347, 20.51),
    ("vit/strong", 1, 70.20, 317, 69.96),
    ("vit/weak", 1, 72.02, 358, 71.95),
    ("expert/none", 2, 70.76, 354, 70.58),
    ("expert/strong", 2, 72.71, 385, 72.55),
    ("expert/weak", 2, 71.65, 374, 71.36),
    ("mlp/none", 3, 26.77, 73, 25.56),
    ("mlp/strong", 3, 35.99, 399, 35.20),
    ("mlp/weak", 3, 42.17, 316, 41.58),
]
# test % by epoch, columns in the order of ROWS
CURVES = {
    1: (6.85, 10.34, 12.01, 6.97, 8.48, 9.76, 3.59, 3.65, 2.89),
    5: (10.60, 13.19, 21.16, 17.38, 20.46, 20.06, 12.26, 9.71, 11.47),
    10: (11.70, 15.13, 29.88, 22.83, 28.15, 26.81, 15.48, 14.01, 14.82),
    40: (12.19, 38.50, 50.45, 43.70, 46.11, 50.34, 23.07, 21.86, 25.50),
    200: (18.33, 66.66, 68.31, 63.96, 66.96, 66.60, 25.35, 33.06, 39.42),
    400: (20.51, 69.96, 71.95, 70.58, 72.55, 71.36, 25.56, 35.20, 41.58),
}
# the logs' training lines, (1 - lambda) CE (nats) and accuracy (%), columns in the order of ROWS
LOSSES = {
    1: (3.9753, 4.3481, 3.9121, 4.0297, 4.4109, 4.0098, 4.1038, 4.4841, 4.1171),
    2: (3.8729, 4.1782, 3.7374, 3.8663, 4.2285, 3.8060, 3.7169, 4.1822, 3.7617),
    3: (3.8653, 4.1678, 3.6968, 3.7919, 4.1407, 3.7151, 3.5495, 4.0069, 3.5795),
    5: (3.8255, 4.1707, 3.5831, 3.7000, 4.0105, 3.6061, 3.3573, 3.8118, 3.4141),
    10: (3.8137, 4.1092, 3.3702, 3.5645, 3.7859, 3.4621, 3.1201, 3.5449, 3.1851),
    40: (3.8072, 3.4847, 2.7935, 3.0640, 3.2260, 2.8148, 2.5178, 2.8553, 2.6745),
    100: (3.7280, 2.7229, 2.2285, 2.5239, 2.7624, 2.4172, 1.6044, 2.0562, 2.2041),
    400: (3.6239, 2.1347, 1.6470, 1.7219, 1.8430, 1.7616, 0.1026, 0.0924, 0.7646),
}
TRAINED = {
    1: (3.8, 4.2, 5.0, 3.3, 3.9, 3.9, 2.4, 2.0, 1.9),
    2: (5.5, 6.8, 8.1, 5.3, 6.0, 6.8, 6.2, 4.6, 5.6),
    3: (5.7, 7.2, 8.9, 6.7, 7.5, 8.3, 8.5, 7.0, 8.4),
    5: (6.3, 7.1, 11.3, 8.6, 9.7, 10.3, 12.3, 9.6, 11.6),
    10: (6.7, 8.1, 15.9, 11.4, 13.9, 13.3, 16.7, 14.6, 16.0),
    40: (6.8, 20.6, 30.3, 22.8, 26.1, 28.8, 29.2, 27.6, 26.3),
    100: (8.6, 38.0, 45.6, 37.5, 37.6, 40.4, 50.5, 44.6, 37.1),
    400: (10.7, 53.7, 61.8, 60.2, 61.9, 59.5, 96.4, 98.4, 76.0),
}
REGULARIZERS = {
    "vit/weak": (7.6, 5.7),
    "expert/weak": (6.8, 6.0),
    "mlp/weak": (7.7, 7.3),
    "vit/strong": (10, 2),
    "expert/strong": (10, 5),
    "mlp/strong": (30, 7),
}


def test_the_nine_rows_stand_in_the_order_of_the_tables():
    assert list(PUBLISHED) == [name for name, *_ in ROWS]


@pytest.mark.parametrize(("name", "number", "best", "epoch", "last"), ROWS)
def test_a_row_holds_the_published_figures(name, number, best, epoch, last):
    row = published(name)
    assert (row.name, row.table, row.best_test, row.best_epoch) == (name, number, best, epoch)
    assert row.last_test == last
    assert f"{row.family}/{row.method}" == name
    assert row.source == f"arXiv 2603.05924, Table {number}"
    assert row in table(number)


@pytest.mark.parametrize("column", range(9))
def test_a_curve_holds_the_published_points(column):
    curve = published(ROWS[column][0]).curve
    assert dict(curve) == {epoch: values[column] for epoch, values in CURVES.items()}
    assert tuple(curve) == CURVE_EPOCHS


@pytest.mark.parametrize("column", range(9))
def test_the_fit_is_that_of_the_logs_without_the_factor_of_lambda(column):
    row = published(ROWS[column][0])
    assert dict(row.train_accuracy) == {e: values[column] for e, values in TRAINED.items()}
    share = 1 - find(row.name).lam
    assert {e: round(share * v, 6) for e, v in row.train_loss.items()} == {
        e: values[column] for e, values in LOSSES.items()
    }
    assert tuple(row.train_loss) == tuple(row.train_accuracy) == FIT_EPOCHS
    # a hundred classes: uniform predictions cost log 100 = 4.605
    assert 4.3 < row.train_loss[1] < 4.61


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_the_best_epoch_is_no_worse_than_any_other(row):
    assert row.best_test >= max(row.curve.values())
    assert 1 <= row.best_epoch <= EPOCHS


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_the_regularizer_is_published_where_there_is_one(row):
    if row.method == "none":
        assert row.regularizer is None
    else:
        assert dict(row.regularizer) == dict(zip((1, EPOCHS), REGULARIZERS[row.name], strict=True))


def test_wall_times_are_those_of_the_networks():
    seconds = {row.family: row.seconds_per_epoch for row in PUBLISHED.values()}
    assert seconds == {"vit": (26, 28), "expert": (25, 25), "mlp": (9, 11)}


def test_an_epoch_has_390_whole_batches_and_a_short_one():
    assert STEPS_PER_EPOCH == -(-50_000 // 128) == 391


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(ValueError, match=r"row 'vit/weka'; did you mean 'vit/weak'"):
        published("vit/weka")
    with pytest.raises(ValueError, match="number=4: expected table 1, 2 or 3"):
        table(4)


def test_a_row_cannot_be_changed():
    row = published("vit/weak")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.best_test = 80.0
    with pytest.raises(TypeError):
        row.curve[400] = 80.0
    assert hash(row) != hash(published("vit/none"))
