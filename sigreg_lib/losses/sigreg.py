"""SIGReg losses for supervised training: Weak (covariance) and Strong (characteristic function).

Both act on a batch of representations z of shape (..., N, C): N samples, C channels; leading
dimensions are separate batches (layers, say), computed in one call. Statistics are float32 whatever
the dtype of z, inside autocast too (float64 stays float64).

The published losses are the defaults (mode ``paper``). ``corrected()`` gives ours: an orthonormal
sketch and an estimate without the bias of a finite batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sigreg_lib._dtype import at_least_float32
from sigreg_lib.distributed import process_count
from sigreg_lib.losses import _kernels
from sigreg_lib.losses.floors import check_grid, strong_floor, weak_floor
from sigreg_lib.sketch import MatrixSource

STRONG_GRIDS: dict[str, tuple[float, int]] = {"paper": (5.0, 17), "lejepa": (3.0, 33)}
"""Named grids of Strong, (t_max, n_points): Weak-SIGReg's and LeJEPA's (17 points on [0, 3],
which by symmetry are 33 on [-3, 3])."""


def weak_sigreg(
    z: Tensor, sketch: Tensor | None = None, *, squared: bool = False, unbiased: bool = False
) -> Tensor:
    r"""Weak-SIGReg: distance of the (sketched) covariance from the identity.

    .. math:: R = \lVert \mathrm{Cov}(Z S) - I_K \rVert_F, \qquad
              \mathrm{Cov}(Y) = \tfrac{1}{N-1} \sum_n (y_n - \bar y)(y_n - \bar y)^\top

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2 (N >= 4 if unbiased).
        sketch: S, shape (C, K), K >= 1, or (..., C, K), one for each batch; None (default) uses
            the channels as they are.
        squared: return the square of the norm.
        unbiased: estimate the squared norm of the population's deviation without the bias of a
            finite batch; it may be negative. Needs ``squared=True``: an unbiased estimate has no
            root. With Q the mean (over N - 1) of the fourth powers of the centred norms,

            .. math:: \widehat{\mathrm{tr}\,\Sigma^2} = \tfrac{N-1}{N(N-2)(N-3)}
                      \bigl[(N-1)(N-2)\,\mathrm{tr}\,\hat\Sigma^2 + (\mathrm{tr}\,\hat\Sigma)^2
                      - N Q\bigr]

    Returns:
        scalar, dimensionless, averaged over the leading dimensions. The gradient is finite
        everywhere: zero at Z = 0 (by symmetry) and where the covariance is exactly I (but for
        ``unbiased``, whose mean has its minimum there, not each batch's value).

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: too few samples, a sketch of another shape, or unbiased without squared.

    Source: arXiv 2603.05924; unbiased trace of the squared covariance: Himeno and Yamada,
    J. Multivariate Anal. 130 (2014) 27-34.
    """
    return _mean(weak_values(z, sketch, squared=squared, unbiased=unbiased))


def weak_values(
    z: Tensor,
    sketch: Tensor | None = None,
    *,
    squared: bool = False,
    unbiased: bool = False,
    gather_distributed: bool = False,
) -> Tensor:
    """:func:`weak_sigreg` for each batch: shape (...) instead of the mean over it.

    With ``gather_distributed`` N is the number of samples of all processes together: each may hold
    as few as it likes, none too, and all raise where the whole is too small.
    """
    if unbiased and not squared:
        raise ValueError("unbiased=True estimates the squared norm: pass squared=True with it")
    # among several processes it is their sum that counts, known where it is taken
    shared = process_count(gather_distributed) > 1
    _check_samples(z, at_least=0 if shared else 4 if unbiased else 2)
    _check_matrix(z, sketch, "sketch")
    with _kernels.without_autocast(z.device.type):
        z = at_least_float32(z)
        sketch = None if sketch is None else sketch.to(z)
        return _kernels.covariance_deviation(z, sketch, squared, unbiased, gather_distributed)


def strong_sigreg(
    z: Tensor,
    directions: Tensor,
    *,
    t_max: float = 5.0,
    n_points: int = 17,
    unbiased: bool = False,
) -> Tensor:
    r"""Strong SIGReg: distance of every projection's characteristic function from the Gaussian's.

    .. math:: R = \frac{N}{K} \sum_k \int_{-t_{max}}^{t_{max}}
              \bigl|\hat\varphi_k(t) - e^{-t^2/2}\bigr|^2 e^{-t^2/2}\, dt, \qquad
              \hat\varphi_k(t) = \frac1N \sum_n e^{i t\, a_k \cdot z_n}

    The integral is the trapezoid rule on a symmetric grid.

    Args:
        z: representations, shape (..., N, C), any float dtype, N >= 2.
        directions: a_k as columns of unit length, shape (C, K), K >= 1, or (..., C, K), other
            ones for each batch.
        t_max: end of the grid, in units of 1/standard deviation.
        n_points: points on [-t_max, t_max], odd. LeJEPA's grid is ``t_max=3.0, n_points=33``.
        unbiased: subtract the bias of a finite batch, (1 - |phi|^2)/(N - 1) at every point; the
            result may be negative.

    Returns:
        scalar, dimensionless, averaged over the leading dimensions. Grows with N away from the
        Gaussian; about 1.06 for a Gaussian batch of any size (see :func:`strong_floor`).

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: too few samples, directions of another shape, or a bad grid.

    Source: LeJEPA, arXiv 2511.08544; grid: arXiv 2603.05924.
    """
    options = {"t_max": t_max, "n_points": n_points, "unbiased": unbiased}
    return _mean(strong_values(z, directions, **options))


def strong_values(
    z: Tensor,
    directions: Tensor,
    *,
    t_max: float = 5.0,
    n_points: int = 17,
    unbiased: bool = False,
    gather_distributed: bool = False,
) -> Tensor:
    """:func:`strong_sigreg` for each batch: shape (...) instead of the mean over it.

    ``gather_distributed`` as in :func:`weak_values`. Gradients of z and of ``directions`` are then
    scaled for data-parallel averaging.
    """
    _check_samples(z, at_least=0 if process_count(gather_distributed) > 1 else 2)
    _check_matrix(z, directions, "directions")
    check_grid(t_max, n_points)
    with _kernels.without_autocast(z.device.type):
        z = at_least_float32(z)
        return _kernels.characteristic_deviation(
            z, directions.to(z), t_max, n_points // 2, unbiased, gather_distributed
        )


def combine(
    task: Tensor, regularizer: Tensor, lam: float | Tensor, *, convex: bool = True
) -> Tensor:
    r"""The objective: (1 - lam) task + lam R if convex (released settings), else task + lam R.

    Args:
        task: the task's loss, in nats for a cross-entropy; scalar.
        regularizer: R, scalar.
        lam: weight, dimensionless; in [0, 1] if convex, else >= 0. A tensor is not checked: that
            would wait for its device.
        convex: which of the two.

    Raises:
        ValueError: lam outside its range.

    Source: arXiv 2603.05924, text (additive) and released settings (convex).
    """
    if not isinstance(lam, Tensor) and not 0 <= lam <= (1 if convex else math.inf):
        raise ValueError(f"lam must lie in {'[0, 1]' if convex else '[0, inf)'}, not {lam!r}")
    return (1 - lam if convex else 1.0) * task + lam * regularizer


class WeakSIGReg(nn.Module):
    """Weak-SIGReg as a module that draws its sketch; see :func:`weak_sigreg`.

    Call it outside of functions under activation checkpointing: recomputed, it would draw another
    sketch. (A matrix handed to :meth:`values` stays the same.)

    Args:
        sketch_dim: K, default 64; representations with C <= K channels are not sketched.
        sketch: ``"gaussian"`` (default, as published) or ``"orthonormal"``.
        resample: draw S anew at every call (default, released settings) or once for each C
            (the paper's text: a network can then keep its variance where S does not look).
        squared, unbiased: see :func:`weak_sigreg`.
        generator: source of the draws; default a private one seeded from ``seed``, so that all
            processes of a distributed run draw the same S. Its state is not in the module's
            ``state_dict``: a run that is to resume exactly hands in its own and saves its state,
            to be set again after the module is built. With ``resample=False`` one seed is taken
            from it here, at construction, and every S follows from that and C: build the module
            as at first, and it has the same S.
        seed: of the private generator.
        gather_distributed: statistics of the batch of all processes (gradients are scaled for
            data-parallel averaging, see :mod:`sigreg_lib.distributed`).
    """

    def __init__(
        self,
        sketch_dim: int = 64,
        *,
        sketch: str = "gaussian",
        resample: bool = True,
        squared: bool = False,
        unbiased: bool = False,
        generator: torch.Generator | None = None,
        seed: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if sketch == "directions":
            raise ValueError("sketch must be 'gaussian' or 'orthonormal', not 'directions'")
        if unbiased and not squared:
            raise ValueError("unbiased=True estimates the squared norm: pass squared=True with it")
        self.source = MatrixSource(
            sketch, sketch_dim, resample=resample, generator=generator, seed=seed
        )
        self.squared, self.unbiased = squared, unbiased
        self.gather_distributed = gather_distributed

    @classmethod
    def corrected(cls, sketch_dim: int = 64, **options) -> WeakSIGReg:
        """Mode ``corrected``: orthonormal sketch, unbiased estimate of the squared norm.

        On the scale of a square: collapse costs K, the goal 0. The gradient of R squared is 2R
        times that of R, and near collapse, where the bias is small, the corrected loss's is about
        as large: a lam of 0.1 becomes about 0.007 at R = 7, as a start for tuning.
        """
        return cls(sketch_dim, sketch="orthonormal", squared=True, unbiased=True, **options)

    def matrix(self, z: Tensor) -> Tensor | None:
        """The sketch for ``z``, shape (C, K); None where none is used (C <= K)."""
        return None if z.shape[-1] <= self.source.n_columns else self.source(z)

    def values(self, z: Tensor, matrix: Tensor | None = None) -> Tensor:
        """The loss of each batch, (..., N, C) -> (...), under a given matrix."""
        return weak_values(
            z,
            matrix,
            squared=self.squared,
            unbiased=self.unbiased,
            gather_distributed=self.gather_distributed,
        )

    def floor(self, n_samples: int, n_channels: int, sketch_dim: int | None = None) -> float:
        """Expected value at the goal, a batch from N(0, I); see :func:`weak_floor`.

        ``sketch_dim``: K if it differs from the module's.
        """
        return weak_floor(
            n_samples,
            n_channels,
            sketch_dim or self.source.n_columns,
            sketch=self.source.kind,
            squared=self.squared,
            unbiased=self.unbiased,
        )

    def forward(self, z: Tensor) -> Tensor:
        """Scalar loss of z, shape (..., N, C)."""
        return _mean(self.values(z, self.matrix(z)))

    def extra_repr(self) -> str:
        s = self.source
        return (
            f"sketch_dim={s.n_columns}, sketch={s.kind!r}, resample={s.resample}, "
            f"squared={self.squared}, unbiased={self.unbiased}{_gathers(self)}"
        )


class SIGReg(nn.Module):
    """Strong SIGReg as a module that draws its directions; see :func:`strong_sigreg`.

    Args:
        num_slices: K, number of directions, default 64.
        t_max, n_points, unbiased: see :func:`strong_sigreg`; defaults are the grid published with
            Weak-SIGReg, :meth:`lejepa` gives LeJEPA's.
        resample, generator, seed, gather_distributed: see :class:`WeakSIGReg`.
    """

    def __init__(
        self,
        num_slices: int = 64,
        t_max: float = 5.0,
        n_points: int = 17,
        *,
        unbiased: bool = False,
        resample: bool = True,
        generator: torch.Generator | None = None,
        seed: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_grid(t_max, n_points)
        self.source = MatrixSource(
            "directions", num_slices, resample=resample, generator=generator, seed=seed
        )
        self.t_max, self.n_points, self.unbiased = t_max, n_points, unbiased
        self.gather_distributed = gather_distributed

    @classmethod
    def lejepa(cls, num_slices: int = 64, **options) -> SIGReg:
        """The grid of LeJEPA, 17 points on [0, 3] (33 on [-3, 3])."""
        t_max, n_points = STRONG_GRIDS["lejepa"]
        return cls(num_slices, t_max, n_points, **options)

    def matrix(self, z: Tensor) -> Tensor:
        """The directions for ``z``, shape (C, K)."""
        return self.source(z)

    def values(self, z: Tensor, matrix: Tensor) -> Tensor:
        """The loss of each batch, (..., N, C) -> (...), under given directions."""
        return strong_values(
            z,
            matrix,
            t_max=self.t_max,
            n_points=self.n_points,
            unbiased=self.unbiased,
            gather_distributed=self.gather_distributed,
        )

    def floor(self, n_samples: int, n_channels: int, sketch_dim: int | None = None) -> float:
        """Expected value for a Gaussian batch of any size and K; see :func:`strong_floor`."""
        return strong_floor(t_max=self.t_max, n_points=self.n_points, unbiased=self.unbiased)

    def forward(self, z: Tensor) -> Tensor:
        """Scalar loss of z, shape (..., N, C)."""
        return _mean(self.values(z, self.matrix(z)))

    def extra_repr(self) -> str:
        s = self.source
        return (
            f"num_slices={s.n_columns}, t_max={self.t_max}, n_points={self.n_points}, "
            f"unbiased={self.unbiased}, resample={s.resample}{_gathers(self)}"
        )


def _gathers(module: WeakSIGReg | SIGReg) -> str:
    return ", gather_distributed=True" if module.gather_distributed else ""


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.ndim else values  # two operations less for a single batch


def _check_samples(z: Tensor, at_least: int) -> None:
    if not torch.is_floating_point(z):
        raise TypeError(f"z must be a floating-point tensor, not {z.dtype}")
    if z.ndim < 2:
        raise ValueError(f"z must have shape (..., N, C), not {tuple(z.shape)}")
    if not z.shape[-1]:
        raise ValueError(f"z has no channels: shape {tuple(z.shape)}")
    if z.shape[-2] < at_least:
        raise ValueError(f"z has {z.shape[-2]} samples (shape {tuple(z.shape)}); needs {at_least}")


def _check_matrix(z: Tensor, matrix: Tensor | None, name: str) -> None:
    if matrix is None:
        return
    leading, own = z.shape[:-2], matrix.shape[:-2]  # one matrix, or one a batch
    fits = len(own) <= len(leading) and all(
        a in (1, b) for a, b in zip(own[::-1], leading[::-1], strict=False)
    )
    if matrix.ndim < 2 or matrix.shape[-2] != z.shape[-1] or not fits:
        raise ValueError(
            f"{name} must have shape (C, K) with C = {z.shape[-1]}, not {tuple(matrix.shape)}; "
            f"more dimensions in front must be those of z, {tuple(leading)}"
        )
    if not matrix.shape[-1]:
        raise ValueError(f"{name} has no columns: shape {tuple(matrix.shape)}")
