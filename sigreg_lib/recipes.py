"""Every experiment as data: a frozen dataclass of settings and the named rows.

``RECIPES["vit/weak"]`` is a row of the paper; ``RECIPES["vit/weak"].override(lam=0.3)`` a variation
of it. Settings follow the released code where it differs from the paper's text (arXiv 2603.05924);
each difference is a field here.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sigreg_lib._names import suggest
from sigreg_lib._types import alternatives, check_type
from sigreg_lib.augment import Policy
from sigreg_lib.losses import STRONG_GRIDS, LogWeakSIGReg, SIGReg, VCReg, WeakPart, WeakSIGReg


@dataclass(frozen=True)
class Recipe:
    """All settings of a run but its data, its seed and the machine.

    Fields marked (vit) do nothing for the MLP. Lengths are in pixels of a 32-pixel image, rates
    per step, ``epochs`` is the length of the learning-rate schedule. ``mode`` is the published loss
    (``paper``), ours (``corrected``), or for Weak one part of ours alone: the norm's square, an
    orthonormal sketch, the unbiased estimate of the square. The square's gradient is 2R times that
    of the norm, that of its unbiased estimate about as large near collapse alone: divide ``lam`` by
    2R to begin with. ``log_scale`` is Weak with the scale in logarithms,
    :func:`~sigreg_lib.losses.log_weak_sigreg`; ``scale`` and ``shape`` are one of Weak's two
    parts alone, :func:`~sigreg_lib.losses.weak_parts`, not squared; the shape is up to the root of
    K times as large as Weak, and its gradient grows as features shrink.

    Records of a recipe under a name of one's own have no overrides; one of other settings under
    the same name is refused where it would be written to the same file: name it apart.
    """

    name: str
    model: Literal["mlp", "vit"]
    width: int
    depth: int
    residual: bool
    norm: Literal["none", "layer", "batch", "iterative"]
    regularizer: Literal["none", "weak", "strong", "vcreg"]  # vcreg: of no named row

    # where the regularizer looks
    taps: str | tuple[str, ...]  # names with wildcards, see attach
    tap_on: Literal["output", "input"] = "output"
    pool: Literal["mean", "class_token", "patches", "tokens"] = "mean"  # (vit)

    # the objective; a baseline of the released settings keeps the factor (1 - lam)
    lam: float | Literal["auto"] = 0.1  # auto: found in the first steps, see train.balance
    convex: bool = True
    mode: Literal[
        "paper", "squared", "orthonormal", "unbiased", "corrected", "log_scale", "scale", "shape"
    ] = "paper"
    sketch_dim: int | tuple[int, ...] = 64  # of every tapped layer, or one each
    resample: bool = True
    shared_sketch: bool = True  # by layers of one width; false: each redraws its own (released)
    strong_grid: Literal["paper", "lejepa"] = "paper"

    dropout: float = 0.0  # (mlp) of every hidden activation

    # (vit)
    patch: int = 4
    heads: int = 8
    mlp_ratio: float = 2.0
    rotary: Literal["published", "axial", "none"] = "published"
    class_token: bool = False
    position_embedding: bool = False
    qkv_bias: bool = False
    drop_path: float = 0.0
    init: Literal[
        "truncated_normal", "expert", "xavier", "default", "orthogonal", "identity_attention"
    ] = "truncated_normal"

    # optimization
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_min: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    batch_size: int = 128
    epochs: int = 400
    precision: Literal["float32", "bfloat16"] = "bfloat16"

    # input
    mean: tuple[float, ...] | None = None  # None: the data set's own
    std: tuple[float, ...] | None = None
    crop_padding: int = 0
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    holdout: int = 0  # training images set aside and tested on instead of the test set

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), HINTS[field.name]
            check_type(field.name, value, hint)
            if type(value) is int and int not in alternatives(hint):
                object.__setattr__(self, field.name, float(value))  # 1 and 1.0 are one run
        if not self.taps:
            raise ValueError("taps is empty: name at least one layer")
        if self.model == "vit" and self.pool in ("class_token", "patches") and not self.class_token:
            raise ValueError(f"pool={self.pool!r} is for networks with class_token=true")
        if self.dropout and self.model != "mlp":
            raise ValueError(f"dropout={self.dropout!r} is for the mlp")
        for name in ("width", "depth", "sketch_dim", "patch", "heads", "batch_size", "epochs"):
            value = getattr(self, name)
            if min(value, default=0) < 1 if isinstance(value, tuple) else value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")
        for name in ("lr", "lr_min", "weight_decay", "holdout", "lam"):
            value = getattr(self, name)
            if value != "auto" and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, not {value!r}")
        if self.lam == "auto" and self.regularizer == "none":
            raise ValueError("lam='auto' weighs a regularizer, and regularizer='none' has none")
        if self.lam != "auto" and self.convex and self.lam > 1:
            raise ValueError(f"lam must lie in [0, 1] when convex, not {self.lam!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or none, not {self.clip_norm!r}")
        if self.regularizer == "strong" and self.mode not in ("paper", "corrected"):
            raise ValueError(f"mode of Strong is paper or corrected (unbiased), not {self.mode!r}")
        if not self.shared_sketch and not self.resample:
            raise ValueError(
                "shared_sketch=false draws for each layer anew; a fixed matrix (resample=false) is "
                "one for each width: set shared_sketch=true with it"
            )
        if self.regularizer == "vcreg":
            for name, usual in _OF_SIGREG.items():
                if getattr(self, name) != usual:
                    raise ValueError(
                        f"{name} is a setting of Weak and Strong, VCReg draws nothing: it must be "
                        f"{usual!r}, not {getattr(self, name)!r}"
                    )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        if self.mean is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std differ in length: {self.mean}, {self.std}")
        if self.std is not None and not all(0 < s < float("inf") for s in self.std):
            raise ValueError(
                f"std must be finite and positive, images are divided by it: {self.std}"
            )
        self.policy(32)  # checks the augmentation

    def override(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; the name stays.

        Raises:
            ValueError: no such field (the nearest is named), or a value that the field cannot have.
        """
        for name in changes:
            if name not in HINTS or name == "name":
                raise ValueError(f"a recipe has no setting {name!r}; {suggest(name, HINTS)}")
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        return dataclasses.replace(self, **lists)

    def differences(self) -> dict[str, Any]:
        """The fields in which this recipe differs from the named one, in the order of fields.

        Empty where no row of :data:`RECIPES` has its name: there is nothing to differ from.
        """
        base = RECIPES.get(self.name, self)
        return {k: v for k, v in self.as_dict().items() if v != base.as_dict()[k]}

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`sigreg_lib.models.build_model`."""
        shared = ("width", "depth", "residual", "norm")
        vit = ("patch", "heads", "mlp_ratio", "rotary", "class_token", "position_embedding")
        vit += ("qkv_bias", "drop_path", "init")
        names = shared + (vit if self.model == "vit" else ("dropout",))
        return {name: getattr(self, name) for name in names}

    def policy(self, size: int) -> Policy:
        """The augmentation of images of ``size`` pixels; the crop's padding scales with it."""
        return Policy(
            crop_padding=round(self.crop_padding * size / 32),
            flip=self.flip,
            rand_augment=self.rand_augment,
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
        )

    @property
    def tapping(self) -> dict[str, Any]:
        """Where the regularizer looks, for :func:`sigreg_lib.attach.attach`."""
        return {"layers": self.taps, "on": self.tap_on, "pool": self.pool}

    @property
    def columns(self) -> tuple[int, ...] | None:
        """K of each tapped layer where they differ, for :func:`sigreg_lib.attach.attach`."""
        return self.sketch_dim if isinstance(self.sketch_dim, tuple) else None

    def build_regularizer(
        self, generator: torch.Generator | None = None, *, seed: int = 0
    ) -> nn.Module | None:
        """The regularizer that the recipe names, None for a baseline.

        Its random matrices come from ``generator``, or from one seeded with ``seed``.
        """
        if self.regularizer == "vcreg":
            return VCReg()
        options = {"resample": self.resample, "generator": generator, "seed": seed}
        unbiased = self.mode in ("unbiased", "corrected")
        most = max(self.columns or (self.sketch_dim,))
        if self.regularizer == "weak" and self.mode == "log_scale":
            return LogWeakSIGReg(most, **options)
        if self.regularizer == "weak" and self.mode in ("scale", "shape"):
            return WeakPart(self.mode, most, **options)
        if self.regularizer == "weak":
            return WeakSIGReg(
                most,
                sketch="orthonormal" if self.mode in ("orthonormal", "corrected") else "gaussian",
                squared=unbiased or self.mode == "squared",
                unbiased=unbiased,
                **options,
            )
        if self.regularizer == "strong":
            t_max, n_points = STRONG_GRIDS[self.strong_grid]
            return SIGReg(most, t_max, n_points, unbiased=unbiased, **options)
        return None

    def learning_rate(self, epoch: int) -> float:
        """Rate during ``epoch`` (counted from 0); the cosine steps once an epoch."""
        if self.schedule == "constant":
            return self.lr
        turn = torch.pi * epoch / self.epochs
        return (
            self.lr_min + (self.lr - self.lr_min) * (1 + torch.cos(torch.tensor(turn)).item()) / 2
        )


_OF_SIGREG: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.name in ("mode", "sketch_dim", "resample", "shared_sketch", "strong_grid")
}
HINTS: dict[str, Any] = typing.get_type_hints(Recipe)


def parse_override(text: str) -> tuple[str, Any]:
    """``"lam=0.3"`` as (name, value); values are written as in JSON, words need no quotes.

    Raises:
        ValueError: no ``=`` in it.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"an override is written name=value, such as lam=0.3, not {text!r}")
    words = {"none": None, "true": True, "false": False}
    name, word = name.strip(), value.strip()
    choices = [a for h in alternatives(HINTS.get(name)) for a in typing.get_args(h)]
    if word in choices:  # norm=none is a word, clip_norm=none is nothing
        return name, word
    if word.lower() in words:
        return name, words[word.lower()]
    try:
        return name, json.loads(word)
    except json.JSONDecodeError:
        return name, word


def find(name: str) -> Recipe:
    """The named recipe.

    Raises:
        ValueError: no such recipe; the nearest is named.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {suggest(name, RECIPES)} (`sigreg list`)")
    return RECIPES[name]


_CIFAR_MEAN, _CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_LAMBDA = {"none": 0.1, "weak": 0.1, "strong": 0.01}
_OWN_SKETCHES = ("vit", "vit-bn", "expert")  # each layer draws its own, as released

_STRONG_AUGMENTATION: dict[str, Any] = {
    "crop_padding": 4,
    "flip": True,
    "rand_augment": (2, 9),
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    # Tables 1 to 3
    "vit": {
        "model": "vit",
        "width": 256,
        "depth": 6,
        "residual": True,
        "norm": "layer",
        "taps": "blocks.*",
        "weight_decay": 5e-4,
        **_STRONG_AUGMENTATION,
    },
    "expert": {
        "model": "vit",
        "width": 192,
        "depth": 9,
        "residual": True,
        "norm": "layer",
        "taps": "blocks.*",
        "heads": 3,
        "mlp_ratio": 4.0,
        "rotary": "none",
        "class_token": True,
        "position_embedding": True,
        "qkv_bias": True,
        "drop_path": 0.1,
        "init": "expert",
        "weight_decay": 0.05,
        "lr_min": 1e-5,
        "clip_norm": 1.0,
        "mean": _CIFAR_MEAN,
        "std": _CIFAR_STD,
        **_STRONG_AUGMENTATION,
    },
    "mlp": {
        "model": "mlp",
        "width": 1024,
        "depth": 5,
        "residual": False,
        "norm": "none",
        "taps": "layers.*",
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "constant",
        "clip_norm": 1.0,
        "mean": _CIFAR_MEAN,
        "std": _CIFAR_STD,
        "crop_padding": 4,
        "flip": True,
    },
}
_AS_TEXT = {"resample": False, "convex": False, "clip_norm": 1.0, "residual": False}
_FAMILIES |= {
    # as the paper's text says: S fixed, additive lambda, clipping, no residual connections, and in
    # vit-text no normalization either, since it is what the loss is said to stand in for
    "vit-text": _FAMILIES["vit"] | _AS_TEXT | {"norm": "none"},
    "vit-noskip": _FAMILIES["vit"] | _AS_TEXT,
    # what the loss is to stand in for
    "vit-bn": _FAMILIES["vit"] | {"norm": "batch"},
    "mlp-bn": _FAMILIES["mlp"] | {"norm": "batch"},
    "mlp-bn-skip": _FAMILIES["mlp"] | {"norm": "batch", "residual": True},
    # deep plain networks on the embedded digits, at PyTorch's default initialization
    "digits": {
        "model": "mlp",
        "width": 128,
        "depth": 16,
        "residual": False,
        "norm": "none",
        "taps": "layers.*",
        "schedule": "constant",
        "epochs": 30,
        "precision": "float32",
    },
    # the paper's claim at its word, on the embedded digits: 16 tokens, all else as in vit-text
    "digits-vit": {k: v for k, v in _FAMILIES["vit"].items() if k not in _STRONG_AUGMENTATION}
    | _AS_TEXT
    | {
        "norm": "none",
        "patch": 2,
        "width": 32,
        "heads": 4,
        "epochs": 20,
        "precision": "float32",
    },
}

RECIPES: dict[str, Recipe] = {
    f"{family}/{method}": Recipe(
        name=f"{family}/{method}",
        regularizer=method,  # type: ignore[arg-type]
        lam=_LAMBDA[method],
        shared_sketch=method == "none" or family not in _OWN_SKETCHES,
        **settings,
    )
    for family, settings in _FAMILIES.items()
    for method in ("none", "strong", "weak")
}
"""The named rows, ``family/method``: the paper's vit, expert and mlp, and their variants."""
