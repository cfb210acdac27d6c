r"""Clouds of points to test the losses on: what second moments see, and what they do not.

Every cloud has mean 0 and covariance I but for two that say so: ``"rank_deficient"`` cannot have
covariance I, ``"shifted"`` has another mean. For each there is a sampler, in any dimension, and the
exact characteristic function of its projections, from which the population's Strong SIGReg follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigreg_lib._names import suggest

CLOUDS: dict[str, str] = {
    "gaussian": "standard Gaussian",
    "cube": "independent channels, uniform on [-sqrt 3, sqrt 3]",
    "ring": "channels in pairs, each pair uniform on a circle of radius sqrt 2",
    "clusters": "two Gaussian clusters on the first axis, all other channels standard Gaussian",
    "heavy_tails": "independent channels, Student t of 5 degrees of freedom",
    "heavy_radius": "multivariate Student t of 5 degrees of freedom: a Gaussian of random scale",
    "rank_deficient": "every standard Gaussian channel twice: half of the directions are missing",
    "shifted": "Gaussian of covariance I with mean 1/2 in every channel",
}
"""The clouds and what they are."""

SEPARATION = 0.95  # half the distance of the two clusters' centres; 1 would leave them no width
DEGREES = 5  # of freedom of Student t; the fourth moment exists
SHIFT = 0.5  # of every channel


def sample(
    kind: str,
    *shape: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Independent samples of a cloud.

    All but two have mean 0 and covariance I:

    - ``"gaussian"``.
    - ``"cube"``: channels independent and uniform, excess kurtosis -6/5 each.
    - ``"ring"``: channels 2p and 2p + 1 are :math:`\sqrt2(\cos\theta_p, \sin\theta_p)`, the angles
      independent; every channel has the arcsine law, excess kurtosis -3/2. The last channel of an
      odd number is the first half of a pair.
    - ``"clusters"``: the first channel is :math:`\pm m + \sqrt{1 - m^2}\,g`, m = 0.95, either sign
      with probability 1/2; excess kurtosis -2 m^4. Covariance I allows no larger distance of two
      clusters of equal weight than 2, and that in one direction only.
    - ``"heavy_tails"``: channels independent, Student t of 5 degrees of freedom, scaled by
      :math:`\sqrt{3/5}`; excess kurtosis 6, moments of order 5 and above infinite.
    - ``"heavy_radius"``: a Gaussian vector times one random scale,
      :math:`z = g \sqrt{3/\chi^2_5}`; every projection, in any dimension, has the law of a channel
      of ``"heavy_tails"``. Uncorrelated, not independent.
    - ``"rank_deficient"``: channels 2p and 2p + 1 are equal; the last of an odd number stands for
      itself. Mean 0, every variance 1, eigenvalues of the covariance 2 and 0 in equal number.
    - ``"shifted"``: covariance I, mean 1/2 in every channel.

    Args:
        kind: a key of :data:`CLOUDS`.
        shape: (..., N, d), any number of leading dimensions.
        generator: source of the draw; drawn on its device.
        dtype: float32 (default) or float64.

    Returns:
        the samples, shape (..., N, d), dimensionless.

    Raises:
        ValueError: an unknown kind, fewer than two dimensions or an empty shape, or
            ``"rank_deficient"`` in one dimension, where nothing can be missing.
    """
    check_kind(kind)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be (..., N, d), all >= 1, not {shape}")
    d = shape[-1]
    if kind == "rank_deficient" and d < 2:
        raise ValueError("'rank_deficient' needs at least 2 dimensions, not 1")
    place = {"dtype": dtype, "device": generator.device}

    def normal(*size: int) -> Tensor:
        return torch.empty(size, **place).normal_(generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.empty(size, **place).uniform_(generator=generator)

    half = (*shape[:-1], (d + 1) // 2)
    if kind == "cube":
        return (2 * uniform(*shape) - 1) * math.sqrt(3)
    if kind == "ring":
        angle = 2 * math.pi * uniform(*half)
        return math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)[..., :d]
    if kind == "clusters":
        z = normal(*shape)
        sign = torch.where(uniform(*shape[:-1]) < 0.5, -1.0, 1.0).to(dtype)
        z[..., 0] = SEPARATION * sign + math.sqrt(1 - SEPARATION**2) * z[..., 0]
        return z
    if kind in ("heavy_tails", "heavy_radius"):
        rows = shape if kind == "heavy_tails" else (*shape[:-1], 1)
        chi_square = sum(normal(*rows).square() for _ in range(DEGREES))
        return normal(*shape) * ((DEGREES - 2) / chi_square).sqrt()
    if kind == "rank_deficient":
        return normal(*half).repeat_interleave(2, -1)[..., :d]
    return normal(*shape) + (SHIFT if kind == "shifted" else 0.0)


def characteristic_function(kind: str, t: Tensor, directions: Tensor) -> Tensor:
    r"""Exact characteristic function of a cloud's projections.

    .. math:: \varphi_k(t) = \mathbb E\, e^{i t\, a_k \cdot z}

    a product over independent channels or pairs of them. For the cube the factors are
    :math:`\sin(x)/x` with :math:`x = \sqrt3\, a_j t`, for the pairs of the ring Bessel functions
    :math:`J_0(\sqrt2\, |a_p|\, t)`, for Student t :math:`e^{-|x|}(1 + |x| + x^2/3)`, the same x.

    Args:
        kind: a key of :data:`CLOUDS`.
        t: points, shape (m,), in units of 1/standard deviation.
        directions: a_k as unit columns, shape (d, K).

    Returns:
        complex128, shape (K, m).

    Raises:
        ValueError: an unknown kind, or arguments of other shapes.
    """
    check_kind(kind)
    if t.ndim != 1 or directions.ndim != 2:
        raise ValueError(
            f"t and directions must have shapes (m,) and (d, K), not {tuple(t.shape)} and "
            f"{tuple(directions.shape)}"
        )
    a, t = directions.T.double(), t.double()  # (K, d)
    gauss = torch.exp(-(t**2) / 2)
    if kind == "shifted":
        return gauss * torch.exp(1j * SHIFT * a.sum(-1, keepdim=True) * t)
    if kind in ("ring", "rank_deficient"):
        pairs = torch.nn.functional.pad(a, (0, a.shape[-1] % 2)).unflatten(-1, (-1, 2))
    if kind == "gaussian":
        value = gauss.expand(len(a), -1)
    elif kind == "cube":  # torch.sinc(x) is sin(pi x) / (pi x)
        value = torch.sinc(math.sqrt(3) / math.pi * a[..., None] * t).prod(-2)
    elif kind == "ring":
        radius = pairs.norm(dim=-1)[..., None]
        value = torch.special.bessel_j0(math.sqrt(2) * radius * t).prod(-2)
    elif kind == "clusters":
        along = SEPARATION * a[:, :1]
        value = torch.cos(along * t) * torch.exp(-(1 - along**2) * t**2 / 2)
    elif kind == "rank_deficient":
        value = torch.exp(-pairs.sum(-1).square().sum(-1, keepdim=True) * t**2 / 2)
    else:
        x = math.sqrt(DEGREES - 2) * t.abs()
        if kind == "heavy_tails":
            x = a.abs()[..., None] * x
            value = (torch.exp(-x) * (1 + x + x**2 / 3)).prod(-2)
        else:
            value = (torch.exp(-x) * (1 + x + x**2 / 3)).expand(len(a), -1)
    return value.to(torch.complex128)


def population_strong(
    kind: str, directions: Tensor, *, t_max: float = 5.0, n_points: int = 17
) -> Tensor:
    r"""Strong SIGReg of a whole cloud, without the factor N, for each direction.

    .. math:: D_k = \int_{-t_{max}}^{t_{max}} \bigl|\varphi_k(t) - e^{-t^2/2}\bigr|^2
              e^{-t^2/2}\, dt

    by the loss's own trapezoid rule, so that N times its mean over k is exactly the expectation of
    ``strong_sigreg(..., unbiased=True)`` on a batch of N samples.

    Args:
        kind, directions: see :func:`characteristic_function`.
        t_max, n_points: grid, see :func:`sigreg_lib.strong_sigreg`.

    Returns:
        float64, shape (K,), >= 0.

    Raises:
        ValueError: an unknown kind, or directions of another shape.
    """
    t = torch.linspace(-t_max, t_max, n_points, dtype=torch.float64)
    gauss = torch.exp(-(t**2) / 2)
    deviation = characteristic_function(kind, t, directions.cpu()) - gauss
    return torch.trapezoid(deviation.abs().square() * gauss, t)


def detection_power(
    values: Tensor, null: Tensor, *, level: float = 0.95
) -> tuple[float, float, float]:
    r"""How often a loss exceeds what it is on Gaussian batches: its power as a test.

    .. math:: \hat p = \frac1n \sum_i \mathbf 1\{R_i > q\}, \qquad
              \frac{\hat p + c^2/2n \pm c \sqrt{\hat p (1 - \hat p)/n + c^2/4n^2}}{1 + c^2/n}

    with q the quantile of order ``level`` of the null values and c = 1.96: Wilson's interval. It
    covers the chance of the n values, not that of q, whose own level is off by about
    :math:`\sqrt{level\,(1 - level)/n_0}` for n_0 null values.

    Args:
        values: the loss on n batches of a cloud, shape (n,).
        null: the loss on Gaussian batches of the same size, shape (n_0,).
        level: order of the quantile, in (0, 1), so that a loss which sees nothing has the power
            1 - level.

    Returns:
        power, and the ends of its 95% interval, all in [0, 1].

    Raises:
        ValueError: no values, or a level outside (0, 1).

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.
    """
    if values.numel() == 0 or null.numel() == 0:
        raise ValueError(f"values and null hold {values.numel()} and {null.numel()} numbers")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), not {level!r}")
    n, c = values.numel(), 1.959964
    p = float((values > torch.quantile(null, level)).double().mean())
    middle = p + c**2 / (2 * n)
    half = c * math.sqrt(p * (1 - p) / n + c**2 / (4 * n**2))
    scale = 1 + c**2 / n
    return p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def check_kind(kind: str) -> None:
    """Raise ValueError, with the nearest known name, for a cloud that is not in :data:`CLOUDS`."""
    if kind not in CLOUDS:
        raise ValueError(f"unknown cloud {kind!r}; {suggest(kind, CLOUDS)}")
