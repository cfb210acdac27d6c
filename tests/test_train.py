import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, seeded

from sigreg_lib import records
from sigreg_lib.data import ImageData, load
from sigreg_lib.losses import weak_floor
from sigreg_lib.recipes import RECIPES, Recipe
from sigreg_lib.train import Run, Trainer, run, sweep, train, train_seeds
from sigreg_lib.train.lock import locked
from sigreg_lib.train.processes import ProcessDied
from sigreg_lib.train.sweep import summary

SMALL = {"depth": 2, "width": 32, "epochs": 3}
TINY_VIT = {"depth": 2, "width": 32, "heads": 2, "precision": "float32", "epochs": 2}


def striped(n=96, classes=4) -> ImageData:
    """Images whose class is their brightest column: learnable, tiny."""
    labels = torch.arange(n) % classes
    images = torch.randint(0, 100, (n, 3, 8, 8), generator=seeded(0), dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, :, :, 2 * label] = 255
    return ImageData(
        "striped", images, labels, images[:32], labels[:32], tuple("abcd"), (0.5,) * 3, (0.25,) * 3
    )


def options(tmp_path, **more):
    return {"results": tmp_path / "r", "checkpoints": tmp_path / "c", "quiet": True, **more}


def weights(path) -> str:
    state = torch.load(path, weights_only=True)["model"]
    parts = [v.numpy().tobytes() for _, v in sorted(state.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("shared", [True, False])
def test_the_step_is_the_objective_of_the_formula(shared):
    """One SGD step by hand: normalise, forward, (1 - lam) CE + lam mean R, clip, update."""
    data = load("digits")
    recipe = RECIPES["mlp/weak"].override(
        depth=2,
        width=80,
        precision="float32",
        lam=0.25,
        flip=False,
        crop_padding=0,
        lr=0.5,
        clip_norm=0.1,
        shared_sketch=shared,
    )
    trainer = Trainer(recipe, data, seed=1, compile=False)
    trainer.model.train()
    x, y = data.train_images[:128], data.train_labels[:128]
    trainer.generator.manual_seed(5)  # the sketches of this one step
    g = torch.Generator().manual_seed(5)
    sketches = [torch.empty(80, 64).normal_(0, 80**-0.5, generator=g) for _ in range(2)]
    if shared:
        sketches[1] = sketches[0]

    w = [p.detach().clone().double().requires_grad_() for p in trainer.model.parameters()]
    h = ((x.double() / 255 - data.mean[0]) / data.std[0]).flatten(1)
    rs = []
    for layer in range(2):
        h = h @ w[2 * layer].T + w[2 * layer + 1]
        cov = torch.cov((h @ sketches[layer].double()).T)
        rs.append((cov - torch.eye(64)).square().sum().sqrt())
        h = h.relu()
    logits = h @ w[4].T + w[5]
    ce = -logits.log_softmax(1)[torch.arange(128), y].mean()
    loss = 0.75 * ce + 0.25 * (rs[0] + rs[1]) / 2
    grads = torch.autograd.grad(loss, w)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    expected = [p - 0.5 * g * 0.1 / norm for p, g in zip(w, grads, strict=True)]

    stats, measured = trainer._train_step(x, y, epoch=0, step=0)
    assert measured.item() == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.1  # clipping was at work
    assert stats[0].item() == pytest.approx(ce.item(), rel=1e-5)
    assert stats[2].item() == pytest.approx(loss.item(), rel=1e-5)
    assert stats[3:].tolist() == pytest.approx([r.item() for r in rs], rel=1e-4)
    for p, e in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-4, atol=1e-6)


def test_mixed_labels_weigh_as_the_pixels():
    """Training loss under MixUp is lam CE(own) + (1 - lam) CE(partner)."""
    data = striped()
    recipe = RECIPES["mlp/none"].override(
        width=16, depth=1, mixup_alpha=0.8, lam=0.0, flip=False, crop_padding=0, precision="float32"
    )
    trainer = Trainer(recipe, data, seed=0, compile=False)
    x, y = data.train_images[:64], data.train_labels[:64]
    from sigreg_lib.augment import draw_mix

    m = draw_mix(recipe.policy(8), 64, 8, seed=0, epoch=3, step=1)
    _, stats = trainer._loss(x, y, m, {})
    with torch.no_grad():
        own, other = x.double(), x[m.partner].double()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.mean, recipe.std))
        mixed = ((m.lam * own + (1 - m.lam) * other) / 255 - mean) / std
        logp = trainer.model(mixed.float()).log_softmax(1)
    rows = torch.arange(64)
    expected = -(m.lam * logp[rows, y] + (1 - m.lam) * logp[rows, y[m.partner]]).mean()
    assert 0.02 < m.lam < 0.98
    assert stats[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_epoch_visits_every_image_once_and_weighs_the_short_batch_by_its_size():
    data = striped(n=80)
    recipe = RECIPES["mlp/none"].override(
        width=16, depth=1, batch_size=32, lr=0.0, flip=False, crop_padding=0, precision="float32"
    )
    trainer = Trainer(recipe, data, seed=0, compile=False)
    found = trainer.train_epoch(0)
    with torch.no_grad():
        logits = trainer._logits(data.train_images)
        loss = torch.nn.functional.cross_entropy(logits, data.train_labels)
    correct = (logits.argmax(1) == data.train_labels).float().mean().item()
    assert found["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["train_accuracy"] == pytest.approx(100 * correct, rel=1e-5)
    assert found["objective"] == pytest.approx(0.9 * loss.item(), rel=1e-5)


def test_test_accuracy_is_the_share_of_correct_predictions():
    data = load("digits")
    trainer = Trainer(RECIPES["digits/weak"].override(**SMALL), data, seed=0, compile=False)
    trainer.train_epoch(0)
    found, features = trainer.evaluate()
    with torch.no_grad():
        predicted = trainer.model.eval()((data.test_images / 255 - data.mean[0]) / data.std[0])
    right = (predicted.argmax(1) == data.test_labels).sum().item()
    assert found["test_accuracy"] == pytest.approx(100 * right / 500, abs=1e-9)
    assert [z.shape for z in features] == [(500, 32)] * 2  # every test image, either layer


def test_the_digits_are_learned_and_the_record_tells_it(tmp_path):
    record = train(RECIPES["digits/weak"].override(depth=3, epochs=8), **options(tmp_path))
    assert record.status == "finished" and record.epochs == 8
    assert record.last["test_accuracy"] > 93
    assert record.history["train_loss"][-1] < 0.5 * record.history["train_loss"][0]
    path = tmp_path / "r" / "digits" / "digits-weak+depth=3+epochs=8-s0.json"
    assert records.read(path) == record
    assert record.layers["names"] == ["layers.0", "layers.1", "layers.2"]
    assert len(record.layers["effective_dim"]) == 8 and len(record.layers["weak"][0]) == 3
    assert record.layers["epoch"] == list(range(1, 9))
    kept = [rows is not None for rows in record.layers["spectrum"]]
    assert kept == [True] + [False] * 6 + [True]
    assert len(record.layers["spectrum"][-1][0]) == len(records.spectrum_ranks(128))
    # the floor of Weak at N = 128, C = 128, K = 64: above the sqrt(64) of total collapse
    assert record.history["regularizer_floor"][0] == pytest.approx(8.09, abs=0.01)


def test_all_layers_are_measured_wherever_the_regularizer_looks(tmp_path):
    """With lam = 0 the taps change nothing: every run has the measures of the usual taps."""
    recipe = RECIPES["digits/weak"].override(**SMALL, lam=0.0)
    usual = train(recipe, **options(tmp_path))
    assert "tapped" not in usual.layers
    for taps, on in ((["layers.1"], "output"), (["head", "layers.1"], "input")):
        other = train(recipe.override(taps=taps, tap_on=on), **options(tmp_path))
        assert other.layers["names"] == ["layers.0", "layers.1"]
        assert other.layers["tapped"] == taps
        assert [len(row) for row in other.layers["regularizer"]] == [len(taps)] * 3
        for name in ("effective_dim", "weak", "strong", "mean_cosine", "spectrum"):
            assert other.layers[name] == usual.layers[name]
        assert other.history["test_accuracy"] == usual.history["test_accuracy"]
        assert records.read(tmp_path / "r" / "digits" / f"{other.name}.json") == other


def test_a_post_activation_is_the_input_of_the_layer_above():
    recipe = RECIPES["digits/weak"].override(**SMALL)
    above = recipe.override(taps=["layers.1", "head"], tap_on="input")
    pre, post = (Trainer(r, load("digits"), seed=0, compile=False) for r in (recipe, above))
    for trainer in (pre, post):
        trainer._logits(trainer.data.train_images[:16])
    features = zip(pre.handle.features.values(), post.handle.features.values(), strict=True)
    assert all(torch.equal(a.relu(), b) for a, b in features)


def test_the_floor_of_layers_with_different_k_is_the_mean_of_theirs():
    recipe = RECIPES["digits/weak"].override(depth=3, sketch_dim=[8, 64, 16])
    floors = [weak_floor(128, 128, k) for k in (8, 64, 16)]
    trainer = Trainer(recipe, load("digits"), seed=0, compile=False)
    assert trainer.floor() == pytest.approx(sum(floors) / 3, rel=1e-12)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    recipe = RECIPES["digits/weak"].override(**SMALL)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, c = (
        train(recipe, seed=s, **options(tmp_path / n)) for s, n in ((0, "a"), (0, "b"), (1, "c"))
    )
    same = [name for name in records.HISTORY if name != "seconds"]
    assert all(a.history[n] == b.history[n] for n in same)
    assert a.history["train_loss"] != c.history["train_loss"]
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    "name", ["vit/none", "vit-text/weak", "vit/weak", "vit/strong", "expert/weak", "mlp/strong"]
)
def test_stopping_and_going_on_equals_one_run(tmp_path, name):
    """With all that is random switched on: sketches, drops, RandAugment, MixUp and CutMix."""
    small = SMALL | {"precision": "float32", "dropout": 0.2} if name.startswith("mlp") else TINY_VIT
    recipe = RECIPES[name].override(**small | {"batch_size": 40, "sketch_dim": 8})
    data = striped()
    whole = train(recipe, data=data, **options(tmp_path / "a"))
    for epochs in range(1, recipe.epochs + 1):
        parts = train(recipe, data=data, epochs=epochs, **options(tmp_path / "b"))
        assert parts.status == ("finished" if epochs == recipe.epochs else "partial")
    a, b = (next((tmp_path / n / "c").rglob("*.pt")) for n in "ab")
    assert weights(a) == weights(b)
    assert whole.history["test_accuracy"] == parts.history["test_accuracy"]


def test_a_run_that_has_its_epochs_is_not_repeated(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    first = train(recipe, epochs=2, **options(tmp_path))
    path = next((tmp_path / "r").rglob("*.json"))
    before = path.read_bytes()
    assert train(recipe, epochs=1, **options(tmp_path)).history == first.history
    assert path.read_bytes() == before
    assert train(recipe, epochs=3, **options(tmp_path)).status == "finished"


def test_a_run_without_its_checkpoint_keeps_the_longer_record_until_it_is_passed(tmp_path, capsys):
    recipe = RECIPES["digits/none"].override(**SMALL)
    train(recipe, epochs=2, **options(tmp_path))
    path = next((tmp_path / "r").rglob("*.json"))
    before = path.read_bytes()
    next((tmp_path / "c").rglob("*.pt")).unlink()

    class Stopped(Exception):
        pass

    def stop(record, epochs):
        raise Stopped(record.epochs)

    for epoch in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "line", stop)  # the first thing after an epoch's record
            with pytest.raises(Stopped, match=str(epoch)):
                train(recipe, epochs=3, **options(tmp_path) | {"quiet": False})
        assert (path.read_bytes() == before) == (epoch == 1)
    assert "no checkpoint, beginning again" in capsys.readouterr().out
    assert train(recipe, epochs=3, **options(tmp_path)).epochs == 3


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_a_run_killed_between_its_last_checkpoint_and_its_record_only_writes_the_record(
    tmp_path, status
):
    settings = SMALL | ({"optimizer": "sgd", "lr": 1e30} if status == "diverged" else {})
    recipe = RECIPES["digits/weak"].override(**settings)
    first = train(recipe, **options(tmp_path))
    assert first.status == status
    checkpoint = next((tmp_path / "c").rglob("*.pt"))
    next((tmp_path / "r").rglob("*.json")).unlink()
    before = checkpoint.read_bytes()
    assert train(recipe, **options(tmp_path)) == first
    assert checkpoint.read_bytes() == before  # no epoch was added


def test_a_session_under_other_conditions_is_listed_in_the_provenance(tmp_path, monkeypatch):
    recipe = RECIPES["digits/none"].override(**SMALL)
    first = train(recipe, epochs=1, **options(tmp_path)).provenance
    assert "later" not in train(recipe, epochs=2, **options(tmp_path)).provenance
    monkeypatch.setattr(run, "code", lambda: {"commit": "f" * 40, "clean": False})
    found = train(recipe, epochs=3, **options(tmp_path)).provenance
    assert found["commit"] == first["commit"] and found["start"] == first["start"]
    assert found["later"] == [{"from_epoch": 3, "commit": "f" * 40, "clean": False}] or (
        first["clean"] is False  # then only the commit differs
        and found["later"] == [{"from_epoch": 3, "commit": "f" * 40}]
    )


def test_an_edited_package_is_not_called_clean(tmp_path, monkeypatch):
    package = tmp_path / "sigreg_lib"
    package.mkdir()
    (package / "losses.py").write_text("x = 1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(run, "PACKAGE", package)
    assert run.code.__wrapped__()["clean"] is True
    assert len(run.code.__wrapped__()["commit"]) == 40
    (package / "losses.py").write_text("x = 2\n")
    assert run.code.__wrapped__()["clean"] is False


@pytest.mark.parametrize("resample", [True, False])
def test_sketches_are_independent_of_the_weights_of_the_same_seed(resample):
    data = load("digits")
    recipe = RECIPES["digits/weak"].override(resample=resample)
    trainer = Trainer(recipe, data, seed=0, compile=False)
    trainer.train_epoch(0)
    first = Trainer(recipe, data, seed=0, compile=False)
    drawn = []
    matrix = first.regularizer.matrix
    first.regularizer.matrix = lambda z: drawn.append(matrix(z)) or drawn[-1]
    first.train_epoch(0)
    weights = Trainer(recipe, data, seed=0, compile=False).model.layers[0].weight
    # PyTorch makes normals of 16 numbers at a time: any shared stream shows in blocks of 8
    s, w = (t.detach().flatten()[:8192].view(-1, 8)[1::2].flatten() for t in (drawn[0], weights))
    assert abs(torch.corrcoef(torch.stack([s, w]))[0, 1]) < 0.06  # 4 standard errors


def turned(data):
    return replace(
        data, train_images=data.train_images.flip(0), train_labels=data.train_labels.flip(0)
    )


@pytest.mark.parametrize("kept", ["record", "checkpoint"])
def test_a_run_on_other_images_of_the_same_name_is_not_taken_for_this_one(tmp_path, kept):
    recipe, data = RECIPES["digits/none"].override(**SMALL), load("digits")
    other = replace(data, train_images=data.train_images.flip(0))
    own = options(tmp_path) | {"data": data}
    found = train(recipe, epochs=1, **own).provenance
    assert found["images"] == data.checksums["images"]
    if kept == "checkpoint":
        next((tmp_path / "r").rglob("*.json")).unlink()
    with pytest.raises(ValueError, match=f"other images.*{found['images']}"):
        train(recipe, epochs=1, **own | {"data": other})


def test_a_finished_run_serves_images_in_any_order_but_goes_on_in_its_own(tmp_path):
    recipe, data = RECIPES["digits/none"].override(**SMALL), load("digits")
    own = options(tmp_path) | {"data": data}
    first = train(recipe, epochs=1, **own)
    assert train(recipe, epochs=1, **own | {"data": turned(data)}) == first
    with pytest.raises(ValueError, match="images in another order"):
        train(recipe, epochs=2, **own | {"data": turned(data)})
    assert train(recipe, epochs=2, **own).epochs == 2


def test_a_record_of_other_data_is_not_taken_for_this_run(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    train(recipe, epochs=1, group="mine", **options(tmp_path))
    with pytest.raises(ValueError, match="other settings or data"):
        train(recipe, data=striped(), epochs=1, group="mine", **options(tmp_path))


def test_the_normalization_in_the_record_is_the_one_used(tmp_path):
    record = train(RECIPES["mlp/none"].override(**SMALL), epochs=1, **options(tmp_path))
    assert record.provenance["mean"] == [round(load("digits").mean[0], 6)]
    wrong = RECIPES["mlp/none"].override(mean=(0.1, 0.2, 0.3), **SMALL)
    with pytest.raises(ValueError, match="mean has 3 values for 1 channels"):
        train(wrong, epochs=1, **options(tmp_path))


def test_a_last_batch_too_small_for_a_covariance_names_the_batch_size(tmp_path):
    recipe = RECIPES["digits/weak"].override(batch_size=1296, **SMALL)
    with pytest.raises(ValueError, match="batch_size=1296 leaves a last batch of 1"):
        train(recipe, **options(tmp_path))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    train(recipe, epochs=1, **options(tmp_path))
    checkpoint = next((tmp_path / "c").rglob("*.pt"))
    saved = torch.load(checkpoint, weights_only=True)
    saved["record"] = saved["record"].replace('"lr": 0.001', '"lr": 0.002')
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match="other settings"):
        train(recipe, epochs=2, **options(tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path):
    recipe = RECIPES["mlp/none"].override(
        depth=2, width=32, lr=1e30, clip_norm=None, precision="float32", batch_size=32
    )
    record = train(recipe, data=striped(), **options(tmp_path))
    assert record.status == "diverged" and record.epochs < 10
    assert record.last["train_loss"] is None
    path = next((tmp_path / "r").rglob("*.json"))
    assert records.read(path).status == "diverged"
    before = path.read_bytes()
    assert train(recipe, data=striped(), **options(tmp_path)).status == "diverged"
    assert path.read_bytes() == before  # it is not tried again


def test_a_weaker_network_than_chance_is_no_divergence(tmp_path):
    record = train(
        RECIPES["digits/none"].override(**SMALL | {"lr": 0.0}), epochs=1, **options(tmp_path)
    )
    assert record.status == "partial"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"epochs": 0}, r"epochs must lie in 1\.\.3"),
        ({"epochs": 4}, r"epochs must lie in 1\.\.3"),
        ({"epochs": 1.5}, r"epochs must lie in 1\.\.3, the schedule, and be whole, not 1\.5"),
        ({"epochs": True}, "epochs must .* be whole, not True"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer .* not True"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"evaluate_every": True}, "evaluate_every must be an integer"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(RECIPES["digits/none"].override(**SMALL), **options(tmp_path, **more))


def test_integers_of_numpy_are_integers(tmp_path):
    recipe, one = RECIPES["digits/none"].override(**SMALL), np.int64(1)
    record = train(recipe, seed=one, epochs=one, evaluate_every=one, **options(tmp_path))
    assert (record.name[-3:], record.epochs) == ("-s1", 1)
    read = records.read(next((tmp_path / "r").rglob("*.json")))
    assert (read.seed, read.epochs) == (1, 1)
    (again,) = train_seeds(recipe, [one], epochs=one, **options(tmp_path / "batched"))
    assert (again.seed, again.provenance["batched"]) == (1, [1])


@pytest.mark.parametrize(("asked", "held"), [(300, 0), (0, 300), (200, 300)])
def test_data_that_hold_out_other_images_than_the_recipe_says_are_refused(tmp_path, asked, held):
    changes, more = SMALL | {"holdout": asked}, options(tmp_path, data=load("digits", holdout=held))
    recipe, runs = RECIPES["digits/none"].override(**changes), [Run("digits/none", 0, changes)]
    message = f"the recipe says holdout={asked}, but the data .* has holdout={held}"
    for call in (
        lambda: train(recipe, **more),
        lambda: train_seeds(recipe, (0, 1), **more),
        lambda: sweep([Run("digits/none", 0, SMALL | {"holdout": held}), *runs], **more),
        lambda: sweep(runs, batched=True, **more),
        lambda: sweep(runs, workers=2, **more),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "r").exists()


def test_data_that_hold_out_what_the_recipe_says_are_those_of_their_name(tmp_path):
    recipe, data = (
        RECIPES["digits/none"].override(**SMALL, holdout=300),
        load("digits", holdout=300),
    )
    given = train(recipe, epochs=1, data=data, **options(tmp_path / "given"))
    named = train(recipe, epochs=1, data="digits", **options(tmp_path / "named"))
    assert given.dataset == named.dataset == "digits-holdout300"
    assert given.provenance["images"] == named.provenance["images"]


def _own(**changes):
    settings = dataclasses.asdict(RECIPES["digits/weak"].override(**SMALL)) | {"name": "my/own"}
    return Recipe(**settings | changes)


def test_a_recipe_of_ones_own_trains_and_goes_on_under_its_name(tmp_path):
    train(_own(), epochs=1, **options(tmp_path))
    record = train(_own(), epochs=2, **options(tmp_path))
    assert (record.recipe, record.overrides, record.name) == ("my/own", {}, "my-own-s0")
    assert record.layers["names"] == ["layers.0", "layers.1"]
    assert records.read(next((tmp_path / "r").rglob("*.json"))) == record
    batched = train_seeds(_own(), (0, 1), epochs=1, **options(tmp_path / "batched"))
    assert [r.name for r in batched] == ["my-own-s0", "my-own-s1"]


def test_two_recipes_under_one_name_are_not_taken_for_one_another(tmp_path):
    train(_own(), epochs=1, **options(tmp_path))
    for other in (_own(lam=0.3), _own(name="my-own")):
        with pytest.raises(ValueError, match="is of other settings"):
            train(other, epochs=1, **options(tmp_path))
    next((tmp_path / "r").rglob("*.json")).unlink()
    with pytest.raises(ValueError, match="is of a run with other settings"):
        train(_own(lam=0.3), epochs=1, **options(tmp_path))


def test_a_mean_of_a_recipe_of_ones_own_fits_the_channels(tmp_path):
    own = _own(mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(ValueError, match="mean has 3 values for 1 channels"):
        train(own, epochs=1, **options(tmp_path))


def _held_elsewhere(checkpoint):
    """A process that holds a run, as one that trains it does, until it is killed."""
    code = "import sys, time, pathlib; from sigreg_lib.train.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(checkpoint)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, capsys):
    pytest.importorskip("fcntl")
    recipe, more = RECIPES["digits/none"].override(**SMALL), options(tmp_path)
    name = run.new_record(recipe, load("digits"), 1).name
    other = _held_elsewhere(tmp_path / "c" / "digits" / f"{name}.pt")
    try:
        for call in (
            lambda: train(recipe, seed=1, **more),
            lambda: train_seeds(recipe, (0, 1), **more),
        ):
            with pytest.raises(RuntimeError, match="-s1 is being trained by another process"):
                call()
        assert not (tmp_path / "r").exists()
        with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
            sweep([Run("digits/none", s, SMALL) for s in (0, 1)], epochs=1, **more)
        shown = capsys.readouterr().out
        assert "Busy: " in shown and "Traceback" not in shown
    finally:
        other.kill()  # what it held is free at once, though its file stays
        other.wait()
        other.stdout.close()
    assert train(recipe, seed=1, **more).status == "finished"
    assert sorted(p.suffix for p in (tmp_path / "c" / "digits").iterdir()) == [".pt", ".pt"]
    with locked(tmp_path / "c" / "digits" / f"{name}.pt"):  # a run that is done needs no lock
        assert train(recipe, seed=1, **more).status == "finished"


def test_a_run_that_another_process_ends_meanwhile_is_not_begun_again(tmp_path, monkeypatch):
    recipe, more = RECIPES["digits/none"].override(**SMALL), options(tmp_path)
    whole = train(recipe, **more)
    next((tmp_path / "c").rglob("*.pt")).unlink()  # it alone would tell of the other's epochs
    look, looks = run.earlier, []

    def late(*about):  # the first look comes before the other process has written its record
        looks.append(about)
        return look(*about) if len(looks) > 1 else None

    monkeypatch.setattr(run, "earlier", late)
    assert train(recipe, epochs=1, **more) == whole


def _start(folder, epochs):
    command = [sys.executable, "-m", "sigreg_lib", "run", "digits/weak", "--epochs", str(epochs)]
    command += ["--set", "depth=3", "--set", "width=128", "--threads", "1", "--no-compile"]
    command += ["--results", str(folder / "r"), "--checkpoints", str(folder / "c")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    """A real SIGKILL, several times in one run, against the run left alone."""
    epochs, chance = 12, random.Random(0)
    alone = _start(tmp_path / "alone", epochs)
    started = time.perf_counter()
    for line in alone.stdout:
        if "epoch 1/" in line:
            first = time.perf_counter() - started
    alone.stdout.close()
    assert alone.wait() == 0
    rest = time.perf_counter() - started - first
    kills = 0
    for _ in range(3):
        victim = _start(tmp_path / "killed", epochs)
        line = victim.stdout.readline()  # it has begun: says where it goes on, or its first epoch
        time.sleep(chance.uniform(0, rest / 4))
        if line and victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            kills += victim.wait() == -signal.SIGKILL
        victim.stdout.close()
        for path in (tmp_path / "killed").rglob("*.json"):
            records.read(path)  # never half a record
    assert kills >= 1, "no run was killed before its end: the test shows nothing"
    last = _start(tmp_path / "killed", epochs)
    last.communicate()
    assert last.returncode == 0
    a, b = (next((tmp_path / n / "c").rglob("*.pt")) for n in ("alone", "killed"))
    assert weights(a) == weights(b)
    a, b = (records.read(next((tmp_path / n / "r").rglob("*.json"))) for n in ("alone", "killed"))
    assert a.history["train_loss"] == b.history["train_loss"] and b.status == "partial"


@pytest.mark.parametrize("shared", [True, False])
def test_compiled_and_eager_steps_agree(shared):
    data = striped()
    settings = {"batch_size": 48, "sketch_dim": 8, "shared_sketch": shared}
    recipe = RECIPES["vit/weak"].override(**TINY_VIT | settings)
    eager, compiled = (Trainer(recipe, data, seed=0, compile=c) for c in (False, True))
    results = [t.train_epoch(0) for t in (eager, compiled)]
    for name in ("train_loss", "regularizer", "grad_norm"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)
    for p, q in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        # Adam's first steps are of size lr whatever the gradient: tiny ones may turn sign
        assert (p - q).abs().max() < 4 * recipe.lr
    assert eager.evaluate()[0]["test_loss"] == pytest.approx(
        compiled.evaluate()[0]["test_loss"], rel=1e-3
    )


def test_a_sweep_does_each_run_once_and_gives_them_in_order(tmp_path, capsys, monkeypatch):
    runs = [Run("digits/none", s, SMALL) for s in (1, 0)] + [Run("digits/weak", 0, SMALL)]
    found = sweep(runs, workers=2, epochs=1, **options(tmp_path))
    assert [(r.recipe, r.seed) for r in found] == [(r.recipe, r.seed) for r in runs]
    assert len(list((tmp_path / "r").rglob("*.json"))) == 3
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*.json")}
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all("partial, epoch 1/3, test" in line for line in lines)
    assert not any("already there" in line for line in lines)
    module = sys.modules["sigreg_lib.train.sweep"]  # the package's `sweep` is the function
    monkeypatch.setattr(module, "now", lambda: "9999-01-01T00:00:00+00:00")
    again = sweep(runs, workers=1, epochs=1, **options(tmp_path))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(line.endswith("already there") for line in lines)
    assert [r.history for r in again] == [r.history for r in found]  # in another process too
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*.json")}


def test_a_sweep_goes_on_after_a_failure_and_names_it(tmp_path, capsys):
    settings = SMALL | {"batch_size": 1296}
    runs = [Run("digits/weak", 0, settings), Run("digits/none", 0, SMALL)]
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed: digits-weak\+"):
        sweep(runs, epochs=1, **options(tmp_path))
    shown = capsys.readouterr().out
    assert "leaves a last batch of 1" in shown and "Traceback" not in shown
    assert len(list((tmp_path / "r").rglob("*.json"))) == 1


def test_a_sweep_names_a_run_whose_process_was_killed(tmp_path, capsys, monkeypatch):
    def each(do, groups, workers):
        killed, fine = groups
        yield killed, ProcessDied("killed")
        yield fine, do(fine)

    monkeypatch.setattr(sys.modules["sigreg_lib.train.sweep"], "each", each)
    runs = [Run("digits/weak", 0, SMALL), Run("digits/none", 0, SMALL)]
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed: digits-weak\+"):
        sweep(runs, workers=2, epochs=1, **options(tmp_path))
    assert "FAILED\nkilled\n[1/2] digits-none+" in capsys.readouterr().out


def test_a_sweep_refuses_unknown_settings_and_twins_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        sweep([Run("digits/none"), Run("digits/none", 0, {"detph": 1})], **options(tmp_path))
    with pytest.raises(ValueError, match="given twice: digits-none-s0"):
        sweep([Run("digits/none"), Run("digits/none", 0, {"depth": 16})], **options(tmp_path))
    with pytest.raises(ValueError, match=r"epochs must lie in 1\.\.30"):
        sweep([Run("digits/none")], epochs=31, **options(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sweep([Run("digits/none")], data=tmp_path / "nowhere", **options(tmp_path))
    assert not (tmp_path / "r").exists()


def test_provenance_says_what_ran(tmp_path):
    record = train(RECIPES["digits/none"].override(**SMALL), epochs=1, **options(tmp_path))
    p = record.provenance
    assert p["torch"] == torch.__version__ and p["threads"] == torch.get_num_threads()
    assert p["precision"] == "float32" and p["compiled"] is False and p["wall_seconds"] > 0
    assert p["start"] <= p["end"]
    assert p["commit"] is None or len(p["commit"]) == 40
    assert str(ROOT) not in json.dumps(p)  # nothing of the machine's folders


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path):
    train(RECIPES["digits/weak"].override(**SMALL), epochs=1, **options(tmp_path))
    path = next((tmp_path / "c").rglob("*.pt"))
    assert set(torch.load(path, weights_only=True)) == {"model", "optimizer", "record"}
    assert os.listdir(path.parent) == [path.name]


def test_cifar_runs_from_its_parquet_files(cifar100_root, tmp_path):
    recipe = RECIPES["mlp/weak"].override(width=64, depth=2, batch_size=500)
    record = train(recipe, data=cifar100_root, epochs=1, **options(tmp_path))
    assert record.dataset == "cifar100" and record.last["test_accuracy"] > 2.0  # chance is 1


def test_layers_are_looked_at_often_at_first_and_then_every_tenth_epoch():
    looks = [epoch for epoch in range(1, 401) if run.looked_at(epoch)]
    assert looks[:12] == [*range(1, 11), 15, 20] and looks[-3:] == [380, 390, 400]
    assert len(looks) == 10 + 8 + 35


@pytest.mark.parametrize("recipe", ["digits/weak", "vit/none"])
def test_evaluating_less_often_trains_the_same_and_leaves_gaps(tmp_path, recipe):
    digits = recipe.startswith("digits")
    settings = SMALL if digits else TINY_VIT | {"batch_size": 40}
    recipe = RECIPES[recipe].override(**settings | {"epochs": 7})
    data = "digits" if digits else striped()
    each = train(recipe, data=data, **options(tmp_path / "a"))
    third = train(recipe, data=data, evaluate_every=3, **options(tmp_path / "b"))
    a, b = (next((tmp_path / n / "c").rglob("*.pt")) for n in "ab")
    assert weights(a) == weights(b)
    for name in ("train_loss", "train_accuracy", "regularizer", "grad_norm"):
        assert third.history[name] == each.history[name]
    for name in ("test_loss", "test_accuracy", "effective_dim"):
        expected = [v if e in (3, 6, 7) else None for e, v in enumerate(each.history[name], 1)]
        assert third.history[name] == expected
    assert third.layers["epoch"] == [3, 6, 7]
    assert third.last["test_accuracy"] == each.last["test_accuracy"]
    best = max(e for e in third.history["test_accuracy"] if e is not None)
    assert third.best_test["test_accuracy"] == best and third.best_test["epoch"] in (3, 6, 7)
    assert records.read(next((tmp_path / "b" / "r").rglob("*.json"))) == third


def test_a_run_stopped_between_evaluations_tests_its_last_epoch(tmp_path):
    recipe = RECIPES["digits/none"].override(**SMALL)
    first = train(recipe, epochs=2, evaluate_every=5, **options(tmp_path))
    assert [a is None for a in first.history["test_accuracy"]] == [True, False]
    found = train(recipe, epochs=3, evaluate_every=5, **options(tmp_path))
    assert [a is None for a in found.history["test_accuracy"]] == [True, False, False]


def test_a_run_that_diverges_between_evaluations_is_tested_and_ends(tmp_path):
    recipe = RECIPES["mlp/none"].override(
        depth=2, width=32, lr=1e30, clip_norm=None, precision="float32", batch_size=32
    )
    record = train(recipe, data=striped(), evaluate_every=100, **options(tmp_path))
    often = train(recipe, data=striped(), **options(tmp_path / "often"))
    assert record.status == "diverged" and record.epochs == often.epochs
    assert record.last["test_accuracy"] == often.last["test_accuracy"] is not None


def test_the_lines_of_a_run_and_of_a_sweep_cope_with_epochs_that_were_not_tested(tmp_path, capsys):
    recipe = RECIPES["digits/weak"].override(**SMALL)
    shown = options(tmp_path) | {"quiet": False}
    record = train(recipe, evaluate_every=2, **shown)
    *lines, end = capsys.readouterr().out.splitlines()
    assert end.split(": ", 1)[1].startswith("finished at epoch 3, record ")
    assert ["test " in line for line in lines] == [False, True, True]
    assert ["effective dim " in line for line in lines] == [False, True, True]
    assert all("loss " in line and "R " in line for line in lines)
    for name in ("test_loss", "test_accuracy", "effective_dim"):
        record.history[name] = [None] * 3  # as if killed before the first evaluation
    assert "test -% (best -% at -), effective dim -" in summary(record)


def test_evaluation_is_scheduled_by_a_positive_integer(tmp_path):
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match="evaluate_every must be an integer >= 1"):
            train(RECIPES["digits/none"], evaluate_every=value, **options(tmp_path))
        with pytest.raises(ValueError, match="evaluate_every must be an integer >= 1"):
            sweep([Run("digits/none")], evaluate_every=value, **options(tmp_path))
