import dataclasses
import math

import pytest
import torch

from sigreg_lib.losses import SIGReg, VCReg, WeakSIGReg
from sigreg_lib.recipes import RECIPES, find, parse_override
from sigreg_lib.train import Run

NINE = [
    f"{family}/{method}"
    for family in ("vit", "expert", "mlp")
    for method in ("none", "strong", "weak")
]


def test_the_nine_rows_lead_the_list():
    assert list(RECIPES)[:9] == NINE


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vit/weak",
            dict(model="vit", patch=4, width=256, depth=6, heads=8, mlp_ratio=2.0, norm="layer",
                 residual=True, rotary="published", class_token=False, position_embedding=False,
                 qkv_bias=False, drop_path=0.0, optimizer="adamw", lr=1e-3, lr_min=0.0,
                 schedule="cosine", weight_decay=5e-4, clip_norm=None, epochs=400, batch_size=128,
                 crop_padding=4, flip=True, rand_augment=(2, 9), mixup_alpha=0.8, cutmix_alpha=1.0,
                 mean=None, std=None, taps="blocks.*", pool="mean", lam=0.1, convex=True,
                 resample=True, sketch_dim=64, mode="paper"),
        ),
        (
            "expert/strong",
            dict(model="vit", width=192, depth=9, heads=3, mlp_ratio=4.0, class_token=True,
                 position_embedding=True, rotary="none", qkv_bias=True, drop_path=0.1,
                 optimizer="adamw", lr=1e-3, lr_min=1e-5, weight_decay=0.05, clip_norm=1.0,
                 mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), lam=0.01,
                 strong_grid="paper", pool="mean"),
        ),
        (
            "mlp/none",
            dict(model="mlp", width=1024, depth=5, norm="none", residual=False, optimizer="sgd",
                 lr=0.1, schedule="constant", weight_decay=0.0, clip_norm=1.0, crop_padding=4,
                 flip=True, rand_augment=None, mixup_alpha=0.0, cutmix_alpha=0.0, lam=0.1,
                 convex=True, taps="layers.*"),
        ),
        (
            "vit-text/weak",
            dict(residual=False, norm="none", resample=False, convex=False, clip_norm=1.0),
        ),
        ("vit-noskip/none", dict(residual=False, norm="layer", clip_norm=1.0)),
    ],
)  # fmt: skip
def test_settings_are_the_published_ones(name, expected):
    recipe = RECIPES[name]
    assert {field: getattr(recipe, field) for field in expected} == expected


def test_rows_of_a_family_differ_in_the_regularizer_alone():
    for family in ("vit", "expert", "mlp"):
        rows = [RECIPES[f"{family}/{m}"].as_dict() for m in ("none", "strong", "weak")]
        changed = {k for k in rows[0] if len({str(row[k]) for row in rows}) > 1}
        drawn = set() if family == "mlp" else {"shared_sketch"}  # a baseline draws nothing
        assert changed == {"name", "regularizer", "lam"} | drawn


def test_the_cosine_starts_at_lr_halves_midway_and_steps_once_an_epoch():
    vit, expert = RECIPES["vit/weak"], RECIPES["expert/weak"]
    assert vit.learning_rate(0) == pytest.approx(1e-3, rel=1e-12)
    assert vit.learning_rate(200) == pytest.approx(5e-4, rel=1e-6)
    assert vit.learning_rate(399) == pytest.approx(0.5e-3 * (1 - math.cos(math.pi / 400)), rel=1e-3)
    assert expert.learning_rate(400) == pytest.approx(1e-5, rel=1e-6)
    assert {RECIPES["mlp/weak"].learning_rate(e) for e in (0, 17, 399)} == {0.1}


@pytest.mark.parametrize(
    ("mode", "kind", "squared", "unbiased"),
    [
        ("paper", "gaussian", False, False),
        ("squared", "gaussian", True, False),
        ("orthonormal", "orthonormal", False, False),
        ("unbiased", "gaussian", True, True),
        ("corrected", "orthonormal", True, True),
    ],
)
def test_a_mode_of_weak_is_the_published_loss_with_the_parts_of_ours(mode, kind, squared, unbiased):
    loss = RECIPES["mlp/weak"].override(mode=mode).build_regularizer()
    assert (loss.source.kind, loss.squared, loss.unbiased) == (kind, squared, unbiased)


def test_a_mode_that_strong_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"mode of Strong is paper or corrected.*'orthonormal'"):
        RECIPES["mlp/strong"].override(mode="orthonormal")


def test_regularizers_are_built_as_named():
    weak = RECIPES["vit/weak"].build_regularizer()
    assert isinstance(weak, WeakSIGReg) and not weak.squared and weak.source.resample
    corrected = RECIPES["mlp/weak"].override(mode="corrected", sketch_dim=8).build_regularizer()
    assert corrected.unbiased and corrected.squared
    assert (corrected.source.kind, corrected.source.n_columns) == ("orthonormal", 8)
    strong = RECIPES["vit/strong"].override(strong_grid="lejepa").build_regularizer()
    assert isinstance(strong, SIGReg) and (strong.t_max, strong.n_points) == (3.0, 33)
    assert RECIPES["vit/none"].build_regularizer() is None


def test_vcreg_is_an_override_of_any_row_with_the_module_s_own_weights():
    recipe = RECIPES["digits/none"].override(regularizer="vcreg", lam=0.3)
    loss = recipe.build_regularizer()
    assert isinstance(loss, VCReg) and (loss.variance, loss.covariance) == (1.0, 0.04)
    assert recipe.differences() == {"regularizer": "vcreg", "lam": 0.3}
    assert not any(name.endswith("vcreg") for name in RECIPES)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "corrected"},
        {"sketch_dim": 16},
        {"resample": False},
        {"shared_sketch": False},
        {"strong_grid": "lejepa"},
    ],
)
def test_vcreg_refuses_settings_of_the_random_matrix(changes):
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} is a setting of Weak and Strong"):
        RECIPES["digits/none"].override(regularizer="vcreg", **changes)


def test_k_can_be_given_for_each_layer_and_the_regularizer_draws_the_largest():
    recipe = RECIPES["digits/weak"].override(sketch_dim=[8, 32, 16])
    assert recipe.columns == (8, 32, 16) and RECIPES["digits/weak"].columns is None
    assert recipe.build_regularizer().source.n_columns == 32
    for wrong in ([8, 0], []):
        with pytest.raises(ValueError, match="sketch_dim must be at least 1"):
            RECIPES["digits/weak"].override(sketch_dim=wrong)


def test_sketches_of_each_layer_are_drawn_anew():
    own = {name for name, recipe in RECIPES.items() if not recipe.shared_sketch}
    families = ("vit", "vit-bn", "expert")  # as released; the records of the mlp share
    assert own == {f"{family}/{method}" for family in families for method in ("strong", "weak")}
    assert RECIPES["vit/weak"].override(shared_sketch=True).differences() == {"shared_sketch": True}
    with pytest.raises(ValueError, match=r"shared_sketch=false draws.*resample=false"):
        RECIPES["vit/weak"].override(resample=False)
    for changes in ({"resample": False}, {"regularizer": "vcreg"}):
        with pytest.raises(ValueError, match=r"shared_sketch.*[tT]rue"):
            RECIPES["expert/weak"].override(**changes)
        assert RECIPES["expert/weak"].override(**changes, shared_sketch=True).shared_sketch


def test_several_patterns_are_taps_too_and_none_is_refused():
    recipe = RECIPES["digits/weak"].override(taps=["layers.0", "layers.8"], tap_on="input")
    assert recipe.tapping == {"layers": ("layers.0", "layers.8"), "on": "input", "pool": "mean"}
    for nothing in ("", []):
        with pytest.raises(ValueError, match="taps is empty"):
            recipe.override(taps=nothing)
    with pytest.raises(ValueError, match="taps must be str or tuple, not"):
        recipe.override(taps=[0, 8])


def test_a_whole_number_is_the_same_setting_as_its_float():
    one = RECIPES["mlp/weak"].override(lam=1, clip_norm=2)
    assert [type(v) for v in (one.lam, one.clip_norm, one.sketch_dim)] == [float, float, int]
    assert one.differences() == {"lam": 1.0, "clip_norm": 2.0}
    assert Run("mlp/weak", 0, {"lam": 1}).name == Run("mlp/weak", 0, {"lam": 1.0}).name


def test_dropout_is_a_setting_of_the_mlp():
    assert RECIPES["mlp/none"].override(dropout=0.2).model_options()["dropout"] == 0.2
    with pytest.raises(ValueError, match=r"dropout=0\.2 is for the mlp"):
        RECIPES["vit/none"].override(dropout=0.2)


@pytest.mark.parametrize("pool", ["class_token", "patches"])
def test_a_pool_that_treats_the_class_token_apart_needs_one(pool):
    assert RECIPES["expert/weak"].override(pool=pool).pool == pool
    with pytest.raises(ValueError, match=f"pool='{pool}' is for networks with class_token"):
        RECIPES["vit/weak"].override(pool=pool)


def test_overrides_are_told_apart_from_the_named_recipe():
    changed = RECIPES["vit/weak"].override(lam=0.3, clip_norm=1.0, heads=8)
    assert changed.differences() == {"lam": 0.3, "clip_norm": 1.0}
    assert RECIPES["vit/weak"].differences() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depht": 3}, "did you mean 'depth'"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"depth": 2.5}, "depth must be int"),
        ({"depth": True}, "depth must be int"),
        ({"lam": 1.5}, r"lam must lie in \[0, 1\]"),
        ({"lam": float("nan")}, "lam must be finite"),
        ({"lam": "much"}, "lam must be float or auto, not 'much'"),
        ({"norm": "btach"}, "unknown norm 'btach'; did you mean 'batch'"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"rand_augment": (2,)}, "rand_augment must be"),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be finite and positive"),
        ({"mean": (0.5, 0.5), "std": (0.2, -0.2)}, "std must be finite and positive"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "std must be finite and positive"),
        ({"name": "mine"}, "no setting 'name'"),
        ({"residual": 1}, "residual must be bool"),
    ],
)
def test_a_bad_override_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        RECIPES["vit/weak"].override(**changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lam=0.3", ("lam", 0.3)),
        ("depth=16", ("depth", 16)),
        ("residual=false", ("residual", False)),
        ("norm=none", ("norm", "none")),
        ("clip_norm=none", ("clip_norm", None)),
        ("rand_augment=[1, 5]", ("rand_augment", [1, 5])),
        ("regularizer=weak", ("regularizer", "weak")),
        ("taps=layers.0", ("taps", "layers.0")),
        ('taps=["layers.0", "layers.8"]', ("taps", ["layers.0", "layers.8"])),
    ],
)
def test_overrides_are_read_from_text(text, expected):
    assert parse_override(text) == expected
    RECIPES["mlp/none"].override(**dict([expected]))


def test_text_that_is_no_override_is_refused():
    with pytest.raises(ValueError, match="name=value"):
        parse_override("lam")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'vit/weak'"):
        find("vit/weka")


def test_a_recipe_survives_json_and_cannot_be_changed_in_place():
    recipe = RECIPES["expert/weak"]
    content = recipe.as_dict()
    assert recipe.override(**{k: v for k, v in content.items() if k != "name"}) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lam = 0.5


def test_crop_padding_scales_with_the_image():
    assert RECIPES["vit/weak"].policy(32).crop_padding == 4
    assert RECIPES["vit/weak"].policy(8).crop_padding == 1


def test_a_recipe_draws_its_sketch_from_the_given_generator():
    generator = torch.Generator().manual_seed(3)
    regularizer = RECIPES["vit/weak"].build_regularizer(generator)
    drawn = regularizer.matrix(torch.empty(1, 256))
    again = torch.empty(256, 64).normal_(0, 1 / 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, again, rtol=0, atol=0)


def test_digits_vit_is_the_text_of_the_paper_in_small_and_without_augmentation():
    size = {"name", "patch", "width", "heads", "epochs", "precision"}
    size |= {"crop_padding", "flip", "rand_augment", "mixup_alpha", "cutmix_alpha"}
    for method in ("none", "strong", "weak"):
        small, whole = (RECIPES[f"{f}/{method}"].as_dict() for f in ("digits-vit", "vit-text"))
        assert {key for key in whole if small[key] != whole[key]} == size
