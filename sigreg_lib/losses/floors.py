"""What the losses cost at their goal, a batch drawn from N(0, I): the floors of a finite batch."""

from __future__ import annotations

import math


def weak_floor(
    n_samples: int,
    n_channels: int,
    sketch_dim: int | None = None,
    *,
    sketch: str = "gaussian",
    squared: bool = False,
    unbiased: bool = False,
) -> float:
    r"""Expected Weak-SIGReg at the goal, a batch drawn from Z ~ N(0, I_C).

    No lower bound: features of less variance cost less on average
    (:func:`~sigreg_lib.finite_batch.best_scale`). With a Gaussian sketch the expected square is

    .. math:: v = K(K+1)\Bigl(\frac1C + \frac1{N-1}\Bigr) + \frac{K(K+3)}{C(N-1)},

    with an orthonormal one, or none, K(K+1)/(N-1). The unsquared floor is its root (the mean of
    the norm lies below, by Jensen's inequality: 0.02% at N = 128, C = 256, K = 64; 1% at N = 16,
    C = 40, K = 24; more at small K, 3% at N = C = 128, K = 4 and 20% there at K = 1).

    Args:
        n_samples: N, at least 2 (4 if unbiased).
        n_channels: C.
        sketch_dim: K; None, or C <= K, means no sketch.
        sketch: ``"gaussian"`` or ``"orthonormal"``.
        squared, unbiased: as in :func:`~sigreg_lib.losses.weak_sigreg`. The corrected loss
            (orthonormal or no sketch, unbiased) has the floor 0; a Gaussian sketch leaves
            K(K+1)/C.

    Raises:
        ValueError: an unknown sketch, too few samples, or unbiased without squared.
    """
    if sketch not in ("gaussian", "orthonormal"):
        raise ValueError(f"sketch must be 'gaussian' or 'orthonormal', not {sketch!r}")
    if unbiased and not squared:
        raise ValueError("unbiased=True estimates the squared norm: pass squared=True with it")
    if n_samples < (least := 4 if unbiased else 2):
        raise ValueError(f"n_samples must be at least {least}, not {n_samples!r}")
    c = n_channels
    k = c if sketch_dim is None or c <= sketch_dim else sketch_dim
    from_sketch = k * (k + 1) / c if k < c and sketch == "gaussian" else 0.0
    m = n_samples - 1
    from_batch = k * (k + 1) / m + (k * (k + 3) / (c * m) if from_sketch else 0.0)
    square = from_sketch + (0.0 if unbiased else from_batch)
    return square if squared else math.sqrt(square)


def strong_floor(*, t_max: float = 5.0, n_points: int = 17, unbiased: bool = False) -> float:
    r"""Expected Strong SIGReg of a Gaussian batch of any N and C.

    .. math:: \int e^{-t^2/2} (1 - e^{-t^2})\, dt \to \sqrt{2\pi}\,(1 - 1/\sqrt3) = 1.06

    on the loss's own grid; 0 if unbiased.
    """
    check_grid(t_max, n_points)
    if unbiased:
        return 0.0
    dt = t_max / (n_points // 2)
    ts = [j * dt for j in range(1, n_points // 2 + 1)]
    terms = [2 * dt * math.exp(-t * t / 2) * (1 - math.exp(-t * t)) for t in ts]
    return sum(terms) - terms[-1] / 2


def check_grid(t_max: float, n_points: int) -> None:
    """ValueError unless it is a grid of Strong."""
    if not 0 < t_max < math.inf:
        raise ValueError(f"t_max must be positive and finite, not {t_max!r}")
    if n_points < 3 or n_points % 2 == 0:
        raise ValueError(f"n_points must be odd and at least 3, not {n_points!r}")
