import pytest
import torch
from helpers import seeded

from sigreg_lib import records
from sigreg_lib.data import load
from sigreg_lib.recipes import RECIPES
from sigreg_lib.train import Trainer, train
from sigreg_lib.train.balance import Balance
from sigreg_lib.train.run import line

SMALL = {"depth": 2, "width": 32, "epochs": 2, "lam": "auto", "taps": "layers.1"}


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@pytest.mark.parametrize("convex", [True, False])
def test_the_weighted_gradients_stand_in_the_target_ratio(convex):
    balance = Balance(convex=convex, device=torch.device("cpu"), target=0.25)
    g = seeded(0)
    task, r = ([s * torch.randn(3, 5, generator=g), s * torch.ones(7)] for s in (2.0, 40.0))
    balance.see(task, r)
    lam = balance.weight().item()
    assert lam * norm(r) / ((1 - lam if convex else 1) * norm(task)) == pytest.approx(0.25, 1e-5)


def test_the_ratio_is_a_geometric_mean_over_steps_and_then_stays():
    balance = Balance(convex=False, device=torch.device("cpu"), target=1.0, steps=2)
    with pytest.raises(RuntimeError, match="no step"):
        balance.weight()
    for size in (10.0, 1000.0):
        assert not balance.done
        balance.see([torch.ones(1)], [torch.full((1,), size)])
    assert balance.done and balance.weight().item() == pytest.approx(1 / 100, rel=1e-5)


def test_steps_without_one_of_the_gradients_do_not_count():
    balance = Balance(convex=False, device=torch.device("cpu"), target=1.0)
    nothing, task, r = torch.zeros(3), torch.ones(1), torch.full((1,), 4.0)
    for pair in ((nothing, nothing), (1e10 * task, nothing), (nothing, r), (task * torch.inf, r)):
        balance.see([pair[0]], [pair[1]])
        assert balance.weight().item() == 1.0
    balance.see([task], [r])
    assert balance.weight().item() == pytest.approx(0.25) and balance.seen == 5


@pytest.mark.parametrize(("convex", "most"), [(True, 0.9), (False, 9.0)])
def test_a_regularizer_that_hardly_pushes_does_not_silence_the_task(convex, most):
    balance = Balance(convex=convex, device=torch.device("cpu"))
    balance.see([torch.ones(1)], [torch.full((1,), 1e-8)])
    assert balance.weight().item() == pytest.approx(most)


def trainer(**changes):
    recipe = RECIPES["digits/weak"].override(**(SMALL | changes))
    return Trainer(recipe, load("digits"), seed=0, compile=False)


def test_the_parts_of_the_gradient_make_up_the_whole_one():
    auto = trainer()
    batch = auto.begin_epoch(0)[0]
    x, y = auto.data.train_images[batch], auto.data.train_labels[batch]
    drawn = auto._draw(len(y), 0, 0)
    task, r, stats = auto.gradients(x, y, *drawn)
    loss, expected = auto._loss(x, y, *drawn, torch.tensor(0.3))
    whole = torch.autograd.grad(loss, auto.parameters)
    for a, b, c in zip(task, r, whole, strict=True):
        torch.testing.assert_close(0.7 * a + 0.3 * b, c, rtol=1e-4, atol=1e-6)
    # the head lies behind the tapped layer: R does not move it
    assert norm(r[-2:]) == 0 and norm(r[:2]) > 0
    torch.testing.assert_close(stats[[0, 1, 3]], expected[[0, 1, 3]])


def test_the_objective_of_a_seeking_step_is_weighted_with_what_it_found():
    auto = trainer(clip_norm=0.01)
    batch = auto.begin_epoch(0)[0]
    x, y = auto.data.train_images[batch], auto.data.train_labels[batch]
    stats, norm = auto._train_step(x, y, 0, 0)
    lam = auto.balance.weight()
    torch.testing.assert_close(stats[2], (1 - lam) * stats[0] + lam * stats[3])
    assert norm.item() > 0.01  # before clipping
    assert norm_of_gradients(auto) == pytest.approx(0.01, rel=1e-3)
    loss, _ = auto.forward(x, y, 0, 1)  # with the weight found so far
    assert torch.isfinite(loss)


def norm_of_gradients(auto):
    return norm([p.grad for p in auto.parameters])


def test_a_weight_found_in_one_step_trains_as_the_same_weight_given():
    auto, given = (trainer(lam=x, optimizer="sgd", lr=0.1) for x in ("auto", 0.1))
    auto.balance.steps = 1
    auto.train_epoch(0)
    lam = auto.balance.weight().item()
    assert 0 < lam < 1 and auto.balance.seen == 1
    given.recipe = given.recipe.override(lam=lam)
    given.train_epoch(0)
    for a, b in zip(auto.parameters, given.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_run_with_auto_goes_on_where_it_stopped_and_tells_the_weight(tmp_path):
    recipe = RECIPES["digits/weak"].override(**(SMALL | {"epochs": 12}))

    def options(name):
        places = {"results": tmp_path / name, "checkpoints": tmp_path / f"{name}c"}
        return {"seed": 3, "quiet": True, **places}

    whole = train(recipe, **options("a"))
    first = train(recipe, epochs=4, **options("b"))
    assert "lam" not in first.provenance  # 44 of 100 steps
    assert "lam still sought" in line(first, 12)
    assert f"lam {whole.provenance['lam']:.3g} " in line(whole, 12)
    second = train(recipe, **options("b"))
    assert second.history["train_loss"] == whole.history["train_loss"]
    assert 0 < whole.provenance["lam"] == second.provenance["lam"] < 1
    path = next((tmp_path / "a").rglob("*.json"))
    assert path.stem == "digits-weak+width=32+depth=2+taps=layers.1+lam=auto+epochs=12-s3"
    assert records.read(path).config["lam"] == "auto"


def test_a_baseline_has_nothing_to_weigh():
    with pytest.raises(ValueError, match="regularizer='none' has none"):
        RECIPES["mlp/none"].override(lam="auto")
