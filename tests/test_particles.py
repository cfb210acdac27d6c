"""The particle system against gradients of the losses, its closed forms and float64 integrators."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib import strong_sigreg, weak_sigreg
from sigreg_lib.particles import (
    force,
    langevin,
    squared_weak_flow,
    stationary_variance,
    strong_rates,
    weak_flow,
)
from sigreg_lib.sketch import directions


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def with_variances(variances: list[float], n: int, seed: int) -> Tensor:
    """n centred samples whose covariance is exactly diagonal with these entries."""
    k = len(variances)
    ones = torch.ones(n, 1, dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([ones, randn(n, k, seed=seed)], dim=1))[0][:, 1:]
    return q * (torch.tensor(variances, dtype=torch.float64) * (n - 1)).sqrt()


def variances(z: Tensor) -> Tensor:
    return z.var(-2)


def run(z: Tensor, *, seed: int = 0, **options) -> tuple[Tensor, list[Tensor]]:
    """Times and variances of each axis along a trajectory."""
    found = [(t, variances(x)) for t, x in langevin(z, generator=seeded(seed), **options)]
    return torch.tensor([t for t, _ in found], dtype=torch.float64), [v for _, v in found]


def last(z: Tensor, *, seed: int = 0, steps: int, **options) -> Tensor:
    *_, (_, end) = langevin(z, generator=seeded(seed), steps=steps, every=steps, **options)
    return end


def integrate(rate, sigma: Tensor, t: float, steps: int = 4_000) -> Tensor:
    """Fourth-order Runge-Kutta of d sigma/dt = rate(sigma), in float64."""
    h = t / steps
    for _ in range(steps):
        a = rate(sigma)
        b = rate(sigma + h / 2 * a)
        c = rate(sigma + h / 2 * b)
        sigma = sigma + h / 6 * (a + 2 * b + 2 * c + rate(sigma + h * c))
    return sigma


# ------------------------------------------------------------------------------- forces


@pytest.mark.parametrize("kind", ["weak", "weak_squared", "strong"])
def test_the_force_is_the_scaled_gradient_of_the_loss(kind):
    z = (2 * randn(50, 6, seed=0) + 1).requires_grad_()
    a = directions(6, 12, generator=seeded(1)).double()
    if kind == "strong":
        loss, scale = strong_sigreg(z, a), 1
    else:
        loss, scale = weak_sigreg(z, squared=kind == "weak_squared"), 49
    expected = -0.3 * scale * torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(force(z.detach(), kind, lam=0.3, directions=a), expected)


@pytest.mark.parametrize("kind", ["weak", "weak_squared", "strong"])
def test_systems_of_a_batch_do_not_feel_each_other_and_have_their_own_strength(kind):
    z, lam = randn(3, 40, 5, seed=2), torch.tensor([0.5, 1.0, 2.0])
    a = directions(5, 8, generator=seeded(3))
    together = force(z, kind, lam=lam, directions=a)
    for system, strength, found in zip(z, lam, together, strict=True):
        alone = force(system, kind, lam=strength.item(), directions=a)
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("kind", ["weak", "weak_squared", "strong"])
def test_the_force_vanishes_where_all_particles_sit_at_the_origin(kind):
    z = torch.zeros(20, 4, dtype=torch.float64)
    a = directions(4, 6, generator=seeded(4))
    assert force(z, kind, directions=a).abs().max() == 0


@pytest.mark.parametrize("kind", ["weak", "weak_squared"])
def test_weak_does_not_push_a_white_batch(kind):
    z = with_variances([1.0] * 4, 30, seed=5)
    # of the norm the gradient has length 2 |z| up to rounding: only the mended zero is exact
    bound = 1e-12 if kind == "weak_squared" else 3 * z.norm(dim=-1).max().item()
    assert force(z, kind).abs().max() <= bound


# ------------------------------------------------------------------------------- integrator


def test_without_forces_the_noise_spreads_the_particles_by_twice_its_covariance():
    g = torch.tensor([[1.0, 0.0], [2.0, 0.5], [0.0, 0.0]])
    end = last(torch.zeros(200_000, 3), dt=0.25, steps=4, noise=g, temperature=0.3, seed=6)
    expected = 2 * (g @ g.T + 0.3 * torch.eye(3))
    # three standard errors of a variance of at most 8.6
    torch.testing.assert_close(end.T.cov(), expected, rtol=0, atol=3 * 8.6 * math.sqrt(2 / 2e5))


def test_without_noise_the_error_falls_with_the_square_of_the_time_step():
    z = with_variances([0.1, 3.0], 20, seed=7)
    exact = squared_weak_flow(torch.tensor([0.1, 3.0]), torch.tensor([0.5]), lam=0.5)[0]
    errors = [
        (variances(last(z, dt=0.5 / n, steps=n, kind="weak_squared", lam=0.5)) - exact).norm()
        for n in (50, 100)
    ]
    assert (errors[0] / errors[1]).item() == pytest.approx(4, rel=0.1)


def test_particles_are_drawn_to_their_own_targets():
    targets = randn(10, 3, seed=8)
    end = last(randn(2, 10, 3, seed=9), dt=0.01, steps=2000, pull=1.0, targets=targets)
    torch.testing.assert_close(end, targets.expand(2, 10, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_generator_alone_decides_the_noise_and_the_start_is_kept(dtype):
    z = randn(2, 30, 4, seed=10).to(dtype)
    kept, state = z.clone(), torch.get_rng_state()
    options = dict(dt=0.01, steps=5, kind="strong", lam=0.1, temperature=0.2, directions=7)
    a, b, c = last(z, seed=1, **options), last(z, seed=1, **options), last(z, seed=2, **options)
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(z, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_yields_the_start_and_every_so_many_steps():
    z = randn(10, 2, seed=11)
    found = list(langevin(z, dt=0.1, steps=7, every=3, generator=seeded(0), temperature=1.0))
    assert [t for t, _ in found] == pytest.approx([0.0, 0.3, 0.6])
    assert torch.equal(found[0][1], z)
    assert not torch.equal(found[1][1], found[2][1])


def test_a_temperature_of_its_own_for_each_system():
    z = torch.zeros(2, 50_000, 1)
    end = last(z, dt=0.5, steps=2, temperature=torch.tensor([0.0, 2.0]), seed=12)
    assert end[0].abs().max() == 0
    assert end[1].var().item() == pytest.approx(4.0, rel=0.03)


# ------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("lam", "pull", "diffusion"),
    [(0.3, 0.0, 0.0), (0.3, 0.2, 0.5), (0.05, 0.4, 0.0), (0.1, 0.4, 0.0), (0.0, 0.3, 0.2)],
    ids=["logistic", "all terms", "weak force", "double root", "no force"],
)
def test_the_squared_flow_solves_its_differential_equation(lam, pull, diffusion):
    start = torch.tensor([0.0, 1e-3, 0.5, 1.0, 4.0], dtype=torch.float64)
    c = 8 * lam
    end = integrate(lambda s: -c * s * (s - 1) - 2 * pull * s + 2 * diffusion, start, 3.0)
    times = torch.tensor([0.0, 3.0])
    found = squared_weak_flow(start, times, lam=lam, pull=pull, diffusion=diffusion)
    torch.testing.assert_close(found[0], start)
    torch.testing.assert_close(found[1], end, rtol=1e-9, atol=1e-12)


def test_particles_of_any_distribution_follow_the_squared_flow_at_any_number():
    start = [0.01, 0.2, 1.0, 3.0]
    z = with_variances(start, 12, seed=13)
    t, found = run(z, dt=0.002, steps=1000, every=100, kind="weak_squared", lam=0.25)
    expected = squared_weak_flow(torch.tensor(start), t, lam=0.25)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=0)


def test_noise_and_drift_change_the_flow_as_the_closed_form_says():
    z = torch.randn(20_000, 3, generator=seeded(14)) * torch.tensor([0.1, 1.0, 2.0])
    g = torch.diag(torch.tensor([1.0, 0.0, 0.5]))
    options = dict(lam=0.2, pull=0.3)
    t, found = run(z, dt=0.02, steps=100, every=10, kind="weak_squared", noise=g, **options)
    diffusion = g.diagonal().square()
    expected = squared_weak_flow(variances(z), t, diffusion=diffusion, **options)
    torch.testing.assert_close(torch.stack(found).double(), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("sigma", [1e-4, 0.5, 3.0])
def test_equal_eigenvalues_reach_the_identity_exponentially_and_in_finite_time(sigma):
    lam, d = 0.3, 4
    arrival = math.sqrt(d) * abs(math.log(sigma)) / (4 * lam)
    t = torch.tensor([0.0, 0.5, 0.9, 1.1]) * arrival
    flow, arrived = weak_flow(torch.full((d,), sigma), t, lam=lam)
    assert arrived == pytest.approx(arrival, rel=1e-6)
    expected = torch.tensor([sigma, sigma**0.5, sigma**0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(flow, expected[:, None].expand(4, d), rtol=1e-5, atol=0)


def test_unequal_eigenvalues_follow_the_flow_of_the_norm():
    lam, start = 0.4, torch.tensor([0.02, 0.3, 2.0], dtype=torch.float64)
    end = integrate(lambda s: -4 * lam * s * (s - 1) / (s - 1).norm(), start, 1.5)
    flow, arrived = weak_flow(start, torch.tensor([1.5]), lam=lam)
    assert arrived > 1.5
    torch.testing.assert_close(flow[0], end, rtol=1e-5, atol=0)
    z = with_variances(start.tolist(), 12, seed=15)
    simulated = variances(last(z, dt=0.001, steps=1500, kind="weak", lam=lam))
    torch.testing.assert_close(simulated, end, rtol=1e-5, atol=0)


PARAMETERS = [
    (0.3, 0.5, 0.2, 0.0),
    (0.3, 0.5, 0.2, 4.0),
    (0.0, 0.5, 0.2, 1.5),
    (1e-9, 0.5, 0.2, 1.5),
    (0.3, 0.0, 0.2, 7.0),
    (0.05, 0.4, 1e-4, 0.0),
]


@pytest.mark.parametrize(("lam", "pull", "diffusion", "classes"), PARAMETERS)
def test_the_stationary_variance_balances_drift_noise_and_force(lam, pull, diffusion, classes):
    s = stationary_variance(lam=lam, pull=pull, diffusion=diffusion, class_variance=classes).item()
    y = pull + 4 * lam * (s - 1)  # net restoring rate: z relaxes to the mean pull mu / y
    with_class = pull * classes / y
    assert 2 * y * s == pytest.approx(2 * diffusion + 2 * pull * with_class, rel=1e-9)


def test_the_stationary_variance_ends_the_squared_flow():
    options = dict(lam=0.2, pull=torch.tensor([0.0, 0.3, 1.0]), diffusion=0.1)
    limit = stationary_variance(**options)
    for kappa, expected in zip(options["pull"].tolist(), limit, strict=True):
        end = squared_weak_flow([0.5], [1e3], lam=0.2, pull=kappa, diffusion=0.1)
        assert end.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("lam", "expected"), [(0.1, 0.0), (0.125, 0.0), (0.25, 0.5), (1.0, 0.875)])
def test_a_silent_direction_survives_only_beyond_a_quarter_of_the_pull(lam, expected):
    s = stationary_variance(lam=lam, pull=0.5, diffusion=0.0)
    assert s.item() == pytest.approx(expected, abs=1e-9)


def test_simulated_classes_and_noise_settle_at_the_stationary_variances():
    n, kappa, radius = 20_000, 0.5, 2.0
    targets = torch.zeros(n, 3)
    targets[::2, 0], targets[1::2, 0] = radius, -radius
    g = torch.diag(torch.tensor([0.3, 0.6, 0.0]))
    options = dict(dt=0.1, steps=200, kind="weak_squared", lam=0.2, pull=kappa, targets=targets)
    end = last(torch.randn(n, 3, generator=seeded(16)), noise=g, temperature=0.01, **options)
    expected = stationary_variance(
        lam=0.2,
        pull=kappa,
        diffusion=g.diagonal().square() + 0.01,
        class_variance=torch.tensor([radius**2, 0.0, 0.0]),
    )
    torch.testing.assert_close(variances(end).double(), expected, rtol=0.04, atol=0)


def evenly_spread(d: int) -> Tensor:
    """Directions whose fourth moments are those of the sphere's uniform law, shape (d, K)."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if d == 2:
        angle = torch.arange(5, dtype=torch.float64) * math.pi / 5
        return torch.stack([angle.cos(), angle.sin()])
    golden = (1 + math.sqrt(5)) / 2  # the six axes of an icosahedron
    first = torch.tensor([[0, 1, golden], [0, 1, -golden]], dtype=torch.float64)
    axes = torch.cat([first.roll(k, 1) for k in range(3)])
    return (axes / axes.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("d", [1, 2, 3])
def test_strong_starts_to_undo_a_small_deviation_at_its_two_rates(d):
    start = randn(200_000, d, seed=17)
    start = start - start.mean(0)
    start = start @ torch.linalg.inv(torch.linalg.cholesky(start.T @ start / len(start))).T
    without_trace = torch.tensor([1.0] + [-1 / max(d - 1, 1)] * (d - 1), dtype=torch.float64)
    found = []
    for epsilon in (1e-3 * without_trace, torch.full((d,), 1e-3, dtype=torch.float64)):
        moved = []
        for sign in (1, -1):  # the difference of the two signs drops what is there at epsilon = 0
            z = start * (1 + sign * epsilon).sqrt()
            moved.append(2 * (z * force(z, "strong", directions=evenly_spread(d))).mean(0))
        found.append(-((moved[0] - moved[1]) / 2 @ epsilon / epsilon.square().sum()).item())
    traceless, isotropic = strong_rates(d)
    assert found[1] == pytest.approx(isotropic, rel=0.02)
    if d > 1:
        assert found[0] == pytest.approx(traceless, rel=0.03)


def test_the_strong_rates_come_from_an_integral_that_the_grid_gets_right():
    j = 0.75 * math.sqrt(math.pi) * (2 / 3) ** 2.5
    assert strong_rates(1)[1] == pytest.approx(2 * j, rel=1e-3)
    assert strong_rates(1)[0] == pytest.approx(4 * j / 3, rel=1e-3)


# ------------------------------------------------------------------------------- arguments


def test_an_unknown_force_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown force 'weak_square'; did you mean 'weak_squar"):
        force(randn(5, 2, seed=0), "weak_square")


BAD = {
    "dt=0": dict(dt=0.0),
    "lam=-1": dict(kind="weak", lam=-1.0),
    "pull=": dict(pull=torch.ones(3)),
    "temperature=nan": dict(temperature=math.nan),
    "noise has shape": dict(noise=torch.ones(3, 1)),
    "directions is None": dict(kind="strong"),
    "unknown force": dict(kind="strung"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_parameter_is_refused_by_name(message):
    options = dict(dt=0.1, steps=3, generator=seeded(0)) | BAD[message]
    with pytest.raises(ValueError, match=message):
        list(langevin(randn(2, 5, 2, seed=0), **options))


def test_a_time_step_that_is_too_large_is_an_error_not_a_result():
    options = dict(dt=1.0, steps=50, generator=seeded(0), kind="weak_squared", lam=5.0)
    with pytest.raises(FloatingPointError, match="lower dt=1"):
        list(langevin(10 * randn(20, 2, seed=1), **options))


def test_closed_forms_refuse_what_has_no_limit():
    with pytest.raises(ValueError, match="expected values > 0"):
        weak_flow([0.0, 1.0], [1.0], lam=0.1)
    with pytest.raises(ValueError, match="expected >= 0, and lam"):
        stationary_variance(lam=0.0, pull=0.0, diffusion=1.0)
