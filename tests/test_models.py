"""Properties of the networks: counts, laws, references in float64, invariances, randomness."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from torch import Tensor, nn

from sigreg_lib.models import MLP, VisionTransformer, build_model, redraw_drops
from sigreg_lib.recipes import RECIPES

CIFAR = (3, 32, 32)
EXPERT = {
    "width": 192,
    "depth": 9,
    "heads": 3,
    "mlp_ratio": 4,
    "rotary": "none",
    "class_token": True,
    "position_embedding": True,
    "qkv_bias": True,
    "drop_path": 0.1,
    "init": "expert",
}
TINY = {"width": 16, "depth": 2, "heads": 2}
TINY_IMAGE = (3, 8, 12)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def tiny_vit(seed: int = 0, **options: object) -> VisionTransformer:
    return build_model("vit", TINY_IMAGE, 5, seed=seed, **(TINY | options))


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """The model in float64 with every parameter random, so that no zero hides a mistake."""
    model = model.double().eval()
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


# ------------------------------------------------------------------------------- counts and laws


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_vit_has_the_parameters_of_the_facts():
    patch = 48 * 256 + 256
    attention = 256 * 768 + (256 * 256 + 256)
    mlp = (256 * 512 + 512) + (512 * 256 + 256)
    block = 2 * (2 * 256) + attention + mlp
    by_hand = patch + 6 * block + 2 * 256 + (256 * 100 + 100)
    assert by_hand == 3_196_772
    assert count(build_model("vit", CIFAR, 100, seed=0)) == by_hand


def test_expert_has_the_parameters_of_the_facts():
    embedding = (48 * 192 + 192) + 192 + 65 * 192
    attention = (192 * 576 + 576) + (192 * 192 + 192)
    mlp = (192 * 768 + 768) + (768 * 192 + 192)
    by_hand = embedding + 9 * (4 * 192 + attention + mlp) + 2 * 192 + (192 * 100 + 100)
    assert by_hand == 4_045_540
    assert count(build_model("vit", CIFAR, 100, seed=0, **EXPERT)) == by_hand


def test_mlp_has_the_parameters_of_the_facts():
    by_hand = (3072 * 1024 + 1024) + 4 * (1024 * 1024 + 1024) + (1024 * 100 + 100)
    assert by_hand == 7_447_652
    assert count(build_model("mlp", CIFAR, 100, seed=0)) == by_hand


def test_no_norm_means_no_norm_anywhere():
    for kind in ("mlp", "vit"):
        model = build_model(kind, CIFAR, 10, seed=0, norm="none")
        names = {type(m).__name__ for m in model.modules()}
        assert not {name for name in names if "Norm" in name}
    # 2 per block and the final one, scale and shift each
    with_norm = count(build_model("vit", CIFAR, 10, seed=0))
    assert with_norm - count(model) == 13 * 2 * 256


def linears(model: VisionTransformer) -> list[nn.Linear]:
    return [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]


def test_vit_weights_are_normal_with_std_0_02_and_biases_zero():
    model = build_model("vit", CIFAR, 100, seed=1)
    chosen = [*linears(model), model.head]
    w = torch.cat([m.weight.flatten() for m in chosen]).double()
    # standard errors: std / sqrt(2 n) and sqrt(24 / n); a cut at two std would give 0.0176, -0.63
    assert w.std().item() == pytest.approx(0.02, abs=5 * 0.02 / math.sqrt(2 * len(w)))
    assert abs(w.mean().item()) < 5 * 0.02 / math.sqrt(len(w))
    assert abs((w / w.std()).pow(4).mean().item() - 3) < 5 * math.sqrt(24 / len(w))
    assert all(m.bias is None or not m.bias.any() for m in chosen)
    assert [m.bias is None for m in linears(model)[:4]] == [True, False, False, False]


def assert_uniform(w: Tensor, bound: float) -> None:
    w = w.flatten().double()
    # the standard error of a uniform variance is bound^2 sqrt(4 / 45 / n)
    tolerance = 5 * math.sqrt(4 / 45 / len(w)) * bound**2
    assert w.abs().max().item() <= bound * (1 + 1e-6)
    assert w.pow(2).mean().item() == pytest.approx(bound**2 / 3, abs=tolerance)


@pytest.mark.parametrize("options", [{}, EXPERT, {"init": "xavier"}, {"init": "default"}])
def test_patch_embedding_starts_from_the_default_law_of_a_convolution(options):
    model = build_model("vit", CIFAR, 100, seed=2, **options)
    assert_uniform(model.patch_embedding.weight, 1 / math.sqrt(3 * 4 * 4))
    assert_uniform(model.patch_embedding.bias, 1 / math.sqrt(3 * 4 * 4))


def test_expert_head_is_xavier_and_the_rest_default():
    model = build_model("vit", CIFAR, 100, seed=3, **EXPERT)
    assert_uniform(model.head.weight, math.sqrt(6 / (192 + 100)))
    assert not model.head.bias.any()
    for linear in linears(model):
        assert_uniform(linear.weight, 1 / math.sqrt(linear.in_features))
        assert_uniform(linear.bias, 1 / math.sqrt(linear.in_features))
    embedding = torch.cat([model.class_token, model.position_embedding])
    assert embedding.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * embedding.numel()))


def test_xavier_init_reaches_every_linear_map_of_blocks_and_head():
    model = build_model("vit", CIFAR, 100, seed=4, init="xavier", qkv_bias=True)
    for linear in [*linears(model), model.head]:
        fan = linear.in_features + linear.out_features
        assert_uniform(linear.weight, math.sqrt(6 / fan))
        assert not linear.bias.any()


PLAIN = {"residual": False, "norm": "none"}
ORTHOGONAL = pytest.mark.parametrize("init", ["orthogonal", "identity_attention"])


def attention_weights(attention: nn.Module, x: Tensor, rotary: nn.Module | None) -> Tensor:
    """Softmax of the scores, (N, heads, tokens, tokens), from the layer's own maps."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    if rotary is not None:
        q, k = rotary(q), rotary(k)
    d = q.shape[-1]
    return (torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(d)).softmax(-1)


@ORTHOGONAL
@pytest.mark.parametrize("hidden", [2, 2.5, 4])
def test_a_gelu_network_started_orthogonal_is_an_isometry_at_every_scale(init, hidden):
    model = build_model("vit", CIFAR, 10, seed=6, init=init, mlp_ratio=hidden, **PLAIN).double()
    for scale in (1e-6, 1.0, 100.0):
        x = scale * randn(2, 5, 256, seed=7, dtype=torch.float64)
        out = model.blocks[1].mlp(x)
        torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
        torch.testing.assert_close(out @ out.mT, x @ x.mT, rtol=1e-4, atol=1e-5 * scale**2)
        torch.testing.assert_close(model.blocks[1].mlp(-x), -out)


def test_a_narrow_or_odd_gelu_network_started_orthogonal_projects_onto_half_its_units():
    model = tiny_vit(init="orthogonal", mlp_ratio=11 / 16).double()  # five pairs and one unit
    mlp = model.blocks[0].mlp
    out = mlp(torch.eye(16, dtype=torch.float64))
    values = torch.linalg.svdvals(out)
    torch.testing.assert_close(values[:5], torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert values[5:].max() < 1e-6


@pytest.mark.parametrize("rotary", ["published", "axial", "none"])
def test_identity_attention_starts_near_the_identity_and_every_block_keeps_the_scale(rotary):
    options = {"init": "identity_attention", "rotary": rotary, **PLAIN}
    model = build_model("vit", CIFAR, 100, seed=8, **options)
    x = randn(4, 64, 256, seed=9)
    for block in model.blocks:
        weights = attention_weights(block.attention, x, model.rotary)
        assert weights.diagonal(dim1=-2, dim2=-1).mean() > 0.95
        out = block(x, model.rotary)
        ratio = (out.square().mean() / x.square().mean()).sqrt().item()
        assert ratio == pytest.approx(1, rel=0.1)
        x = out
    assert 0.9 < x.square().mean().sqrt() < 1.1  # after all six, too


def test_independent_orthogonal_queries_and_keys_do_not_single_out_the_token_itself():
    model = build_model("vit", CIFAR, 100, seed=8, init="orthogonal", rotary="none", **PLAIN)
    weights = attention_weights(model.blocks[0].attention, randn(4, 64, 256, seed=9), None)
    assert weights.diagonal(dim1=-2, dim2=-1).mean().item() == pytest.approx(1 / 64, rel=0.1)


@ORTHOGONAL
def test_orthogonal_starts_leave_head_and_biases_as_xavier_does(init):
    model = build_model("vit", CIFAR, 100, seed=4, init=init, qkv_bias=True)
    assert_uniform(model.head.weight, math.sqrt(6 / 356))
    assert all(not m.bias.any() for m in [*linears(model), model.head])


def test_mlp_starts_from_the_default_law():
    model = build_model("mlp", CIFAR, 100, seed=5)
    for linear in [*model.layers, model.head]:
        assert_uniform(linear.weight, 1 / math.sqrt(linear.in_features))


# ------------------------------------------------------------------------- references in float64


def rotate_by_hand(u: Tensor, x: int, y: int, pairs: list[tuple[int, int]]) -> Tensor:
    """Rotary embedding of one head's vector at column x, row y, one channel at a time."""
    d = len(u)
    quarter = d // 4

    def angle(c: int) -> float:
        i = c % quarter
        return (x if c < d // 2 else y) * 10000.0 ** (-2 * i / (d / 2))

    out = torch.empty_like(u)
    for i, j in pairs:
        out[i] = u[i] * math.cos(angle(i)) - u[j] * math.sin(angle(i))
        out[j] = u[j] * math.cos(angle(j)) + u[i] * math.sin(angle(j))
    return out


def pairs_of(kind: str, d: int) -> list[tuple[int, int]]:
    if kind == "published":
        return [(i, i + d // 2) for i in range(d // 2)]
    return [(h + i, h + i + d // 4) for h in (0, d // 2) for i in range(d // 4)]


def vit_by_hand(model: VisionTransformer, image: Tensor, rotary: str, patch: int = 4) -> Tensor:
    """Logits of one image: loops over patches, heads, queries and keys, from the equations."""
    w = dict(model.named_parameters())
    _, height, width = image.shape
    places, tokens = [], []
    for y in range(height // patch):
        for x in range(width // patch):
            pixels = image[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            kernel = w["patch_embedding.weight"].view(-1, *pixels.shape)
            tokens.append((kernel * pixels).sum((1, 2, 3)) + w["patch_embedding.bias"])
            places.append((x, y))
    if "class_token" in w:
        tokens.insert(0, w["class_token"][0])
        places.insert(0, (0, 0))
    x = torch.stack(tokens)
    if "position_embedding" in w:
        x = x + w["position_embedding"]
    c, heads = x.shape[1], model.blocks[0].attention.heads
    d = c // heads

    def norm(z: Tensor, name: str) -> Tensor:
        z = z - z.mean(1, keepdim=True)
        z = z / (z.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(len(model.blocks)):
        b = f"blocks.{i}"
        qkv = norm(x, f"{b}.norm1") @ w[f"{b}.attention.qkv.weight"].T
        qkv = qkv + w.get(f"{b}.attention.qkv.bias", torch.zeros(3 * c, dtype=x.dtype))
        mixed = torch.zeros_like(x)
        for h in range(heads):
            q, k, v = (qkv[:, j * c + h * d : j * c + (h + 1) * d] for j in range(3))
            if rotary != "none":
                pairs = pairs_of(rotary, d)
                q = torch.stack(
                    [rotate_by_hand(u, *p, pairs) for u, p in zip(q, places, strict=True)]
                )
                k = torch.stack(
                    [rotate_by_hand(u, *p, pairs) for u, p in zip(k, places, strict=True)]
                )
            scores = (q[:, None, :] * k[None, :, :]).sum(-1) / math.sqrt(d)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            mixed[:, h * d : (h + 1) * d] = weights @ v
        projection = f"{b}.attention.projection"
        x = x + mixed @ w[f"{projection}.weight"].T + w[f"{projection}.bias"]
        z = norm(x, f"{b}.norm2") @ w[f"{b}.mlp.0.weight"].T + w[f"{b}.mlp.0.bias"]
        z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        x = x + z @ w[f"{b}.mlp.2.weight"].T + w[f"{b}.mlp.2.bias"]
    x = norm(x, "norm")
    pooled = x[0] if "class_token" in w else x.mean(0)
    return w["head.weight"] @ pooled + w["head.bias"]


@pytest.mark.parametrize("rotary", ["published", "axial", "none"])
@pytest.mark.parametrize("expert", [False, True])
def test_vit_is_its_equations_in_float64(rotary, expert):
    extra = {"class_token": expert, "position_embedding": expert, "qkv_bias": expert}
    model = scrambled(tiny_vit(rotary=rotary, **extra), seed=6)
    images = randn(2, *TINY_IMAGE, seed=7, dtype=torch.float64)
    by_hand = torch.stack([vit_by_hand(model, image, rotary) for image in images])
    # the tables of angles are float32
    torch.testing.assert_close(model(images), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_mlp_is_its_equations(residual, norm):
    model = scrambled(MLP((1, 2, 3), 4, width=6, depth=3, residual=residual, norm=norm), seed=8)
    x = randn(5, 1, 2, 3, seed=9, dtype=torch.float64)
    h = x.reshape(5, 6)
    w = dict(model.named_parameters())
    for i in range(3):
        z = h @ w[f"layers.{i}.weight"].T + w[f"layers.{i}.bias"]
        if norm == "layer":
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            z = z * w[f"norms.{i}.weight"] + w[f"norms.{i}.bias"]
        # the first layer has no residual, even where, as here, image and width agree in size
        h = z.clamp(min=0) + (h if residual and i > 0 else 0)
    logits = h @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(x), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_named_layers_can_be_tapped(kind):
    model = build_model(kind, CIFAR, 10, seed=10)
    seen: dict[str, Tensor] = {}
    names = (
        [f"layers.{i}" for i in range(5)] if kind == "mlp" else [f"blocks.{i}" for i in range(6)]
    )
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
    model(randn(3, *CIFAR, seed=11))
    assert list(seen) == names
    shape = (3, 1024) if kind == "mlp" else (3, 64, 256)
    assert all(out.shape == shape for out in seen.values())
    if kind == "mlp":  # pre-activations: half of them are negative
        assert all(0.3 < (out < 0).float().mean() < 0.7 for out in seen.values())


def test_branches_are_tapped_before_they_are_added():
    model, seen = tiny_vit(), {}
    block = model.blocks[1]
    for name in ("attention", "mlp"):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
    x = randn(2, 6, 16, seed=12)
    torch.testing.assert_close(block(x), x + seen["attention"] + seen["mlp"])


# ------------------------------------------------------------------------------ norm and residual


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_batch_norm_standardises_each_channel_over_batch_and_tokens(kind):
    model = build_model(kind, TINY_IMAGE, 5, seed=13, norm="batch", width=32, depth=2)
    seen: dict[str, Tensor] = {}
    tapped = "norms.1" if kind == "mlp" else "blocks.1.norm2"
    model.get_submodule(tapped).register_forward_hook(
        lambda module, args, out: seen.update(inp=args[0], out=out)
    )
    model(randn(32, *TINY_IMAGE, seed=14))
    z = seen["inp"].flatten(0, -2)
    expected = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(seen["out"].flatten(0, -2), expected, rtol=1e-4, atol=1e-5)


def test_mlp_without_norm_and_bias_is_positively_homogeneous():
    model = MLP(CIFAR, 10, width=32, depth=3)
    for linear in [*model.layers, model.head]:
        nn.init.zeros_(linear.bias)
    x = randn(4, *CIFAR, seed=15)
    torch.testing.assert_close(model(8 * x), 8 * model(x))


@pytest.mark.parametrize("residual", [True, False])
def test_silent_branches_leave_the_stream_or_nothing(residual):
    model = tiny_vit(residual=residual)
    for block in model.blocks:
        for linear in (block.attention.projection, block.mlp[2]):
            nn.init.zeros_(linear.weight)
    x = randn(2, 6, 16, seed=16)
    torch.testing.assert_close(model.blocks[0](x), x if residual else torch.zeros_like(x))


def test_without_position_information_vit_cannot_see_the_order_of_patches():
    images = randn(2, *TINY_IMAGE, seed=21)
    swapped = torch.cat([images[..., 4:], images[..., :4]], dim=-1)  # whole patches move
    blind = tiny_vit(rotary="none")
    torch.testing.assert_close(blind(swapped), blind(images))
    seeing = scrambled(tiny_vit(rotary="published"), seed=22)
    assert (seeing(swapped.double()) - seeing(images.double())).abs().max() > 1e-3


def test_drop_path_rates_rise_linearly_to_the_last_block():
    blocks = build_model("vit", CIFAR, 100, seed=0, **EXPERT).blocks
    rates = [0.1 * i / 8 for i in range(9)]
    assert [block.drop1.rate for block in blocks] == pytest.approx(rates)
    assert [block.drop2.rate for block in blocks] == pytest.approx(rates)


# ------------------------------------------------------------------------------- precision


def test_residual_stream_is_float32_inside_autocast():
    model, dtypes = tiny_vit(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(randn(2, *TINY_IMAGE, seed=28))
    assert dtypes == [torch.float32] * 2


def test_bfloat16_autocast_stays_near_float64():
    model = build_model("vit", CIFAR, 10, seed=29, depth=3)
    images = randn(4, *CIFAR, seed=30)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images).double()
    exact = model.double()(images.double())
    assert ((low - exact).norm() / exact.norm()).item() < 0.02


def test_batch_norm_is_float32_inside_autocast():
    norm = build_model("mlp", (1, 1, 1), 2, seed=31, norm="batch", width=4, depth=1).norms[0]
    z = (100 + 8 * randn(512, 4, seed=32)).bfloat16()  # as a linear map hands it on
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(z)
    exact = z.double()
    exact = (exact - exact.mean(0)) / (exact.var(0, correction=0) + 1e-5).sqrt()
    # a result in bfloat16 would be off by 4e-3
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------- transforms and construction


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_functional_gradient_is_the_autograd_gradient(kind):
    model = build_model(kind, TINY_IMAGE, 5, seed=51, width=32, depth=2, norm="layer")
    images, labels = randn(4, *TINY_IMAGE, seed=52), torch.tensor([0, 1, 2, 3])
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (images,)), labels)

    gradient = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()})
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(gradient[name], p.grad)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_weights_follow_from_the_seed_and_leave_the_global_state_alone(kind):
    torch.manual_seed(53)
    state = torch.get_rng_state()
    first = build_model(kind, TINY_IMAGE, 5, seed=7, width=32).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(54)
    second = build_model(kind, TINY_IMAGE, 5, seed=7, width=32).state_dict()
    other = build_model(kind, TINY_IMAGE, 5, seed=8, width=32).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: build_model("vti", CIFAR, 10, seed=0), ValueError, "did you mean 'vit'"),
        (
            lambda: build_model("vit", CIFAR, 10, seed=0, dropath=0.1),
            TypeError,
            "unknown option 'dropath' of 'vit'.*did you mean 'drop_path'",
        ),
        (lambda: build_model("mlp", CIFAR, 10, seed=0, heads=3), TypeError, "'heads' of 'mlp'"),
        (lambda: tiny_vit(norm="leyer"), ValueError, "norm='leyer'.*did you mean 'layer'"),
        (lambda: tiny_vit(rotary="axail"), ValueError, "rotary='axail'.*did you mean 'axial'"),
        (lambda: tiny_vit(init="xavir"), ValueError, "init='xavir'.*did you mean 'xavier'"),
        (lambda: tiny_vit(patch=5), ValueError, "patch=5"),
        (lambda: tiny_vit(heads=3), ValueError, "heads=3: expected a divisor of width=16"),
        (lambda: tiny_vit(heads=8), ValueError, "width / heads=2.*multiple of 4"),
        (lambda: tiny_vit(drop_path=1.0), ValueError, "drop_path=1.0"),
        (lambda: tiny_vit(drop_path=0.1, residual=False), ValueError, "without residual"),
        (lambda: tiny_vit(mlp_ratio=0), ValueError, "mlp_ratio=0"),
        (lambda: MLP(CIFAR, 10, depth=0), ValueError, "depth=0"),
        (lambda: MLP(CIFAR, 10, width=1.5), TypeError, "width=1.5"),
        (lambda: MLP((32, 32), 10), ValueError, r"image_shape=\(32, 32\)"),
        (lambda: tiny_vit()(torch.zeros(2, 3, 8, 8)), ValueError, r"shape \(2, 3, 8, 8\)"),
        (lambda: tiny_vit()(torch.zeros(2, 3, 8, 12).byte()), TypeError, "uint8"),
    ],
)
def test_a_bad_argument_is_named_with_what_would_be_right(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_tuned_transformer_is_that_of_pytorch_s_own_layers_and_so_is_a_step_s_gradient():
    """expert, its drop paths drawn, beside encoder layers that PyTorch maintains."""
    recipe = RECIPES["expert/none"].override(width=24, depth=3, heads=3, drop_path=0.5)
    options = recipe.model_options()
    ours = build_model("vit", (3, 8, 8), 5, seed=0, **options).double().train()
    redraw_drops(ours, 6, seeded(1))
    theirs = [
        nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(3)
    ]
    names = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.projection.": "self_attn.out_proj.",
        "mlp.0.": "linear1.",
        "mlp.2.": "linear2.",
    }
    for layer, block in zip(theirs, ours.blocks, strict=True):
        state = dict(block.state_dict())
        for own, other in names.items():
            state = {k.replace(own, other): v for k, v in state.items()}
        layer.double().load_state_dict(state)
    images = torch.randn(6, 3, 8, 8, generator=seeded(2), dtype=torch.float64)
    labels = torch.arange(6) % 5

    weight = ours.patch_embedding.weight.view(24, 3, 4, 4)
    x = F.conv2d(images, weight, ours.patch_embedding.bias, stride=4).flatten(2).mT
    x = torch.cat([ours.class_token.expand(6, 1, -1), x], dim=1) + ours.position_embedding
    for layer, block in zip(theirs, ours.blocks, strict=True):
        kept = [
            1.0 if drop.rate == 0 else drop.factors[:6].double().view(-1, 1, 1)
            for drop in (block.drop1, block.drop2)
        ]
        y = layer.norm1(x)
        x = x + kept[0] * layer.self_attn(y, y, y, need_weights=False)[0]
        x = x + kept[1] * layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))
    logits = ours.head(ours.norm(x)[:, 0])
    torch.testing.assert_close(ours(images), logits, rtol=1e-10, atol=1e-12)

    expected = torch.autograd.grad(
        F.cross_entropy(logits, labels), [layer.linear2.weight for layer in theirs]
    )
    found = torch.autograd.grad(
        F.cross_entropy(ours(images), labels), [block.mlp[2].weight for block in ours.blocks]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
