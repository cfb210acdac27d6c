"""Whitening and batch normalization as functions of a batch, and whitening as a loss.

What SIGReg asks for by a loss, these do by a transform. z has shape (..., N, C), leading dimensions
are separate batches. Statistics are float32 whatever the dtype of z, inside autocast too (float64
stays float64), and of the batch of this process alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigreg_lib._dtype import at_least_float32
from sigreg_lib._names import suggest
from sigreg_lib._newton import newton_inverse_root
from sigreg_lib._types import is_integer
from sigreg_lib.losses.sigreg import _check_samples

WHITENINGS = ("zca", "pca")


def batch_normalize(z: Tensor, *, eps: float = 1e-5) -> Tensor:
    r"""Batch normalization as a function of the batch: statistics of z itself, no scale and shift.

    .. math:: \mathrm{BN}(z)_{nj} = \frac{z_{nj} - \bar z_j}{\sqrt{\mathrm{Var}(z_j) + \epsilon}}

    with the variance over N.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        eps: added to the variance, >= 0, in squared units of z. At 0 a constant channel becomes 0,
            with gradient 0.

    Returns:
        the normalized batch, shape of z, dimensionless; float32, or float64 if z is.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, or a negative eps.

    Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """
    _check_samples(z, at_least=2)
    _check_eps(eps)
    with torch.autocast(z.device.type, enabled=False):
        centred = _centred(z)
        variance = centred.square().mean(-2, keepdim=True) + eps
        return centred * torch.where(variance > 0, variance, torch.inf).rsqrt()


def whiten(z: Tensor, kind: str = "zca", *, eps: float = 0.0, correction: int = 1) -> Tensor:
    r"""Whiten a batch by its own covariance.

    .. math:: W = (z - \bar z)\, U (\Lambda + \epsilon)^{-1/2} V^\top, \qquad
              \mathrm{Cov}(Z) = U \Lambda U^\top

    with V = U for ``"zca"``, the whitened batch nearest to z, and V = I for ``"pca"``, whose
    channels are principal components, the largest first.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        kind: ``"zca"`` or ``"pca"``.
        eps: added to the eigenvalues, >= 0, in squared units of z. At 0 directions without variance
            (below C times the machine's epsilon times the largest) are mapped to 0, so that the
            covariance of the result is a projection: the identity only if N > C.
        correction: 1 (default) for the covariance over N - 1, which gives
            :func:`sigreg_lib.weak_sigreg` the value 0; 0 for N, as batch whitening has it.

    Returns:
        the whitened batch, shape of z, dimensionless; float32, or float64 if z is. The gradient of
        ``"zca"`` is finite, equal eigenvalues included; that of ``"pca"`` exists only where all
        eigenvalues differ, as its axes are not defined elsewhere.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, an unknown kind, a negative eps, or a correction other
            than 0 and 1.

    Source: Kessy et al., arXiv 1512.00809 (ZCA, PCA); Huang et al., arXiv 1804.08450 (in networks).
    """
    if kind not in WHITENINGS:
        raise ValueError(f"unknown kind of whitening {kind!r}; {suggest(kind, WHITENINGS)}")
    _check_samples(z, at_least=2)
    _check_eps(eps)
    with torch.autocast(z.device.type, enabled=False):
        centred = _centred(z)
        covariance = _covariance(centred, correction)
        if kind == "zca":
            return centred @ _InverseRoot.apply(covariance, eps)
        values, vectors = torch.linalg.eigh(covariance)
        # an infinite divisor, and not a product with 0: its gradient is 0, too
        kept = torch.where(_nonzero(values, eps), values + eps, torch.inf)
        return ((centred @ vectors) * kept.rsqrt()[..., None, :]).flip(-1)


def iterative_whiten(
    z: Tensor, *, iterations: int = 5, eps: float = 1e-5, correction: int = 0
) -> Tensor:
    r"""IterNorm: ZCA whitening by Newton's iteration, without eigenvalues.

    .. math:: \Sigma = \mathrm{Cov}(Z) + \epsilon I, \quad \Sigma_N = \Sigma/\mathrm{tr}\,\Sigma,
              \quad P_0 = I, \quad P_{k+1} = \tfrac12 (3 P_k - P_k^3 \Sigma_N), \quad
              W = (z - \bar z)\, P_T / \sqrt{\mathrm{tr}\,\Sigma}

    A step multiplies P by at most 3/2: with few iterations small directions are only partly
    whitened. Computed in the coupled form, whose iterates are the same and which is stable.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        iterations: T >= 0, default 5.
        eps: added to the eigenvalues, >= 0, in squared units of z, default 1e-5.
        correction: 0 (default) for the covariance over N, 1 for N - 1.

    Returns:
        shape of z, dimensionless; float32, or float64 if z is.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, negative iterations or eps, or a correction other than
            0 and 1.

    Source: Huang et al., arXiv 1904.03441, algorithm 1.
    """
    _check_samples(z, at_least=2)
    _check_eps(eps)
    if not is_integer(iterations) or iterations < 0:
        raise ValueError(f"iterations must be an int >= 0, not {iterations!r}")
    with torch.autocast(z.device.type, enabled=False):
        centred = _centred(z)
        covariance = _covariance(centred, correction)
        return centred @ newton_inverse_root(covariance, iterations, eps)


def whitening_penalty(z: Tensor) -> Tensor:
    r"""Squared distance from a batch to its whitened version: whitening as a loss.

    .. math:: R = \frac{1}{N-1} \sum_n \lVert (z_n - \bar z) - w_n \rVert^2
                = \sum_i \bigl(\sqrt{\lambda_i} - 1\bigr)^2, \qquad W = \mathrm{ZCA}(Z)

    with the eigenvalues :math:`\lambda_i` of the covariance over N - 1. It is the squared
    2-Wasserstein distance between Gaussians of covariance Cov(Z) and I. The two sides agree at full
    rank; computed is the right one, which adds 1 for every direction that has no variance.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.

    Returns:
        scalar >= 0, dimensionless; C at total collapse. The gradient, 2 (z - mean - w) / (N - 1),
        does not vanish as a direction collapses, other than that of Weak.

    Raises:
        TypeError, ValueError: z is no floating-point batch of two samples or more.

    Source: Olkin and Pukelsheim, Linear Algebra Appl. 48 (1982) 257-263 (the distance).
    """
    _check_samples(z, at_least=2)
    with torch.autocast(z.device.type, enabled=False):
        n, c = z.shape[-2:]
        scales = torch.linalg.svdvals(_centred(z)) / math.sqrt(n - 1)
        return ((scales - 1).square().sum(-1) + max(0, c - n)).mean()


class _InverseRoot(torch.autograd.Function):
    """(A + eps I)^{-1/2} of symmetric A >= 0, 0 in the null space if eps is 0.

    With A = U diag(a) U' the derivative along E is U [F * (U'EU)] U' with the divided differences
    F_ij of f(a) = (a + eps)^{-1/2}. Written out, they have no 0/0 where eigenvalues coincide.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, eps: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        kept = _nonzero(values, eps)
        inverse = torch.where(kept, values + eps, torch.inf).rsqrt()  # 0 in the null space
        ctx.save_for_backward(inverse, vectors, kept)
        return (vectors * inverse[..., None, :]) @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        inverse, vectors, kept = ctx.saved_tensors
        x, y = inverse[..., :, None], inverse[..., None, :]
        # both kept: -xy / (1/x + 1/y), without the square of xy, which overflows early; one of
        # them null: x^3, its cube; both: 0
        both = kept[..., :, None] & kept[..., None, :]
        slope = torch.where(both, -(x * y) * ((x * y) / (x + y)), (x + y) ** 3)
        with torch.autocast(grad.device.type, enabled=False):  # backward may be called inside it
            inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
            return vectors @ (slope * inner) @ vectors.mT, None


def _centred(z: Tensor) -> Tensor:
    # From the first sample before the mean: samples that coincide become exactly zero. The first
    # step is a constant shift, which centring takes back, so no gradient goes through it.
    z = at_least_float32(z)
    z = z - z[..., :1, :].detach()
    return z - z.mean(-2, keepdim=True)


def _covariance(centred: Tensor, correction: int) -> Tensor:
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 (over N) or 1 (over N - 1), not {correction!r}")
    return centred.mT @ centred / (centred.shape[-2] - correction)


def _nonzero(values: Tensor, eps: float) -> Tensor:
    """Which eigenvalues, in ascending order, differ from 0 by more than rounding."""
    if eps > 0:
        return torch.ones_like(values, dtype=torch.bool)
    smallest = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    return values > smallest.clamp_min(0)


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, not {eps!r}")
