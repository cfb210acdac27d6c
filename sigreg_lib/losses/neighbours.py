"""The neighbours of SIGReg: VICReg, VCReg, Barlow Twins and DeCov, all losses of second moments.

One notation: z of shape (..., N, C), N samples, C channels. Losses are averaged over the leading
dimensions. Statistics are float32 whatever the dtype of z, inside autocast too (float64 stays
float64), and of the batch of this process alone. No function here draws anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sigreg_lib._dtype import at_least_float32
from sigreg_lib.losses.sigreg import _check_samples
from sigreg_lib.losses.whitening import _centred, _check_eps, _covariance, batch_normalize


def variance_term(z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    r"""VICReg's variance term: a hinge on the standard deviation of every channel.

    .. math:: v(Z) = \frac1C \sum_j \max\bigl(0,\ \gamma - \sqrt{\mathrm{Var}(z_j) + \epsilon}\bigr)

    with the variance over N - 1. It asks for more than gamma only from below: a channel that is too
    wide costs nothing.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        gamma: standard deviation wanted, > 0, in units of z, default 1.
        eps: added to the variance, >= 0, in squared units of z, default 1e-4. At 0 the gradient
            where a channel is constant is the subgradient 0.

    Returns:
        scalar in [0, gamma], in units of z. Finite gradient everywhere; 0 at Z = 0.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, gamma not positive or eps negative.

    Source: Bardes et al., arXiv 2105.04906, eq. 1 and 2.
    """
    return _variance_values(z, gamma, eps).mean()


def covariance_term(z: Tensor) -> Tensor:
    r"""VICReg's covariance term: squared covariances between different channels.

    .. math:: c(Z) = \frac1C \sum_{i \ne j} \mathrm{Cov}(Z)_{ij}^2

    with the covariance over N - 1, as in :func:`sigreg_lib.weak_sigreg`, whose square without a
    sketch is :math:`C\,c(Z) + \sum_j (\mathrm{Var}(z_j) - 1)^2`.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.

    Returns:
        scalar >= 0, in units of z to the fourth.

    Raises:
        TypeError, ValueError: z is no floating-point batch of two samples or more.

    Source: Bardes et al., arXiv 2105.04906, eq. 3 and 4.
    """
    return _covariance_values(z).mean()


def invariance_term(a: Tensor, b: Tensor) -> Tensor:
    r"""VICReg's invariance term: mean squared distance between two views of the same samples.

    .. math:: s(A, B) = \frac1N \sum_n \lVert a_n - b_n \rVert^2

    (The released code divides by C as well; the paper, and this function, do not.)

    Args:
        a, b: representations of the two views, shape (..., N, C) each, sample by sample.

    Returns:
        scalar >= 0, in squared units of z.

    Raises:
        TypeError, ValueError: no floating-point batches of one shape.

    Source: Bardes et al., arXiv 2105.04906, eq. 5.
    """
    _check_views(a, b, at_least=1)
    with torch.autocast(a.device.type, enabled=False):
        distance = at_least_float32(a) - at_least_float32(b)
        return distance.square().sum(-1).mean()


def vicreg(
    a: Tensor,
    b: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    r"""VICReg of two views of the same samples.

    .. math:: R = \lambda\, s(A, B) + \mu\,[v(A) + v(B)] + \nu\,[c(A) + c(B)]

    Args:
        a, b: representations of the two views, shape (..., N, C) each, N >= 2.
        invariance, variance, covariance: the weights lambda, mu, nu, dimensionless; defaults of the
            paper.
        gamma, eps: see :func:`variance_term`.

    Returns:
        scalar; see the three terms, :func:`invariance_term`, :func:`variance_term`,
        :func:`covariance_term`.

    Raises:
        TypeError, ValueError: as the terms do.

    Source: Bardes et al., arXiv 2105.04906, eq. 6.
    """
    _check_views(a, b, at_least=2)
    spread = variance_term(a, gamma=gamma, eps=eps) + variance_term(b, gamma=gamma, eps=eps)
    overlap = covariance_term(a) + covariance_term(b)
    return invariance * invariance_term(a, b) + variance * spread + covariance * overlap


def barlow_twins(a: Tensor, b: Tensor, *, off_diagonal: float = 5e-3, eps: float = 0.0) -> Tensor:
    r"""Barlow Twins: the cross-correlation of two views against the identity.

    .. math:: R = \sum_i (1 - \rho_{ii})^2 + \lambda \sum_{i \ne j} \rho_{ij}^2, \qquad
              \rho = \tfrac1N\, \mathrm{BN}(A)^\top \mathrm{BN}(B)

    Args:
        a, b: representations of the two views, shape (..., N, C) each, N >= 2.
        off_diagonal: lambda, dimensionless, default of the paper.
        eps: added to the variances, in squared units of z; default 0, the correlation itself. A
            constant channel then has correlation 0 with every other, and gradient 0.

    Returns:
        scalar >= 0, dimensionless; blind to the scale and the mean of every channel.

    Raises:
        TypeError, ValueError: no floating-point batches of one shape with two samples or more, or
            a negative eps.

    Source: Zbontar et al., arXiv 2103.03230, eq. 1 and 2.
    """
    _check_views(a, b, at_least=2)
    with torch.autocast(a.device.type, enabled=False):
        left, right = batch_normalize(a, eps=eps), batch_normalize(b, eps=eps)
        dtype = torch.promote_types(left.dtype, right.dtype)
        correlation = left.to(dtype).mT @ right.to(dtype) / a.shape[-2]
        on = (1 - correlation.diagonal(dim1=-2, dim2=-1)).square().sum(-1)
        return (on + off_diagonal * _off_diagonal_square(correlation)).mean()


def decov(z: Tensor) -> Tensor:
    r"""DeCov: half the squared covariances between different channels, covariance over N.

    .. math:: R = \tfrac12 \bigl(\lVert C \rVert_F^2 - \lVert \mathrm{diag}\, C \rVert^2\bigr),
              \qquad C = \tfrac1N \sum_n (z_n - \bar z)(z_n - \bar z)^\top

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.

    Returns:
        scalar >= 0, in units of z to the fourth. Nothing in it keeps z from shrinking to 0.

    Raises:
        TypeError, ValueError: z is no floating-point batch of two samples or more.

    Source: Cogswell et al., arXiv 1511.06068, eq. 2.
    """
    return _decov_values(z).mean()


class VCReg(nn.Module):
    r"""VCReg: VICReg's variance and covariance terms, on layers of a supervised network.

    .. math:: R = \mu\, v(Z) + \nu\, c(Z)

    For :func:`sigreg_lib.attach`. The terms are :func:`variance_term` and :func:`covariance_term`;
    the smooth L1 penalty that VCReg puts on outlying covariances is left out.

    Args:
        variance, covariance: the weights mu and nu, >= 0; the defaults have VICReg's ratio 25 : 1.
        gamma, eps: see :func:`variance_term`.

    Raises:
        ValueError: a negative weight, gamma not positive, or eps negative.

    Source: Zhu et al., arXiv 2306.13292.
    """

    def __init__(
        self,
        variance: float = 1.0,
        covariance: float = 0.04,
        *,
        gamma: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        for name, weight in (("variance", variance), ("covariance", covariance)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a weight >= 0, not {weight!r}")
        _check_gamma(gamma)
        _check_eps(eps)
        self.variance, self.covariance, self.gamma, self.eps = variance, covariance, gamma, eps

    def matrix(self, z: Tensor) -> None:
        """None: nothing is drawn."""

    def values(self, z: Tensor, matrix: None = None) -> Tensor:
        """The loss of each batch, (..., N, C) -> (...)."""
        spread = _variance_values(z, self.gamma, self.eps)
        return self.variance * spread + self.covariance * _covariance_values(z)

    def floor(self, n_samples: int, n_channels: int, sketch_dim: None = None) -> float:
        r"""Expected value for a white Gaussian batch: for a finite N it is not 0.

        .. math:: \mu\, \mathbb E \max\bigl(0, \gamma - \sqrt{\chi^2_{N-1}/(N-1) + \epsilon}\bigr)
                  + \nu\, \frac{C - 1}{N - 1}
        """
        m = n_samples - 1
        overlap = self.covariance * (n_channels - 1) / m
        if self.gamma**2 <= self.eps:  # eps alone is wide enough: no hinge is left
            return overlap
        top = math.sqrt(self.gamma**2 - self.eps)
        s = torch.linspace(0, top, 20_001, dtype=torch.float64)[1:]  # standard deviations
        log_norm = math.log(2) + m / 2 * math.log(m / 2) - math.lgamma(m / 2)
        density = torch.exp(log_norm + (m - 1) * s.log() - m / 2 * s.square())
        hinge = torch.trapezoid((self.gamma - (s.square() + self.eps).sqrt()) * density, s)
        return self.variance * float(hinge) + overlap

    def forward(self, z: Tensor) -> Tensor:
        """Scalar loss of z, shape (..., N, C)."""
        return self.values(z).mean()

    def extra_repr(self) -> str:
        return (
            f"variance={self.variance}, covariance={self.covariance}, gamma={self.gamma}, "
            f"eps={self.eps}"
        )


class DeCov(nn.Module):
    """:func:`decov` as a module, for :func:`sigreg_lib.attach`."""

    def matrix(self, z: Tensor) -> None:
        """None: nothing is drawn."""

    def values(self, z: Tensor, matrix: None = None) -> Tensor:
        """The loss of each batch, (..., N, C) -> (...)."""
        return _decov_values(z)

    def floor(self, n_samples: int, n_channels: int, sketch_dim: None = None) -> float:
        """Expected value for a white Gaussian batch, C (C - 1) (N - 1) / (2 N^2)."""
        return n_channels * (n_channels - 1) * (n_samples - 1) / (2 * n_samples**2)

    def forward(self, z: Tensor) -> Tensor:
        """Scalar loss of z, shape (..., N, C)."""
        return self.values(z).mean()


def _variance_values(z: Tensor, gamma: float, eps: float) -> Tensor:
    _check_samples(z, at_least=2)
    _check_gamma(gamma)
    _check_eps(eps)
    with torch.autocast(z.device.type, enabled=False):
        centred, m = _centred(z), z.shape[-2] - 1
        if eps == 0:
            std = torch.linalg.vector_norm(centred, dim=-2) / math.sqrt(m)  # gradient 0 at 0
        else:
            std = (centred.square().sum(-2) / m + eps).sqrt()
        return (gamma - std).clamp_min(0).mean(-1)


def _covariance_values(z: Tensor) -> Tensor:
    _check_samples(z, at_least=2)
    with torch.autocast(z.device.type, enabled=False):
        return _off_diagonal_square(_covariance(_centred(z), 1)) / z.shape[-1]


def _decov_values(z: Tensor) -> Tensor:
    _check_samples(z, at_least=2)
    with torch.autocast(z.device.type, enabled=False):
        return _off_diagonal_square(_covariance(_centred(z), 0)) / 2


def _off_diagonal_square(matrix: Tensor) -> Tensor:
    c = matrix.shape[-1]
    on_diagonal = torch.eye(c, dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(on_diagonal, 0).square().sum((-2, -1))


def _check_views(a: Tensor, b: Tensor, at_least: int) -> None:
    _check_samples(a, at_least)
    _check_samples(b, at_least)
    if a.shape != b.shape:
        raise ValueError(f"two views must have one shape, not {tuple(a.shape)}, {tuple(b.shape)}")


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, not {gamma!r}")
