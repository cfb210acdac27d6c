"""Products of bfloat16 matrices by way of float32: their values, gradients, and where they act."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sigreg_lib.data import load
from sigreg_lib.recipes import find
from sigreg_lib.train import Trainer, precision, train, train_seeds
from sigreg_lib.train.precision import Float32Products, lacks_products, worth_compiling

CPU = torch.device("cpu")
SMALL = {"width": 64, "depth": 2, "batch_size": 50, "precision": "bfloat16"}
SMALL_VIT = SMALL | {"width": 32, "heads": 2}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution", "linear")


class Reached(TorchDispatchMode):
    """What reaches the kernels: products by name, apart for those with a bfloat16 argument."""

    def __init__(self):
        super().__init__()
        self.reduced, self.full = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot" in name:
            dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            (self.reduced if torch.bfloat16 in dtypes else self.full).append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["with products", "without"])
def has(request, monkeypatch):
    """Whether the processor is taken to have bfloat16 products."""
    monkeypatch.setattr(precision, "_has_products", lambda: request.param)
    return request.param


def matrices(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).bfloat16() for shape in shapes]


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
def test_a_product_is_the_float32_one_rounded_once(product, shapes):
    inputs = matrices(*shapes)
    with Reached() as reached, Float32Products():
        found = product(*inputs)
    assert torch.equal(found, product(*(a.float() for a in inputs)).bfloat16())
    assert reached.reduced == [] and len(reached.full) == 1
    exact = product(*(a.double() for a in inputs))
    # half a unit in the last of 8 binary digits, and what float32 sums of 70 terms lose
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_other_dtypes_and_operations_pass():
    x, w = (a.float() for a in matrices((9, 70), (70, 5)))
    with Float32Products():
        assert torch.equal(x @ w, torch.mm(x, w)) and (x @ w).dtype == torch.float32
        assert x.bfloat16().relu().dtype == torch.bfloat16


def test_gradients_go_by_way_of_float32_too():
    x, w = matrices((9, 70), (70, 5))
    w.requires_grad_()
    with Reached() as reached, Float32Products():
        (x @ w).sum().backward()
    assert reached.reduced == [] and len(reached.full) == 2
    exact = x.double().sum(0)[:, None].expand(70, 5)
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad.double(), exact, rtol=2**-8, atol=1e-5)


def test_only_a_processor_without_products_lacks_them(has):
    half, full = find("mlp/weak"), find("mlp/weak").override(precision="float32")
    assert lacks_products(half, CPU) == (not has)
    assert worth_compiling(find("vit/weak"), CPU) == has
    assert worth_compiling(find("vit/weak").override(precision="float32"), CPU)
    assert not worth_compiling(half, CPU)
    assert not lacks_products(full, CPU)
    assert not lacks_products(half, torch.device("cuda"))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("mlp/weak", SMALL),
        ("mlp/weak", SMALL | {"lam": "auto"}),
        ("mlp/weak", SMALL | {"norm": "iterative"}),
        ("mlp/none", SMALL | {"norm": "batch", "residual": True}),
        ("vit/strong", SMALL_VIT),
        ("expert/weak", SMALL_VIT),
    ],
)
def test_no_product_of_a_step_or_a_test_is_a_scalar_loop(recipe, changes, has):
    data = load("digits")
    trainer = Trainer(find(recipe).override(**changes), data, seed=0, compile=False)
    trainer.begin_epoch(0)
    with Reached() as step:
        trainer._train_step(data.train_images[:50], data.train_labels[:50], 0, 0)
    with Reached() as test:
        trainer.evaluate()
    for reached in (step, test):
        assert bool(reached.reduced) == has  # so that the recorder is seen to record
        assert reached.full or has


def test_nor_one_of_several_seeds_trained_at_once(tmp_path, has):
    places = {"results": tmp_path, "checkpoints": tmp_path}
    with Reached() as reached:
        train_seeds(find("mlp/weak").override(**SMALL), [0, 1], epochs=1, quiet=True, **places)
    assert bool(reached.reduced) == has and ("baddbmm" in reached.full) == (not has)


@pytest.mark.parametrize(("recipe", "changes"), [("mlp/weak", SMALL), ("vit/strong", SMALL_VIT)])
def test_a_trainer_takes_the_same_step_either_way(recipe, changes, monkeypatch):
    found = []
    for has in (True, False):
        monkeypatch.setattr(precision, "_has_products", lambda has=has: has)
        trainer = Trainer(find(recipe).override(**changes), load("digits"), seed=0, compile=False)
        trainer.begin_epoch(0)
        x, y = trainer.data.train_images[:50], trainer.data.train_labels[:50]
        stats, norm = trainer._train_step(x, y, 0, 0)
        found.append(torch.cat([stats[[0, 2]], norm[None]]))
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_a_compiled_trainer_keeps_the_processors_products(has):
    recipe = find("digits/weak").override(**SMALL)
    assert Trainer(recipe, load("digits"), seed=0, compile=True).by_float32 is False
    assert Trainer(recipe, load("digits"), seed=0, compile=False).by_float32 is (not has)


def test_records_say_how_products_were_made(has, tmp_path):
    recipe = find("mlp/none").override(**SMALL)
    options = {"epochs": 1, "quiet": True, "results": tmp_path, "checkpoints": tmp_path}
    one = train(recipe, seed=0, **options)
    several = train_seeds(recipe, [0, 1], group="several", **options)
    by = "" if has else ", products in float32"
    assert {r.provenance["precision"] for r in (one, *several)} == {"bfloat16" + by}
    assert one.provenance["kernels"] == torch.backends.cpu.get_cpu_capability()
