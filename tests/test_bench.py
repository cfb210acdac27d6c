import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import seeded
from reference_step import PlainStep, plain_augmentation

from sigreg_lib import _blocks, bench, weak_floor, weak_sigreg
from sigreg_lib.__main__ import main
from sigreg_lib.bench import steps, timing
from sigreg_lib.bench.losses import _drawn, loss_functions
from sigreg_lib.bench.profile import kind_of
from sigreg_lib.bench.steps import count_operations, fake_images
from sigreg_lib.losses import WeakSIGReg
from sigreg_lib.recipes import RECIPES
from sigreg_lib.train import precision
from sigreg_lib.train.loop import Trainer


def test_functions_are_called_in_turn_and_timed_once_a_round(monkeypatch):
    calls, clock = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.alternate(functions, rounds=3)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert calls == list("aabb" + "ab" * 3)  # twice each to warm up


def test_a_short_call_is_repeated_within_a_round(monkeypatch):
    calls, clock = [], itertools.count(step=0.001)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times = bench.alternate({"a": lambda: calls.append(1)}, rounds=2, at_least=0.01)
    assert len(calls) == 2 + 2 * (5 + 10)  # half as many before the clock starts
    assert times["a"] == pytest.approx([1e-4] * 2)


def test_processes_are_pooled_to_the_median_and_the_outermost_interval():
    def process(x):
        ends = {"low": x - 1, "high": x + 1, "least": x - 2, "most": x + 2}
        row = {"loss": "weak", "k": None, "n": 128, "seconds": {"ours": x / 10}}
        return [row | {"ratio": {"median": x, **ends}}]

    (row,) = bench.pooled([process(x) for x in (3.0, 1.0, 8.0)])
    assert row["loss"] == "weak" and row["k"] is None and row["n"] == 128
    assert row["seconds"] == {"ours": 0.3}
    assert row["ratio"] == {"median": 3.0, "low": 0.0, "high": 9.0, "least": -1.0, "most": 10.0}
    with pytest.raises(ValueError, match="different things"):
        bench.pooled(["weak", "strong"])


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::_fused_adamw_", "update"),
        ("aten::mul_", "norm and clipping"),
        ("aten::mul", "elementwise and other"),
        ("## Call CompiledFxGraph f12 ##", "compiled, between products"),
        ("_CovarianceDeviation", "Python and autograd"),
        ("autograd::engine::evaluate_function: MmBackward0", "Python and autograd"),
    ],
)
def test_operators_are_of_a_kind_by_their_name(event, kind):
    assert kind_of(event) == kind


@pytest.mark.parametrize(("shared", "drawn"), [(True, 1), (False, 9)])
def test_a_call_of_all_layers_draws_one_sketch_or_one_each(monkeypatch, shared, drawn):
    drawing, calls = WeakSIGReg.matrix, []
    monkeypatch.setattr(WeakSIGReg, "matrix", lambda self, z: calls.append(z) or drawing(self, z))
    _drawn("expert", "weak", shared=shared, device="cpu")()
    assert len(calls) == drawn


def test_sketches_are_timed_for_both_transformers_and_losses():
    rows = bench.bench_sketches(rounds=1)
    cases = [(row["family"], row["loss"], row["shape"]) for row in rows]
    vit, expert = [6, 128, 256], [9, 128, 192]
    assert cases == [
        ("vit", "weak", vit),
        ("vit", "strong", vit),
        ("expert", "weak", expert),
        ("expert", "strong", expert),
    ]
    for row in rows:
        each, shared = row["seconds"]["one each"], row["seconds"]["one for all"]
        assert row["ratio"]["median"] == pytest.approx(each / shared)
    lines = bench.table({"sketches": {"rows": rows}})
    assert len(lines) == 9 and "9 x N 128, C 192, sketch one each" in lines[5]


def test_a_profile_shares_out_all_of_the_time():
    a = torch.ones(600, 600)
    found = bench.profile(lambda: a @ a + a, repeats=3)
    assert sum(found["share"].values()) == pytest.approx(1.0)
    assert next(iter(found["share"])) == "products"  # 4e8 operations against 4e5
    assert found["operators"] >= 3  # matmul, mm, add


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        bench.alternate({"a": int}, rounds=0)


def test_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    times = {"slow": [2.0, 40.0, 6.0, 9.0, 5.0], "fast": [1.0, 10.0, 2.0, 3.0, 5.0]}
    found = bench.ratio(times, "slow", "fast")
    assert found == {"median": 3.0, "low": 2.0, "high": 3.0, "least": 1.0, "most": 4.0}


@pytest.mark.parametrize("rounds", [8, 31, 42])
def test_the_interval_of_a_median_covers_it_in_95_of_100_cases(rounds):
    g, inside = np.random.default_rng(3), []
    for _ in range(3000):
        times = {"a": g.exponential(size=rounds), "b": np.ones(rounds)}
        found = bench.ratio(times, "a", "b")
        inside.append(found["least"] <= math.log(2) <= found["most"])
    assert 0.945 < np.mean(inside) < 0.995


def test_extra_memory_is_the_peak_not_the_sum():
    def call():
        for _ in range(3):
            a = torch.empty(1000, 1000)  # 4 MB, freed before the next
            del a
        b = torch.empty(500_000)
        return torch.empty(250_000), b  # 3 MB together

    assert bench.extra_memory(call) == pytest.approx(4e6, rel=0.01)


@pytest.mark.parametrize(
    ("loss", "layers"), [("weak", 1), ("weak", 3), ("strong", 1), ("strong", 3)]
)
def test_what_is_compared_is_the_same_loss(loss, layers, monkeypatch):
    found = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda value, z: found.append((value.item(), grad(value, z)))
    )
    functions = loss_functions(loss, 64, 32, 16, layers=layers)
    functions["ours"]()
    functions["plain"]()
    (ours, (gradient,)), (plain, each) = found
    assert ours == pytest.approx(plain, rel=1e-5)
    gradient = gradient.view(layers, 64, 32)
    torch.testing.assert_close(gradient, torch.stack(list(each)), rtol=1e-4, atol=1e-6)


def test_memory_of_the_losses_grows_with_n_k_and_c_k_only():
    def held(loss, n=512, c=256, k=32):
        return bench.extra_memory(loss_functions(loss, n, c, k)["ours"])

    # what any loss must hold: its gradient, N x C; beyond it a few arrays of N x K
    for loss in ("weak", "strong"):
        assert held(loss) < 4 * (512 * 256 + 10 * 512 * 32 + 256 * 32) + 1.2e6
    wide = held("weak", n=64, c=8192)
    assert wide < 4 * 2 * (64 * 8192 + 8192 * 32) < 8192**2 / 10  # no C x C


def test_the_plain_step_holds_the_grid_of_strong_and_ours_does_not():
    functions = loss_functions("strong", 8192, 64, 64)
    assert bench.extra_memory(functions["plain"]) > 8 * bench.extra_memory(functions["ours"])


@pytest.mark.parametrize("family", ["vit", "expert", "mlp"])
def test_the_plain_model_gives_our_logits_and_objective(family):
    data = fake_images(8, 8)
    recipe = RECIPES[f"{family}/none"].override(batch_size=8, precision="float32", drop_path=0.0)
    trainer = Trainer(recipe, data, seed=3, compile=False)
    trainer.model.train()
    plain = PlainStep(recipe, trainer.model.state_dict())
    images, labels = data.train_images, data.train_labels
    x = (images.float() - trainer.mean) / trainer.std
    torch.testing.assert_close(plain.model(x), trainer._logits(images), rtol=1e-4, atol=1e-4)
    loss, _ = trainer._loss(images, labels, None, {})
    assert plain.loss(x, labels).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["expert", "mlp"])
def test_a_plain_step_moves_the_weights_as_ours_does(family):
    data = fake_images(8, 8)
    recipe = RECIPES[f"{family}/none"].override(
        batch_size=8, precision="float32", drop_path=0.0, mixup_alpha=0.0, cutmix_alpha=0.0
    )
    trainer = Trainer(recipe, data, seed=3, compile=False)
    plain = PlainStep(recipe, trainer.model.state_dict())
    trainer.model.train()
    images, labels = data.train_images, data.train_labels
    trainer._train_step(images, labels, 0, 0)
    plain((images.float() - trainer.mean) / trainer.std, labels)
    ours, theirs = (m.head.weight.detach() for m in (trainer.model, plain.model))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_regularizer_of_a_plain_step_is_the_mean_over_layers():
    recipe = RECIPES["mlp/weak"]
    step = PlainStep(recipe)
    with torch.no_grad():
        step.model(torch.randn(256, 3, 32, 32, generator=seeded(1)))
        for i, z in enumerate(step.features):  # no two layers alike
            z.copy_((1 + i) * torch.randn(z.shape, generator=seeded(2 + i)))
        torch.manual_seed(0)
        value = step.regularizer().item()
        torch.manual_seed(0)  # the same sketches, one a layer, in turn
        losses = [
            weak_sigreg(z, sketch=torch.randn(1024, 64) / 1024**0.5).item() for z in step.features
        ]
    assert len(losses) == 5
    assert value == pytest.approx(sum(losses) / 5, rel=1e-5)
    # a layer of unit normals has its closed form, up to its one sketch: draws scatter by 2%
    assert losses[0] == pytest.approx(weak_floor(256, 1024, 64), rel=0.1)


def test_plain_augmentation_gives_normalised_images_of_the_same_size():
    from PIL import Image

    image = Image.fromarray(torch.full((32, 32, 3), 128, dtype=torch.uint8).numpy())
    transform = plain_augmentation(RECIPES["mlp/none"], (0.5,) * 3, (0.25,) * 3)
    x = transform(image)
    assert x.shape == (3, 32, 32)
    inside = x[:, 8:24, 8:24]  # no crop by at most 4 pixels reaches it
    torch.testing.assert_close(inside, torch.full_like(inside, (128 / 255 - 0.5) / 0.25))


def test_one_row_a_case_in_the_table_and_json_holds_it():
    found = {
        "losses": bench.as_part([*bench.bench_cases([("weak", 32, 16, 8, 1)], rounds=2)], "cpu"),
        "steps": bench.as_part([bench.bench_steps("mlp", rounds=1)], "cpu"),
        "epoch": bench.as_part([bench.bench_epoch("mlp/weak", rounds=1)], "cpu"),
    }
    assert found["losses"]["provenance"]["threads"] == torch.get_num_threads()
    lines = bench.table(json.loads(json.dumps(found)))
    assert len(lines) == 1 + 1 + (3 + 2) + 6
    assert lines[1].split()[:6] == ["weak,", "N", "32,", "C", "16,", "K"]
    assert len({len(line) for line in lines}) == 1
    epoch = found["epoch"]["rows"][0]
    parts = [v for name, v in epoch["seconds"].items() if name != "plain augmentation"]
    assert sum(parts) == pytest.approx(epoch["epoch"])


def test_operations_of_a_step_are_those_of_its_layers():
    # three products a linear map, but no gradient of the images
    widths = [3072] + [1024] * 5 + [100]
    maps = [a * b for a, b in itertools.pairwise(widths)]
    assert count_operations("mlp") == 2 * 128 * (3 * sum(maps) - maps[0])


def test_the_command_measures_in_several_processes(tmp_path, capsys):
    path = tmp_path / "bench.json"
    few = ["--rounds", "1", "--threads", "1", "--processes", "2", "--json", str(path)]
    assert main(["bench", "products", *few]) == 0
    found = json.loads(path.read_text())["products"]
    assert found["provenance"]["processes"] == 2 and found["provenance"]["threads"] == 1
    assert len(found["rows"]) == 3


def test_the_command_replaces_the_parts_it_measured_and_no_other(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text('{"steps": "kept", "products": "old"}')
    assert main(["bench", "products", "--rounds", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["steps"] == "kept"
    assert [row["family"] for row in found["products"]["rows"]] == ["vit", "expert", "mlp"]
    assert f"products written to {path}" in capsys.readouterr().out


def test_fused_attention_is_swapped_in_and_out_and_gives_the_same_logits():
    data = fake_images(4, 2)
    recipe = RECIPES["vit/none"].override(batch_size=4, precision="float32")
    trainer = Trainer(recipe, data, seed=0, compile=False)
    fused = torch.nn.functional.scaled_dot_product_attention
    plainly = trainer._logits(data.train_images)
    attend = _blocks._attend
    with steps._fused_attention(True):
        assert _blocks._attend is fused
        otherwise = trainer._logits(data.train_images)
    assert _blocks._attend is attend
    torch.testing.assert_close(otherwise, plainly, rtol=1e-4, atol=1e-4)


def test_variants_are_compared_with_the_plain_step(monkeypatch):
    monkeypatch.setattr(steps, "VARIANTS", {"eager": {"compile": False}})
    monkeypatch.setattr(steps, "fake_images", lambda *a: fake_images(128, 2))
    rows = bench.bench_variants(rounds=1)
    assert [row["variant"] for row in rows] == ["plain", "eager"]
    assert rows[0]["ratio"]["median"] == 1
    assert rows[1]["ratio"]["median"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])


def test_without_bfloat16_products_nothing_is_compiled_in_bfloat16(monkeypatch):
    made = []

    class Spy(steps.Steps):
        def __init__(self, name, data, **options):
            made.append(options)
            super().__init__(name, data, **options, depth=2, width=32, heads=2)

    variants = {n: steps.VARIANTS[n] for n in ("bfloat16, eager", "bfloat16, compiled")}
    monkeypatch.setattr(steps, "VARIANTS", variants)
    monkeypatch.setattr(steps, "Steps", Spy)
    monkeypatch.setattr(steps, "fake_images", lambda *a: fake_images(128, 2))
    monkeypatch.setattr(precision, "_has_products", lambda: False)
    rows = bench.bench_variants(rounds=1)
    assert [row["variant"] for row in rows] == ["plain", "bfloat16, eager"]
    assert [options["compile"] for options in made] == [False]


def test_a_target_is_met_on_its_side_only():
    def row(loss, ratio):
        seconds = {"plain": 8.0, "ours": 2.0, "products": 1.0}
        size = {"n": 128, "c": 256, "k": 64, "layers": 1}
        around = {"median": ratio, "least": ratio - 0.05, "most": ratio + 0.05}
        return {"loss": loss, **size, "seconds": seconds, "ratio": around}

    seconds = {"augmentation": 4.0, "evaluation": 6.0}
    found = {
        "losses": [row("strong", 8.1), row("weak", 1.4)],
        "steps": [
            {
                "family": "mlp",
                "operations": 3e9,
                "seconds": {"plain none": 0.06},
                "ratio": {"none": {"median": 2.1, "least": 1.9, "most": 2.3}},
                "added": {
                    "weak": {"median": 1.1002, "least": 1.1001, "most": 1.11},
                    "strong": {"median": 0.9, "least": 0.8, "most": 1.26},
                },
            }
        ],
        "products": [{"family": "mlp", "gflops": {"bfloat16": 100.0, "float32": 50.0}}],
        "epoch": [{"recipe": "vit/weak", "seconds": seconds, "epoch": 100.0}],
    }
    judged = bench.targets(found)
    assert [t.met for t in judged] == [
        "yes",
        "no",
        "not resolved",
        "no",
        "not resolved",
        "yes",
        "no",
    ]
    assert [t.bound for t in judged[:3]] == pytest.approx([8, 8, 2])
    assert judged[-1].measured == pytest.approx(6)


def test_an_unknown_part_is_refused():
    parts = "losses, sketches, scaling, products, steps, variants, epoch, profile"
    with pytest.raises(ValueError, match=f"{parts}, not 'step'"):
        bench.run(("step",))


def test_outside_a_checkout_the_plain_versions_are_missed_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "TESTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="a checkout's tests/"):
        bench.plain("reference")
