import math

import matplotlib
import pytest
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from sigreg_lib import ablations
from sigreg_lib.ablations import (
    cell_values,
    epoch_table,
    grid,
    heat_map,
    outcome,
    paired,
    require,
    rows,
    seed_table,
    study,
)
from sigreg_lib.records import HISTORY, Record
from sigreg_lib.train import Run

matplotlib.use("Agg")


def finished(run: Run, accuracies: list[float], *, status="finished", planned=None) -> Record:
    n = len(accuracies)
    recipe = run.resolve().override(epochs=planned or n)
    history = {name: [0.5] * n for name in HISTORY}
    history |= {"epoch": list(range(1, n + 1)), "test_accuracy": accuracies}
    history |= {"regularizer": [7.0] * n, "regularizer_floor": [6.0] * n}
    return Record(
        recipe=recipe.name,
        overrides=recipe.differences(),
        config=recipe.as_dict(),
        seed=run.seed,
        dataset="digits",
        epochs_planned=recipe.epochs,
        history=history,
        layers={"names": ["a", "b"], "epoch": [1, n], "weak": [[5.0, 6.0], [3.0, 4.0]]},
        status=status,
    )


def two_epochs(k, seed):
    return Run("digits/weak", seed, {"sketch_dim": k, "epochs": 2})


RUNS = [two_epochs(k, seed) for k in (4, 8) for seed in (0, 1)]


def three_of_four():
    """K = 4 with seeds 0 and 1, K = 8 with seed 1 only."""
    values = {0: [10.0, 20.0], 1: [40.0, 30.0], 3: [5.0, 50.0]}
    return rows(RUNS, {RUNS[i].name: finished(RUNS[i], a) for i, a in values.items()})


def test_a_grid_is_every_combination_with_every_seed():
    runs = grid("digits/weak", [0, 1], sketch_dim=[4, 8], batch_size=[32, 64])
    assert len({run.name for run in runs}) == len(runs) == 8
    assert runs[2].overrides == {"sketch_dim": 4, "batch_size": 64} and runs[2].seed == 0


def test_the_table_has_a_row_a_run_its_settings_and_no_guess():
    frame = three_of_four()
    assert list(frame["sketch_dim"]) == [4, 4, 8, 8] and set(frame["batch_size"]) == {128}
    assert list(frame["status"]) == ["done", "done", "missing", "done"]
    assert cell_values(frame, "accuracy", sketch_dim=4) == [20.0, 30.0]
    assert cell_values(frame, "best", sketch_dim=4) == [20.0, 40.0]
    assert cell_values(frame, "train_accuracy", sketch_dim=4) == [0.5, 0.5]
    assert math.isnan(frame["accuracy"][2])
    assert list(frame["probe"][[0, 1, 3]]) == [3.5] * 3
    assert list(frame["weight"][[0, 1, 3]]) == [0.1] * 3


@pytest.mark.parametrize(
    ("record", "epochs", "status"),
    [
        (None, None, "missing"),
        (finished(RUNS[0], [10.0], status="partial", planned=2), None, "partial"),
        (finished(RUNS[0], [10.0, 20.0], status="diverged", planned=3), None, "diverged"),
        (finished(RUNS[0], [10.0], status="partial", planned=2), 1, "done"),
        (finished(RUNS[0], [10.0, 20.0, 5.0], status="diverged", planned=9), 2, "done"),
        (finished(RUNS[0], [None, 20.0], planned=2), 1, "untested"),
    ],
)
def test_only_a_run_that_came_to_its_end_has_figures(record, epochs, status):
    found = outcome(record, epochs)
    assert found["status"] == status
    assert math.isnan(found["accuracy"]) == (status != "done")


def test_a_layer_without_a_finite_probe_leaves_the_run_without_one():
    record = finished(RUNS[0], [10.0, 20.0])
    record.layers["weak"][1] = [3.0, None]  # overflow: a record holds no infinity
    found = outcome(record)
    assert found["status"] == "done" and math.isnan(found["probe"]) and found["accuracy"] == 20.0


def test_cells_are_found_by_none_and_by_lists_too():
    runs = grid("digits/weak", [0], clip_norm=[None, 1.0], sketch_dim=[[4, 8], 16], epochs=[1])
    frame = rows(runs, {run.name: finished(run, [10.0 + i]) for i, run in enumerate(runs)})
    assert cell_values(frame, "accuracy", clip_norm=None, sketch_dim=[4, 8]) == [10.0]
    assert cell_values(frame, "accuracy", clip_norm=1.0) == [12.0, 13.0]
    assert cell_values(frame, "accuracy", sketch_dim=16) == [11.0, 13.0]


def test_differences_are_of_runs_of_the_same_seed():
    frame = three_of_four()
    assert paired(frame, "accuracy", {"sketch_dim": 8}, {"sketch_dim": 4}) == [20.0]
    with pytest.raises(ValueError, match="more than one setting"):
        paired(frame, "accuracy", {}, {"sketch_dim": 4})


def test_a_table_by_seed_gives_the_number_or_why_there_is_none():
    stopped = finished(RUNS[2], [70.0], status="partial", planned=2)
    done = finished(RUNS[0], [10.0, 20.0])
    frame = rows(RUNS, {RUNS[0].name: done, RUNS[2].name: stopped})
    table = seed_table(frame.iloc[[2, 3, 0]], "sketch_dim")  # its lines in the frame's order
    assert table.to_dict("index") == {
        8: {"seed 0": "partial (epoch 1)", "seed 1": "missing"},
        4: {"seed 0": "20.00", "seed 1": ""},
    }
    assert seed_table(frame, "sketch_dim", "probe", digits=1).loc[4, "seed 0"] == "3.5"
    done.layers = {"names": ["a", "b"], "epoch": [1], "weak": [[5.0, 6.0]]}  # no look at the end
    unseen = rows(RUNS[:1], {RUNS[0].name: done})
    assert seed_table(unseen, "sketch_dim", "probe").loc[4, "seed 0"] == "not measured"
    with pytest.raises(ValueError, match="duplicate"):
        seed_table(frame, "batch_size")


def test_a_record_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="has other settings"):
        rows(RUNS, {RUNS[0].name: finished(two_epochs(16, 0), [1.0, 2.0])})


def test_a_page_without_any_of_its_runs_stops_and_says_what_would_train_them():
    runs = grid("digits/none", [0, 1], epochs=[2])
    frame = rows(runs, {runs[1].name: finished(runs[1], [60.0, 70.0])})
    assert require(frame) is frame
    with pytest.raises(ValueError, match=r"any of 2 runs, such as digits-none.epochs=2-s0; budget"):
        require(rows(runs, {}))
    with pytest.raises(ValueError, match="any of 0 runs; "):
        require(frame.iloc[:0])


def test_a_heat_map_says_mean_interval_and_why_a_cell_is_empty():
    frame = three_of_four()
    ax = Figure().subplots()
    options = {"x": "sketch_dim", "y": "batch_size", "value": "accuracy", "lines": [128]}
    heat_map(ax, frame, **options, columns=[4, 8, 16, 32], reasons={(32, 128): "as K = 16"})
    texts = {text.get_text() for text in ax.texts}
    # t quantile 12.71 times the deviation 7.07 over the root of 2
    assert texts == {"25.0\n±63.5", "50.0\nn = 1", "missing", "as K = 16"}


@pytest.mark.parametrize("vmax", [55, 70, 90, 120, 200, 400])
def test_numbers_of_a_heat_map_are_readable_on_every_shade(vmax):
    ax = Figure().subplots()
    options = {"x": "sketch_dim", "y": "batch_size", "value": "accuracy", "lines": [128]}
    heat_map(ax, three_of_four(), **options, columns=[4, 8, 16], vmin=0, vmax=vmax)
    mesh = ax.collections[-1]
    shades = {m: relative_luminance(mesh.to_rgba(m)) for m in (25.0, 50.0)}
    for text in ax.texts[:2]:
        ink = relative_luminance(text.get_color())
        dark, light = sorted((ink, shades[float(text.get_text().split("\n")[0])]))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # the web's guideline for text


def test_a_study_trains_what_is_missing_and_reads_the_rest(tmp_path):
    small = {"width": 16, "depth": 2, "epochs": 1}
    runs = grid("digits/weak", [0], sketch_dim=[4, 8], **{k: [v] for k, v in small.items()})
    places = {"records": tmp_path / "r", "checkpoints": tmp_path / "c", "data": "digits"}
    options = {"records": tmp_path / "r"}
    with pytest.raises(ValueError, match="no folder of records"):
        study(runs, "ks", "recorded", **options)
    smoke = study(runs, "ks", "smoke", smoke=runs[:1], **places)
    assert list(smoke["status"]) == ["done"] and not (tmp_path / "r").exists()
    made = study(runs[:1], "ks", "cpu", **places)
    read = study(runs, "ks", "recorded", **options)
    assert list(read["status"]) == ["done", "missing"]
    assert read["accuracy"][0] == made["accuracy"][0]
    path = tmp_path / "r" / "ks" / f"{runs[0].name}.json"
    before = path.read_bytes()
    assert list(study(runs, "ks", "cpu", **places)["status"]) == ["done", "done"]
    assert path.read_bytes() == before
    for budget in ("none", "Full"):
        with pytest.raises(ValueError, match=f"budget='{budget}'"):
            study(runs, "ks", budget, costly=True, **options)


def test_costly_runs_are_trained_with_the_full_budget_alone(tmp_path):
    runs = grid("digits/weak", [0], width=[16], depth=[2], epochs=[1])
    places = {"records": tmp_path / "r", "checkpoints": tmp_path / "c", "data": "digits"}
    (tmp_path / "r").mkdir()
    for budget, status in (("recorded", "missing"), ("smoke", "missing"), ("cpu", "missing"),
                           ("full", "done")):  # fmt: skip
        found = study(runs, "ks", budget, smoke=runs, costly=True, **places)
        assert list(found["status"]) == [status], budget


def test_runs_under_names_of_ones_own_keep_them_and_their_order(tmp_path):
    record = finished(RUNS[3], [5.0, 50.0])
    record.write(tmp_path / "ks" / f"{record.name}.json")
    named = {"wide": RUNS[2:], "narrow": RUNS[:1], "wide again": RUNS[3:]}
    frame = ablations.cases(named, "ks", "recorded", records=tmp_path)
    assert list(frame["case"]) == ["wide", "wide", "narrow", "wide again"]
    assert list(frame["status"]) == ["missing", "done", "missing", "done"]
    assert list(frame.index) == [0, 1, 2, 3]
    assert paired(frame, "accuracy", {"case": "wide"}, {"case": "wide again"}) == [0.0]


def test_several_epochs_stand_beside_each_other_with_what_is_missing(tmp_path):
    runs = grid("digits/weak", [0, 1], epochs=[9])
    for run, accuracies in zip(runs, ([10.0, 20.0, 30.0], [15.0]), strict=True):
        record = finished(run, accuracies, planned=9, status="partial")
        record.write(tmp_path / "g" / f"{run.name}.json")
    named = {"here": runs, "nowhere": grid("digits/none", [0], epochs=[9])}
    table = epoch_table(named, "g", [1, 3], records=tmp_path, digits=1)
    assert table[1].loc["here"].tolist() == ["10.0", "15.0"]
    assert table[3].loc["here"].tolist() == ["30.0", "partial (epoch 1)"]
    assert table.loc["nowhere"].tolist() == ["missing", "", "missing", ""]
    assert table.columns.names == ["epoch", "seed"]


def test_every_outcome_is_there_for_every_run():
    assert set(outcome(None)) == set(ablations.OUTCOMES)


@pytest.mark.parametrize(("found", "weight"), [({"lam": 0.02}, 0.02), ({}, math.nan)])
def test_the_weight_of_a_run_that_sought_it_is_the_one_it_found(found, weight):
    run = Run("digits/weak", 0, {"lam": "auto", "epochs": 1})
    record = finished(run, [10.0])
    record.provenance.update(found)
    for epochs in (1, 2):  # come so far or not
        assert outcome(record, epochs)["weight"] == pytest.approx(weight, nan_ok=True)
