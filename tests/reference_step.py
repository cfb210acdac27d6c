"""A training step as one writes it first: the benchmark's baseline, and a check of the fast one.

Float32 and eager, the fused attention of PyTorch, hooks that keep each layer's features, one call
of the plain loss and one sketch a layer, gradient clipping and the optimizer at their defaults,
images augmented one by one through torchvision.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from reference import strong, weak
from torch import Tensor, nn


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, angles: Tensor | None) -> None:
        super().__init__()
        self.heads, self.angles = heads, angles
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width)

    def rotate(self, u: Tensor) -> Tensor:
        a, b = u.chunk(2, dim=-1)
        return u * self.angles.cos() + torch.cat([-b, a], dim=-1) * self.angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if self.angles is not None:
            q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.projection(y.transpose(1, 2).reshape(n, tokens, width))


class PlainBlock(nn.Module):
    def __init__(self, width, heads, hidden, bias, angles, drop_path) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PlainAttention(width, heads, bias, angles)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = drop_path

    def drop(self, x: Tensor) -> Tensor:
        if self.drop_path == 0 or not self.training:
            return x
        kept = (torch.rand(len(x), 1, 1) >= self.drop_path).float()
        return x * kept / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PlainViT(nn.Module):
    """The vit or the expert recipe on images of 32 x 32, patches of 4 x 4."""

    def __init__(self, recipe, n_classes: int) -> None:
        super().__init__()
        c, heads = recipe.width, recipe.heads
        self.patches = nn.Conv2d(3, c, kernel_size=recipe.patch, stride=recipe.patch)
        side = 32 // recipe.patch
        angles = None
        if recipe.rotary == "published":
            quarter = c // heads // 4
            omega = 10000.0 ** (-torch.arange(quarter) / quarter)
            y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
            angles = torch.cat([x, x, y, y], dim=1)
        self.class_token = nn.Parameter(torch.zeros(1, c)) if recipe.class_token else None
        self.position_embedding = None
        if recipe.position_embedding:
            self.position_embedding = nn.Parameter(torch.zeros(side**2 + recipe.class_token, c))
        hidden, depth = round(recipe.mlp_ratio * c), recipe.depth
        self.blocks = nn.ModuleList(
            PlainBlock(
                c, heads, hidden, recipe.qkv_bias, angles, recipe.drop_path * i / (depth - 1)
            )
            for i in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])


class PlainMLP(nn.Module):
    def __init__(self, recipe, n_classes: int) -> None:
        super().__init__()
        sizes = [3072] + [recipe.width] * recipe.depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(recipe.width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class PlainStep:
    """Steps of one of the paper's nine recipes on CIFAR-100's shapes.

    Args:
        recipe: ``vit``, ``expert`` or ``mlp`` with any regularizer.
        state: weights of the package's model; default PyTorch's own draw.
    """

    def __init__(self, recipe, state: dict[str, Tensor] | None = None) -> None:
        self.recipe = recipe
        self.model = (PlainViT if recipe.model == "vit" else PlainMLP)(recipe, 100)
        if state is not None:
            state = dict(state)
            if recipe.model == "vit":
                weight = state.pop("patch_embedding.weight")
                state["patches.weight"] = weight.view(-1, 3, recipe.patch, recipe.patch)
                state["patches.bias"] = state.pop("patch_embedding.bias")
            self.model.load_state_dict(state)
        make = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
        self.optimizer = make(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.features: list[Tensor] = []
        for layer in self.model.blocks if recipe.model == "vit" else self.model.layers:
            layer.register_forward_hook(self._keep)

    def forget(self) -> None:
        """Let go of what the last step left behind."""
        self.optimizer.zero_grad()
        self.features.clear()

    def _keep(self, module, inputs, output) -> None:
        self.features.append(output.mean(1) if output.ndim == 3 else output)

    def regularizer(self) -> Tensor:
        c, k = self.recipe.width, self.recipe.sketch_dim
        values = []
        for z in self.features:
            draw = torch.randn(c, k)
            if self.recipe.regularizer == "weak":
                values.append(weak(z, draw / c**0.5))
            else:
                values.append(strong(z, draw / draw.norm(dim=0)))
        return sum(values) / len(values)

    def loss(self, x: Tensor, y: Tensor, partner: Tensor | None = None, lam: float = 1.0) -> Tensor:
        """The objective; ``x`` normalised and already mixed, labels as ``lam`` says."""
        self.features.clear()
        logits = self.model(x)
        task = F.cross_entropy(logits, y)
        if partner is not None:
            task = lam * task + (1 - lam) * F.cross_entropy(logits, y[partner])
        if self.recipe.regularizer == "none":
            return (1 - self.recipe.lam) * task
        return (1 - self.recipe.lam) * task + self.recipe.lam * self.regularizer()

    def __call__(self, x: Tensor, y: Tensor, partner: Tensor | None = None, lam: float = 1.0):
        self.optimizer.zero_grad()
        loss = self.loss(x, y, partner, lam)
        loss.backward()
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return loss.item()


def plain_augmentation(recipe, mean, std) -> T.Compose:
    """Of one PIL image, as torchvision offers it."""
    parts = [T.RandomCrop(32, padding=recipe.crop_padding), T.RandomHorizontalFlip()]
    if recipe.rand_augment is not None:
        operations, magnitude = recipe.rand_augment
        parts.append(T.RandAugment(operations, magnitude))
    return T.Compose([*parts, T.ToTensor(), T.Normalize(mean, std)])
