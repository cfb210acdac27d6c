"""Closed forms, invariances and float64 references of the diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib.diagnostics import (
    check_samples,
    covariance_spectrum,
    effective_rank,
    feature_norm,
    mean_cosine,
    participation_ratio,
    spectral_entropy,
)

ALL = [
    participation_ratio,
    covariance_spectrum,
    spectral_entropy,
    effective_rank,
    mean_cosine,
    feature_norm,
]
CENTRED = [participation_ratio, covariance_spectrum, spectral_entropy]
SCALE_FREE = [participation_ratio, spectral_entropy, effective_rank, mean_cosine]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def rotation(c: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(c, c, seed=seed))[0]


def with_spectrum(eigenvalues: list[float], n: int, c: int, seed: int) -> Tensor:
    """n centred samples in c channels whose covariance has exactly these eigenvalues."""
    k = len(eigenvalues)
    # orthonormal columns, orthogonal to the vector of ones: centred and uncorrelated
    q = torch.linalg.qr(torch.cat([torch.ones(n, 1), randn(n, k, seed=seed)], dim=1).double())[0]
    scale = (torch.tensor(eigenvalues, dtype=torch.float64) * (n - 1)).sqrt()
    return (q[:, 1:] * scale @ rotation(c, seed + 1)[:k].double()).float()


# ------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_equal_eigenvalues_count_the_dimensions(rank, shape):
    z = with_spectrum([2.0] * rank, *shape, seed=0)
    assert participation_ratio(z).item() == pytest.approx(rank, rel=1e-5)
    assert spectral_entropy(z).item() == pytest.approx(math.log(rank), abs=1e-4)
    # centred, so that the singular values are equal too
    assert effective_rank(z).item() == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_a_known_spectrum_gives_the_closed_forms(shape):
    eigenvalues = [8.0, 4.0, 2.0, 1.0, 1.0]
    z = with_spectrum(eigenvalues, *shape, seed=2)
    p = [value / 16 for value in eigenvalues]
    assert participation_ratio(z).item() == pytest.approx(16**2 / (64 + 16 + 4 + 1 + 1), rel=1e-5)
    assert spectral_entropy(z).item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-5)
    sigma = [math.sqrt(value) for value in eigenvalues]
    q = [s / sum(sigma) for s in sigma]
    rank = math.exp(-sum(x * math.log(x) for x in q))
    assert effective_rank(z).item() == pytest.approx(rank, rel=1e-4)
    spectrum = covariance_spectrum(z)
    assert spectrum.shape == (min(shape[0] - 1, shape[1]),)
    torch.testing.assert_close(spectrum[:5], torch.tensor(eigenvalues), rtol=1e-5, atol=0)
    assert spectrum[5:].abs().max() < 1e-10


def test_small_eigenvalues_keep_their_digits():
    # Ten decades: beyond what the eigenvalues of a float32 covariance matrix can hold.
    eigenvalues = [1.0, 1e-5, 1e-10]
    spectrum = covariance_spectrum(with_spectrum(eigenvalues, 50, 3, seed=4))
    torch.testing.assert_close(spectrum, torch.tensor(eigenvalues), rtol=0.05, atol=0)


def test_cosines_and_norms_of_three_vectors_by_hand():
    z = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 5.0]])
    # the pairs: 0, 1/sqrt 2, 1/sqrt 2
    assert mean_cosine(z).item() == pytest.approx(2 / math.sqrt(2) / 3, rel=1e-6)
    assert feature_norm(z).item() == pytest.approx((3 + 4 + math.sqrt(50)) / 3, rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_corners_of_a_simplex_have_the_least_mean_cosine(n):
    corners = torch.eye(n) - 1 / n
    assert mean_cosine(corners).item() == pytest.approx(-1 / (n - 1), rel=1e-5)


def test_the_participation_ratio_of_gaussian_samples_falls_short_of_their_dimension():
    # n S is Wishart with n = N - 1: E (tr S)^2 = C^2 + 2 C / n, E tr S^2 = C (1 + (C + 1) / n)
    c, big_n, draws = 24, 33, 2000
    n = big_n - 1
    ratios = participation_ratio(randn(draws, big_n, c, seed=5))
    expected = (c + 2 / n) / (1 + (c + 1) / n)
    assert expected == pytest.approx(c / (1 + (c + 1) / n), rel=0.003)
    assert expected < 0.6 * c
    # The mean of the ratios is not the ratio of the means; here they agree to 0.1%.
    assert ratios.mean().item() == pytest.approx(expected, rel=0.005)
    assert ratios.std().item() / math.sqrt(draws) < 0.001 * expected


# ---------------------------------------------------------------------- references in float64


def plain(name: str, z: Tensor) -> Tensor:
    """The definitions, one batch at a time, from eigenvalues and from all pairs."""
    n, c = z.shape
    if name == "mean_cosine":
        pairs = [
            torch.dot(z[i], z[j]) / (z[i].norm() * z[j].norm())
            for i in range(n)
            for j in range(n)
            if i != j
        ]
        return torch.stack(pairs).mean()
    if name == "feature_norm":
        return torch.stack([z[i].square().sum().sqrt() for i in range(n)]).mean()
    if name == "effective_rank":
        sigma = torch.linalg.eigvalsh(z.T @ z if n >= c else z @ z.T).clamp(min=0).sqrt()
        p = sigma / sigma.sum()
        return torch.exp(-torch.special.xlogy(p, p).sum())
    values = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[: min(n - 1, c)]
    if name == "covariance_spectrum":
        return values
    if name == "participation_ratio":
        return values.sum() ** 2 / values.square().sum()
    p = (values / values.sum()).clamp(min=0)
    return -torch.special.xlogy(p, p).sum()


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_float32_agrees_with_the_definition_in_float64(function, shape):
    z = randn(2, 3, *shape, seed=6) * torch.linspace(0.1, 2, shape[1]) + 0.5
    expected = [plain(function.__name__, batch.double()) for batch in z.flatten(0, 1)]
    expected = torch.stack(expected).unflatten(0, (2, 3))
    torch.testing.assert_close(function(z).double(), expected, rtol=2e-5, atol=1e-6)
    in_double = function(z.double())
    assert in_double.dtype == torch.float64
    torch.testing.assert_close(in_double, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_half_precision_is_computed_in_float32_inside_autocast_too(function):
    z = randn(40, 12, seed=7).bfloat16()
    expected = function(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = [function(z), function(z.float())]
    for value in found:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected)


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_is_blind_to_rotation_and_to_the_order_of_samples(function):
    z = randn(50, 10, seed=8) * torch.linspace(0.2, 1, 10) + 1
    order = torch.randperm(50, generator=seeded(9))
    changed = function((z @ rotation(10, seed=10))[order])
    torch.testing.assert_close(changed, function(z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", SCALE_FREE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_is_blind_to_scale_without_over_or_underflow(function, scale):
    z = randn(50, 10, seed=11) + 1
    torch.testing.assert_close(function(scale * z), function(z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", CENTRED, ids=lambda f: f.__name__)
def test_is_blind_to_a_shift_far_larger_than_the_spread(function):
    # 2^16 and multiples of 2^-7 below 4 add exactly in float32
    z = (randn(50, 10, seed=12).clamp(-3.9, 3.9) * 128).round() / 128
    torch.testing.assert_close(function(z + 2.0**16), function(z), rtol=1e-4, atol=1e-5)


def test_the_mean_counts_for_rank_cosine_and_norm():
    z = randn(50, 10, seed=13)
    assert effective_rank(z + 100) < 2 < effective_rank(z)
    assert mean_cosine(z + 100) > 0.99 > mean_cosine(z)
    assert feature_norm(z + 100) > 100 * math.sqrt(10) - 10


def test_spectrum_and_norm_scale_as_their_units():
    z = randn(50, 10, seed=14)
    torch.testing.assert_close(covariance_spectrum(3 * z), 9 * covariance_spectrum(z))
    torch.testing.assert_close(feature_norm(3 * z), 3 * feature_norm(z))


def test_the_spectrum_sums_to_the_total_variance():
    for shape in ((50, 10), (10, 50)):
        z = randn(4, *shape, seed=15)
        torch.testing.assert_close(covariance_spectrum(z).sum(-1), z.var(-2).sum(-1))


# ------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_total_collapse_has_the_documented_values(value):
    z = torch.full((20, 6), value)
    assert participation_ratio(z).item() == 0
    assert spectral_entropy(z).item() == 0
    assert torch.equal(covariance_spectrum(z), torch.zeros(6))
    assert effective_rank(z).item() == pytest.approx(1, abs=1e-3)
    assert mean_cosine(z).item() == pytest.approx(float(value != 0), abs=1e-6)
    assert feature_norm(z).item() == pytest.approx(abs(value) * math.sqrt(6))


def test_two_samples_span_one_dimension():
    z = randn(2, 6, seed=16)
    assert participation_ratio(z).item() == pytest.approx(1, rel=1e-5)
    assert covariance_spectrum(z).shape == (1,)
    assert covariance_spectrum(z).item() == pytest.approx((z[0] - z[1]).square().sum() / 2)


def test_a_zero_vector_has_cosine_0_with_every_other():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert mean_cosine(z).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_leading_dimensions_are_separate_batches(function):
    z = randn(2, 3, 12, 5, seed=17)
    one_by_one = torch.stack([function(batch) for batch in z.flatten(0, 1)]).unflatten(0, (2, 3))
    torch.testing.assert_close(function(z), one_by_one)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_bad_samples_are_refused(function: Callable[[Tensor], Tensor]):
    z = randn(4, 3, seed=18)
    with pytest.raises(TypeError, match="int64: expected a tensor of a floating-point dtype"):
        function(z.long())
    with pytest.raises(TypeError, match="z is list"):
        function([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"shape \(3,\): expected \(\.\.\., N, C\)"):
        function(z[0])
    with pytest.raises(ValueError, match="expected at least"):
        function(z[:0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            function(torch.where(torch.eye(4, 3) > 0, bad, z))


def test_a_covariance_needs_two_samples():
    with pytest.raises(ValueError, match="z has 1 samples: expected at least 2"):
        check_samples(torch.ones(1, 3))
    assert feature_norm(torch.ones(1, 4)).item() == 2
