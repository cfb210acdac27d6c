import dataclasses
import json
import math
import os

import pytest

from sigreg_lib import records
from sigreg_lib.recipes import Recipe
from sigreg_lib.records import HISTORY, LATER_SETTINGS, Record, run_name


def made(epochs=3, planned=400, **changes) -> Record:
    history = {name: [float(i) for i in range(1, epochs + 1)] for name in HISTORY}
    history["epoch"] = list(range(1, epochs + 1))
    history["test_accuracy"] = [10.0, 30.0, 20.0][:epochs]
    fields = dict(
        recipe="vit/weak", overrides={}, seed=0,
        config={"lam": 0.1, "rand_augment": [2, 9], "dropout": 0.1, "shared_sketch": False},
        dataset="cifar100",
        epochs_planned=planned, history=history,
        status="finished" if epochs >= planned else "partial",
    )  # fmt: skip
    return Record(**(fields | changes))


def test_a_record_reads_back_as_written(tmp_path):
    record = made()
    record.write(tmp_path / "a" / "r.json")
    again = records.read(tmp_path / "a" / "r.json")
    assert again == record
    assert again.last["test_accuracy"] == 20.0 and again.last["epoch"] == 3
    assert again.best_test == {"epoch": 2, "test_accuracy": 30.0}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.json"]  # no temporary file is left


def test_a_record_older_than_a_setting_has_the_value_that_its_run_had():
    older = made(config={"lam": 0.1})
    expected = {"lam": 0.1, "dropout": 0.0, "shared_sketch": True}
    assert Record.from_json(older.to_json()).config == expected
    # what a record without the setting is taken for must be the setting's own default
    defaults = {f.name: f.default for f in dataclasses.fields(Recipe)}
    assert {k: defaults[k] for k in LATER_SETTINGS} == LATER_SETTINGS


def test_the_best_epoch_is_the_first_of_equals():
    record = made()
    record.history["test_accuracy"] = [10.0, 30.0, 30.0]
    assert record.best_test["epoch"] == 2


def test_an_accuracy_of_zero_is_an_accuracy():
    record = made()
    record.history["test_accuracy"] = [0.0, 0.0, None]
    assert record.best_test == {"epoch": 1, "test_accuracy": 0.0}


def test_epochs_without_evaluation_are_skipped_by_what_was_measured():
    record = made(epochs=3)
    record.history["test_accuracy"] = [None, 30.0, None]
    assert record.measured("test_accuracy") == {2: 30.0}
    assert record.measured("train_loss") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert record.best_test == {"epoch": 2, "test_accuracy": 30.0}
    assert record.last["test_accuracy"] is None
    record.history["test_accuracy"] = [None] * 3
    assert record.measured("test_accuracy") == {} and record.best_test is None
    assert Record.from_json(record.to_json()) == record


def test_a_recent_mean_is_of_the_epochs_up_to_its_own_and_of_all_of_them():
    record = made(epochs=4)
    record.history["test_accuracy"] = [10.0, 20.0, 60.0, None]
    assert record.recent_mean("test_accuracy", 3, over=2) == 40.0
    assert record.recent_mean("test_accuracy", 3, over=3) == 30.0
    for epoch, over in ((4, 2), (3, 4), (9, 2)):  # not measured, before the first, not reached
        assert record.recent_mean("test_accuracy", epoch, over=over) is None


def test_floats_keep_six_digits_and_what_is_not_finite_becomes_null(tmp_path):
    record = made()
    record.history["train_loss"] = [1.23456789, math.nan, math.inf]
    record.write(tmp_path / "r.json")
    assert records.read(tmp_path / "r.json").history["train_loss"] == [1.23457, None, None]
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # strict JSON


def test_history_stands_by_column_on_one_line_each():
    lines = made().to_json().splitlines()
    (line,) = [x for x in lines if '"test_accuracy": [' in x]
    assert "[10.0, 30.0, 20.0]" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.history.pop("seconds"), "columns"),
        (lambda r: r.history["seconds"].pop(), "differ in length"),
        (lambda r: r.history.update(epoch=[1, 3, 2]), "epochs 1, 2, 3"),
        (lambda r: r.history.update(test_accuracy=[0.1, 0.2, 101.0]), "percent"),
        (lambda r: setattr(r, "status", "done"), "status must be one of"),
        (lambda r: setattr(r, "status", "finished"), "after 3 of 400"),
        (lambda r: setattr(r, "epochs_planned", 3), "after 3 of 3"),
    ],
)
def test_a_record_that_contradicts_itself_is_not_written(tmp_path, change, message):
    record = made()
    change(record)
    with pytest.raises(ValueError, match=message):
        record.write(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_an_edited_accuracy_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    made().write(path)
    path.write_text(path.read_text().replace("[10.0, 30.0, 20.0]", "[10.0, 30.0, 99.0]"))
    with pytest.raises(ValueError, match=r"r\.json: last or best_test disagrees"):
        records.read(path)


def test_another_schema_or_another_file_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        records.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a run record"):
        records.read(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match=r"r\.json"):
        records.read(path)


def test_an_epoch_that_the_run_did_not_reach_is_an_error():
    assert made().at(1)["test_accuracy"] == 10.0
    with pytest.raises(ValueError, match="epochs 1 to 3, not 4"):
        made().at(4)


def test_names_tell_overrides_and_seeds_apart():
    assert run_name("vit/weak", {}, 3) == "vit-weak-s3"
    assert run_name("mlp/none", {"lam": 0.3, "mean": [1, 2]}, 0) == "mlp-none+lam=0.3+mean=1x2-s0"
    assert "/" not in run_name("mlp/none", {"taps": "layers.*/x"}, 0)
    several = run_name("mlp/weak", {"taps": ["layers.?", "layers.1*"]}, 0)
    assert several == "mlp-weak+taps=layers._xlayers.1@-s0"


def test_names_of_many_settings_fit_into_a_file_name_and_still_tell_them_apart():
    settings = [{f"a_setting_of_number_{i}": i for i in range(most)} for most in (20, 21)]
    names = {run_name("mlp/weak", changes, seed) for changes in settings for seed in (0, 1)}
    assert len(names) == 4 and all(len(name) < 240 for name in names)


def test_names_of_long_lists_are_short_and_still_tell_them_apart():
    lists = [[f"layers.{i}" for i in range(start, start + 40)] for start in (0, 1)]
    lists.append(lists[0][:-1])
    names = {run_name("mlp/weak", {"taps": taps}, 0) for taps in lists}
    assert len(names) == 3 and max(map(len, names)) < 90


def test_select_finds_by_recipe_seed_and_setting(tmp_path):
    made().write(tmp_path / "g" / "a.json")
    made(seed=1).write(tmp_path / "g" / "b.json")
    made(recipe="vit/none", config={"lam": 0.5}).write(tmp_path / "h" / "c.json")
    found = lambda **q: [p.name for p, _ in records.select(tmp_path, **q)]  # noqa: E731
    assert found() == ["a.json", "b.json", "c.json"]
    assert found(recipe="vit/weak", seed=1) == ["b.json"]
    assert found(rand_augment=(2, 9)) == ["a.json", "b.json"]
    assert found(lam=0.5) == ["c.json"]
    with pytest.raises(ValueError, match="no folder of records"):
        list(records.select(tmp_path / "nowhere"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    records.write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("n", [1, 5, 32, 33, 256, 1024])
def test_spectrum_ranks_run_from_first_to_last(n):
    ranks = records.spectrum_ranks(n)
    assert ranks[0] == 1 and ranks[-1] == n and len(ranks) <= 32
    assert ranks == sorted(set(ranks))
