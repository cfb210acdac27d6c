"""The clouds against their moments and exact characteristic functions; the power of a test."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib import strong_sigreg
from sigreg_lib.clouds import (
    CLOUDS,
    SEPARATION,
    SHIFT,
    characteristic_function,
    detection_power,
    population_strong,
    sample,
)
from sigreg_lib.losses import strong_values
from sigreg_lib.sketch import directions

every_cloud = pytest.mark.parametrize("kind", CLOUDS)
WHITE = [kind for kind in CLOUDS if kind not in ("rank_deficient", "shifted")]
# E z_1^4 of one channel; 9 for Student t of 5 degrees of freedom scaled to variance 1
FOURTH = {"gaussian": 3, "cube": 9 / 5, "ring": 3 / 2, "clusters": 3 - 2 * SEPARATION**4}


def draw(kind: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return sample(kind, *shape, generator=seeded(seed), dtype=dtype)


def within(values: Tensor, expected: float, errors: float = 4.5) -> bool:
    """Is the mean of independent values within some standard errors of what it should be?"""
    return bool(
        (values.mean(0) - expected).abs().max()
        < errors * (values.std(0) / len(values) ** 0.5).max()
    )


@pytest.mark.parametrize("d", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", WHITE)
def test_the_mean_is_zero_and_the_covariance_the_identity(kind, d):
    z = draw(kind, 40_000, d, seed=1)
    assert within(z, 0.0)
    products = z[:, :, None] * z[:, None, :] - torch.eye(d, dtype=z.dtype)
    assert within(products.flatten(1), 0.0)


@pytest.mark.parametrize("kind", FOURTH)
def test_the_fourth_moment_of_a_channel_is_the_stated_one(kind):
    z = draw(kind, 100_000, 3, seed=2)[:, 0]
    assert within(z**4, FOURTH[kind])


def test_the_ring_lies_on_circles():
    z = draw("ring", 100, 6, seed=3).unflatten(-1, (3, 2))
    torch.testing.assert_close(z.norm(dim=-1), torch.full_like(z[..., 0], math.sqrt(2)))


def test_the_cube_stays_in_its_bounds_and_fills_them():
    z = draw("cube", 10_000, 4, seed=4)
    assert 0.999 * math.sqrt(3) < z.abs().max() <= math.sqrt(3)


def test_the_clusters_have_equal_numbers_and_the_stated_width():
    first = draw("clusters", 40_000, 2, seed=5)[:, 0]
    signs = torch.sign(first)
    assert abs(signs.mean()) < 4.5 / 200
    # the width is 0.31, so that hardly any sample is on the wrong side
    assert (first * signs).std().item() == pytest.approx(math.sqrt(1 - SEPARATION**2), rel=0.03)
    assert (first * signs).mean().item() == pytest.approx(SEPARATION, rel=0.01)


@pytest.mark.parametrize("d", [2, 5, 64])
def test_half_of_the_directions_are_missing_though_every_variance_is_one(d):
    z = draw("rank_deficient", 5000, d, seed=6)
    assert torch.equal(z[:, 0], z[:, 1])
    assert torch.linalg.matrix_rank(z) == math.ceil(d / 2)
    assert within(z.square(), 1.0)


def test_the_shifted_cloud_is_a_gaussian_moved_along_every_channel():
    moved, gauss = draw("shifted", 50, 3, seed=7), draw("gaussian", 50, 3, seed=7)
    torch.testing.assert_close(moved - gauss, torch.full_like(gauss, SHIFT))


def test_a_common_radius_correlates_squares_and_independent_tails_do_not():
    # of the logarithms of squares, whose moments are all finite
    for kind, correlated in (("heavy_radius", True), ("heavy_tails", False)):
        logs = draw(kind, 40_000, 2, seed=8).square().log()
        assert (torch.corrcoef(logs.T)[0, 1] > 4.5 / 200) == correlated


@every_cloud
@pytest.mark.parametrize("d", [2, 5, 64])
def test_projections_have_the_exact_characteristic_function(kind, d):
    n, t = 20_000, torch.linspace(-4, 4, 9, dtype=torch.float64)
    a = directions(d, 5, generator=seeded(9)).double()
    found = torch.exp(1j * (draw(kind, n, d, seed=10) @ a)[..., None] * t).mean(0)
    # real and imaginary part of each have standard errors of at most 1/sqrt(n)
    assert (found - characteristic_function(kind, t, a)).abs().max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("kind", [kind for kind in CLOUDS if kind != "rank_deficient"])
def test_one_dimension_is_a_channel_of_many(kind):
    t = torch.linspace(0, 3, 7, dtype=torch.float64)
    first = torch.zeros(7, 1, dtype=torch.float64)
    first[0] = 1
    alone = characteristic_function(kind, t, torch.ones(1, 1))
    torch.testing.assert_close(characteristic_function(kind, t, first), alone)


@every_cloud
def test_characteristic_functions_are_one_at_zero_and_hermitian(kind):
    t = torch.linspace(-3, 3, 13, dtype=torch.float64)
    phi = characteristic_function(kind, t, directions(6, 4, generator=seeded(11)))
    torch.testing.assert_close(phi[:, 6], torch.ones(4, dtype=torch.complex128))
    torch.testing.assert_close(phi.flip(1), phi.conj())
    assert phi.abs().max() <= 1 + 1e-12


@every_cloud
def test_the_unbiased_loss_averages_to_the_value_of_the_population(kind):
    a = directions(6, 8, generator=seeded(12))
    values = strong_values(draw(kind, 3000, 20, 6, seed=13), a, unbiased=True) / 20
    assert within(values, population_strong(kind, a).mean().item())


def test_the_population_value_is_the_limit_of_the_loss_over_n():
    a, n = directions(2, 8, generator=seeded(14)), 200_000
    found = strong_sigreg(draw("ring", n, 2, seed=15), a) / n
    assert found.item() == pytest.approx(population_strong("ring", a).mean().item(), rel=0.02)


def test_the_gaussian_has_the_population_value_zero_and_no_other_cloud():
    a = directions(4, 16, generator=seeded(16))
    for kind in CLOUDS:
        value = population_strong(kind, a).mean()
        assert value == 0 if kind == "gaussian" else value > 1e-4


@every_cloud
def test_leading_dimensions_are_independent_batches_up_to_1024_channels(kind):
    z = draw(kind, 2, 3, 5, 1024, seed=17, dtype=torch.float32)
    assert z.shape == (2, 3, 5, 1024)
    assert z.dtype == torch.float32
    flat = z.reshape(6, -1)
    assert all(not torch.equal(flat[i], flat[j]) for i in range(6) for j in range(i))


@every_cloud
def test_a_cloud_is_a_function_of_its_generator_alone(kind):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two = draw(kind, 8, 4, seed=18), draw(kind, 8, 4, seed=18)
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())


def test_power_counts_what_exceeds_the_quantile_and_wilson_bounds_it():
    null = torch.arange(101, dtype=torch.float64)  # its 95% quantile is 95
    values = torch.tensor([94.0, 95.0, 96.0, 97.0], dtype=torch.float64)
    power, low, high = detection_power(values, null)
    assert power == 0.5
    # Wilson's interval for 2 of 4, as tabulated
    assert (low, high) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert detection_power(values, null + 1000)[:2] == (0.0, 0.0)
    assert detection_power(values, null - 1000)[0] == 1.0


def test_a_blind_loss_has_the_power_of_the_level():
    g = seeded(19)
    values, null = torch.randn(20_000, generator=g), torch.randn(200_000, generator=g)
    for level in (0.9, 0.95):
        power, low, high = detection_power(values, null, level=level)
        assert low < 1 - level < high
        assert high - low == pytest.approx(
            2 * 1.96 * math.sqrt(power * (1 - power) / 20_000), rel=0.01
        )


def test_errors_name_the_argument_and_the_remedy():
    g = seeded(0)
    with pytest.raises(ValueError, match="unknown cloud 'rings'; did you mean 'ring'"):
        sample("rings", 4, 2, generator=g)
    with pytest.raises(ValueError, match="did you mean 'cube'"):
        population_strong("cub", torch.eye(2))
    with pytest.raises(ValueError, match=r"shape must be \(\.\.\., N, d\)"):
        sample("cube", 4, generator=g)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        sample("rank_deficient", 4, 1, generator=g)
    with pytest.raises(ValueError, match=r"\(m,\) and \(d, K\)"):
        characteristic_function("cube", torch.zeros(2, 2), torch.eye(2))
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\)"):
        detection_power(torch.ones(2), torch.ones(2), level=95)
    with pytest.raises(ValueError, match="hold 0 and 2"):
        detection_power(torch.ones(0), torch.ones(2))
