"""Captured steps: on the CPU with a tape that records operators as a CUDA graph records kernels."""

import contextlib
import types
from typing import NamedTuple

import pytest
import torch
from helpers import never_waiting, seeded
from test_train import striped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sigreg_lib.recipes import RECIPES
from sigreg_lib.train import Trainer, ensemble, train
from sigreg_lib.train.capture import WARM_UP, CapturedStep, CudaGraph
from sigreg_lib.train.ensemble import Ensemble

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# 96 images: three whole batches of 28 and a short one of 12, so that recording falls into the
# second epoch. The rates are exact in float32, as they are on the device.
VIT = {"depth": 2, "width": 32, "heads": 2, "precision": "float32", "epochs": 4, "batch_size": 28}
VIT |= {"lr": 2**-10, "lr_min": 0.0, "schedule": "constant"}
MLP = {"depth": 2, "width": 80, "precision": "float32", "epochs": 4, "batch_size": 28, "lr": 2**-3}
ROWS = [
    ("vit/none", VIT),
    ("vit/weak", VIT),
    ("vit/strong", VIT | {"mode": "corrected"}),
    ("expert/weak", VIT),  # drop path, class token, clipping
    ("mlp/weak", MLP | {"mode": "corrected"}),
    ("mlp/strong", MLP),
    ("mlp/weak", MLP | {"shared_sketch": False}),
    ("mlp-bn/weak", MLP),  # running statistics are updated within the graph
]


class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph that knows tensors by their memory and numbers by their value.

    Recording keeps every operator with its arguments; replaying calls them again on the same
    memory. What Python computed on the way, such as a learning rate that is no tensor, stays as it
    was. Unlike a CUDA graph it runs while it records, so that the first replay does nothing.
    """

    def __init__(self, device):
        super().__init__()
        self.records = self.replays = 0

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.calls, self.fresh = [], True
        self.records += 1
        with self:
            self.result = function()

    def __torch_dispatch__(self, operator, _types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        self.calls.append((operator, arguments, keywords or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if not self.fresh:
            for operator, arguments, keywords, before in self.calls:
                now = operator(*arguments, **keywords)
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
        self.fresh = False
        return self.result


def trainers(name, settings, data, captures=(None, Tape)):
    recipe = RECIPES[name].override(**settings)
    return [Trainer(recipe, data, seed=1, compile=False, capture=c) for c in captures]


@pytest.mark.parametrize(("name", "settings"), ROWS)
def test_replayed_steps_train_to_the_same_weights_as_the_plain_loop(name, settings):
    plain, captured = trainers(name, settings, striped())
    for epoch in range(3):
        assert plain.train_epoch(epoch) == captured.train_epoch(epoch)
        assert plain.evaluate()[0] == captured.evaluate()[0]  # in eval mode, between replays
    tape = captured.whole_step.graph
    assert (tape.records, tape.replays) == (1, 3 * 3 - WARM_UP)
    state = plain.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in captured.model.state_dict().items())


@pytest.mark.parametrize("name", ["vit/weak", "mlp/weak"])
def test_a_new_learning_rate_reaches_the_recorded_step(name):
    """Cosine: another rate each epoch, one recording; AdamW and SGD."""
    settings = (VIT if name == "vit/weak" else MLP) | {"schedule": "cosine"}
    plain, captured = trainers(name, settings, striped())
    for epoch in range(4):
        plain.train_epoch(epoch), captured.train_epoch(epoch)
        rate = captured.optimizer.param_groups[0]["lr"]
        assert rate.item() == pytest.approx(plain.recipe.learning_rate(epoch), rel=1e-6)
    assert captured.whole_step.graph.records == 1
    for p, q in zip(plain.parameters, captured.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-6)  # rates rounded to float32


def test_a_rate_that_is_no_tensor_would_not_reach_it():
    """The tape freezes numbers, as a graph does: else the test above would show nothing."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()
        return weight

    run = CapturedStep(step, optimizer, Tape(None))
    for _ in range(WARM_UP + 1):
        run(torch.ones(1))
    before = weight.item()
    optimizer.param_groups[0]["lr"] = 4.0
    run(torch.ones(1))
    assert before - weight.item() == 0.5


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


def adder():
    """A step that adds up all of its inputs, and its total."""
    total = torch.zeros(2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def step(x: Tensor, pair: Pair, more: dict[int, Tensor | None]) -> Tensor:
        total.add_(x + pair.first).add_(sum(m for m in more.values() if m is not None))
        return total * 1

    return CapturedStep(step, optimizer, Tape(None)), total


def test_the_buffers_are_the_only_inputs():
    """Tensors handed in may change once the call returns, and are not changed by it."""
    run, total = adder()
    expected, given = torch.zeros(2), []
    for call in range(WARM_UP + 4):
        g = seeded(call)
        x, first, matrix = (torch.randn(2, generator=g) for _ in range(3))
        expected += x + first
        expected += matrix
        found = run(x, Pair(first, None), {64: matrix, 10: None})
        assert torch.equal(found, expected) and torch.equal(total, expected)
        given += [tensor.fill_(float("nan")) for tensor in (x, first, matrix)]
    assert run.graph.records == 1
    assert torch.stack(given).isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, p, d: (x[:1], p, d),
        lambda x, p, d: (x, Pair(p.first, x), d),
        lambda x, p, d: (x, p, {64: x}),
        lambda x, p, d: (x, None, d),
        lambda x, p, d: (x.double(), p, d),
    ],
)
def test_inputs_of_another_shape_or_dtype_are_refused(change):
    run, _ = adder()
    inputs = torch.ones(2), Pair(torch.ones(2), None), {64: torch.ones(2), 10: None}
    run(*inputs)
    with pytest.raises(ValueError, match="takes the same shapes and dtypes at each call"):
        run(*change(*inputs))


@pytest.mark.parametrize("name", ["expert/weak", "mlp/strong"])
def test_stopping_and_going_on_equals_one_captured_run(name):
    settings = MLP if name.startswith("mlp") else VIT
    (whole,) = trainers(name, settings, striped(), [Tape])
    (first,) = trainers(name, settings, striped(), [Tape])
    for epoch in range(2):
        whole.train_epoch(epoch), first.train_epoch(epoch)
    state = first.state()
    for going_on in (first, *trainers(name, settings, striped(), [Tape, None])):
        going_on.load_state({k: _copied(v) for k, v in state.items()})
    assert first.whole_step.calls == 0  # the optimizer's state lies elsewhere now
    whole.train_epoch(2), first.train_epoch(2)
    for p, q in zip(whole.parameters, first.parameters, strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_goes_from_a_captured_run_to_a_plain_one_and_back():
    """The learning rate stays where the trainer wants it: a tensor or a number."""
    plain, captured = trainers("vit/weak", VIT, striped())
    plain.train_epoch(0)
    captured.load_state(_copied(plain.state()))
    assert isinstance(captured.optimizer.param_groups[0]["lr"], Tensor)
    captured.train_epoch(1)
    back = trainers("vit/weak", VIT, striped(), [None])[0]
    back.load_state(_copied(captured.state()))
    assert back.optimizer.param_groups[0]["lr"] == VIT["lr"]
    plain.train_epoch(1)
    for trainer in (plain, back):
        trainer.train_epoch(2)
    for p, q in zip(plain.parameters, back.parameters, strict=True):
        assert torch.equal(p, q)


def _copied(value):
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ["mlp/weak", "mlp/strong"])
def test_members_of_a_captured_ensemble_train_as_plain_ones(name):
    recipe, data = RECIPES[name].override(**MLP), striped()
    plain, captured = (
        Ensemble([Trainer(recipe, data, seed=s, compile=False) for s in (0, 1)], capture=c)
        for c in (None, Tape)
    )
    for epoch in range(3):
        assert plain.train_epoch(epoch) == captured.train_epoch(epoch)
    assert captured.whole_step.graph.records == 1


def test_capture_needs_a_gpu(tmp_path):
    with pytest.raises(
        ValueError, match="capture=True records a CUDA graph, but the device is cpu"
    ):
        train(RECIPES["digits/none"], capture=True, device="cpu", results=tmp_path)


# ---------------------------------------------------------------- nothing waits for the device


class Copies(TorchDispatchMode):
    """Counts copies to the device, and names those that would wait for it."""

    def __init__(self):
        super().__init__()
        self.waiting, self.count = [], 0

    def __torch_dispatch__(self, operator, _types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        copies = {"aten::_to_copy": arguments[:1], "aten::copy_": arguments[1:2]}
        source = copies.get(operator.name().split(".")[0], ())
        if source and source[0].device.type == "cpu" and result.device.type == "meta":
            self.count += 1
            schema = [argument.name for argument in operator._schema.arguments]
            named = dict(zip(schema, arguments, strict=False)) | (keywords or {})
            if not named.get("non_blocking"):
                self.waiting.append(f"{operator} of {tuple(result.shape)}")
        return result


def on_meta(name, settings, monkeypatch) -> Trainer:
    """A trainer whose "device" holds no values: whatever reads one back from it raises.

    The optimizer and the functions over all gradients have no such version; they are left out.
    """
    (trainer,) = trainers(name, settings, striped(), [None])
    meta = torch.device("meta")
    trainer.device, trainer.data = meta, trainer.data.to(meta)
    trainer.mean, trainer.std = trainer.mean.to(meta), trainer.std.to(meta)
    trainer.parameters = list(trainer.model.to(meta).parameters())
    trainer.like = {key: z.to(meta) for key, z in trainer.like.items()}
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    norm, clip = torch.nn.utils.get_total_norm, torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g, foreach: norm(g))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda p, most, n, foreach: clip(p, most, n)
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    if trainer.regularizer is not None:  # a generator of the device draws these there
        widths = {z.shape[-1] for z in trainer.like.values()}
        drawn = {c: trainer.regularizer.matrix(torch.empty(1, c)) for c in widths}
        held = {c: None if s is None else s.to(meta) for c, s in drawn.items()}
        trainer.regularizer.matrix = lambda z: held[z.shape[-1]]
    return trainer


@pytest.mark.parametrize(("name", "settings"), ROWS)
def test_an_epoch_waits_for_the_device_once(name, settings, monkeypatch):
    """Augmentation, mixing, steps: no value is read back before the end, every copy to the device
    is asynchronous."""
    trainer = on_meta(name, settings, monkeypatch)
    with Copies() as copies:
        totals = trainer.run_steps(0)
    assert copies.count >= 3 and copies.waiting == []
    assert len(totals) == 4 + (1 if name.endswith("none") else 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        trainer.read(totals)


@pytest.mark.parametrize("method", ["none", "weak", "strong"])
def test_an_epoch_of_an_ensemble_waits_once(method, monkeypatch):
    members = [on_meta(f"mlp/{method}", MLP, monkeypatch) for _ in range(2)]
    nothing = types.SimpleNamespace(zero_grad=lambda: None, step=lambda: None, param_groups=[])
    monkeypatch.setattr(ensemble, "build_optimizer", lambda *_, **__: nothing)
    together = Ensemble(members)
    with Copies() as copies:
        totals = together.run_steps(0)
    assert copies.count >= 2 and copies.waiting == []
    assert totals.shape == (2, 4 + (1 if method == "none" else 2))


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: float(x),
        lambda x: bool(x > 0),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_reading_a_value_from_the_pretended_device_raises(reading):
    """Else the test above would show nothing."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        reading(torch.ones((), device="meta"))


def test_a_copy_that_waits_would_be_named():
    with Copies() as copies:
        torch.ones(3).to("meta", non_blocking=True)
        torch.ones(4).to("meta")
        torch.empty(5, device="meta").copy_(torch.ones(5))
    assert copies.count == 3 and len(copies.waiting) == 2


# ---------------------------------------------------------------- on a GPU


@cuda
@pytest.mark.parametrize(("name", "settings"), ROWS)
def test_a_cuda_graph_trains_to_the_weights_of_eager_steps_and_never_waits(name, settings):
    data = striped().to("cuda")
    plain, captured = trainers(name, settings, data, (None, CudaGraph))
    for epoch in range(2):  # recording, which waits, falls into the second
        plain.train_epoch(epoch), captured.train_epoch(epoch)
    expected = plain.train_epoch(2)
    with never_waiting():
        totals = captured.run_steps(2)
    found = captured.read(totals)
    assert captured.whole_step.calls == 3 * 3
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    for p, q in zip(plain.parameters, captured.parameters, strict=True):
        # Adam's steps are of size lr whatever the gradient: tiny ones may turn sign
        bound = 10 * captured.recipe.lr if captured.recipe.optimizer == "adamw" else 1e-3
        assert (p - q).abs().max() < bound


@cuda
def test_a_compiled_objective_is_captured_too():
    data = striped().to("cuda")
    recipe = RECIPES["vit/weak"].override(**VIT)
    plain, captured = (
        Trainer(recipe, data, seed=1, compile=c is not None, capture=c) for c in (None, CudaGraph)
    )
    for epoch in range(3):
        a, b = plain.train_epoch(epoch), captured.train_epoch(epoch)
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)
    assert captured.whole_step.calls == 3 * 3


@cuda
def test_a_captured_ensemble_follows_plain_members_on_the_gpu():
    recipe, data = RECIPES["mlp/weak"].override(**MLP), striped().to("cuda")
    plain, captured = (
        Ensemble([Trainer(recipe, data, seed=s, compile=False) for s in (0, 1)], capture=c)
        for c in (None, CudaGraph)
    )
    for epoch in range(3):
        for a, b in zip(plain.train_epoch(epoch), captured.train_epoch(epoch), strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
