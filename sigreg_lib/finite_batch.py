r"""What a finite batch and a random sketch do to the squared Weak loss: closed forms, simulation.

Throughout, N samples of C channels are Gaussian with covariance s I (s: the ``scale``, a variance),
R^2 is the squared Weak loss and K the sketch dimension. The value at s = 1 is
:func:`sigreg_lib.weak_floor`; here is how it depends on s, and how much three estimates of the same
quantity scatter:

``biased``
    || Cov - I ||^2 of the batch, as published.
``halves``
    the inner product of the deviations of two disjoint half batches.
``unbiased``
    all quadruples of different samples (Himeno and Yamada), what ``mode="unbiased"`` uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sigreg_lib._names import suggest
from sigreg_lib.losses import weak_floor
from sigreg_lib.losses.sigreg import weak_values
from sigreg_lib.sketch import KINDS


def expected_square(
    scale: float,
    n_samples: int,
    n_channels: int,
    sketch_dim: int | None = None,
    *,
    sketch: str = "gaussian",
    unbiased: bool = False,
) -> float:
    r"""Mean of R^2, or of its unbiased estimate, over batches and sketches, for N(0, s I).

    .. math:: E R^2 = s^2 (K + v) - 2 s K + K, \qquad v = E R^2 |_{s = 1}

    Args:
        scale: s, the population's variance, >= 0.
        n_samples, n_channels, sketch_dim, sketch, unbiased: as in :func:`sigreg_lib.weak_floor`.

    Raises:
        ValueError: a negative scale, or what ``weak_floor`` refuses.

    Source: from E Cov = s I and E || Cov ||^2 = s^2 (K + v); v is ``weak_floor(squared=True)``.
    """
    if not scale >= 0:
        raise ValueError(f"scale is a variance: it must be >= 0, not {scale!r}")
    k, v = _columns_and_floor(n_samples, n_channels, sketch_dim, sketch, unbiased)
    return scale**2 * (k + v) - 2 * scale * k + k


def best_scale(
    n_samples: int,
    n_channels: int,
    sketch_dim: int | None = None,
    *,
    sketch: str = "gaussian",
    unbiased: bool = False,
) -> float:
    r"""The variance at which :func:`expected_square` is least, s* = K / (K + v) <= 1.

    The least value is K (1 - s*). Since R^2 is convex in the population's covariance and its mean
    does not change under rotations, s* I is the minimum over all covariances too. s* = 1 only for
    the corrected loss (unbiased, and an orthonormal sketch or none).

    Args, raises: as :func:`sigreg_lib.weak_floor`, the square being meant.
    """
    k, v = _columns_and_floor(n_samples, n_channels, sketch_dim, sketch, unbiased)
    return k / (k + v)


def sketched_dimension(
    effective_dim: float, n_samples: int, sketch_dim: int | None = None
) -> float:
    r"""Effective dimension that a batch shows through a sketch, at most K and at most N - 1.

    For Gaussian samples of *any* covariance :math:`\Sigma` with
    :math:`d = (\mathrm{tr}\,\Sigma)^2 / \mathrm{tr}\,\Sigma^2`, and
    :math:`\hat\Sigma = \mathrm{Cov}(Z S)`, S Gaussian and :math:`m = N - 1`,

    .. math:: \frac1{d_S} = \frac{E\,\mathrm{tr}\,\hat\Sigma^2}{(E\,\mathrm{tr}\,\hat\Sigma)^2}
              = \Bigl(1 + \frac1m\Bigr) \Bigl(\frac{1 + 1/K}d + \frac1K\Bigr)
                + \frac1m \Bigl(1 + \frac2{K d}\Bigr) .

    With :math:`s^2` the mean variance, :math:`E R^2 = K^2 s^4 / d_S - 2 K s^2 + K`: it is least at
    :math:`s^2 = d_S / K`, where it is :math:`K - d_S`. So the covariance's effective dimension
    alone decides which scale the loss asks for, and what it costs there; at d = C that is
    :func:`best_scale`.

    Args:
        effective_dim: d, of the population.
        n_samples: N, at least 2.
        sketch_dim: K; None: no sketch, :math:`1 / d_S = (1 + 1/m) / d + 1/m`. Give None where
            C <= K: the losses do not sketch there.

    Raises:
        ValueError: an effective dimension or a K below 1, or fewer than two samples.

    Source: ours; the moments are those of Gaussian quadratic forms (Wishart).
    """
    if not effective_dim >= 1:
        raise ValueError(f"effective_dim must be at least 1, not {effective_dim!r}")
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, not {n_samples!r}")
    if sketch_dim is not None and sketch_dim < 1:
        raise ValueError(f"sketch_dim must be at least 1 or None, not {sketch_dim!r}")
    m, d = n_samples - 1, effective_dim
    if sketch_dim is None:
        return 1 / ((1 + 1 / m) / d + 1 / m)
    k = sketch_dim
    return 1 / ((1 + 1 / m) * ((1 + 1 / k) / d + 1 / k) + (1 + 2 / (k * d)) / m)


def halves_square(z: Tensor) -> Tensor:
    r"""Unbiased estimate of the squared deviation from two disjoint half batches.

    .. math:: \langle \mathrm{Cov}_A - I, \mathrm{Cov}_B - I \rangle

    The halves are independent, so the mean of the product is the product of the means. It may be
    negative. For the scatter of this estimate against that of the others see
    :func:`estimate_variance`.

    Args:
        z: (sketched) representations, shape (..., N, K), N >= 4; A is the first half of the
            samples, B the rest.

    Returns:
        shape (...), dimensionless.

    Raises:
        ValueError: fewer than four samples.
    """
    if z.ndim < 2 or z.shape[-2] < 4:
        raise ValueError(f"two half batches need 4 samples or more, z has shape {tuple(z.shape)}")
    half = z.shape[-2] // 2
    a, b = (_deviation(part) for part in (z[..., :half, :], z[..., half:, :]))
    return (a * b).sum((-2, -1))


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "biased": lambda z: weak_values(z, squared=True),
    "halves": halves_square,
    "unbiased": lambda z: weak_values(z, squared=True, unbiased=True),
}
"""The three estimates of || Sigma - I ||^2, each (..., N, K) -> (...)."""


def estimate_variance(scale: float, n_samples: int, n_channels: int, estimate: str) -> float:
    r"""Variance over batches of an unbiased estimate, features N(0, s I_K), no sketch.

    With M the degrees of freedom of a batch and m = N/2 - 1 those of a half,

    .. math:: \mathrm{halves:}\ \frac{4 K s^2 (s - 1)^2}{m} + \frac{2 K (K + 1) s^4}{m^2}, \qquad
              \mathrm{unbiased:}\ \frac{8 K s^2 (s - 1)^2}{M} + \frac{4 K (K + 1) s^4}{M (M - 1)}

    exact for halves of equal size; for the other the first orders in 1/M, M = N - 1 (within 1% at
    N = 128).

    Args:
        scale: s >= 0.
        n_samples: N, even, at least 6.
        n_channels: K, the width that the loss sees (after an orthonormal sketch, its columns).
        estimate: ``"halves"`` or ``"unbiased"``.

    Raises:
        ValueError: another estimate, or N odd or too small.

    Source: Var tr(Cov) = 2 s^2 K / m and Cov of entries s^2 (d_ik d_jl + d_il d_jk) / m of a
    Wishart matrix; for the other, the projections of a U-statistic of order two.
    """
    if n_samples < 6 or n_samples % 2:
        raise ValueError(f"n_samples must be even and at least 6, not {n_samples!r}")
    k, linear = n_channels, n_channels * (scale * (scale - 1)) ** 2
    if estimate == "halves":
        m = n_samples // 2 - 1
        return 4 * linear / m + 2 * k * (k + 1) * scale**4 / m**2
    if estimate == "unbiased":
        m = n_samples - 1
        return 8 * linear / m + 4 * k * (k + 1) * scale**4 / (m * (m - 1))
    raise ValueError(_unknown("estimate", estimate, ("halves", "unbiased")))


def simulate(
    n_samples: int,
    n_channels: int,
    sketch_dim: int | None = None,
    *,
    count: int,
    generator: torch.Generator,
    scale: float = 1.0,
    sketch: str = "gaussian",
    estimates: Sequence[str] = ("biased",),
) -> dict[str, Tensor]:
    """Draw Gaussian batches, each with a sketch of its own, and estimate on each.

    Args:
        n_samples, n_channels, sketch_dim, sketch: N, C, K and the kind, as in ``weak_floor``.
        count: batches.
        generator: source of samples and sketches.
        scale: s, variance of every channel.
        estimates: keys of :data:`ESTIMATES`; all see the same batches.

    Returns:
        for each estimate the values, float32, shape (count,).

    Raises:
        ValueError: an unknown estimate or sketch, a negative scale, or a count below 1.
    """
    for name in estimates:
        if name not in ESTIMATES:
            raise ValueError(_unknown("estimate", name, ESTIMATES))
    if sketch not in ("gaussian", "orthonormal"):
        raise ValueError(_unknown("sketch", sketch, ("gaussian", "orthonormal")))
    if count < 1 or not scale >= 0:
        raise ValueError(f"count must be >= 1 and scale >= 0, not {count!r} and {scale!r}")
    k = _columns(n_channels, sketch_dim)
    at_once = max(1, 2**20 // (n_samples * n_channels))  # 4 MiB of samples stay in the cache
    found: dict[str, list[Tensor]] = {name: [] for name in estimates}
    for start in range(0, count, at_once):
        b = min(at_once, count - start)
        y = torch.randn(b, n_samples, n_channels, generator=generator) * scale**0.5
        if k < n_channels:
            make = KINDS[sketch]
            y = y @ torch.stack([make(n_channels, k, generator=generator) for _ in range(b)])
        for name in estimates:
            found[name].append(ESTIMATES[name](y))
    return {name: torch.cat(parts) for name, parts in found.items()}


def interpolated_trace(ranks: Sequence[int], eigenvalues: Sequence[float]) -> float:
    """Sum of a spectrum of which a record keeps only some ranks.

    Between kept ranks the eigenvalue is taken to follow a power of the rank (a line in the
    double logarithm); where one of the two is 0, a line. Beyond the last kept rank it is 0.

    Args:
        ranks: increasing, from 1; as :func:`sigreg_lib.records.spectrum_ranks` gives them.
        eigenvalues: at those ranks, >= 0.

    Returns:
        estimate of the sum over all ranks, in the eigenvalues' unit: exact where no rank is left
        out and for a power of the rank; as good as the spectrum is smooth between kept ranks.

    Raises:
        ValueError: lengths that differ, or ranks that do not increase from 1.
    """
    r, e = np.asarray(ranks, dtype=float), np.asarray(eigenvalues, dtype=float)
    if len(r) != len(e):
        raise ValueError(f"{len(r)} ranks for {len(e)} eigenvalues")
    if not len(r) or r[0] != 1 or (np.diff(r) <= 0).any():
        raise ValueError(f"ranks must increase from 1, not {list(ranks)}")
    every = np.arange(1, r[-1] + 1)
    upper = np.searchsorted(r, every)  # the kept rank at or after each rank
    positive = (e[upper] > 0) & (e[np.maximum(upper - 1, 0)] > 0)
    power = np.exp(np.interp(np.log(every), np.log(r), np.log(np.where(e > 0, e, 1.0))))
    return float(np.where(positive, power, np.interp(every, r, e)).sum())


def _columns(n_channels: int, sketch_dim: int | None) -> int:
    """K, or C where no sketch is used."""
    return n_channels if sketch_dim is None else min(sketch_dim, n_channels)


def _columns_and_floor(
    n_samples: int, n_channels: int, sketch_dim: int | None, sketch: str, unbiased: bool
) -> tuple[int, float]:
    """K, and the mean of R^2 at s = 1: the coefficients of every mean here."""
    options = {"sketch": sketch, "squared": True, "unbiased": unbiased}
    return _columns(n_channels, sketch_dim), weak_floor(
        n_samples, n_channels, sketch_dim, **options
    )


def _deviation(y: Tensor) -> Tensor:
    """Cov(y) - I, shape (..., N, K) -> (..., K, K)."""
    centred = y - y.mean(-2, keepdim=True)
    covariance = centred.mT @ centred / (y.shape[-2] - 1)
    return covariance - torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)


def _unknown(what: str, name: object, known) -> str:
    return f"unknown {what} {name!r}; {suggest(name, known)}"
