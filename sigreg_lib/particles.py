r"""Representations as interacting particles: overdamped Langevin dynamics and its closed forms.

N particles in d dimensions, many systems at once, follow

.. math:: dz_n = \bigl[-\kappa\,(z_n - \mu_n) + F_n(Z)\bigr]\,dt
          + \sqrt{2}\,\bigl(G\,dW'_n + \sqrt{T}\,dW_n\bigr)

a task drift of rate kappa toward the class mean mu_n, the force F of a regularizer, noise through a
low-rank factor G and a temperature T. Time and length are dimensionless; the diffusion matrix is
D = G G' + T I. The closed forms hold along common eigenvectors of covariance, D and class means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sigreg_lib._names import suggest
from sigreg_lib.diagnostics import check_samples
from sigreg_lib.losses import strong_values
from sigreg_lib.sketch import directions as draw_directions

Number = float | Tensor  # as a tensor of shape (...), one value a system
FORCES = ("none", "weak", "weak_squared", "strong")


def force(z: Tensor, kind: str, *, lam: Number = 1.0, directions: Tensor | None = None) -> Tensor:
    r"""Force of a regularizer on every particle, scaled to have a limit for many particles.

    .. math:: F_n = -4 \lambda\, (\Sigma - I)(z_n - \bar z), \qquad
              F_n = -2 \lambda\, \frac{(\Sigma - I)(z_n - \bar z)}{\lVert \Sigma - I \rVert_F},
              \qquad F_n = -\lambda\, \partial R / \partial z_n

    for ``"weak_squared"``, ``"weak"`` (0 where the norm is 0) and ``"strong"``, Sigma being the
    covariance over N - 1. The first two are :math:`-\lambda (N-1)\, \partial R / \partial z_n` of
    :func:`sigreg_lib.weak_sigreg` without a sketch; Strong's R carries a factor N itself.

    Args:
        z: particles, shape (..., N, d), N >= 2.
        kind: ``"none"``, ``"weak"``, ``"weak_squared"`` or ``"strong"``.
        lam: strength >= 0; a float, or shape (...) for one value a system.
        directions: a_k of Strong as unit columns, shape (d, K).

    Returns:
        shape (..., N, d), length per time.

    Raises:
        ValueError: an unknown kind, Strong without directions, or a bad lam.
    """
    _check_kind(kind)
    strength = _per_system(lam, z, "lam")
    if kind == "none":
        return torch.zeros_like(z)
    if kind == "strong":
        if directions is None:
            raise ValueError("directions is None: 'strong' needs unit columns, shape (d, K)")
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return -strength * torch.autograd.grad(strong_values(leaf, directions).sum(), leaf)[0]
    centred = z - z.mean(-2, keepdim=True)
    deviation = centred.mT @ centred / (z.shape[-2] - 1)
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    if kind == "weak":
        norm = torch.linalg.matrix_norm(deviation, keepdim=True)
        deviation = deviation / (2 * norm).where(norm > 0, 1)
    return centred @ (-4 * strength * deviation)


@torch.no_grad()
def langevin(
    z: Tensor,
    *,
    dt: float,
    steps: int,
    generator: torch.Generator,
    every: int = 1,
    kind: str = "none",
    lam: Number = 0.0,
    pull: Number = 0.0,
    targets: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: Number = 0.0,
    directions: Tensor | int | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Integrate the particles with Heun's method and yield (time, particles) as it goes.

    Of second order in dt, for averages over the additive noise too; explicit: under the squared
    Weak force 4 lam sigma dt must stay well below 1, sigma the covariance's largest eigenvalue.

    Args:
        z: particles at time 0, shape (..., N, d), N >= 2; not changed. Float64 stays float64.
        dt, steps: time step, positive, and their number; every: yield at each so many, from 0.
        generator: source of the noise and of redrawn directions, on the device of z.
        kind, lam: the regularizer, see :func:`force`; default none.
        pull, temperature: kappa and T, >= 0; a float, or shape (...).
        targets: mu_n, shape (N, d) or (..., N, d); default the origin.
        noise: G, shape (d, m) or (..., d, m); default none.
        directions: of Strong, shape (d, K), or an int K to draw K anew at every step.

    Raises:
        TypeError, ValueError: z is no batch of finite samples; a bad kind or parameter.
        FloatingPointError: a particle is no longer finite: dt is too large.
    """
    z = check_samples(z)
    _check_kind(kind)
    if dt <= 0 or steps < 0 or every < 1:
        raise ValueError(f"dt={dt}, steps={steps}, every={every}: expected dt > 0, >= 0 and >= 1")
    rate, heat = _per_system(pull, z, "pull"), _per_system(temperature, z, "temperature")
    if noise is not None and (noise.ndim < 2 or noise.shape[-2] != z.shape[-1]):
        raise ValueError(f"noise has shape {tuple(noise.shape)}: expected (..., {z.shape[-1]}, m)")
    factors = [] if noise is None else [noise.to(z).mT]
    if heat.any():
        factors.append(heat.sqrt() * torch.eye(z.shape[-1]).to(z))
    home = 0.0 if targets is None else targets.to(z)

    def drift(at: Tensor) -> Tensor:
        return force(at, kind, lam=lam, directions=a) - rate * (at - home)

    for step in range(steps + 1):
        if step % every == 0:
            if not z.isfinite().all():
                raise FloatingPointError(f"particles diverged by t = {step * dt:g}: lower dt={dt}")
            yield step * dt, z
        if step == steps:
            return
        kick = torch.zeros_like(z)
        for factor in factors:
            shape = (*z.shape[:-1], factor.shape[-2])
            draw = torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
            kick += math.sqrt(2 * dt) * draw @ factor
        redraw = kind == "strong" and isinstance(directions, int)
        a = draw_directions(z.shape[-1], directions, generator=generator) if redraw else directions
        first = drift(z)
        z = z + kick + dt / 2 * (first + drift(z + dt * first + kick))


def squared_weak_flow(
    sigma: Tensor, t: Tensor, *, lam: float, pull: float = 0.0, diffusion: Number = 0.0
) -> Tensor:
    r"""Eigenvalues of the covariance under the squared Weak force: a logistic (Riccati) law.

    .. math:: \dot\sigma = -c\,\sigma(\sigma - 1) - 2\kappa\sigma + 2D, \qquad c = 8\lambda

    Exact for any N without noise, for N to infinity with it; targets are 0. The force being linear
    in z, no distribution is assumed. With :math:`p = c - 2\kappa`, :math:`s = \sqrt{p^2 + 8cD}`,
    :math:`r_\pm = (p \pm s)/2`, :math:`E = e^{-st}` and :math:`h = (1 - E)/s`,

    .. math:: \sigma(t) = \frac{\sigma_0 (E + r_+ h) + 2Dh}{(c\,\sigma_0 - r_-)\,h + E}

    Args: eigenvalues at time 0, shape (d,), >= 0; times, shape (m,); lambda, kappa; D, a float or
    shape (d,). Returns float64, shape (m, d).
    """
    sigma, t, d = _double(sigma), _double(t)[:, None], _double(diffusion)
    c, p = 8 * lam, 8 * lam - 2 * pull
    s = (p**2 + 8 * c * d).sqrt()
    decay = torch.exp(-s * t)
    h = torch.where(s > 0, -torch.expm1(-s * t) / s.where(s > 0, 1), t)
    above, below = (p + s) / 2, (p - s) / 2
    return (sigma * (decay + above * h) + 2 * d * h) / ((c * sigma - below) * h + decay)


def weak_flow(sigma: Tensor, t: Tensor, *, lam: float) -> tuple[Tensor, float]:
    r"""Eigenvalues of the covariance under the unsquared Weak force, without noise and drift.

    .. math:: \dot\sigma_i = -4\lambda\,\sigma_i(\sigma_i - 1)/r, \quad
              r = \Bigl(\sum_j (\sigma_j - 1)^2\Bigr)^{1/2}

    In the time u with du = 4 lam dt / r it is the logistic law of rate 1; t(u) is integrated
    numerically. As r falls like e^{-u}, the identity is reached in finite time:
    :math:`\sqrt d \, |\log\sigma_0| / (4\lambda)` if all d eigenvalues start at sigma_0.

    Args: eigenvalues at time 0, shape (d,), > 0; times, shape (m,); lambda > 0. Returns float64,
    shape (m, d), and the time of arrival at the identity. ValueError for values <= 0.
    """
    sigma, t = _double(sigma), _double(t)
    if sigma.min() <= 0 or lam <= 0:
        raise ValueError(f"sigma={sigma.tolist()}, lam={lam}: expected values > 0")
    # log(1/sigma) is the time to grow to 1; from there r falls as e^{-u}
    u = torch.linspace(0, 40 - math.log(min(sigma.min().item(), 1.0)), 40_001, dtype=sigma.dtype)
    r = torch.linalg.vector_norm(squared_weak_flow(sigma, u, lam=1 / 8) - 1, dim=-1)
    clock = torch.cat([u[:1], torch.cumulative_trapezoid(r, u) / (4 * lam)])
    right = torch.searchsorted(clock, t).clamp(1, len(clock) - 1)
    share = (t - clock[right - 1]) / (clock[right] - clock[right - 1]).clamp_min(1e-300)
    elapsed = u[right - 1] + share.clamp(0, 1) * (u[right] - u[right - 1])
    return squared_weak_flow(sigma, elapsed, lam=1 / 8), clock[-1].item()


def stationary_variance(
    *, lam: Number, pull: Number, diffusion: Number, class_variance: Number = 0.0
) -> Tensor:
    r"""Stationary eigenvalue of the covariance under task drift, noise and squared Weak force.

    .. math:: y^3 + \bigl(\tfrac c2 - \kappa\bigr) y^2 - \tfrac{cD}2\,y - \tfrac{c\,\kappa^2 m}2
              = 0, \qquad \sigma = 1 + \tfrac2c (y - \kappa) = (D y + \kappa^2 m) / y^2

    with c = 8 lam, m the variance of the class means, and y, the net restoring rate, the positive
    root. Without noise and classes sigma = max(0, 1 - kappa / (4 lam)).

    Args: lambda, kappa, D, m, each >= 0, lambda + kappa > 0 (else ValueError). Returns float64, of
    their broadcast shape.
    """
    values = [_double(v) for v in (lam, pull, diffusion, class_variance)]
    if min(v.min() for v in values) < 0 or (values[0] + values[1]).min() <= 0:
        raise ValueError(f"lam, pull, ... are {values}: expected >= 0, and lam + pull > 0")
    half, kappa, d, m = torch.broadcast_tensors(4 * values[0], *values[1:])  # half is c / 2
    low, high = torch.zeros_like(half), 1 + half + kappa + half * (d + kappa**2 * m)
    for _ in range(200):  # bisection: the signs change once, whatever the parameters
        y = (low + high) / 2
        positive = ((y + half - kappa) * y - half * d) * y - half * kappa**2 * m > 0
        low, high = low.where(positive, y), y.where(positive, high)
    # of the two forms of sigma, that without cancellation
    soft = (1 + (y - kappa) / half).clamp_min(0)
    return torch.where(y > kappa / 2, (d * y + kappa**2 * m) / y**2, soft)


def strong_rates(d: int) -> tuple[float, float]:
    r"""Rates at which Strong at lam = 1 starts to undo a small deviation from N(0, I_d).

    For a Gaussian of covariance I + epsilon and directions uniform on the sphere,

    .. math:: \dot\epsilon = -2 J\, \frac{2\epsilon + \mathrm{tr}(\epsilon) I}{d (d + 2)},
              \quad J = \int t^4 e^{-3t^2/2}\,dt \to \tfrac34\sqrt\pi\,(2/3)^{5/2} = 0.482

    on the loss's own grid. Only at first: the force is not linear in z and leaves no Gaussian.
    Returns the rates of an epsilon without trace, 4 J / (d (d + 2)), and of I itself, 2 J / d.
    """
    grid = torch.linspace(-5, 5, 17, dtype=torch.float64)
    j = torch.trapezoid(grid**4 * torch.exp(-1.5 * grid**2), grid).item()
    return 4 * j / (d * (d + 2)), 2 * j / d


def _double(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _check_kind(kind: str) -> None:
    if kind not in FORCES:
        raise ValueError(f"unknown force {kind!r}; {suggest(kind, FORCES)}")


def _per_system(value: Number, z: Tensor, name: str) -> Tensor:
    """A number, or one number a system, as a tensor that broadcasts against z."""
    value = torch.as_tensor(value, dtype=z.dtype, device=z.device)
    if (value.ndim and value.shape != z.shape[:-2]) or not (value >= 0).all():
        raise ValueError(f"{name}={value.tolist()}: expected >= 0, one or {tuple(z.shape[:-2])}")
    return value[..., None, None]
