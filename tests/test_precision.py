"""Products of bfloat16 matrices by way of float32: their values, gradients, and where they act."""

import pytest
import torch

from sigreg_lib.data import load
from sigreg_lib.recipes import find
from sigreg_lib.train import Trainer, train, train_seeds
from sigreg_lib.train.precision import PRODUCTS, Float32Products, lacks_products, worth_compiling

CPU = torch.device("cpu")
SMALL = {"width": 64, "batch_size": 50, "epochs": 2, "precision": "bfloat16"}


def matrices(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).bfloat16() for shape in shapes]


@pytest.fixture
def count(monkeypatch):
    """Products that went by way of float32, by name."""
    seen = []
    inner = Float32Products.__torch_dispatch__

    def dispatch(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            seen.append(func.name())
        return inner(self, func, types, args, kwargs)

    monkeypatch.setattr(Float32Products, "__torch_dispatch__", dispatch)
    return seen


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(9, 70), (70, 5)]),
        (torch.bmm, [(3, 9, 70), (3, 70, 5)]),
        (torch.addmm, [(5,), (9, 70), (70, 5)]),
        (torch.baddbmm, [(3, 1, 5), (3, 9, 70), (3, 70, 5)]),
        (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), [(5,), (9, 70), (70, 5)]),
    ],
    ids=["mm", "bmm", "addmm", "baddbmm", "addmm, scaled"],
)
def test_a_product_is_the_float64_one_rounded_once(product, shapes, count):
    inputs = matrices(*shapes)
    with Float32Products():
        found = product(*inputs)
    exact = product(*(a.double() for a in inputs))
    assert found.dtype == torch.bfloat16 and len(count) == 1
    # half a unit in the last of 8 binary digits, and what float32 sums of 70 terms lose
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_other_dtypes_and_operations_pass(count):
    x, w = (a.float() for a in matrices((9, 70), (70, 5)))
    with Float32Products():
        assert torch.equal(x @ w, torch.mm(x, w)) and (x @ w).dtype == torch.float32
        assert x.bfloat16().relu().dtype == torch.bfloat16
    assert count == []


def test_gradients_go_by_way_of_float32_too(count):
    x, w = matrices((9, 70), (70, 5))
    w.requires_grad_()
    with Float32Products():
        (x @ w).sum().backward()
    exact = x.double().sum(0)[:, None].expand(70, 5)
    assert w.grad.dtype == torch.bfloat16 and len(count) == 2
    torch.testing.assert_close(w.grad.double(), exact, rtol=2**-8, atol=1e-5)


def test_only_a_processor_without_products_lacks_them(capability):
    half, full = find("mlp/weak"), find("mlp/weak").override(precision="float32")
    assert lacks_products(half, CPU) == (capability == "AVX2")
    assert worth_compiling(find("vit/weak"), CPU) == (capability != "AVX2")
    assert worth_compiling(find("vit/weak").override(precision="float32"), CPU)
    assert not worth_compiling(half, CPU)
    assert not lacks_products(full, CPU)
    assert not lacks_products(half, torch.device("cuda"))


@pytest.mark.parametrize("recipe", ["digits/weak", "mlp/weak", "vit/strong"])
def test_a_trainer_takes_the_same_step_either_way(recipe, monkeypatch, count):
    small = {"depth": 2, "batch_size": 50, "precision": "bfloat16"} | (
        {"width": 32, "heads": 2} if recipe.startswith("vit") else {"width": 64}
    )
    found = {}
    for name in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        trainer = Trainer(find(recipe).override(**small), load("digits"), seed=0, compile=False)
        trainer.begin_epoch(0)
        x, y = trainer.data.train_images[:50], trainer.data.train_labels[:50]
        stats, norm = trainer._train_step(x, y, 0, 0)
        found[name] = torch.cat([stats[[0, 2]], norm[None]])
        assert bool(count) == (name == "AVX2")
        count.clear()
    torch.testing.assert_close(found["AVX2"], found["AVX512"], rtol=0.02, atol=0.02)


def test_a_compiled_trainer_keeps_the_processors_products(capability, count):
    trainer = Trainer(find("digits/weak").override(**SMALL), load("digits"), seed=0, compile=True)
    assert trainer.by_float32 is False


def test_records_say_how_products_were_made(capability, count, tmp_path):
    recipe, places = find("mlp/none").override(**SMALL), {}
    for name, group in (("one", "one"), ("several", "several")):
        places[name] = {"results": tmp_path, "checkpoints": tmp_path / "ck", "group": group}
    one = train(recipe, seed=0, epochs=1, quiet=True, **places["one"])
    assert bool(count) == (capability == "AVX2")
    count.clear()
    several = train_seeds(recipe, [0, 1], epochs=1, quiet=True, **places["several"])
    assert ("aten::baddbmm" in count) == (capability == "AVX2")
    by = ", products in float32" if capability == "AVX2" else ""
    assert {r.provenance["precision"] for r in (one, *several)} == {"bfloat16" + by}
    assert one.provenance["device"].endswith(f", {capability}")
