import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import seeded
from matplotlib import pyplot as plt

from sigreg_lib import RECIPES, report, tables, weak_floor
from sigreg_lib.data import ImageData
from sigreg_lib.paper import PUBLISHED
from sigreg_lib.records import HISTORY, Record, read, spectrum_ranks
from sigreg_lib.tables import figures, questions

RECORDS = Path(__file__).parent.parent / "figures/records"


@pytest.fixture(autouse=True)
def headless():
    with matplotlib.rc_context():
        matplotlib.use("agg")
        yield
        plt.close("all")


def curve(name, epochs, offset=0.0):
    """The published curve, straight between its points, shifted."""
    points = PUBLISHED[name].curve
    x = np.interp(range(1, epochs + 1), list(points), list(points.values()))
    return [round(float(a) + offset, 4) for a in x]


def made(name="mlp/weak", seed=0, epochs=40, offset=0.0, every=1, **changes) -> Record:
    recipe = RECIPES[name]
    tested = [
        a if e % every == 0 or e == epochs else None
        for e, a in enumerate(curve(name, epochs, offset), 1)
    ]
    history = {column: [None] * epochs for column in HISTORY}
    history |= {"epoch": list(range(1, epochs + 1)), "test_accuracy": tested}
    history |= {"grad_norm": [0.1 * e for e in range(1, epochs + 1)]}
    looks = [e for e in range(1, epochs + 1) if e <= 10 or e in (40, epochs)]
    depth, ranks = recipe.depth, spectrum_ranks(recipe.width)
    layers = {
        "names": [f"layers.{i}" for i in range(depth)],
        "epoch": looks,
        "effective_dim": [[e + i + seed for i in range(depth)] for e in looks],
        "feature_norm": [[math.sqrt(recipe.width)] * depth for _ in looks],
        "mean_cosine": [[0.25] * depth for _ in looks],
        "spectrum": [[[1 / r for r in ranks]] * depth if e in (1, 10) else None for e in looks],
    }
    if recipe.regularizer != "none":
        layers["regularizer"] = [[7.5] * depth for _ in looks]
    record = Record(
        recipe=name,
        overrides={},
        config=recipe.as_dict(),
        seed=seed,
        dataset="cifar100",
        epochs_planned=400,
        history=history,
        layers=layers,
        status="finished" if epochs == 400 else "partial",
        provenance={"commit": "0" * 40, "clean": True, "wall_seconds": 3600.0},
    )
    return replace(record, **changes)


def written(folder, *made_records, group="cifar100"):
    for record in made_records:
        record.write(folder / group / f"{record.name}.json")
    return folder


def row(folder, *made_records, seeds=(0, 1, 2), name="mlp/weak"):
    family, method = name.split("/")
    rows = tables.collect(written(folder, *made_records), family, seeds)
    return {r.published.method: r for r in rows}[method]


# rows


def test_a_deleted_record_makes_its_row_missing_and_leaves_the_others(tmp_path):
    everything = [made(name) for name in ("mlp/none", "mlp/strong", "mlp/weak")]
    rows = tables.collect(written(tmp_path, *everything), "mlp", [0])
    assert [len(r.seeds) for r in rows] == [1, 1, 1]
    before = tables.results_table(rows)
    (tmp_path / "cifar100" / "mlp-strong-s0.json").unlink()
    rows = tables.collect(tmp_path, "mlp", [0])
    after = tables.results_table(rows)
    assert after.loc["ours", "Strong"] == after.loc["verdict", "Strong"] == "missing"
    assert after.loc["n", "Strong"] == "0" and rows[1].missing == [0]
    assert after.drop(columns="Strong").equals(before.drop(columns="Strong"))


def test_a_group_that_is_not_there_has_no_records_and_a_folder_that_is_not_there_is_refused(
    tmp_path,
):
    rows = tables.collect(tmp_path, "expert", [0, 1])
    assert [str(tables.verdict(r)) for r in rows] == ["missing"] * 3
    assert tables.statement(rows).count("is missing") == 3
    with pytest.raises(ValueError, match="no folder of records"):
        tables.collect(tmp_path / "nowhere", "vit", [0])
    with pytest.raises(ValueError, match=r"unknown family .*did you mean 'vit'"):
        tables.collect(tmp_path, "vti", [0])


def test_a_damaged_record_is_an_error_not_a_missing_row(tmp_path):
    written(tmp_path, made())
    (tmp_path / "cifar100" / "mlp-weak-s0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mlp-weak-s0\.json"):
        tables.collect(tmp_path, "mlp", [0])


def test_only_the_published_recipe_and_the_seeds_asked_for_are_taken(tmp_path):
    other = made(seed=1, overrides={"lam": 0.3}, config=RECIPES["mlp/weak"].as_dict())
    found = row(tmp_path, made(seed=0), other, made(seed=5), seeds=(0, 1))
    assert found.seeds == [0] and found.missing == [1]


def test_runs_of_different_length_are_each_compared_as_far_as_they_go(tmp_path):
    found = row(tmp_path, made(seed=0, epochs=53), made(seed=1, epochs=12, offset=1.0))
    assert (found.epoch, found.compared) == (40, [1, 5, 10, 40])
    assert found.difference(10) == pytest.approx(0.5)
    assert found.difference(40) == pytest.approx(0.0) and len(found.accuracies(40)) == 1
    reason = tables.verdict(found).reason
    assert "not all runs are there: epoch 40 (1 of 2 runs)" in reason and "n = 1" in reason
    table = tables.results_table([found])["Weak"]
    assert table["epoch compared"] == "40" and table["n"] == "1 of 2"
    # runs of different length have no mean of their last epochs
    assert table["our last (epoch)"].count("(53)") == table["our last (epoch)"].count("(12)") == 1


def test_best_and_last_are_each_given_with_their_epoch(tmp_path):
    record = made(epochs=12)
    record.history["test_accuracy"][6] = 20.0
    table = tables.results_table([row(tmp_path, record)])["Weak"]
    assert table["our best (epoch)"] == "20.00 (7)"
    assert table["our last (epoch)"] == f"{record.last['test_accuracy']:.2f} (12)"
    assert table["published best (epoch)"] == "42.17 (316)"
    assert table["published last (400)"] == "41.58"


def test_epochs_without_evaluation_are_skipped(tmp_path):
    found = row(tmp_path, made(epochs=12, every=5))
    assert found.shared == [5, 10, 12] and found.compared == [5, 10]
    found = row(tmp_path, made(epochs=12, every=5), made(seed=1, epochs=12))
    assert found.shared == [5, 10, 12]
    tables.plot_curves([found])


# verdicts


@pytest.mark.parametrize(
    ("epochs", "offset", "expected"),
    [
        (400, 1.5, "reproduced"),
        (400, -1.5, "reproduced"),
        (400, 1.51, "not reproduced"),
        (399, 0.0, "reproduced in part (to epoch 200)"),
        (12, 1.4, "reproduced in part (to epoch 10)"),
        (1, 0.0, "reproduced in part (to epoch 1)"),
        (12, -1.6, "not reproduced"),
    ],
)
def test_the_verdict_follows_from_epochs_and_differences(tmp_path, epochs, offset, expected):
    assert str(tables.verdict(row(tmp_path, made(epochs=epochs, offset=offset)))) == expected


@pytest.mark.parametrize("name", ["vit/none", "expert/strong"])
def test_transformers_have_three_points_of_tolerance(tmp_path, name):
    near, far = (
        row(tmp_path / str(o), made(name, offset=o, epochs=10), name=name) for o in (2.9, 3.1)
    )
    assert tables.verdict(near).word == "reproduced in part"
    assert tables.verdict(far).word == "not reproduced"


def test_one_epoch_outside_the_tolerance_decides_and_is_named(tmp_path):
    record = made(epochs=45)
    record.history["test_accuracy"][9] += 2.0
    found = tables.verdict(row(tmp_path, record))
    assert found.word == "not reproduced" and found.epoch == 40
    assert "+2.00 points at epoch 10" in found.reason and "at epoch 40, n = 1" in found.reason
    assert "+2.00 points at epoch 10" in tables.statement([row(tmp_path, record)])


def at_points(name, values, **changes):
    """A run with these test accuracies at the first published epochs."""
    record = made(name, epochs=list(PUBLISHED[name].curve)[len(values) - 1], **changes)
    for epoch, value in zip(PUBLISHED[name].curve, values, strict=False):
        record.history["test_accuracy"][epoch - 1] = value
    return record


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("mlp/none", (3.79, 12.25, 15.37), ["mlp/weak"]),
        ("mlp/strong", (3.49, 9.93, 14.23), []),  # Weak is 1.54 away at epoch 5
        ("vit/none", (8.04,), ["vit/strong"]),  # Weak is 3.97 away
        ("mlp/none", (2.15,), ["mlp/strong", "mlp/weak"]),  # 1.5 from Strong: inclusive
        ("mlp/none", (2.14,), ["mlp/weak"]),
        ("mlp/none", (3.2, 11.5, 14.9, 25.5), ["mlp/weak"]),  # no longer as itself
    ],
)
def test_rows_that_the_judged_epochs_do_not_separate_are_named(tmp_path, name, values, expected):
    found = row(tmp_path, at_points(name, values), name=name)
    assert [other.name for other in tables.passes_as(found)] == expected
    named = " and ".join(expected)
    too = "" if len(values) == 4 else " too"
    said = [tables.statement([found]), tables.verdict(found).reason]
    assert [f"would pass as {named}{too}" in s for s in said] == [bool(expected)] * 2
    assert ["would pass" in s for s in said] == [bool(expected)] * 2
    label = ", ".join(tables.LABELS[n.split("/")[1]] for n in expected) or "no other row"
    assert tables.results_table([found]).loc["would pass as"].item() == label


def test_finished_runs_on_their_curve_pass_as_no_other_row_where_the_published_rows_part(tmp_path):
    runs = [made(f"{f}/{m}", epochs=400) for f in ("vit", "mlp") for m in tables.LABELS]
    written(tmp_path, *runs)
    rows = [r for f in ("vit", "mlp") for r in tables.collect(tmp_path, f, [0])]
    assert [tables.passes_as(r) for r in rows] == [[]] * 6
    # a wider tolerance than that of the family; what is not judged or diverged passes as nothing
    assert tables.passes_as(row(tmp_path, made(epochs=400)), tolerance=40)
    assert "would pass" in tables.verdict(row(tmp_path, made(epochs=400)), tolerance=40).reason
    assert tables.passes_as(replace(rows[3], judged=False), tolerance=40) == []
    assert tables.passes_as(row(tmp_path, made(epochs=10, status="diverged"))) == []
    missing = tables.collect(tmp_path, "expert", [0])[0]
    assert tables.passes_as(missing) == []
    assert tables.results_table([missing]).loc["would pass as"].item() == "-"


def test_an_interval_wider_than_the_tolerance_is_said(tmp_path):
    def reason(folder, *offsets):
        runs = [made(seed=s, epochs=12, offset=o) for s, o in enumerate(offsets)]
        return tables.verdict(row(folder, *runs)).reason

    # half width of two runs 2 d apart: 12.71 d
    assert "interval wider than the tolerance at epoch 1, 5, 10" in reason(
        tmp_path / "a", -0.12, 0.12
    )
    assert "wider" not in reason(tmp_path / "b", -0.11, 0.11)
    assert "wider" not in reason(tmp_path / "c", 0.0)  # one run has no interval


def test_a_short_run_more_does_not_take_the_last_epoch_from_a_finished_one(tmp_path):
    runs = made(epochs=400), made(seed=1, epochs=100), made(seed=2, epochs=4)
    found = tables.verdict(row(tmp_path / "a", *runs))
    assert found.word == "reproduced" and found.epoch == 400
    assert "200 (1 of 3 runs), 400 (1 of 3 runs)" in found.reason
    # but what it shows counts where it goes
    off = made(epochs=400), made(seed=1, epochs=100, offset=3.2)
    found = tables.verdict(row(tmp_path / "b", *off))
    assert found.word == "not reproduced" and "+1.60 points at epoch 40" in found.reason
    rows = tables.collect(written(tmp_path / "a", made("mlp/none", epochs=400)), "mlp", (0, 1, 2))
    differences = tables.differences(rows)
    assert differences.n.tolist() == ["3 and 1", *["2 and 1"] * 3, *["1 and 1"] * 2]


def test_the_mean_over_seeds_is_judged_not_each_run(tmp_path):
    runs = [made(seed=s, epochs=400, offset=o) for s, o in enumerate((-2, 0, 2))]
    assert tables.verdict(row(tmp_path, *runs)).word == "reproduced"


def test_a_diverged_run_is_not_reproduced_whatever_it_reached(tmp_path):
    found = tables.verdict(row(tmp_path, made(), made(seed=1, epochs=6, status="diverged")))
    assert found.word == "not reproduced" and "seed 1 at epoch 6" in found.reason


def test_a_run_before_its_first_published_epoch_is_missing_and_says_why(tmp_path):
    found = tables.verdict(row(tmp_path / "a", made(epochs=4, every=3)))
    assert found.word == "missing" and "no published epoch was tested" in found.reason
    found = tables.verdict(row(tmp_path / "b", made(epochs=12, every=5), made(seed=1, epochs=4)))
    assert str(found) == "reproduced in part (to epoch 10)"
    assert "epoch 1 (1 of 2 runs), 5 (1 of 2 runs), 10 (1 of 2 runs)" in found.reason


def test_runs_of_other_data_are_not_judged(tmp_path, monkeypatch):
    small = tables.rows.SMOKE["mlp"] | {"width": 64, "epochs": 5}
    monkeypatch.setitem(tables.rows.SMOKE, "mlp", small)
    rows = tables.train_family(
        "mlp",
        "smoke",
        [3, 4],
        results=tmp_path / "r",
        checkpoints=tmp_path / "c",
        evaluate_every=5,
        data="ignored",
    )
    assert [r.seeds for r in rows] == [[3]] * 3
    assert all(tables.verdict(r).word == "not judged" for r in rows)
    assert all(r.epoch == 5 and len(r.records[3].layers["names"]) == 3 for r in rows)
    assert min(r.accuracies(5)[0] for r in rows) > 25  # chance is 10
    table = tables.results_table(rows)
    assert set(table.loc["difference"]) == set(table.loc["published"]) == {"-"}
    stamps = [p.stat().st_mtime_ns for p in sorted((tmp_path / "r").rglob("*.json"))]
    again = tables.train_family(
        "mlp", "smoke", [3], results=tmp_path / "r", checkpoints=tmp_path / "c"
    )
    assert [r.records[3].history for r in again] == [r.records[3].history for r in rows]
    assert stamps == [p.stat().st_mtime_ns for p in sorted((tmp_path / "r").rglob("*.json"))]


def test_budgets_plan_what_they_say(tmp_path, monkeypatch):
    asked = {}

    def planned(runs, **options):
        asked.update(names=[r.name for r in runs], **options)

    monkeypatch.setattr(tables.rows, "sweep", planned)
    (tmp_path / "r").mkdir()
    tables.train_family("vit", "cpu", [7, 8], results=tmp_path / "r", data="d")
    assert asked["names"] == ["vit-none-s7", "vit-strong-s7", "vit-weak-s7"]
    assert (asked["epochs"], asked["data"], asked["group"]) == (40, "d", "cifar100")
    asked.clear()
    tables.train_family("mlp", "cpu", [0, 1, 2], results=tmp_path / "r")
    assert asked["epochs"] == 400 and len(asked["names"]) == 9
    asked.clear()
    tables.train_family("expert", "full", [0, 1], results=tmp_path / "r")
    assert "epochs" not in asked and len(asked["names"]) == 6
    with pytest.raises(ValueError, match="budget='recorded'"):
        tables.train_family("vit", "recorded", [0], results=tmp_path)


def test_a_budget_resumes_partial_runs_and_leaves_finished_ones_alone(tmp_path, monkeypatch):
    """Published recipes on a data set of that name and shape, but of 40 images."""
    images = torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8, generator=seeded(5))
    labels = torch.arange(40) % 4
    few = ImageData("cifar100", images, labels, images, labels, (*"abcd",), (0.5,) * 3, (0.2,) * 3)
    folders = {"results": tmp_path / "r", "checkpoints": tmp_path / "c"}
    seen = []
    for epochs in (1, 3, 2):
        monkeypatch.setitem(tables.rows.CPU_EPOCHS, "mlp", epochs)
        rows = tables.train_family("mlp", "cpu", [0], data=few, **folders)
        seen.append([row.records[0].history["train_loss"] for row in rows])
    assert [len(losses) for losses in seen[0]] == [1] * 3
    assert [losses[:1] for losses in seen[1]] == seen[0]  # went on, did not begin again
    assert [len(losses) for losses in seen[1]] == [3] * 3 and seen[2] == seen[1]
    assert all(row.judged and row.compared == [1] for row in rows)
    assert {p.parent.name for p in tables.sources(rows)} == {"cifar100"}


# tables


def test_the_curve_table_holds_every_published_epoch_and_is_empty_where_nothing_ran(tmp_path):
    found = tables.curve_table([row(tmp_path, made(epochs=10), made(seed=1, epochs=5, offset=1))])
    assert list(found.index) == [1, 5, 10, 40, 200, 400]
    assert found.loc[10, "Weak: ours"] == "14.82, +0.00 (n = 1)"
    assert found.loc[5, "Weak: ours"].endswith("+0.50 (n = 2)")
    assert found.loc[40, "Weak: ours"] == "-" and found.loc[40, "Weak: published"] == "25.50"


def test_the_training_table_has_the_fit_of_our_runs_beside_the_published_one(tmp_path):
    records = [made(epochs=10), made(seed=1, epochs=5)]
    for record, accuracy in zip(records, (20.0, 30.0), strict=True):
        record.history["train_accuracy"] = [accuracy + e for e in record.history["epoch"]]
        record.history["train_loss"] = [4 - 0.1 * e for e in record.history["epoch"]]
    found = tables.training_table([row(tmp_path, *records)])
    assert list(found.index) == [1, 2, 3, 5, 10, 40, 100, 400]
    assert found.loc[5, "Weak: ours"] == "30.0%, 3.500 (n = 2)"
    assert found.loc[10, "Weak: ours"] == "30.0%, 3.000 (n = 1)"
    assert (
        found.loc[40, "Weak: ours"] == "-" and found.loc[400, "Weak: published"] == "76.0%, 0.850"
    )


def test_tables_and_figures_are_saved_and_read_back(tmp_path):
    rows = tables.collect(written(tmp_path / "r", made(), made("mlp/none")), "mlp", [0])
    table = tables.results_table(rows)
    options = {"caption": tables.caption(rows), "records": tables.sources(rows)}
    report.save_table(table, "table3", out=tmp_path / "o", **options)
    read = pd.read_csv(tmp_path / "o" / "table3.csv", comment="#", dtype=str, index_col=0)
    assert read.equals(table)
    assert "\\toprule" in (tmp_path / "o" / "table3.tex").read_text()
    assert options["caption"].startswith("No regularizer n = 1 to epoch 40; Strong n = 0;")
    assert "mlp/strong: missing, seed 0" in tables.whence(rows)


# layers


def test_a_layer_table_is_the_mean_over_runs_at_their_latest_common_look(tmp_path):
    found = row(tmp_path, made(epochs=40), made(seed=1, epochs=8))
    table = tables.layer_table([found], "effective_dim")
    assert list(table.index) == ["Weak, epoch 8, n = 2"]
    assert table.iloc[0].tolist() == [8.5, 9.5, 10.5, 11.5, 12.5]
    assert tables.layer_table([found], "effective_dim", 40).iloc[0].tolist() == [40, 41, 42, 43, 44]
    assert tables.layer_table([found], "no_such_measure").empty


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (torch.randn(500, 64, generator=seeded(0)), []),
        (torch.randn(500, 64, generator=seeded(1)) * 0.01, ["shrunk"]),
        (torch.randn(500, 64, generator=seeded(2)) * 0.1 + 1, ["images look alike"]),
        (
            torch.randn(500, 2, generator=seeded(3)) @ torch.full((2, 64), 5.0),
            ["few directions", "blown up"],
        ),
    ],
)
def test_each_symptom_is_found_in_features_made_to_have_it(z, expected):
    from sigreg_lib import diagnostics

    found = tables.symptoms(
        dimension=diagnostics.participation_ratio(z).item(),
        length=diagnostics.feature_norm(z).item() / 8,
        cosine=diagnostics.mean_cosine(z).item(),
    )
    assert found == expected


def test_features_are_those_of_the_last_layer_in_units_of_standard_gaussian_ones(tmp_path):
    table = tables.features([row(tmp_path, made(epochs=10)), row(tmp_path, name="mlp/none")])
    assert list(table.index) == ["Weak"]  # a row without runs is left out
    assert table.loc["Weak", "length / sqrt(C)"] == 1.0
    dead = made(epochs=10)
    for name, value in (("feature_norm", 0.0), ("mean_cosine", None), ("effective_dim", None)):
        dead.layers[name][-1] = [value] * 5
    found = tables.features([row(tmp_path / "dead", dead)]).loc["Weak"]
    assert found["symptoms"] == "shrunk" and math.isnan(found["mean cosine"])
    assert table.loc["Weak", "effective dimension"] == 14.0
    assert tables.features([row(tmp_path, name="mlp/none")]).empty


def test_the_levels_of_weak_are_those_of_simulated_features():
    found = tables.levels(RECIPES["mlp/weak"])
    assert found["collapsed"] == pytest.approx(8) and found["least, Gaussian"] < found["whitened"]
    assert found["whitened"] == weak_floor(128, 1024, 64)
    loss, z = (
        RECIPES["mlp/weak"].build_regularizer(seed=1),
        torch.randn(60, 128, 1024, generator=seeded(4)),
    )
    values = {s: torch.stack([loss(math.sqrt(s) * x) for x in z]).mean() for s in (0.3, 0.62, 1)}
    assert values[1] == pytest.approx(found["whitened"], rel=0.01)
    assert min(values.values()) == pytest.approx(found["least, Gaussian"], rel=0.01)


def test_strong_costs_a_multiple_of_the_batch_at_collapse():
    found = tables.levels(RECIPES["vit/strong"])
    integral = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert found["collapsed"] == pytest.approx(128 * integral, rel=0.01)
    with pytest.raises(ValueError, match="vit/none has no regularizer"):
        tables.levels(RECIPES["vit/none"])


def test_every_state_of_the_records_can_be_drawn(tmp_path):
    mixed = [made(), made(seed=1, epochs=3), made("mlp/none", epochs=400)]
    mixed[0].layers["effective_dim"][2][1] = None  # not finite
    for folder, found in (("empty", []), ("mixed", mixed)):
        (tmp_path / folder).mkdir()
        rows = tables.collect(written(tmp_path / folder, *found), "mlp", [0, 1])
        levels = {m: tables.levels(RECIPES[f"mlp/{m}"]) for m in ("weak", "strong")}
        drawn = [
            tables.plot_curves(rows),
            tables.plot_layers(rows, "effective_dim", "effective dimension"),
            tables.plot_layers(rows[1:], "regularizer", "R", log=False, levels=levels),
            tables.plot_spectra(rows),
            tables.plot_gradients(rows, 1.0),
        ]
        for fig in drawn:
            fig.canvas.draw()
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == [
        "No regularizer, n = 1 at epoch 400:\nreproduced\n",
        "Strong:\nmissing\n",
        "Weak, n = 1 at epoch 40:\nreproduced in part (to epoch 40)\n",
    ]
    alike = row(tmp_path / "alike", at_points("vit/none", (8.04,)), name="vit/none")
    (panel,) = tables.plot_curves([alike]).axes
    assert panel.get_title().endswith(
        ", n = 1 at epoch 1:\nreproduced in part (to epoch 1)\nwould pass as Strong"
    )
    # six published points in every panel, and all epochs of every run
    points, *runs = drawn[0].axes[2].lines
    assert len(points.get_xdata()) == 6 and [len(r.get_xdata()) for r in runs] == [40, 3, 3]


def test_the_spectrum_drawn_is_the_last_one_kept(tmp_path):
    assert figures.last_spectrum(made(epochs=40))[0] == 10
    assert figures.last_spectrum(replace(made(), layers={})) == (None, [])


# differences


def test_the_interval_of_a_difference_is_welchs():
    from scipy.stats import ttest_ind

    a, b = [41.2, 42.0, 41.7, 40.9], [25.1, 26.3, 25.2]
    difference, half = tables.interval_of_difference(a, b)
    expected = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx(expected)
    assert math.isnan(tables.interval_of_difference(a, b[:1])[1])
    assert tables.interval_of_difference([1.0, 1.0], [0.0, 0.0]) == (1.0, 0.0)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_the_spread_of_a_difference_over_test_sets_is_the_formula(correlation):
    draws = np.random.default_rng(0).multivariate_normal  # probit hits, then their correlation
    n, sets = 2000, 3000
    latent = draws([0.5, 0.5], [[1, correlation], [correlation, 1]], size=(sets, n)) > 0
    accuracy = 100 * latent.mean(1)
    rho = np.corrcoef(latent.reshape(-1, 2).T)[0, 1]
    spread = (accuracy[:, 0] - accuracy[:, 1]).std()
    expected = tables.sampling_half_width(*accuracy.mean(0), n_images=n, correlation=rho)
    assert 1.96 * spread == pytest.approx(expected, rel=0.04)


def test_a_gain_is_called_one_only_if_its_interval_excludes_zero(tmp_path):
    def said(folder, offsets, others):
        runs = [made("mlp/none", seed=s, offset=o) for s, o in enumerate(offsets)]
        runs += [made("mlp/weak", seed=s, offset=o) for s, o in enumerate(others)]
        rows = tables.collect(written(folder, *runs), "mlp", [0, 1, 2])
        return tables.gain(rows)[1], tables.differences(rows)

    clear, table = said(tmp_path / "a", (0, 0.1, -0.1), (0, 0.1, -0.1))
    assert "at epoch 40: +2.43 points, gain (95% interval +2.20" in clear
    last = table.loc["Weak - none"].set_index("epoch").loc[40]
    assert last["ours"] == last["published"] == "+2.43"
    assert "undecided (95%" in said(tmp_path / "b", (0, 3, -2), (0, 3, -2))[0]
    assert "undecided (a row has n = 1" in said(tmp_path / "c", (0,), (0, 1))[0]
    assert "loss (95%" in said(tmp_path / "d", (5, 5.1, 4.9), (0, 0.1, -0.1))[0]
    assert said(tmp_path / "e", (), (0,))[0] == "Weak - none: not measured"


def test_a_lead_needs_both_rows_at_that_epoch(tmp_path):
    found = [made("mlp/none"), made("mlp/weak", epochs=12), made("mlp/weak", seed=1, offset=1)]
    rows = tables.collect(written(tmp_path, *found), "mlp", [0, 1])
    none, strong, weak = rows
    assert tables.lead(weak, none, 10) == pytest.approx(14.82 + 0.5 - 15.48)
    assert tables.lead(weak, none, 40) == pytest.approx(26.5 - 23.07)  # of the run that is there
    assert tables.lead(strong, none, 10) is None and tables.lead(weak, none, 200) is None
    assert isinstance(tables.shown(tables.features([strong])), str)


# optimization


def descending(tmp_path, epochs=40):
    """Runs with known gradients and a test curve that climbs by 0.5 with a known zigzag."""
    record = made("mlp/none", epochs=epochs)
    record.history["grad_norm"] = [0.5] * 10 + [4.0] * (epochs - 10)
    record.history["train_accuracy"] = [30.0] * epochs
    record.history["train_loss"] = [2.0] * epochs
    record.history["test_accuracy"] = [0.5 * e + 0.3 * (-1) ** e for e in range(1, epochs + 1)]
    return row(tmp_path, record, name="mlp/none")


def test_clipping_is_counted_by_epochs_and_shrinks_the_step(tmp_path):
    found = tables.optimization_table([descending(tmp_path)]).loc["No regularizer"]
    assert found["epochs above the clip"] == "30 of 40"
    assert found["step / gradient"] == "0.025"  # 0.1 clipped from 4 to 1
    assert found["train - test (points)"] == "+9.7"
    said = tables.clipping([descending(tmp_path)])
    assert "is in 30 of 40 epochs (step at epoch 40: 0.025 of the gradient)" in said
    assert tables.optimization_table([row(tmp_path, name="mlp/weak")]).empty
    unclipped = made("vit/none", epochs=3)
    unclipped.history["grad_norm"] = [2.0] * 3
    found = tables.optimization_table([row(tmp_path, unclipped, name="vit/none")])
    assert found.loc["No regularizer", "epochs above the clip"] == "no clip"
    # AdamW's step is not proportional to the gradient
    assert found.loc["No regularizer", "step / gradient"] == "-"
    said = tables.clipping([row(tmp_path, name="vit/none")])
    assert said == "Clipped, by the mean norm of an epoch: vit/none is not."


@pytest.mark.parametrize("epochs", [1, 3, 8])
def test_the_step_is_that_of_the_rate_of_its_epoch(tmp_path, monkeypatch, epochs):
    """SGD on a cosine: the rate that training sets, one step unclipped, and half of it clipped."""
    cosine = RECIPES["mlp/none"].override(schedule="cosine", lr_min=0.01, epochs=8)
    monkeypatch.setitem(RECIPES, "mlp/none", cosine)
    status = "finished" if epochs == 8 else "partial"
    changes = {"config": cosine.as_dict(), "epochs_planned": 8, "status": status}
    record = made("mlp/none", epochs=epochs, **changes)
    turn = math.pi * (epochs - 1) / 8  # the first epoch has the full rate
    rate = 0.01 + 0.09 * (1 + math.cos(turn)) / 2
    for norm, shrink in ((0.5, 1), (2.0, 0.5)):
        record.history["grad_norm"] = [norm] * epochs
        found = tables.optimization_table([row(tmp_path, record, name="mlp/none")])
        assert found["step / gradient"].item() == f"{rate * shrink:.3g}"


def test_milestones_are_first_epochs(tmp_path):
    found = tables.milestones([descending(tmp_path)], (5, 10, 60))
    assert found.loc["No regularizer"].tolist() == ["10", "20", "-"]
    assert tables.milestones([row(tmp_path, name="mlp/weak")], (5,)).loc["Weak", 5] == "missing"


def test_jitter_is_blind_to_a_trend_and_right_for_independent_noise(tmp_path):
    record = made("mlp/weak", epochs=300)
    noise = np.random.default_rng(1).normal(0, 0.5, 300)
    record.history["test_accuracy"] = [30 + 0.05 * e + float(x) for e, x in enumerate(noise)]
    assert tables.jitter(record, window=300) == pytest.approx(0.5, rel=0.12)
    record.history["test_accuracy"] = [30 + 0.1 * e for e in range(300)]
    assert tables.jitter(record) == pytest.approx(0, abs=1e-9)
    record.history["test_accuracy"][:30] = [10.0, 20.0] * 15  # second differences of 20
    assert tables.jitter(record, end=30) == pytest.approx(20 / math.sqrt(6))
    assert tables.jitter(record) == pytest.approx(0, abs=1e-9)
    assert tables.jitter(record, end=11) is None
    assert tables.jitter(made("mlp/weak", epochs=9)) is None


@pytest.mark.parametrize(("count", "exact"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 0.8463)])
def test_the_expected_best_of_few_is_the_known_one(count, exact):
    assert tables.expected_best(count) == pytest.approx(exact, abs=1e-4)


def test_a_sentence_holds_every_row_that_has_been_looked_at(tmp_path):
    rows = tables.collect(written(tmp_path, made(epochs=10), made("mlp/none")), "mlp", [0])
    said = tables.described(rows)
    assert said.startswith("At epoch 10 the last layer of mlp/none has an effective dimension of")
    assert "mlp/weak" in said and "mlp/strong" not in said
    assert "not been looked at" in tables.described(tables.collect(tmp_path, "vit", [0]))


def test_a_sentence_at_an_epoch_is_of_the_runs_that_came_so_far(tmp_path):
    shorter = made(epochs=5, seed=1)
    rows = tables.collect(
        written(tmp_path, made(epochs=10), shorter, made("mlp/none", epochs=10)), "mlp", [0, 1]
    )
    assert tables.shared_look(rows) == 10
    said = tables.described(rows, 10)
    assert said.startswith("At epoch 10") and said.count("n = 1") == 2
    assert tables.described(rows).startswith("At epoch 5")
    assert tables.shared_look(tables.collect(tmp_path, "vit", [0])) is None


def test_an_expectation_is_said_to_hold_or_not_or_not_to_be_measured():
    assert tables.held("x < 1", True, "0.5").endswith("holds (0.5)")
    assert "does NOT hold" in tables.held("x < 1", False)
    assert tables.held("x < 1", None).endswith("not measured")
    with pytest.raises(ValueError, match="layers at epochs"):
        questions.look(made(epochs=40), 20)


def test_what_is_expected_of_the_end_is_not_measured_before_it():
    partial, finished = made(epochs=3), made(epochs=400)
    said = tables.held_at_end("R ends low", True, partial, "R = 6.88")
    assert said == "expected: R ends low: not measured (epoch 3 of 400; R = 6.88)"
    assert tables.held_at_end("x", False, partial).endswith("not measured (epoch 3 of 400)")
    diverged = replace(partial, status="diverged")
    assert "not measured (epoch 3 of 400" in tables.held_at_end("x", True, diverged)
    assert tables.held_at_end("x", True, finished, "5").endswith(": holds (5)")
    assert tables.held_at_end("x", None, None).endswith("not measured")


# fitting and generalizing


def fitted(name, trained, tested, seed=0, **overrides):
    """A run with these training and test accuracies; None: not tested after that epoch."""
    record = made(name, seed=seed, epochs=len(tested), overrides=overrides)
    record.history |= {"train_accuracy": list(trained), "test_accuracy": list(tested)}
    return record


def test_runs_are_compared_where_they_fit_the_training_set_alike():
    base = fitted("mlp/none", [10, 30, 40, 60], [9, 19, 22, 20])
    weak = fitted("mlp/weak", [8, 20, 24, 45], [8, 18, 22, 32.5])
    table = tables.fit_table({"none": base, "Weak": weak}, (5, 10, 24, 50))
    # between 10 and 30% the baseline rises by half a point a percent of training accuracy
    assert table.loc["none"].tolist() == ["-", "9.00 (1)", "16.00 (2)", "21.00 (4)"]
    assert table.loc["Weak"].tolist() == ["-", "9.67 (2)", "22.00 (3)", "-"]
    # at 45%, the most that both have, the baseline is a quarter of the way from 22 to 20
    assert tables.gain_at_equal_fit(weak, base) == (45, 11.0, 4, 4)
    assert tables.gain_at_equal_fit(base, weak) == (45, -11.0, 4, 4)
    assert tables.gain_at_equal_fit(weak, base, 24) == (24, 6.0, 3, 2)
    assert tables.gain_at_equal_fit(weak, base, 50) is None
    said = tables.compared_fit("Weak", weak, "none", base)
    assert "at epoch 4 train at 45.0 and 60.0%, test at 32.50 and 20.00%" in said
    assert said.endswith("where both train at 45.0% (epochs 4 and 4) Weak tests 11.00 points above")
    said = tables.compared_fit("none", base, "Weak", weak)
    assert said.endswith("none tests 11.00 points below")


def test_epochs_that_were_not_tested_are_left_out_of_fits():
    base = fitted("mlp/none", [10, 25, 40], [9, None, 24])
    weak = fitted("mlp/weak", [8, 20, 30], [None, 20, None])
    assert tables.fit_table({"none": base}, (20,)).loc["none", 20] == "14.00 (3)"
    assert tables.gain_at_equal_fit(weak, base) == (20, 6.0, 2, 3)
    said = tables.compared_fit("Weak", weak, "none", base)
    assert said.startswith("Weak and none: where both train at 20.0%")
    untrained = fitted("mlp/none", [50], [40])
    said = tables.compared_fit("Weak", weak, "none", untrained)
    assert said == "Weak and none: nothing in common was measured"


def test_the_furthest_run_of_a_row_is_shown_alone(tmp_path):
    several = row(tmp_path, made(epochs=400), made(seed=1, epochs=8))
    (one,) = tables.furthest([several])
    assert one.seeds == [0] and tables.layer_table([one], "effective_dim").index[0].endswith(
        "n = 1"
    )
    assert len(tables.sources([one])) == 1 < len(tables.sources([several]))
    assert tables.furthest([row(tmp_path, name="mlp/none")])[0].seeds == []


def test_fits_are_drawn_in_the_colours_of_their_rows():
    base = fitted("mlp/none", [10, 25, 40], [9, None, 22])
    fig = tables.plot_fit({tables.LABELS["none"]: base, "decay": fitted("mlp/none", [5], [6])})
    one, other, _ = fig.axes[0].lines
    assert list(one.get_xdata()) == [10, 40] and list(one.get_ydata()) == [9, 22]
    assert one.get_color() == report.METHODS["none"]["color"] != other.get_color()
    assert [t.get_text() for t in tables.plot_fit({}).axes[0].texts] == ["no record"]


def test_variants_are_told_apart_by_their_dashes_too():
    runs = {f"decay {i}": fitted("mlp/none", [5, 9], [6, 8]) for i in range(4)}
    lines = tables.plot_fit(runs).axes[0].lines[:4]
    assert [line.get_color() for line in lines] == [colour for colour, _ in figures._VARIANTS]
    assert len({dashes for _, dashes in figures._VARIANTS}) == len(lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2187.4, "2,190"), (0.0123456, "0.0123"), (148.9, "149"), (3.0, "3"), (None, "not finite")],
)
def test_numbers_in_titles_have_three_digits_and_no_powers_of_ten(value, text):
    assert figures._text(value) == text


def test_a_look_at_layers_leaves_out_the_names_of_the_tapped_ones():
    record = read(RECORDS / "cifar100/mlp-weak+taps=layers.4-s0.json")
    assert record.layers["tapped"] == ["layers.4"]
    found = tables.look(record, 100)
    assert "tapped" not in found and len(found["regularizer"]) == 1  # of the tapped layer alone
    assert len(found["effective_dim"]) == len(record.layers["names"]) == 5
