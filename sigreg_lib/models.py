"""The networks of the published recipes: an MLP and a vision transformer, with switches.

Hidden layers are named submodules, for a regularizer to tap: `layers.i` of the MLP gives
pre-activations (N, width), `blocks.i` of the transformer token sequences (N, tokens, width).

Source of all settings: Weak-SIGReg, arXiv 2603.05924, and what was released with it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigreg_lib._blocks import (
    NORM_LAYERS,
    Block,
    Dropout,
    DropPath,
    Rotary,
    make_norm,
    redraw_drops,
    start_orthogonal,
)
from sigreg_lib._names import suggest
from sigreg_lib._types import is_integer

__all__ = [
    "MLP", "DropPath", "Dropout", "Rotary", "VisionTransformer", "build_model", "redraw_drops",
]  # fmt: skip

NORMS = tuple(NORM_LAYERS)
ROTARY = ("published", "axial", "none")
INITS = ("truncated_normal", "expert", "xavier", "default", "orthogonal", "identity_attention")


class MLP(nn.Module):
    r"""Fully connected ReLU network on flattened images.

    .. math:: z_i = W_i h_{i-1} + b_i, \quad h_i = \mathrm{ReLU}(\nu(z_i)), \quad
              \text{logits} = W h_L + b

    `layers.i` outputs z_i, the pre-activation; `norms.i`, the norm nu, follows it, and `drops.i`
    the activation. With `residual`, h_i = h_{i-1} + ReLU(nu(z_i)) in all hidden layers but the
    first, whose shapes do not agree.
    Weights and biases start from PyTorch's default law, U(-1, 1) / sqrt(fan_in).

    Args:
        image_shape: (channels, height, width) of one image, in pixels.
        n_classes: number of logits.
        width: units of a hidden layer.
        depth: number of hidden layers, below the classifier `head`.
        residual: add a hidden layer's input to its output.
        norm: "none", "layer" (LayerNorm), "batch" (BatchNorm) or "iterative" (IterNorm: whitening
            in groups of at most 64 channels).
        dropout: `Dropout` rate of every hidden activation; above 0, training needs `redraw_drops`
            before each step.

    Raises:
        TypeError, ValueError: a size that is no positive int, an unknown norm, or a dropout outside
            [0, 1).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        width: int = 1024,
        depth: int = 5,
        residual: bool = False,
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_shape = _check_shape(image_shape)
        _check_counts(n_classes=n_classes, width=width, depth=depth)
        _check_name("norm", norm, NORMS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: expected in [0, 1)")
        self.residual = residual
        sizes = itertools.pairwise([math.prod(self.image_shape)] + [width] * depth)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in sizes)
        self.norms = nn.ModuleList(make_norm(norm, width) for _ in range(depth))
        self.drops = nn.ModuleList(Dropout(dropout, width) for _ in range(depth))
        self.head = nn.Linear(width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, n_classes) of float images (N, channels, height, width)."""
        _check_images(images, self.image_shape)
        h = images.flatten(1)
        parts = zip(self.layers, self.norms, self.drops, strict=True)
        for i, (layer, norm, drop) in enumerate(parts):
            out = drop(F.relu(norm(layer(h))))
            h = h + out if self.residual and i > 0 else out
        return self.head(h)


class VisionTransformer(nn.Module):
    r"""Vision transformer with pre-normalization; the defaults are the recipe "vit".

    .. math:: x \leftarrow x + \mathrm{attention}(\nu_1(x)), \quad
              x \leftarrow x + \mathrm{mlp}(\nu_2(x)), \quad
              \text{logits} = W\, \mathrm{pool}(\nu(x)) + b

    `blocks.i` outputs (N, tokens, width), class token first; `blocks.i.attention` and
    `blocks.i.mlp` output the branches, before drop path and addition. The residual stream keeps the
    parameters' dtype inside autocast. The recipe "expert" is `width=192, depth=9, heads=3,
    mlp_ratio=4, rotary="none", class_token=True, position_embedding=True, qkv_bias=True,
    drop_path=0.1, init="expert"`.

    Args:
        image_shape: (channels, height, width) of one image, in pixels; multiples of `patch`.
        n_classes: number of logits.
        patch: side of a square patch, in pixels.
        width: channels of a token.
        depth: number of blocks.
        heads: number of attention heads, a divisor of `width`.
        mlp_ratio: hidden units of a block's GELU network, in units of `width`.
        residual: without it, a branch replaces its input instead of being added to it.
        norm: "layer", "batch" (each channel over batch and tokens), "iterative" (whitening, over
            both) or "none", nowhere at all.
        rotary: `Rotary` on queries and keys, "published" or "axial"; or "none".
        class_token: classify a learned token put in front, not the mean over tokens.
        position_embedding: add a learned vector to each token, the class token included.
        qkv_bias: biases for queries, keys and values; every other map has one.
        drop_path: `DropPath` rate of the last block, rising linearly from 0 in the first; above 0,
            training needs `redraw_drops` before each step.
        init: how the linear maps of blocks and head start. "truncated_normal": weights of std
            0.02, biases zero. "xavier": Xavier uniform weights (q, k and v as one matrix), biases
            zero. "default": PyTorch's. "expert": as "xavier" in the head, PyTorch's elsewhere.
            "orthogonal": as "xavier" in the head; in the blocks value, projection and GELU network
            (from `mlp_ratio` 2 on) are orthogonal maps of a token, for networks without residual
            connections. "identity_attention": the same, and a token attends nearly to itself alone
            (see `sigreg_lib._blocks.start_orthogonal`).
            In each, the patch embedding starts from PyTorch's default, class token and position
            embedding from a truncated normal of std 0.02. The truncation, PyTorch's, is at -2 and
            2, a hundred standard deviations: nothing is cut.

    Raises:
        TypeError, ValueError: a size that is no positive int or does not divide as said; drop path
            outside [0, 1) or without residual; an unknown norm, rotary or init.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        patch: int = 4,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 2.0,
        residual: bool = True,
        norm: str = "layer",
        rotary: str = "published",
        class_token: bool = False,
        position_embedding: bool = False,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        init: str = "truncated_normal",
    ) -> None:
        super().__init__()
        self.image_shape = channels, *sides = _check_shape(image_shape)
        _check_counts(n_classes=n_classes, patch=patch, width=width, depth=depth, heads=heads)
        _check_name("norm", norm, NORMS)
        _check_name("rotary", rotary, ROTARY)
        _check_name("init", init, INITS)
        if any(side % patch for side in sides):
            raise ValueError(f"patch={patch}: expected a divisor of the image's sides {sides}")
        if width % heads:
            raise ValueError(f"heads={heads}: expected a divisor of width={width}")
        hidden = round(mlp_ratio * width)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio}: expected at least 1 / width")
        if not 0 <= drop_path < 1 or (drop_path and not residual):
            raise ValueError(f"drop_path={drop_path}: expected in [0, 1), and 0 without residual")
        grid = (sides[0] // patch, sides[1] // patch)
        tokens = math.prod(grid) + class_token
        # The patch convolution as a matrix: the same map and default law, and its output has the
        # channels last in memory, as all that follows wants them.
        self.patch = patch
        self.patch_embedding = nn.Linear(channels * patch**2, width)
        self.class_token = _learned(1, width) if class_token else None
        self.position_embedding = _learned(tokens, width) if position_embedding else None
        self.rotary = None
        if rotary != "none":
            self.rotary = Rotary(rotary, grid, width // heads, class_token)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, norm, residual, qkv_bias, rate) for rate in rates
        )
        self.norm = make_norm(norm, width)
        self.head = nn.Linear(width, n_classes)
        self._initialise(init)

    def _initialise(self, init: str) -> None:
        if init in ("orthogonal", "identity_attention"):
            for block in self.blocks:
                start_orthogonal(block, identity_attention=init == "identity_attention")
            init = "expert"  # Xavier in the head
        inner = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        for linear in {"default": [], "expert": [self.head]}.get(init, [*inner, self.head]):
            if init == "truncated_normal":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, n_classes) of float images (N, channels, height, width)."""
        _check_images(images, self.image_shape)
        pixels = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.patch_embedding(patches).to(self.head.weight.dtype)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        for block in self.blocks:
            x = block(x, self.rotary)
        x = self.norm(x)
        return self.head(x.mean(dim=1) if self.class_token is None else x[:, 0])


MODELS = {"mlp": MLP, "vit": VisionTransformer}


def build_model(
    kind: str, image_shape: tuple[int, int, int], n_classes: int, *, seed: int, **options: object
) -> nn.Module:
    """A network on the CPU, its weights a function of the arguments alone.

    Args:
        kind: "mlp" for `MLP`, "vit" for `VisionTransformer`.
        image_shape, n_classes, options: what these classes take.
        seed: of the initial weights; the global random state is left as it was found.

    Raises:
        ValueError: an unknown kind, or what the class refuses.
        TypeError: an option that the class does not have.
    """
    model_class = MODELS[_check_name("kind", kind, MODELS)]
    parameters = inspect.signature(model_class).parameters.values()
    known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(f"unknown option {option!r} of {kind!r}: {suggest(option, known)}")
    # The CPU's generator alone: torch.manual_seed would reseed every accelerator too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return model_class(image_shape, n_classes, **options)


def _learned(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, width), std=0.02))


def _check_name(argument: str, value: object, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{argument}={value!r}: {suggest(value, known)}")
    return str(value)


def _check_counts(**counts: object) -> None:
    for argument, value in counts.items():
        if not is_integer(value):
            raise TypeError(f"{argument}={value!r}: expected an int")
        if value < 1:
            raise ValueError(f"{argument}={value}: expected at least 1")


def _check_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"image_shape={shape!r}: expected (channels, height, width)")
    for size in shape:
        _check_counts(image_shape=size)
    return tuple(shape)


def _check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images of dtype {images.dtype}: expected normalised floats")
    if images.shape[1:] != shape:
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (N, *{shape})")
