"""How many dimensions a batch of representations uses, and how long and aligned its vectors are.

Every function takes z of shape (..., N, C), N samples of C channels, and treats leading dimensions
as separate batches. It computes in float32, inside autocast too; float64 stays float64. Only the
ratio of scales matters where a result is dimensionless, and nothing returns NaN: what a collapsed
batch gives is said below, and values that are not finite are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def participation_ratio(z: Tensor) -> Tensor:
    r"""Effective dimension of the samples around their mean.

    .. math:: D = \frac{(\mathrm{tr}\, S)^2}{\mathrm{tr}\, S^2}
                = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}

    with :math:`\lambda_i` the eigenvalues of the covariance S. It needs no eigenvalues: the traces
    are those of the N x N or of the C x C product of the centred batch, whichever is smaller. N
    samples of an isotropic Gaussian give about :math:`C / (1 + (C + 1) / (N - 1))`, not C.

    Args:
        z: representations, shape (..., N, C), N >= 2.

    Returns:
        shape (...), dimensionless, in [1, min(N - 1, C)]; 0 if all samples coincide.

    Raises:
        TypeError, ValueError: see `check_samples`.

    Source: Gao et al., A theory of multineuronal dimensionality, bioRxiv 214262.
    """
    z = _to_unit_scale(_centred(check_samples(z)))
    with torch.autocast(z.device.type, enabled=False):
        gram = z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z
    return _ratio(z.square().sum((-2, -1)).square(), gram.square().sum((-2, -1)))


def covariance_spectrum(z: Tensor) -> Tensor:
    r"""Eigenvalues of the covariance, the largest first.

    .. math:: \lambda_i = \sigma_i^2 / (N - 1)

    with :math:`\sigma_i` the singular values of the centred batch, which keeps twice as many digits
    of the small ones as the covariance matrix would.

    Args:
        z: representations, shape (..., N, C), N >= 2.

    Returns:
        shape (..., min(N - 1, C)), in squared units of z: the eigenvalues that can differ from 0.

    Raises:
        TypeError, ValueError: see `check_samples`.

    Source: the spectrum of Jing et al., arXiv 2110.09348.
    """
    return _spectrum(_centred(check_samples(z)))


def spectral_entropy(z: Tensor) -> Tensor:
    r"""Entropy of the normalised eigenvalues of the covariance.

    .. math:: H = -\sum_i p_i \log p_i, \quad p_i = \lambda_i / \sum_j \lambda_j

    Args:
        z: representations, shape (..., N, C), N >= 2.

    Returns:
        shape (...), in nats, in [0, log min(N - 1, C)]; 0 if all samples lie on a line or coincide.

    Raises:
        TypeError, ValueError: see `check_samples`.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007, applied to the covariance.
    """
    return _entropy(_spectrum(_to_unit_scale(_centred(check_samples(z)))))


def effective_rank(z: Tensor) -> Tensor:
    r"""Effective rank of the batch as a matrix, its mean included (RankMe).

    .. math:: \exp\Bigl(-\sum_i p_i \log p_i\Bigr), \quad p_i = \sigma_i / \sum_j \sigma_j

    with :math:`\sigma_i` the singular values of z itself. RankMe adds 1e-7 to each p_i; here
    0 log 0 = 0 does without.

    Args:
        z: representations, shape (..., N, C), N >= 1.

    Returns:
        shape (...), dimensionless, in [1, min(N, C)]; 1 if z is zero.

    Raises:
        TypeError, ValueError: see `check_samples`.

    Source: Garrido et al., arXiv 2210.02885, eq. 1.
    """
    sigma = torch.linalg.svdvals(_to_unit_scale(check_samples(z, at_least=1)))
    return _entropy(sigma).exp()


def mean_cosine(z: Tensor) -> Tensor:
    r"""Mean cosine between two different samples, in O(N C).

    .. math:: \frac{1}{N (N - 1)} \sum_{n \ne m} u_n \cdot u_m
              = \frac{\lVert \sum_n u_n \rVert^2 - \sum_n \lVert u_n \rVert^2}{N (N - 1)},
              \quad u_n = z_n / \lVert z_n \rVert

    Args:
        z: representations, shape (..., N, C), N >= 2; not centred.

    Returns:
        shape (...), dimensionless, in [-1 / (N - 1), 1] up to rounding; a zero vector has cosine 0
        with every other.

    Raises:
        TypeError, ValueError: see `check_samples`.

    Source: the anisotropy of Ethayarajh, arXiv 1909.00512.
    """
    z = check_samples(z)
    n = z.shape[-2]
    z = _ratio(z, z.abs().amax(-1, keepdim=True))  # so that no square over- or underflows
    unit = _ratio(z, z.norm(dim=-1, keepdim=True))
    within = unit.square().sum((-2, -1))
    return (unit.sum(-2).square().sum(-1) - within) / (n * (n - 1))


def feature_norm(z: Tensor) -> Tensor:
    r"""Mean Euclidean length of the samples, :math:`\frac1N \sum_n \lVert z_n \rVert`.

    Args:
        z: representations, shape (..., N, C), N >= 1; not centred.

    Returns:
        shape (...), in units of z.

    Raises:
        TypeError, ValueError: see `check_samples`.
    """
    return check_samples(z, at_least=1).norm(dim=-1).mean(-1)


def check_samples(z: Tensor, *, at_least: int = 2) -> Tensor:
    """z in float32, or in float64 if it is, once it has been found to be a batch of samples.

    Raises:
        TypeError: z is not a tensor of a real floating-point dtype.
        ValueError: fewer than two dimensions, no channel, fewer than `at_least` samples, or a
            value that is not finite.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        found = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"z is {found}: expected a tensor of a floating-point dtype")
    if z.dim() < 2 or z.shape[-1] < 1:
        raise ValueError(f"z has shape {tuple(z.shape)}: expected (..., N, C) with C >= 1")
    if z.shape[-2] < at_least:
        raise ValueError(f"z has {z.shape[-2]} samples: expected at least {at_least}")
    if not z.isfinite().all():
        raise ValueError("z holds a value that is not finite: expected finite values only")
    return z if z.dtype == torch.float64 else z.float()


def _centred(z: Tensor) -> Tensor:
    # From the first sample before the mean: samples that coincide become exactly zero, and a mean
    # far larger than the spread costs no digits.
    z = z - z[..., :1, :]
    return z - z.mean(-2, keepdim=True)


def _spectrum(centred: Tensor) -> Tensor:
    n = centred.shape[-2]
    # The last of N singular values is zero but for rounding: centring takes one dimension.
    return torch.linalg.svdvals(centred)[..., : n - 1].square() / (n - 1)


def _to_unit_scale(z: Tensor) -> Tensor:
    return _ratio(z, z.abs().amax((-2, -1), keepdim=True))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0, as then a is."""
    return a / b.where(b > 0, 1)


def _entropy(weights: Tensor) -> Tensor:
    p = _ratio(weights, weights.sum(-1, keepdim=True))
    return torch.special.entr(p).sum(-1)  # in nats
