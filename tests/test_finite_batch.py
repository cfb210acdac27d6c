"""Closed forms of finite batches against simulation and float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded

from sigreg_lib import weak_floor
from sigreg_lib.finite_batch import (
    ESTIMATES,
    best_scale,
    estimate_variance,
    expected_square,
    halves_square,
    interpolated_trace,
    simulate,
    sketched_dimension,
)
from sigreg_lib.losses import weak_sigreg
from sigreg_lib.records import spectrum_ranks


def standard_errors(values: torch.Tensor, expected: float) -> float:
    values = values.double()
    return ((values.mean() - expected) / (values.std() / math.sqrt(len(values)))).item()


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("sketch", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1.8])
def test_expected_square_is_the_mean_over_batches_and_sketches(scale, sketch):
    found = simulate(
        32, 40, 16, count=6000, generator=seeded(1), scale=scale, sketch=sketch
    )["biased"]  # fmt: skip
    expected = expected_square(scale, 32, 40, 16, sketch=sketch)
    assert abs(standard_errors(found, expected)) < 3
    assert abs(standard_errors(found, 1.02 * expected)) > 3  # an error of 2% would be seen


def test_expected_square_is_k_at_collapse_and_the_floor_at_unit_variance():
    assert expected_square(0, 128, 256, 64) == 64
    floor = weak_floor(128, 256, 64, squared=True)
    assert expected_square(1, 128, 256, 64) == pytest.approx(floor, rel=1e-12)


@pytest.mark.parametrize("sketch", ["gaussian", "orthonormal"])
@pytest.mark.parametrize(("n", "c", "k"), [(128, 256, 64), (16, 40, 24), (32, 24, None)])
def test_best_scale_is_where_the_expected_square_is_least(n, c, k, sketch):
    best = best_scale(n, c, k, sketch=sketch)
    values = [expected_square(best + d, n, c, k, sketch=sketch) for d in (-1e-3, 0, 1e-3)]
    assert values[1] == min(values)
    assert values[0] == pytest.approx(values[2], rel=1e-9)  # a parabola's bottom, not its side
    assert values[1] == pytest.approx((c if k is None else k) * (1 - best))


def test_best_scale_has_the_published_approximation_for_wide_layers():
    n, c, k = 10_001, 8_000, 64
    approximation = 1 / (1 + (k + 1) * (1 / c + 1 / (n - 1)))
    assert best_scale(n, c, k) == pytest.approx(approximation, rel=1e-5)
    assert best_scale(n, c, k) < approximation  # the cross term


@pytest.mark.parametrize("k", [12, None])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_the_sketched_dimension_and_what_it_costs_are_means_over_batches(k, power):
    n, c, count = 24, 40, 8000
    variances = torch.arange(1, c + 1, dtype=torch.float64) ** -power
    d = (variances.sum() ** 2 / variances.square().sum()).item()
    z = torch.randn(count, n, c, generator=seeded(6), dtype=torch.float64) * variances.sqrt()
    z = z * (c / variances.sum()).sqrt()  # mean variance 1
    if k is not None:
        s = torch.randn(count, c, k, generator=seeded(7), dtype=torch.float64) / math.sqrt(c)
        z = z @ s
    columns, seen = k or c, sketched_dimension(d, n, k)
    y = z - z.mean(1, keepdim=True)
    square = (y.mT @ y / (n - 1)).square().sum((1, 2))
    assert abs(standard_errors(square, columns**2 / seen)) < 3
    assert abs(standard_errors(square, 1.02 * columns**2 / seen)) > 3
    costs = {}
    for s2 in (0.8 * seen / columns, seen / columns, 1.25 * seen / columns):
        costs[s2] = weak_sigreg(s2**0.5 * z[:4000], squared=True).item()
    assert costs[seen / columns] == min(costs.values())
    assert costs[seen / columns] == pytest.approx(columns - seen, rel=0.02)


@pytest.mark.parametrize(("n", "c", "k"), [(128, 256, 64), (16, 40, 24), (32, 24, None)])
def test_at_the_goal_the_sketched_dimension_is_the_best_scale(n, c, k):
    assert sketched_dimension(c, n, k) / (k or c) == pytest.approx(best_scale(n, c, k), rel=1e-12)


def test_only_the_corrected_loss_asks_for_the_identity():
    assert best_scale(128, 256, 64, sketch="orthonormal", unbiased=True) == 1
    assert best_scale(128, 64, unbiased=True) == 1
    assert best_scale(128, 256, 64, unbiased=True) == pytest.approx(1 / (1 + 65 / 256))
    assert best_scale(128, 256, 64, sketch="orthonormal") == pytest.approx(1 / (1 + 65 / 127))


@pytest.mark.parametrize("sketch", ["gaussian", "orthonormal"])
def test_expected_square_of_the_unbiased_estimate_is_its_mean(sketch):
    found = simulate(
        16, 24, 8, count=20_000, generator=seeded(7), scale=0.7, sketch=sketch,
        estimates=["unbiased"],
    )["unbiased"]  # fmt: skip
    expected = expected_square(0.7, 16, 24, 8, sketch=sketch, unbiased=True)
    assert abs(standard_errors(found, expected)) < 3
    assert abs(standard_errors(found, 1.05 * expected)) > 3


# ---------------------------------------------------------------- the estimates


def test_halves_are_the_inner_product_of_the_two_deviations():
    z = torch.randn(3, 11, 4, generator=seeded(2), dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    by_hand = [((torch.cov(x[:5].T) - eye) * (torch.cov(x[5:].T) - eye)).sum() for x in z]
    torch.testing.assert_close(halves_square(z), torch.stack(by_hand))


@pytest.mark.parametrize("estimate", ["halves", "unbiased"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_unbiased_estimates_have_the_population_mean_and_the_stated_variance(scale, estimate):
    n, k = 128, 16
    found = simulate(
        n, k, count=40_000, generator=seeded(3), scale=scale, estimates=[estimate]
    )[estimate].double()  # fmt: skip
    assert abs(standard_errors(found, k * (scale - 1) ** 2)) < 3
    square = (found - found.mean()).square()
    expected = estimate_variance(scale, n, k, estimate)
    allowed = 0.0 if estimate == "halves" else 0.01 * expected  # that one is of first order
    error = (square.std() / math.sqrt(len(square))).item()
    assert abs(square.mean().item() - expected) < 3 * error + allowed


def test_halves_scatter_twice_as_much_at_the_goal_and_no_more_far_from_it():
    def ratio(scale: float) -> float:
        return estimate_variance(scale, 1000, 8, "halves") / estimate_variance(
            scale, 1000, 8, "unbiased"
        )

    assert ratio(1.0) == pytest.approx(2, rel=0.01)
    assert ratio(0.01) == pytest.approx(1, rel=0.01)


def test_one_batch_gives_every_estimate_and_collapse_costs_k_in_all():
    found = simulate(8, 5, count=3, generator=seeded(4), scale=0.0, estimates=list(ESTIMATES))
    for values in found.values():
        torch.testing.assert_close(values, torch.full((3,), 5.0))


def test_simulation_depends_on_its_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (simulate(16, 12, 4, count=5, generator=seeded(5))["biased"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- a record's spectrum


def test_interpolated_trace_is_exact_for_whole_spectra_and_for_powers_of_the_rank():
    whole = [3.0, 1.0, 0.5, 0.0]
    assert interpolated_trace([1, 2, 3, 4], whole) == pytest.approx(4.5, rel=1e-12)
    ranks = spectrum_ranks(1024)
    power = [5 * r**-1.3 for r in ranks]
    exact = math.fsum(5 * r**-1.3 for r in range(1, 1025))
    assert interpolated_trace(ranks, power) == pytest.approx(exact, rel=1e-12)


def test_interpolated_trace_of_a_gaussian_sample_is_close():
    z = torch.randn(2000, 1024, generator=seeded(6), dtype=torch.float64)
    z = z * torch.logspace(0, -2, 1024, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    ranks = spectrum_ranks(1024)
    kept = [values[r - 1].item() for r in ranks]
    assert interpolated_trace(ranks, kept) == pytest.approx(values.sum().item(), rel=0.02)


def test_interpolated_trace_takes_a_line_to_an_eigenvalue_of_zero():
    assert interpolated_trace([1, 5], [4.0, 0.0]) == pytest.approx(4 + 3 + 2 + 1)


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_square(-1, 8, 8), "scale is a variance"),
        (lambda: expected_square(float("nan"), 8, 8), "scale is a variance"),
        (lambda: sketched_dimension(0.5, 128, 64), "effective_dim must be at least 1, not 0.5"),
        (lambda: sketched_dimension(9, 8, 0), "sketch_dim must be at least 1 or None, not 0"),
        (lambda: sketched_dimension(9, 1, 64), "n_samples must be at least 2, not 1"),
        (lambda: halves_square(torch.zeros(3, 2)), "two half batches need 4"),
        (lambda: estimate_variance(1, 8, 4, "half"), "did you mean 'halves'"),
        (lambda: estimate_variance(1, 9, 4, "halves"), "must be even"),
        (lambda: simulate(8, 4, count=0, generator=seeded(0)), "count must be >= 1"),
        (
            lambda: simulate(8, 4, count=1, generator=seeded(0), estimates=["bias"]),
            "did you mean 'biased'",
        ),
        (
            lambda: simulate(8, 4, 2, count=1, generator=seeded(0), sketch="gauss"),
            "did you mean 'gaussian'",
        ),
        (lambda: interpolated_trace([1, 2], [1.0]), "2 ranks for 1"),
        (lambda: interpolated_trace([2, 3], [1.0, 1.0]), "increase from 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
