"""Several seeds at once against one run a seed."""

import pytest
import torch
from test_train import striped

from sigreg_lib import records
from sigreg_lib.data import load
from sigreg_lib.recipes import RECIPES
from sigreg_lib.train import Run, Trainer, ensemble, run, sweep, train, train_seeds
from sigreg_lib.train.ensemble import Ensemble, check_batched

SEEDS = (3, 0, 7)
SMALL = {"depth": 3, "width": 80, "epochs": 3}
CIFAR_LIKE = {"precision": "float32", "depth": 3, "width": 80, "batch_size": 40, "epochs": 2}


def options(tmp_path, **more):
    return {"results": tmp_path / "r", "checkpoints": tmp_path / "c", "quiet": True, **more}


def doubled(recipe, data, seed) -> Trainer:
    """A trainer whose weights and statistics are float64."""
    trainer = Trainer(recipe, data, seed=seed, compile=False)
    trainer.model.double()
    trainer.mean, trainer.std = trainer.mean.double(), trainer.std.double()
    return trainer


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("digits/none", {}),
        ("digits/weak", {}),
        ("digits/strong", {}),
        ("digits/weak", {"mode": "corrected", "norm": "layer", "residual": True}),
        ("digits/strong", {"mode": "corrected", "resample": False}),
        ("digits/weak", {"sketch_dim": 72, "taps": "layers.*", "tap_on": "input"}),  # widths differ
        ("digits/weak", {"taps": ["layers.2", "head"], "tap_on": "input"}),
        ("digits/strong", {"taps": ["layers.0", "layers.2"]}),
        ("mlp/weak", CIFAR_LIKE),  # SGD, clipping at norm 1, crop and flip
        ("mlp/strong", CIFAR_LIKE),
    ],
)
def test_members_are_the_separate_runs_of_their_seeds_to_float64_rounding(name, more):
    recipe = RECIPES[name].override(**SMALL | more)
    data = striped() if name.startswith("mlp") else load("digits")
    apart = [doubled(recipe, data, seed) for seed in SEEDS]
    together = Ensemble([doubled(recipe, data, seed) for seed in SEEDS])
    for epoch in range(2):
        trained = [trainer.train_epoch(epoch) for trainer in apart]
        for one, other in zip(trained, together.train_epoch(epoch), strict=True):
            assert one["train_accuracy"] == pytest.approx(other["train_accuracy"], rel=1e-6)
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)
            assert one["layers"] == pytest.approx(other["layers"], rel=1e-9)
    for trainer, member in zip(apart, together.members, strict=True):
        assert trainer.evaluate()[0] == pytest.approx(member.evaluate()[0], rel=1e-9)
        for p, q in zip(trainer.model.parameters(), member.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["none", "weak", "strong"])
def test_records_of_a_batched_run_are_those_of_separate_runs(tmp_path, method):
    """In float32: accuracies of 500 images agree to one of them, losses to 4 digits."""
    recipe = RECIPES[f"digits/{method}"].override(**SMALL)
    together = train_seeds(recipe, SEEDS, epochs=2, **options(tmp_path / "a"))
    for seed, found in zip(SEEDS, together, strict=True):
        alone = train(recipe, seed=seed, epochs=2, **options(tmp_path / "b"))
        assert (found.seed, found.name, found.config) == (seed, alone.name, alone.config)
        assert found.provenance["batched"] == list(SEEDS)
        path = tmp_path / "a" / "r" / "digits" / f"{found.name}.json"
        assert records.read(path) == found
        for name in ("train_loss", "test_loss", "effective_dim", "grad_norm"):
            assert found.history[name] == pytest.approx(alone.history[name], rel=2e-3), name
        if method != "none":
            assert found.history["regularizer"] == pytest.approx(
                alone.history["regularizer"], rel=2e-3
            )
        assert found.history["test_accuracy"] == pytest.approx(
            alone.history["test_accuracy"], abs=0.2001
        )
        assert found.layers["names"] == alone.layers["names"]
        assert found.layers.keys() == alone.layers.keys()


def test_seeds_do_not_touch_each_other():
    """A member whose weights turn NaN leaves the others as they are without it."""
    data, recipe = load("digits"), RECIPES["digits/weak"].override(**SMALL)
    both = [Ensemble([Trainer(recipe, data, seed=s, compile=False) for s in SEEDS]) for _ in "ab"]
    with torch.no_grad():
        both[1].parameters["head.bias"][1] = float("nan")
    good, bad = (e.train_epoch(0) for e in both)
    assert bad[1]["train_loss"] != bad[1]["train_loss"]
    for i in (0, 2):
        assert good[i] == bad[i]
        assert torch.equal(
            both[0].parameters["layers.0.weight"][i], both[1].parameters["layers.0.weight"][i]
        )


def stacks(folder) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob("*.pt")
    return torch.load(path, weights_only=True)["parameters"]


@pytest.mark.parametrize("name", ["digits/strong", "mlp/weak"])
def test_stopping_and_going_on_equals_one_run(tmp_path, name):
    mlp = name.startswith("mlp")
    recipe = RECIPES[name].override(**SMALL | (CIFAR_LIKE if mlp else {}) | {"epochs": 3})
    data = striped() if mlp else "digits"
    whole = train_seeds(recipe, SEEDS, data=data, **options(tmp_path / "a"))
    for epochs in (1, 2, 3):
        parts = train_seeds(recipe, SEEDS, data=data, epochs=epochs, **options(tmp_path / "b"))
        assert {r.status for r in parts} == {"finished" if epochs == 3 else "partial"}
    a, b = stacks(tmp_path / "a"), stacks(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r.history["test_accuracy"] for r in whole] == [
        r.history["test_accuracy"] for r in parts
    ]


def test_a_group_killed_between_its_checkpoint_and_its_records_only_writes_them(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    first = train_seeds(recipe, SEEDS, **options(tmp_path))
    paths = sorted((tmp_path / "r").rglob("*.json"))
    paths[1].unlink()
    (checkpoint,) = (tmp_path / "c").rglob("*.pt")
    before = checkpoint.read_bytes()
    assert train_seeds(recipe, SEEDS, **options(tmp_path)) == first
    assert checkpoint.read_bytes() == before and paths[1].exists()


def test_a_seed_that_diverges_ends_alone(tmp_path, monkeypatch):
    recipe = RECIPES["digits/none"].override(**SMALL)

    class Poisoned(Ensemble):
        def run_steps(self, epoch, progress):
            if epoch == 1:
                with torch.no_grad():
                    self.parameters["head.bias"][0] = float("inf")
            return super().run_steps(epoch, progress)

    monkeypatch.setattr(ensemble, "Ensemble", Poisoned)
    found = train_seeds(recipe, SEEDS, **options(tmp_path))
    assert [r.status for r in found] == ["diverged", "finished", "finished"]
    assert [r.epochs for r in found] == [2, 3, 3]
    assert [r.seed for r in train_seeds(recipe, SEEDS, **options(tmp_path))] == list(SEEDS)


def test_vcreg_needs_no_matrix_and_is_trained_batched_as_alone(tmp_path):
    recipe = RECIPES["digits/none"].override(regularizer="vcreg", lam=0.5, **SMALL)
    alone = train(recipe, seed=0, **options(tmp_path / "a"))
    both = train_seeds(recipe, (0, 1), **options(tmp_path / "b"))[0]
    assert alone.last["regularizer_floor"] == both.last["regularizer_floor"] > 0
    for name in ("regularizer", "train_loss", "grad_norm"):
        assert both.history[name] == pytest.approx(alone.history[name], rel=2e-3)


def test_seeds_that_are_done_are_left_out(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    alone = train(recipe, seed=0, **options(tmp_path))
    found = train_seeds(recipe, SEEDS, **options(tmp_path))
    assert found[1] == alone
    assert found[0].provenance["batched"] == [3, 7]


def test_a_run_is_not_begun_in_one_way_and_continued_in_the_other(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    train(recipe, seed=0, epochs=1, **options(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"s0 has a checkpoint of a separate run"):
        train_seeds(recipe, (0, 1), **options(tmp_path / "a"))
    train_seeds(recipe, (0, 1), epochs=1, **options(tmp_path / "b"))
    with pytest.raises(ValueError, match="go on with seeds 0 1, batched"):
        train(recipe, seed=0, **options(tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vit/weak", {}, "only the mlp"),
        ("mlp-bn/weak", {}, "norm='batch': its running statistics"),
        ("mlp/weak", {"norm": "iterative"}, "norm='iterative': its running statistics"),
        ("mlp/weak", {"mixup_alpha": 0.8}, "MixUp and CutMix"),
        ("mlp/weak", {"dropout": 0.1}, "dropout is not drawn for each seed"),
        ("mlp/weak", {"sketch_dim": [8, 8, 16, 16, 64]}, "one K a layer"),
        ("mlp/weak", {"shared_sketch": False}, "shared_sketch=false: each member has one"),
    ],
)
def test_what_cannot_be_batched_is_refused_with_the_reason(tmp_path, name, changes, reason):
    recipe = RECIPES[name].override(**changes)
    with pytest.raises(ValueError, match=f"{name} cannot be trained batched: .*{reason}"):
        check_batched(recipe)
    with pytest.raises(ValueError, match=reason):
        train_seeds(recipe, (0, 1), **options(tmp_path))
    runs = [Run("digits/none", 0, SMALL), Run(name, 0, changes)]
    with pytest.raises(ValueError, match=reason):
        sweep(runs, batched=True, **options(tmp_path))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("seeds", "more", "message"),
    [
        ((), {}, "seeds must be one or more different integers"),
        ((0, 0), {}, "seeds must be one or more different integers"),
        ((0, -1), {}, "seed must be an integer"),
        ((0, 1), {"compile": True}, "compile=True: batched steps are not compiled"),
        ((0, 1), {"evaluate_every": 0}, "evaluate_every must be an integer >= 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, seeds, more, message):
    with pytest.raises(ValueError, match=message):
        train_seeds(RECIPES["digits/none"].override(**SMALL), seeds, **options(tmp_path, **more))


def test_a_batched_sweep_trains_what_differs_in_the_seed_alone_at_once(tmp_path, capsys):
    runs = [Run("digits/none", s, SMALL) for s in (1, 0)]
    runs += [Run("digits/weak", 0, SMALL), Run("digits/none", 2, SMALL)]
    found = sweep(runs, batched=True, epochs=1, **options(tmp_path))
    assert [(r.recipe, r.seed) for r in found] == [(r.recipe, r.seed) for r in runs]
    assert [r.provenance["batched"] for r in found] == [[1, 0, 2], [1, 0, 2], [0], [1, 0, 2]]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_many_seeds_have_a_short_file_name():
    recipe, data = RECIPES["digits/weak"], load("digits")
    records = {seed: run.new_record(recipe, data, seed) for seed in range(301)}
    groups = [dict(list(records.items())[:n]) for n in (3, 300, 301)]
    names = [ensemble._checkpoint_name(group) for group in groups]
    assert len(set(names)) == 3 and max(map(len, names)) < 90
    assert names[0] == "digits-weak-s0_1_2-batched.pt"


def test_a_record_begun_in_another_group_of_seeds_is_not_begun_again(tmp_path):
    where = {"results": tmp_path / "r", "checkpoints": tmp_path / "c", "quiet": True}
    recipe = RECIPES["digits/none"].override(**SMALL)
    before = train_seeds(recipe, [0, 1], epochs=1, **where)
    with pytest.raises(ValueError, match=r"s0, .*s1: begun, but not together"):
        train_seeds(recipe, [0, 1, 2], epochs=2, **where)
    kept = [records.read(path) for path in sorted((tmp_path / "r").rglob("*.json"))]
    assert [r.to_json() for r in kept] == [r.to_json() for r in before]


def test_bfloat16_members_follow_their_separate_runs():
    """The mlp recipes' own precision: sums in bfloat16 differ in the third digit."""
    data = striped()
    recipe = RECIPES["mlp/weak"].override(**CIFAR_LIKE | {"precision": "bfloat16"})
    apart = [Trainer(recipe, data, seed=seed, compile=False) for seed in SEEDS]
    together = Ensemble([Trainer(recipe, data, seed=s, compile=False) for s in SEEDS])
    seen = []
    together.model.layers[1].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    for one, other in zip(apart, together.train_epoch(0), strict=True):
        alone = one.train_epoch(0)
        assert alone["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
        assert alone["regularizer"] == pytest.approx(other["regularizer"], rel=1e-2)
    assert set(seen) == {torch.bfloat16}
