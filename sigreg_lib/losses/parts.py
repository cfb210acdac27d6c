"""Weak-SIGReg in two parts, scale and shape: each alone, and with the scale in logarithms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sigreg_lib.losses._kernels import without_autocast
from sigreg_lib.losses.sigreg import WeakSIGReg, _check_matrix, _check_samples, _mean
from sigreg_lib.losses.whitening import _centred


def weak_parts(z: Tensor, sketch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Scale and shape of the (sketched) covariance: what Weak-SIGReg is made of.

    Let :math:`\Sigma = \mathrm{Cov}(Z S)` and :math:`s^2 = \mathrm{tr}\,\Sigma / K`. Since
    :math:`\Sigma / s^2 - I` has no trace,

    .. math:: \lVert \Sigma - I \rVert_F^2 = R_{scale}^2 + s^4 R_{shape}^2, \qquad
              R_{scale} = \sqrt K\, |s^2 - 1|, \qquad
              R_{shape} = \lVert \Sigma / s^2 - I \rVert_F .

    The scale knows the mean variance alone, and :math:`\sqrt K` is what collapse costs, as in Weak;
    the shape does not change with it, so that its gradient grows as features shrink, and is
    :math:`\sqrt{K (K / d - 1)}` with d the effective dimension of :math:`\Sigma`, at most
    :math:`\sqrt{K (K - 1)}`.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        sketch: S, shape (C, K); None (default) uses the channels as they are.

    Returns:
        :math:`R_{scale}` and :math:`R_{shape}`, each of shape (...), dimensionless. Finite
        wherever :math:`s^2` is a number of the dtype, with gradient 0 where all samples coincide;
        there the shape counts as that of :math:`\Sigma / s^2 = 0`.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, or a sketch of another shape.

    Source: ours; the loss that it divides is arXiv 2603.05924's.
    """
    log_variance, shape, k = _log_variance_and_shape(z, sketch)
    return math.sqrt(k) * (log_variance.exp() - 1).abs(), shape


def log_weak_sigreg(z: Tensor, sketch: Tensor | None = None) -> Tensor:
    r"""Weak-SIGReg with scale and shape of the covariance apart, the scale in logarithms.

    In the notation of :func:`weak_parts` the square of Weak is
    :math:`s^4\, \lVert \Sigma / s^2 - I \rVert_F^2 + K\, (s^2 - 1)^2`. Its gradient in Z vanishes
    with s: the one reason is the factor :math:`s^4`, the other that :math:`s^2 - 1` is flat in s at
    0. This loss has 1 in place of the one and the logarithm, which agrees with it to first order at
    the goal, in place of the other:

    .. math:: R^2 = \lVert \Sigma / s^2 - I \rVert_F^2 + K\, (\log s^2)^2 .

    So the slope of :math:`R(a Z)` in :math:`\log a`, :math:`2 K \log s^2 / R`, tends to
    :math:`-2 \sqrt K` as the scale falls to 0, and is 0 at :math:`s = 1`: in a weight to which the
    output is proportional, the gradient then no longer depends on how small the features are.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        sketch: S, shape (C, K); None (default) uses the channels as they are.

    Returns:
        scalar, dimensionless, averaged over the leading dimensions; 0 where the covariance is I.
        Finite everywhere: where all samples coincide exactly, no direction leads out, the variance
        counts as the cube of the dtype's smallest normal number, and the gradient is 0.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: fewer than two samples, or a sketch of another shape.

    Source: ours; the loss it departs from is arXiv 2603.05924's.
    """
    return _mean(log_weak_values(z, sketch))


def log_weak_values(z: Tensor, sketch: Tensor | None = None) -> Tensor:
    """:func:`log_weak_sigreg` for each batch: shape (...) instead of the mean over it."""
    log_variance, shape, k = _log_variance_and_shape(z, sketch)
    scale = math.sqrt(k) * log_variance
    return torch.linalg.vector_norm(torch.stack([shape, scale]), dim=0)  # gradient 0 at 0


def _log_variance_and_shape(z: Tensor, sketch: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """log s^2 and |Sigma / s^2 - I| of each batch, and K."""
    _check_samples(z, at_least=2)
    _check_matrix(z, sketch, "sketch")
    with without_autocast(z.device.type):
        z = _centred(z)  # before the sketch: equal samples give exact zeros
        y = z if sketch is None else z @ sketch.to(z)
        k, tiny = y.shape[-1], torch.finfo(y.dtype).tiny
        # A constant factor brings the squares into range; its logarithm is added again below.
        unit = y.detach().abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        u = y / unit
        covariance = u.mT @ u / (y.shape[-2] - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(tiny)
        eye = torch.eye(k, dtype=y.dtype, device=y.device)
        shape = torch.linalg.vector_norm(covariance / variance[..., None, None] - eye, dim=(-2, -1))
        return variance.log() + 2 * unit[..., 0, 0].log(), shape, k


class _SketchedWeak(WeakSIGReg):
    """What both have of Weak: its sketch, but neither its squares nor its processes."""

    def __init__(
        self,
        sketch_dim: int = 64,
        *,
        sketch: str = "gaussian",
        resample: bool = True,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sketch_dim, sketch=sketch, resample=resample, generator=generator, seed=seed
        )

    def extra_repr(self) -> str:
        s = self.source
        return f"sketch_dim={s.n_columns}, sketch={s.kind!r}, resample={s.resample}"

    @classmethod
    def corrected(cls, *args: Any, **options: Any) -> WeakSIGReg:
        """Not there: TypeError."""
        raise TypeError(f"{cls.__name__} has no corrected mode: that is WeakSIGReg.corrected()")


class LogWeakSIGReg(_SketchedWeak):
    """:func:`log_weak_sigreg` as a module that draws its sketch; a batch of one process.

    ``floor`` is that of :class:`~sigreg_lib.WeakSIGReg`, with which this loss agrees near the goal:
    within 1.5% (N = 32, C = 128, K = 4), 0.01% at N = 128, C = 256, K = 64.

    Args:
        sketch_dim, sketch, resample, generator, seed: as in :class:`~sigreg_lib.WeakSIGReg`.
    """

    def values(self, z: Tensor, matrix: Tensor | None = None) -> Tensor:
        """The loss of each batch, (..., N, C) -> (...), under a given matrix."""
        return log_weak_values(z, matrix)


class WeakPart(_SketchedWeak):
    """One of :func:`weak_parts` as a module that draws its sketch; a batch of one process.

    For asking what one alone does. Neither is a loss to train with: the scale leaves the features
    where they are of one dimension, the shape where they are tiny. Nor are they summands of Weak:
    there the shape is weighted by :math:`s^4`, so that it, too, acts on the scale.

    Args:
        part: ``"scale"`` or ``"shape"``.
        sketch_dim, sketch, resample, generator, seed: as in :class:`~sigreg_lib.WeakSIGReg`.

    Raises:
        ValueError: another part.
    """

    def __init__(self, part: str, sketch_dim: int = 64, **options: Any) -> None:
        if part not in ("scale", "shape"):
            raise ValueError(f"part must be 'scale' or 'shape', not {part!r}")
        super().__init__(sketch_dim, **options)
        self.part = part

    def values(self, z: Tensor, matrix: Tensor | None = None) -> Tensor:
        """The part of each batch, (..., N, C) -> (...), under a given matrix."""
        return weak_parts(z, matrix)[self.part == "shape"]

    def floor(self, n_samples: int, n_channels: int, sketch_dim: int | None = None) -> float:
        r"""Root mean square at the goal, a batch from N(0, I).

        Of the scale it is :math:`\sqrt{K\,\mathrm{Var}\,s^2}`,

        .. math:: K\,\mathrm{Var}\,s^2 = \frac2C + \frac2{N-1} \Bigl(1 + \frac{K+1}C\Bigr)

        with a Gaussian sketch and :math:`2 / (N - 1)` with an orthonormal one or none. Of the
        shape it is what is left of Weak's squared floor, to first order: above it by 0.6% at
        N = 32, C = 40, K = 24, by more at small K (7% at N = 32, C = 8, K = 4).
        """
        k = sketch_dim or self.source.n_columns
        m, gaussian = n_samples - 1, self.source.kind == "gaussian" and k < n_channels
        square = 2 / n_channels + 2 / m * (1 + (k + 1) / n_channels) if gaussian else 2 / m
        if self.part == "shape":
            square = super().floor(n_samples, n_channels, sketch_dim) ** 2 - square
        return math.sqrt(max(square, 0.0))  # one column has no shape

    def extra_repr(self) -> str:
        return f"part={self.part!r}, {super().extra_repr()}"
