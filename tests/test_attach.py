"""Taps on a model: which layers, what they record, what they cost, and that they leave no trace."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.optim.swa_utils
import torch.utils.checkpoint
import torchvision
from helpers import seeded
from torch import Tensor, nn

from sigreg_lib.attach import attach
from sigreg_lib.losses import SIGReg, WeakSIGReg, strong_sigreg, weak_sigreg
from sigreg_lib.sketch import directions, gaussian


class Block(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


LOSSES = {  # module, its random matrix, the function
    "weak": (WeakSIGReg, gaussian, weak_sigreg),
    "strong": (SIGReg, directions, strong_sigreg),
}


class Net(nn.Module):
    """Eleven blocks, so that ``1`` and ``10`` are different names."""

    def __init__(self, width: int = 6, depth: int = 11, wide: int = 9) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, wide) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x if x.ndim == 2 else x.mean(1))


def initialize(net: nn.Module) -> None:
    g = seeded(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3, generator=g)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def outputs(net: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What the layers compute, by plain hooks of PyTorch."""
    seen: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name in names
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return seen


# ---------------------------------------------------------------- which layers

INSIDE = ("attn", "attn.0", "attn.1", "mlp", "mlp.0", "mlp.1", "mlp.2")  # a block
ONES = ("attn.1", "mlp.1")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*", [f"blocks.{i}" for i in range(11)]),
        ("blocks.1*", ["blocks.1", "blocks.10"]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.?", [f"blocks.{i}" for i in range(10)]),
        ("blocks.[02].mlp", ["blocks.0.mlp", "blocks.2.mlp"]),
        ("*.0.*", ["blocks.0.attn", "blocks.0.mlp"]),
        ("*", ["stem", "head"]),
        ("blocks.9.**", [f"blocks.9.{name}" for name in INSIDE]),
        ("**.mlp.2", [f"blocks.{i}.mlp.2" for i in range(11)]),
        ("blocks.**.mlp.0", [f"blocks.{i}.mlp.0" for i in range(11)]),
        ("**.mlp", [f"blocks.{i}.mlp" for i in range(11)]),
        ("**.attn.1*", [f"blocks.{i}.attn.1" for i in range(11)]),
        ("**.1*", ["blocks.1", "blocks.10", *(f"blocks.{i}.{n}" for i in range(11) for n in ONES)]),
        ("**.stem", ["stem"]),
        ("**.0.mlp.*", [f"blocks.0.mlp.{i}" for i in range(3)]),
    ],
)  # fmt: skip
def test_patterns_stay_within_a_level_unless_they_say_otherwise(pattern, names):
    handle = attach(Net(), pattern, WeakSIGReg())
    assert set(handle.names) == set(names) and len(handle.names) == len(names)


def test_two_stars_match_every_layer_that_can_be_called():
    net = Net()
    named = [name for name, _ in net.named_modules() if name not in ("", "blocks")]
    assert list(attach(net, "**", None).names) == named


def test_a_container_that_is_never_called_is_refused():
    net = Net()
    net.more = nn.ModuleDict({"a": nn.Linear(2, 2)})
    for layers in ("blocks", net.blocks, ["stem", "blocks"]):
        with pytest.raises(
            ValueError, match=r"'blocks' is a ModuleList, .*no forward.*'blocks\.\*'"
        ):
            attach(net, layers, None)
    with pytest.raises(ValueError, match="'more' is a ModuleDict"):
        attach(net, "mor*", None)
    net.more.forward = nn.Identity().forward  # given to the instance
    assert attach(net, "more", None).names == ("more",)


def test_lists_modules_and_patterns_tap_each_layer_once_in_the_order_given():
    net = Net()
    handle = attach(net, [net.head, "blocks.[01]", net.blocks[1], "head", "stem"], WeakSIGReg())
    assert handle.names == ("head", "blocks.0", "blocks.1", "stem")
    assert attach(net, net.blocks[3].mlp, WeakSIGReg()).names == ("blocks.3.mlp",)
    assert attach(net, ("stem", "head"), WeakSIGReg()).names == ("stem", "head")


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (
            "block.*",
            {},
            r"no layer matches 'block\.\*'; did you mean 'blocks\.\*'\? known: stem, blocks, ",
        ),
        ("blocks", {"on": "grad"}, "on must be 'output' or 'input', not 'grad'"),
        ("blocks.*", {"pool": "class"}, "unknown pool 'class'; did you mean 'class_token'"),
        ([], {}, "layers is empty"),
        (["stem", "nothing"], {}, "no layer matches 'nothing'; known: stem, blocks, "),
        ("blocks.3.mlpp", {}, r"did you mean 'blocks\.3\.mlp'\?"),
        (nn.Linear(2, 2), {}, "Linear is not a submodule of the model"),
        (["stem", "head"], {"weights": [1.0]}, "2 numbers >= 0 .* stem, head; got"),
        (["stem", "head"], {"weights": [1.0, -1.0]}, "weights must be"),
        (["stem", "head"], {"weights": [0.0, 0.0]}, "positive sum"),
        (["stem", "head"], {"weights": [float("nan"), 1.0]}, "weights must be 2 numbers"),
        (["stem", "head"], {"weights": {"stem": 1.0, "head": 1.0}}, "weights must be 2 numbers"),
        (["stem", "head"], {"columns": [2.0, 2.0]}, "columns must be 2 integers >= 1"),
        ("blocks.*", {"channels": "middle"}, "'auto', 'first' or 'last', not 'middle'"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_hook(layers, options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        attach(net, layers, WeakSIGReg(), **options)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("regularizer", [WeakSIGReg, "weak"])
def test_a_regularizer_is_an_instance_that_can_be_called(regularizer):
    with pytest.raises(TypeError, match=r"a module or function, WeakSIGReg\(\) say, not"):
        attach(Net(), "stem", regularizer)


# ---------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 4)], ids=["vectors", "tokens"])
def test_output_and_input_of_a_layer_are_recorded(shape):
    net, x = Net(), inputs(*shape)
    mean = (lambda z: z) if len(shape) == 2 else (lambda z: z.mean(1))
    seen = outputs(net, ["stem", "blocks.0.attn", "blocks.10"], x)
    out = attach(net, ["stem", "blocks.0.attn", "blocks.10"], None)
    into = attach(net, ["stem", "blocks.0"], None, on="input")
    net(x)
    for name, value in seen.items():
        torch.testing.assert_close(out.features[name], mean(value))
    torch.testing.assert_close(into.features["stem"], mean(x))
    torch.testing.assert_close(into.features["blocks.0"], mean(seen["stem"]))


def test_what_a_layer_gives_can_be_anything_that_a_callable_pools():
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "other": -x}

    net, x = nn.Sequential(Named()), inputs(6, 5, 4)
    handle = attach(net, "0", None)
    with pytest.raises(TypeError, match="layer '0' gives a dict, not a tensor: pass a callable"):
        net(x)
    handle.remove()
    handle = attach(net, "0", WeakSIGReg(), pool=lambda out: out["hidden"].bfloat16().amax(1))
    net(x)
    assert torch.equal(handle.features["0"], x.bfloat16().amax(1).float())


def test_a_callable_that_does_not_make_samples_of_channels_is_named_with_its_layer():
    net = Net()
    handle = attach(net, "blocks.3", WeakSIGReg(), pool=lambda z: z)
    net(inputs(8, 5, 4))
    with pytest.raises(ValueError, match=r"\(N, C\) of layer 'blocks.3', not \(8, 5, 6\)"):
        handle.loss()


def test_a_batch_of_one_is_named_with_its_layer():
    net = Net()
    handle = attach(net, "blocks.3", WeakSIGReg())
    net(inputs(1, 4))
    with pytest.raises(ValueError, match=r"layer 'blocks.3': one sample .*drop_last=True"):
        handle.loss()


def test_a_value_that_is_changed_in_place_is_not_regularized_in_silence():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU())
    initialize(net)
    handle, x = attach(net, ["0", "2"], WeakSIGReg()), inputs(12, 4)
    net(x)
    with pytest.raises(RuntimeError, match="layer '0': its value was changed in place"):
        handle.loss()
    net[1].inplace = False
    net(x)
    torch.testing.assert_close(handle.losses()[0], weak_sigreg(net[0](x)))


def test_an_input_into_which_its_own_layer_writes_is_not_regularized_in_silence():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    initialize(net)
    handle, x = attach(net, "1", WeakSIGReg(), on="input"), inputs(12, 4)
    net(x)
    with pytest.raises(RuntimeError, match="layer '1': its value was changed in place"):
        handle.loss()
    torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(handle.loss(), weak_sigreg(net[0](x)))


def test_compiled_code_may_change_a_value_in_place_after_it_was_tapped():
    def stack(inplace: bool) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))
        net.load_state_dict(state)
        return net

    state = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict()
    x = inputs(16, 6)
    found = []
    for net, compiled in ((stack(False), False), (stack(True), True)):
        handle = attach(net, "0", WeakSIGReg())
        out = (torch.compile(net, backend="aot_eager") if compiled else net)(x)
        (handle.loss() + out.square().mean()).backward()
        found.append([handle.features["0"], *(p.grad for p in net.parameters())])
    assert (found[0][0] < 0).any()  # which the activation would have cut off
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


class Checkpointed(nn.Module):
    """Two blocks of tokens under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, 9) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_a_loss_that_would_have_no_gradient_is_refused():
    x = torch.randn(16, 5, 6, generator=seeded(31)).requires_grad_()
    nets = {reentrant: Checkpointed(reentrant) for reentrant in (False, True)}
    nets[True].load_state_dict(nets[False].state_dict())
    handles = {r: attach(net, "blocks.*", WeakSIGReg(4, seed=1)) for r, net in nets.items()}
    nets[True](x)
    with pytest.raises(RuntimeError, match=r"'blocks\.0' ran without gradients.*use_reentrant=F"):
        handles[True].loss()
    nets[False](x)
    loss = handles[False].loss()
    gradients = torch.autograd.grad(loss, list(nets[False].blocks[0].parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)
    with torch.no_grad():  # a value is all that is wanted
        nets[False](x)
        assert handles[False].loss() > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_gives_no_loss_where_they_are_on(off, compiled):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), inputs(12, 4)
    handle = attach(net, "0", WeakSIGReg())
    run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    with off():
        run(x)
        assert handle.loss() > 0
    with pytest.raises(RuntimeError, match="'0' ran without gradients"):
        handle.loss()
    run(x)
    handle.loss().backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_weights_and_columns_may_come_as_tensors_and_arrays():
    net, x = Net(), inputs(12, 4)
    names = ["blocks.0", "blocks.1"]
    options = {"weights": torch.tensor([1.0, 3.0]), "columns": np.array([2, 3])}
    told = attach(net, names, WeakSIGReg(5, seed=1), weights=[1, 3], columns=[2, 3])
    other = attach(net, names, WeakSIGReg(5, seed=1), **options)
    net(x)
    assert torch.equal(told.loss(), other.loss())


@pytest.mark.parametrize("made", [{"a": 1}, ()], ids=["dict", "nothing"])
def test_a_pool_that_makes_no_tensor_is_named_with_its_layer(made):
    net = Net()
    attach(net, "stem", WeakSIGReg(), pool=lambda z: made)
    with pytest.raises(TypeError, match="layer 'stem' gives a"):
        net(inputs(3, 4))


def test_an_input_handed_over_by_keyword_cannot_be_tapped():
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    net = Caller()
    attach(net, "inner", None, on="input")
    with pytest.raises(RuntimeError, match="layer 'inner' is called by keywords"):
        net(inputs(3, 4))


def test_taps_for_looking_are_silent_while_the_model_trains():
    net = Net()
    handle = attach(net, "blocks.*", None)
    handle.in_training = False
    net(inputs(8, 4))
    assert handle.features == {}
    handle.always = True
    net(inputs(8, 4))
    assert set(handle.features) == set(handle.names)


def test_the_values_of_an_attention_module_are_taken_and_not_its_weights():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    initialize(attention)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x = Model(), inputs(3, 5, 4)
    handle = attach(model, "attention", None)
    expected = model(x).mean(1)
    torch.testing.assert_close(handle.features["attention"], expected)


# ---------------------------------------------------------------- one K a layer


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_a_layer_of_k_columns_sees_the_first_k_of_its_matrix(kind, shared):
    names, columns = ["blocks.0", "blocks.1.mlp.0", "blocks.1", "blocks.10"], [2, 5, 2, 3]
    net, x = Net(), inputs(12, 4)
    make, draw, single = LOSSES[kind]
    handle = attach(net, names, make(5, generator=seeded(2)), columns=columns, shared_sketch=shared)
    net(x)
    found, seen, g = handle.losses(), outputs(net, names, x), seeded(2)
    widths = (6, 9) if shared else [z.shape[-1] for z in seen.values()]
    matrices = {c if shared else i: draw(c, 5, generator=g) for i, c in enumerate(widths)}
    expected = [
        single(z, matrices[z.shape[-1] if shared else i][:, :k])
        for i, (z, k) in enumerate(zip(seen.values(), columns, strict=True))
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_k_that_no_matrix_can_give_is_refused():
    net, x = Net(), inputs(12, 4)
    with pytest.raises(ValueError, match=r"columns must be 2 integers >= 1.*blocks\.0, blocks\.1"):
        attach(net, ["blocks.0", "blocks.1"], WeakSIGReg(5), columns=[2])
    with pytest.raises(ValueError, match="columns are of a regularizer with a random matrix"):
        attach(net, ["blocks.0", "blocks.1"], lambda z: z.square().mean(), columns=[2, 2])
    for k, columns, reason in (
        (3, [2, 5], "asks for 5 of a random matrix of 3 columns"),
        (64, [2, 5], "asks for 2 of a random matrix that is not drawn"),
    ):
        handle = attach(net, ["blocks.0", "blocks.1"], WeakSIGReg(k), columns=columns)
        net(x)
        with pytest.raises(ValueError, match=reason):
            handle.loss()
        handle.remove()


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 5.0]])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_the_loss_is_the_weighted_average_of_single_calls_and_so_is_its_gradient(kind, weights):
    # two widths, one layer of width 9 among those of width 6
    names = ["blocks.0", "blocks.1.mlp.0", "blocks.1", "blocks.10"]
    net, x = Net(), inputs(12, 4)
    make, draw, single = LOSSES[kind]
    handle = attach(net, names, make(5, generator=seeded(2)), weights=weights, shared_sketch=True)
    net(x)
    loss = handle.loss()
    gradients = torch.autograd.grad(loss, list(net.blocks.parameters()), allow_unused=True)

    seen, g = outputs(net, names, x), seeded(2)
    matrices = {c: draw(c, 5, generator=g) for c in (6, 9)}  # one draw for each width
    expected = [single(z, matrices[z.shape[-1]]) for z in seen.values()]
    share = torch.tensor(weights or [1.0] * 4)
    average = (torch.stack(expected) * share).sum() / share.sum()
    torch.testing.assert_close(loss, average)
    torch.testing.assert_close(
        gradients,
        torch.autograd.grad(average, list(net.blocks.parameters()), allow_unused=True),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_each_layer_draws_a_sketch_of_its_own_in_the_order_of_names(kind):
    names = ["blocks.0", "blocks.1.mlp.0", "blocks.1", "blocks.10"]
    net, x = Net(), inputs(12, 4)
    make, draw, single = LOSSES[kind]
    handle = attach(net, names, make(5, generator=seeded(2)))
    net(x)
    found, seen, g = handle.losses(), outputs(net, names, x), seeded(2)
    matrices = {name: draw(seen[name].shape[-1], 5, generator=g) for name in handle.names}
    expected = torch.stack([single(seen[name], m) for name, m in matrices.items()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(handle.losses(matrices), expected)
    with pytest.raises(KeyError):  # by width: not what this handle looks for
        handle.losses({6: None, 9: None})
    for missing in ("blocks.0", "blocks.1"):  # of one shape
        with pytest.raises(ValueError, match="either all or none"):
            handle.losses(matrices | {missing: None})


def test_a_sketch_shared_by_equal_layers_adds_up_its_noise_and_own_sketches_average_it():
    # four layers with one and the same value: the variance of their mean over the draws
    net = nn.Sequential(*[nn.Identity() for _ in range(4)])
    x = inputs(16, 8)
    spread = {}
    for shared in (True, False):
        handle = attach(net, "*", WeakSIGReg(3, generator=seeded(4)), shared_sketch=shared)
        net(x)
        spread[shared] = torch.stack([handle.loss() for _ in range(400)]).var()
        handle.remove()
    # 4 in expectation; each variance of 400 draws is known to some 8 percent
    assert 2.8 < spread[True] / spread[False] < 5.6


def test_losses_are_given_for_each_layer_and_under_matrices_handed_in():
    net, x = Net(), inputs(12, 4)
    handle = attach(net, ["blocks.0", "blocks.0.mlp.0", "stem"], WeakSIGReg(5), shared_sketch=True)
    seen = outputs(net, list(handle.names), x)
    matrices = {6: gaussian(6, 5, generator=seeded(3)), 9: None}
    found = handle.losses(matrices)
    expected = [weak_sigreg(z, matrices[z.shape[-1]]) for z in seen.values()]
    by_name = dict(zip(seen, expected, strict=True))
    torch.testing.assert_close(found, torch.stack([by_name[name] for name in handle.names]))
    torch.testing.assert_close(handle.loss(matrices), found.mean())


def test_layers_with_different_numbers_of_samples_are_averaged_as_layers():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 2))
    initialize(net)
    x = inputs(3, 2, 9, 9)
    handle = attach(net, "*", WeakSIGReg(64), pool="tokens")
    net(x)
    first, last = net[0](x), net(x)
    assert handle.features["0"].shape == (3 * 16, 4) and handle.features["2"].shape == (3 * 9, 4)
    expected = [
        weak_sigreg(v.permute(0, 2, 3, 1).reshape(-1, 4)) for v in (first, first.relu(), last)
    ]
    torch.testing.assert_close(handle.losses(), torch.stack(expected))


def test_any_callable_regularizes():
    net, x = Net(), inputs(12, 4)
    handle = attach(net, "blocks.[0-2]", lambda z: z.square().mean())
    seen = outputs(net, list(handle.names), x)
    expected = torch.stack([z.square().mean() for z in seen.values()])
    torch.testing.assert_close(handle.losses(), expected)
    torch.testing.assert_close(handle.loss(), expected.mean())


def test_float64_models_are_regularized_in_float64():
    net, x = Net().double(), inputs(12, 4).double()
    handle = attach(net, "stem", WeakSIGReg())
    net(x)
    assert torch.equal(handle.loss(), weak_sigreg(net.stem(x)))


def test_features_are_float32_under_autocast():
    net, x = Net(), inputs(12, 4)
    handle = attach(net, ["stem", "blocks.10"], WeakSIGReg())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = outputs(net, list(handle.names), x)
        loss = handle.loss()
    assert all(z.dtype == torch.bfloat16 for z in (seen["stem"],))
    expected = torch.stack([weak_sigreg(z.float()) for z in seen.values()]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- when it is on


def test_in_eval_mode_nothing_is_recorded_and_the_loss_is_zero():
    net, x = Net().eval(), inputs(12, 4)
    handle = attach(net, "blocks.*", WeakSIGReg())
    net(x)
    assert handle.features == {} and handle.loss().item() == 0
    handle.always = True
    net(x)
    assert len(handle.features) == 11 and handle.loss().item() > 0


def test_a_model_without_parameters_has_loss_zero_in_eval_mode():
    handle = attach(nn.Sequential(nn.ReLU()), "0", WeakSIGReg())
    handle.model.eval()
    assert handle.loss().item() == 0


def test_a_loss_without_a_forward_pass_is_an_error():
    net, x = Net(), inputs(12, 4)
    handle = attach(net, ["stem", "head"], WeakSIGReg())
    with pytest.raises(RuntimeError, match=r"no features of stem, head: run the model in training"):
        handle.loss()
    net.eval()
    net(x)
    net.train()
    with pytest.raises(RuntimeError, match="no features of stem, head"):
        handle.loss()
    net(x)
    handle.loss()
    handle.clear()
    with pytest.raises(RuntimeError, match="no features of stem, head"):
        handle.loss()
    with pytest.raises(RuntimeError, match="records features only"):
        attach(net, "stem", None).loss()


def test_the_error_tells_of_a_layer_that_is_used_without_being_called():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    net, x = Model(), inputs(12, 5, 4)
    handle = attach(net, "**", WeakSIGReg())
    net(x)
    assert set(handle.features) == {"attention"}
    with pytest.raises(
        RuntimeError, match=r"no features of attention\.out_proj: .*without calling"
    ):
        handle.loss()
    handle = attach(net, "attention", WeakSIGReg())
    copy.deepcopy(net)(x)
    with pytest.raises(RuntimeError, match=r"no features of attention: .*a copy or replica"):
        handle.loss()


def test_the_last_of_several_runs_of_a_layer_counts():
    layer = nn.Linear(4, 4)
    initialize(layer)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    x = inputs(12, 4)
    handle = attach(net, layer, WeakSIGReg())
    net(x)
    assert handle.names == ("0",)
    torch.testing.assert_close(handle.loss(), weak_sigreg(net(x)))


def test_a_copy_of_the_model_does_not_feed_the_taps():
    net, x = Net(), inputs(12, 4)
    handle = attach(net, "stem", None)
    averaged = copy.deepcopy(net)
    net(x)
    averaged(inputs(12, 4, seed=4))
    torch.testing.assert_close(handle.features["stem"], net.stem(x))


@pytest.mark.parametrize("on", ["output", "input"])
def test_replicas_do_not_feed_the_taps(on):
    net = Net()
    handle = attach(net, "stem", None, on=on)
    replica = net.stem._replicate_for_data_parallel()
    replica.weight, replica.bias = net.stem.weight, net.stem.bias
    replica(inputs(12, 4))
    assert handle.features == {}


def test_a_copy_does_not_keep_the_model_alive():
    net = Net(depth=1)
    handle = attach(net, ["stem", "head"], WeakSIGReg())
    handle.model(inputs(12, 4))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    alive = weakref.ref(net)
    handle.remove()
    del net, handle
    gc.collect()
    assert alive() is None
    averaged(inputs(12, 4))


def test_models_with_taps_and_their_copies_can_be_saved_whole():
    net, x = Net(depth=1), inputs(12, 4)
    handle = attach(net, "stem", WeakSIGReg(), pool=lambda z: z)  # which cannot be pickled
    attach(net, "head", WeakSIGReg(), on="input")
    for model in (net, copy.deepcopy(net)):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), model(x))
        handle.clear()
        loaded(x)
        assert handle.features == {}
        attach(loaded, "stem", WeakSIGReg()).model(x)
    net(x)
    assert set(handle.features) == {"stem"}


# ---------------------------------------------------------------- no trace


def test_cleared_features_are_freed():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    handle = attach(net, "0", WeakSIGReg())
    net(inputs(12, 4))
    alive = weakref.ref(handle.features["0"])
    assert alive() is not None
    handle.clear()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["compiled", "inference"])
def test_a_later_pass_of_another_kind_frees_the_features_of_an_eager_one(kind):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), inputs(12, 4)
    handle = attach(net, "0", WeakSIGReg())
    net(x)
    alive = weakref.ref(handle.features["0"])
    with torch.inference_mode(kind == "inference"):
        (torch.compile(net, backend="eager", fullgraph=True) if kind == "compiled" else net)(x)
    gc.collect()
    assert alive() is None


def hooks(net: nn.Module) -> Iterator[dict]:
    for module in net.modules():
        for name, value in vars(module).items():
            if "hooks" in name:
                yield name, dict(value) if isinstance(value, dict) else value


def test_removal_leaves_the_model_as_it_was():
    net, x = Net(), inputs(12, 4)
    state, before = copy.deepcopy(net.state_dict()), list(hooks(net))
    attributes = [set(vars(module)) for module in net.modules()]
    handle = attach(net, "**", WeakSIGReg(5), pool="mean")
    other = attach(net, "stem", None, on="input")
    assert list(net.state_dict()) == list(state) and len(list(net.modules())) == len(attributes)
    net(x)
    handle.remove()
    assert handle.features == {}
    net(x)
    assert handle.features == {} and set(other.features) == {"stem"}  # only its own taps
    other.remove()
    assert list(hooks(net)) == before
    assert [set(vars(module)) for module in net.modules()] == attributes
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    handle.remove()  # twice is harmless


def test_taps_do_not_change_what_the_model_computes():
    net, x = Net(), inputs(12, 5, 4)
    expected = net(x)
    attach(net, ["**.mlp", "blocks.*"], WeakSIGReg(), pool="tokens")
    assert torch.equal(net(x), expected)


def test_a_printed_handle_names_its_layers_and_its_regularizer():
    said = repr(attach(Net(depth=2), "blocks.*", WeakSIGReg(5), on="input", pool="tokens"))
    assert said.startswith("Handle(blocks.0, blocks.1; on='input', pool='tokens', ")
    assert "WeakSIGReg(sketch_dim=5" in said


# ---------------------------------------------------------------- in other people's scripts


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
def test_a_compiled_step_has_the_eager_loss_and_gradient():
    net, x = Net(depth=1), inputs(12, 5, 4)
    eager = attach(net, ["blocks.*", "**.mlp.0"], WeakSIGReg(5, generator=seeded(5)))
    strong = attach(net, "blocks.*", SIGReg(5, generator=seeded(6)), pool="tokens")

    def step(x: Tensor) -> Tensor:
        return net(x).square().mean() + 0.1 * eager.loss() + 0.01 * strong.loss()

    def run(step) -> tuple[Tensor, ...]:
        eager.regularizer.source.generator.manual_seed(5)
        strong.regularizer.source.generator.manual_seed(6)
        loss = step(x)
        return loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(run(compiled), run(step), rtol=1e-4, atol=1e-6)


def test_a_torchvision_resnet_is_regularized_at_its_four_stages():
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    initialize(net)
    x = inputs(6, 3, 32, 32)
    handle = attach(net, "layer?", SIGReg(8, generator=seeded(7)))
    assert handle.names == ("layer1", "layer2", "layer3", "layer4")
    seen = outputs(net, list(handle.names), x)
    assert [z.shape[1] for z in handle.features.values()] == [64, 128, 256, 512]
    loss, g = handle.loss(), seeded(7)
    expected = [
        strong_sigreg(v.mean((2, 3)), directions(v.shape[1], 8, generator=g)) for v in seen.values()
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert net.conv1.weight.grad.norm() > 0 and net.fc.weight.grad is None
    assert len(attach(net, "**.conv?", None).names) == 17
    handle.remove()
