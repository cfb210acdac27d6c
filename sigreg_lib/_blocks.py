"""Parts of the networks: block, attention, rotary embedding, drop path, dropout, norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sigreg_lib._newton import newton_inverse_root


class Block(nn.Module):
    """One block of a `VisionTransformer`, (N, tokens, width) to the same."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm: str,
        residual: bool,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.norm1, self.attention = make_norm(norm, width), Attention(width, heads, qkv_bias)
        self.norm2 = make_norm(norm, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop1, self.drop2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        if not self.residual:
            return self.mlp(self.norm2(self.attention(self.norm1(x), rotary)))
        x = x + self.drop1(self.attention(self.norm1(x), rotary))
        return x + self.drop2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k' / sqrt(d)) v, and a projection."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if rotary is not None:
            q, k = rotary(q).to(v.dtype), rotary(k).to(v.dtype)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        return self.projection(_attend(q, k, v).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Plain products, not the fused kernel: on some CPUs its backward takes several times as long,
    # and on an H200, where PyTorch 2.11 takes cuDNN's, fourteen of fifteen trainings at 64 tokens
    # became NaN; likely its backward (github.com/pytorch/pytorch/issues/196678).
    n, heads, tokens, d = q.shape
    q, k, v = (u.reshape(n * heads, tokens, d) for u in (q, k, v))
    # baddbmm scales the scores before they are rounded; and the compiler, which would rewrite a
    # matmul, softmax, matmul into the fused kernel, does not take this for attention.
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=d**-0.5)
    weights = scores.softmax(dim=-1)  # sums in float32 or better, whatever the dtype
    return torch.bmm(weights, v).view(n, heads, tokens, d)


class Rotary(nn.Module):
    r"""Rotary position embedding of queries and keys on a grid of tokens.

    .. math:: \mathrm{rotary}(u) = u \cos\theta + \rho(u) \sin\theta

    Of a head's d channels, the first half has the angles :math:`\theta = x \omega` of the token's
    column x, the second half :math:`y \omega` of its row y. Only the base 10000 is published;
    assumed: :math:`\omega_i = 10000^{-2 i / (d/2)}`, i = 0 ... d/4 - 1, each half holding all of
    them twice, one run after the other. :math:`\rho` takes pairs of channels (a, b) to (-b, a):

    - "axial": i and i + d/4 within each half. Both have one angle, so each pair turns in its plane
      and a score q.k depends on the displacement (dx, dy) alone.
    - "published": i and i + d/2, as released. An x angle meets a y angle: the map is no rotation,
      and a score depends on absolute position.

    A class token, at index 0, is left as it is.

    Source: Su et al., arXiv 2104.09864, for one dimension.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, kind: str, grid: tuple[int, int], head_dim: int, class_token: bool) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"width / heads={head_dim}: rotary={kind!r} needs a multiple of 4")
        self.groups = {"published": 1, "axial": 2}[kind]
        omega = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
        y, x = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
        angles = torch.cat([place.reshape(-1, 1) * omega for place in (x, x, y, y)], dim=1)
        if class_token:
            angles = torch.cat([torch.zeros(1, head_dim), angles])
        # (tokens, 1, head_dim), to broadcast over heads; kept out of checkpoints: no state.
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """Embed u, shape (N, tokens, heads, head_dim), in float32 or better."""
        a, b = u.unflatten(-1, (self.groups, 2, -1)).unbind(-2)
        return u * self.cos + torch.stack([-b, a], dim=-2).flatten(-3) * self.sin


class DropPath(nn.Module):
    """Stochastic depth: a sample's branch is 0 with probability `rate`, else x / (1 - rate).

    `redraw` draws the factors into a buffer that stays where it is, so a compiled or captured graph
    reads a fixed tensor and no global random state is used. In eval mode, or at rate 0, this is the
    identity and needs no draw; training on more samples than were drawn raises RuntimeError.

    Source: Huang et al., arXiv 1603.09382.
    """

    factors: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.drawn = rate, 0
        self.register_buffer("factors", torch.empty(0), persistent=False)

    @torch.no_grad()
    def redraw(self, n: int, generator: torch.Generator) -> None:
        """Draw for `n` samples; an n above all earlier ones allocates a new buffer."""
        if self.rate == 0:
            return
        shape = n, *self.factors.shape[1:]
        if n > len(self.factors):
            self.factors = self.factors.new_empty(shape)
        kept = torch.rand(shape, generator=generator, device=generator.device) >= self.rate
        factors = kept.to(self.factors.dtype) / (1 - self.rate)
        self.factors[:n].copy_(factors, non_blocking=True)
        self.drawn = n

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        n = x.shape[0]
        if n > self.drawn:
            raise RuntimeError(
                f"{type(self).__name__} was drawn for {self.drawn} samples, the batch has {n}: "
                "call redraw_drops(model, n, generator) before each training step"
            )
        # In the buffer's float32: bfloat16 would round 1 / (1 - rate) in the third digit.
        factors = self.factors[:n]
        return x * factors.view(*factors.shape, *[1] * (x.dim() - factors.dim()))


class Dropout(DropPath):
    """Dropout of (N, width): an entry is 0 with probability `rate`, else x / (1 - rate).

    `torch.nn.Dropout` draws from the global random state; this one's factors, of shape
    (n, width), are redrawn as those of `DropPath`.

    Source: Srivastava et al., Journal of Machine Learning Research 15, 2014.
    """

    def __init__(self, rate: float, width: int) -> None:
        super().__init__(rate)
        self.factors = torch.empty(0, width)


def redraw_drops(model: nn.Module, n: int, generator: torch.Generator) -> None:
    """Draw all drop paths and dropouts of a model for up to n samples; call before each step.

    A CPU generator gives the same draw on every device. Where no rate is above 0 it is not used.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    for module in model.modules():
        if isinstance(module, DropPath):
            module.redraw(n, generator)


class ChannelBatchNorm(nn.BatchNorm1d):
    """Batch normalization of (..., C) over all leading dimensions, batch and tokens alike."""

    def forward(self, x: Tensor) -> Tensor:
        # In the parameters' dtype, so that statistics are float32 inside autocast.
        return super().forward(x.flatten(0, -2).to(self.weight.dtype)).view(x.shape)


class IterativeNorm(nn.Module):
    r"""IterNorm of (..., C) over all leading dimensions: whitening by Newton's iteration.

    .. math:: y = (z - \mu)\, P_T / \sqrt{\mathrm{tr}\,\Sigma} \odot \gamma + \beta, \qquad
              \Sigma = \mathrm{Cov}(z) + \epsilon I

    with the covariance over N and P_T as in `sigreg_lib.losses.iterative_whiten`, in groups of
    channels. In training mean and matrix are the batch's own, gradients go through both, and their
    running means are kept; in eval mode these are used. Statistics and result are in the
    parameters' dtype, float32 inside autocast.

    Args:
        width: channels C.
        group_size: channels that are whitened together, at most; the largest divisor of `width`
            that is not above it is used.
        iterations: T; each lets a direction grow by at most 3/2.
        eps: added to the eigenvalues, in squared units of z.
        momentum: weight of the newest batch in the running means.

    Source: Huang et al., arXiv 1904.03441, algorithms 1 and 2.
    """

    running_mean: Tensor
    running_root: Tensor

    def __init__(
        self,
        width: int,
        *,
        group_size: int = 64,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        size = max(d for d in range(1, min(group_size, width) + 1) if width % d == 0)
        self.iterations, self.eps, self.momentum = iterations, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width // size, 1, size))
        self.register_buffer("running_root", torch.eye(size).repeat(width // size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        groups, _, size = self.running_mean.shape
        with torch.autocast(x.device.type, enabled=False):
            z = x.to(self.weight.dtype).reshape(-1, groups, size).transpose(0, 1)
            mean, root = self.running_mean, self.running_root
            if self.training:
                mean = z.mean(1, keepdim=True)
                covariance = (z - mean).mT @ (z - mean) / z.shape[1]
                root = newton_inverse_root(covariance, self.iterations, self.eps)
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_root.lerp_(root, self.momentum)
            whitened = ((z - mean) @ root).transpose(0, 1).reshape(x.shape)
            return whitened * self.weight + self.bias


NORM_LAYERS = {
    "none": nn.Identity,
    "layer": nn.LayerNorm,
    "batch": ChannelBatchNorm,
    "iterative": IterativeNorm,
}


def make_norm(norm: str, width: int) -> nn.Module:
    """The layer of that name in `NORM_LAYERS`."""
    return NORM_LAYERS[norm](width)


QUERY_KEY_GAIN = 4.0


@torch.no_grad()
def start_orthogonal(block: Block, *, identity_attention: bool) -> None:
    """Weights with which a block without residual connections keeps the length of a token.

    Value and projection are random orthogonal matrices. The units of the GELU network start in
    pairs of opposite sign, and gelu(u) - gelu(-u) = u makes it an orthogonal map, exactly and at
    every scale (of rank `hidden // 2` where that is below `width`). Queries and keys are two random
    orthogonal matrices, or, with identity attention, one and the same times `QUERY_KEY_GAIN`: then
    the score of a token with itself exceeds that with another, of cosine c to it and of unit rms,
    by about gain^2 sqrt(d) (1 - c), and the block as a whole is near an orthogonal map of tokens.
    Biases are zero.

    Source: pairs of opposite sign for ReLU, Balduzzi et al., arXiv 1702.08591.
    """
    attention, (first, _, second) = block.attention, block.mlp
    width, hidden = first.in_features, first.out_features
    query, key, value = attention.qkv.weight.chunk(3)
    for weight in (query, key, value, attention.projection.weight):
        nn.init.orthogonal_(weight)
    if identity_attention:
        key.copy_(query.mul_(QUERY_KEY_GAIN))
    up = nn.init.orthogonal_(first.weight.new_empty(hidden // 2, width))
    down = nn.init.orthogonal_(second.weight.new_empty(width, width)) @ up.T
    odd = hidden % 2  # a unit without a partner starts at zero
    first.weight.copy_(torch.cat([up, -up, up.new_zeros(odd, width)]))
    second.weight.copy_(torch.cat([down, -down, down.new_zeros(width, odd)], dim=1))
    for linear in (attention.qkv, attention.projection, first, second):
        if linear.bias is not None:
            linear.bias.zero_()
