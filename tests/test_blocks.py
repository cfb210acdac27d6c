"""Properties of the networks' parts: rotary embedding, attention, drop path, dropout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from sigreg_lib._blocks import Attention, _attend
from sigreg_lib.models import (
    MLP,
    Dropout,
    DropPath,
    Rotary,
    VisionTransformer,
    build_model,
    redraw_drops,
)

IMAGE = (3, 8, 12)  # 2 x 3 patches


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def tiny_vit(**options: object) -> VisionTransformer:
    return build_model("vit", IMAGE, 5, seed=0, **({"width": 16, "depth": 2, "heads": 2} | options))


# ------------------------------------------------------------------------------------- rotary


def all_scores(rotary: Rotary, tokens: int, d: int, seed: int) -> Tensor:
    """Scores of one query vector at every place with one key vector at every place."""
    q, k = randn(2, d, seed=seed, dtype=torch.float64)
    at_all = [rotary(u.expand(1, tokens, 1, d))[0, :, 0] for u in (q, k)]
    return at_all[0] @ at_all[1].T


def spread_at_equal_displacement(scores: Tensor, rows: int, columns: int) -> float:
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for p in range(rows * columns):
        for r in range(rows * columns):
            shift = (p % columns - r % columns, p // columns - r // columns)
            groups.setdefault(shift, []).append(scores[p, r])
    assert len(groups) == (2 * rows - 1) * (2 * columns - 1)
    return max((torch.stack(g).max() - torch.stack(g).min()).item() for g in groups.values())


def test_axial_scores_depend_on_the_displacement_alone():
    scores = all_scores(Rotary("axial", (4, 6), 16, False), 24, 16, seed=17)
    assert spread_at_equal_displacement(scores, 4, 6) < 1e-5
    assert scores.std() > 0.1  # and they do depend on it


def test_published_scores_depend_on_absolute_position():
    scores = all_scores(Rotary("published", (4, 6), 16, False), 24, 16, seed=17)
    assert spread_at_equal_displacement(scores, 4, 6) > 1.0


def test_only_the_axial_rotary_is_a_rotation():
    u = randn(3, 24, 2, 16, seed=18, dtype=torch.float64)
    change = {
        kind: (Rotary(kind, (4, 6), 16, False)(u).norm(dim=-1) / u.norm(dim=-1) - 1).abs().max()
        for kind in ("axial", "published")
    }
    assert change["axial"] < 1e-6
    assert change["published"] > 0.1


def test_the_two_rotaries_agree_at_the_origin_and_leave_it_alone():
    u = randn(1, 24, 2, 16, seed=19)
    for kind in ("axial", "published"):
        torch.testing.assert_close(Rotary(kind, (4, 6), 16, False)(u)[:, 0], u[:, 0])


@pytest.mark.parametrize("kind", ["axial", "published"])
def test_class_token_is_not_rotated_and_shifts_no_angle(kind):
    u = randn(2, 25, 2, 16, seed=20)
    rotated = Rotary(kind, (4, 6), 16, True)(u)
    assert torch.equal(rotated[:, 0], u[:, 0])
    torch.testing.assert_close(rotated[:, 1:], Rotary(kind, (4, 6), 16, False)(u[:, 1:]))


def test_tables_are_not_in_checkpoints():
    names = tiny_vit(drop_path=0.1).state_dict()
    assert not [n for n in names if "rotary" in n or "drop" in n]


# ---------------------------------------------------------------------------------- attention


def test_plain_attention_is_the_fused_one():
    q, k, v = randn(3, 2, 3, 7, 8, seed=22, dtype=torch.float64)
    torch.testing.assert_close(_attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_commutes_with_a_permutation_of_tokens():
    attention = Attention(16, 2, qkv_bias=True).double()
    x = randn(2, 9, 16, seed=23, dtype=torch.float64)
    order = torch.randperm(9, generator=seeded(24))
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_softmax_sums_in_float32_under_bfloat16():
    # Equal scores over 4096 keys: a sum in bfloat16 would stop growing at 256.
    q, k, v = torch.zeros(2, 1, 1, 4096, 8), randn(1, 1, 4096, 8, seed=25), torch.ones(4096, 8)
    out = _attend(q[0].bfloat16(), k.bfloat16(), v[None, None].bfloat16())
    torch.testing.assert_close(out.float(), v[None, None], rtol=2**-7, atol=0)


def compiled_operations(module: nn.Module, x: Tensor, bfloat16: bool, training: bool) -> list[str]:
    """Names of the operations of the forward graph after the compiler's rewriting of patterns."""
    found: list[str] = []

    def keep(graph, inputs, **options):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        module, fullgraph=True, backend=lambda gm, args: compile_fx(gm, args, inner_compile=keep)
    )
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        compiled(x)
    return found


class Textbook(nn.Module):
    """What the compiler does rewrite: shows that the test below would notice."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 8)).unbind(2)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        return (q @ k.mT / math.sqrt(8)).softmax(-1) @ v


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_compiler_does_not_bring_the_fused_kernel_back(bfloat16, training):
    images = randn(4, *IMAGE, seed=26)
    for options in ({}, {"rotary": "none", "qkv_bias": True, "class_token": True}):
        model = tiny_vit(depth=1, **options).train(training)
        found = compiled_operations(model, images, bfloat16, training)
        assert not [name for name in found if "scaled_dot_product" in name]
        assert sum("bmm" in name for name in found) == 2 * len(model.blocks)


def test_compiler_rewrites_textbook_attention():
    x = randn(4, 6, 48, seed=27).requires_grad_()
    found = compiled_operations(Textbook(), x, bfloat16=False, training=True)
    assert [name for name in found if "scaled_dot_product" in name]


# ------------------------------------------------------------------------------ drop path


def drawn(rate: float, n: int, seed: int) -> DropPath:
    drop = DropPath(rate)
    drop.redraw(n, seeded(seed))
    return drop


def test_drop_path_keeps_or_drops_whole_samples_and_scales_by_one_over_keep():
    x = randn(1000, 3, 2, seed=33)
    out = drawn(0.2, 1000, seed=34)(x)
    dropped = (out == 0).flatten(1).all(1)
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.8)
    # binomial: standard deviation sqrt(0.2 * 0.8 / 1000) = 0.0126
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=4 * 0.0126)


def test_drop_path_is_the_identity_in_eval_and_at_rate_0():
    x = randn(7, 3, seed=35)
    assert torch.equal(DropPath(0.5).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_drop_path_draw_follows_from_the_generator_alone():
    state = torch.get_rng_state()
    factors = [drawn(0.3, 200, seed).factors for seed in (36, 36, 37)]
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])
    drawn(0.3, 200, seed=36)(torch.ones(200, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_keeps_or_drops_each_entry_by_itself():
    drop = Dropout(0.2, 50)
    drop.redraw(400, seeded(34))
    x = randn(400, 50, seed=33)
    dropped = (out := drop(x)) == 0
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.8)
    # binomial: standard deviation sqrt(0.2 * 0.8 / 20000) = 0.0028
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=4 * 0.0028)
    # independent entries: a row's share varies as a binomial of 50, a column's as one of 400
    for axis, n in ((1, 50), (0, 400)):
        spread = dropped.float().mean(axis).std().item()
        assert spread == pytest.approx(math.sqrt(0.16 / n), rel=0.4)


def test_dropout_of_the_mlp_is_in_its_hidden_activations_and_in_training_alone():
    model = build_model("mlp", IMAGE, 5, seed=0, width=16, depth=2, dropout=0.5)
    plain = build_model("mlp", IMAGE, 5, seed=0, width=16, depth=2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    images = randn(9, *IMAGE, seed=51)
    with pytest.raises(RuntimeError, match="Dropout was drawn for 0 samples, the batch has 9"):
        model(images)
    redraw_drops(model, 9, seeded(52))
    h = images.flatten(1)
    for layer, drop in zip(model.layers, model.drops, strict=True):
        h = F.relu(layer(h)) * drop.factors
    torch.testing.assert_close(model(images), model.head(h))
    assert not torch.equal(model.drops[0].factors, model.drops[1].factors)
    assert torch.equal(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_dropout_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=r"dropout=.*expected in"):
        MLP(IMAGE, 5, width=16, depth=2, dropout=rate)


def test_branches_of_one_model_are_drawn_independently():
    model = tiny_vit(drop_path=0.5, depth=3)
    redraw_drops(model, 400, seeded(38))
    rows = [f for b in model.blocks[1:] for f in (b.drop1.factors, b.drop2.factors)]
    dropped = torch.stack(rows) == 0
    rates = dropped.float().mean(1)
    torch.testing.assert_close(rates, torch.tensor([0.25, 0.25, 0.5, 0.5]), rtol=0, atol=0.1)
    # correlations of independent draws: standard error 1 / sqrt(400) = 0.05
    off_diagonal = torch.corrcoef(dropped.float()) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.2


def test_redraw_does_not_touch_a_generator_without_need():
    generator = seeded(39)
    redraw_drops(tiny_vit(), 8, generator)
    assert torch.equal(generator.get_state(), seeded(39).get_state())


def test_a_draw_for_no_sample_is_refused():
    with pytest.raises(ValueError, match="n=0: expected at least 1"):
        redraw_drops(tiny_vit(drop_path=0.1), 0, seeded(0))


def test_redraw_is_in_place_and_a_smaller_batch_uses_the_first_rows():
    drop = drawn(0.5, 64, seed=40)
    address = drop.factors.data_ptr()
    drop.redraw(10, seeded(41))
    assert drop.factors.data_ptr() == address
    x = torch.ones(10, 1)
    assert torch.equal(drop(x), drawn(0.5, 10, seed=41)(x))
    assert torch.equal(drop(x[:6]), drop(x)[:6])


def test_training_on_more_samples_than_were_drawn_is_refused():
    model = tiny_vit(drop_path=0.1)
    images = randn(8, *IMAGE, seed=42)
    with pytest.raises(RuntimeError, match=r"for 0 samples, the batch has 8.*redraw_drop"):
        model(images)
    redraw_drops(model, 8, seeded(43))
    model(images)
    redraw_drops(model, 5, seeded(43))
    with pytest.raises(RuntimeError, match="drawn for 5 samples"):
        model(images)
    model.eval()(images)


def test_a_compiled_model_sees_each_new_draw_without_compiling_again():
    model = tiny_vit(drop_path=0.5)
    images = randn(16, *IMAGE, seed=44)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs = []
    for seed in range(45, 49):
        redraw_drops(model, 16, seeded(seed))
        outputs.append(compiled(images))
        torch.testing.assert_close(outputs[-1], model(images))
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


def test_a_dropped_sample_passes_the_block_unchanged():
    block = tiny_vit(drop_path=0.9).blocks[1]
    for drop in (block.drop1, block.drop2):
        drop.redraw(50, seeded(49))  # the same draw, so that both branches drop together
    x = randn(50, 6, 16, seed=50)
    dropped = block.drop1.factors == 0
    assert 30 < dropped.sum() < 50
    assert torch.equal(block(x)[dropped], x[dropped])
    assert (block(x)[~dropped] != x[~dropped]).any()
