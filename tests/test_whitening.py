"""Whitening, its iteration, batch normalization and the penalty: identities and edges."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor
from torch.nn.functional import batch_norm

from sigreg_lib import weak_sigreg
from sigreg_lib.losses import (
    WHITENINGS,
    batch_normalize,
    iterative_whiten,
    whiten,
    whitening_penalty,
)
from sigreg_lib.losses.whitening import _InverseRoot

TRANSFORMS = {
    "zca": whiten,
    "pca": lambda z: whiten(z, "pca"),
    "iterative": iterative_whiten,
    "batch norm": batch_normalize,
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def correlated(n: int, c: int, *, seed: int) -> Tensor:
    return randn(n, c, seed=seed) @ randn(c, c, seed=seed + 1000) + 2


def with_variances(variances: list[float], n: int, *, seed: int, turned: bool = True) -> Tensor:
    """Exactly these eigenvalues of the covariance, in a random basis."""
    c = len(variances)
    z = whiten(randn(n, c, seed=seed)) * torch.tensor(variances, dtype=torch.float64).sqrt()
    return z @ torch.linalg.qr(randn(c, c, seed=seed + 1))[0] if turned else z


def gradient(function, z: Tensor) -> Tensor:
    leaf = z.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


# ------------------------------------------------------------------------------- whitening


@pytest.mark.parametrize("kind", WHITENINGS)
@pytest.mark.parametrize("correction", [0, 1])
def test_the_whitened_covariance_is_the_identity(kind, correction):
    w = whiten(correlated(40, 7, seed=1), kind, correction=correction)
    torch.testing.assert_close(w.T.cov(correction=correction), torch.eye(7).double())
    assert w.mean(0).abs().max() < 1e-12
    if correction == 1:
        assert weak_sigreg(w) < 1e-11


@pytest.mark.parametrize("kind", WHITENINGS)
@pytest.mark.parametrize("n, c", [(5, 8), (8, 8), (2, 6)])
def test_with_too_few_samples_the_missing_directions_are_what_weak_sees(kind, n, c):
    w = whiten(correlated(n, c, seed=2), kind)
    assert weak_sigreg(w, squared=True).item() == pytest.approx(c - n + 1)


def test_zca_is_the_symmetric_root_and_pca_its_rotation_onto_components():
    z = correlated(50, 5, seed=3)
    covariance = z.T.cov()
    zca, pca = whiten(z), whiten(z, "pca")
    # of all whitenings W = Z A, ZCA alone has a symmetric positive A: then Z'W is symmetric, too
    cross = (z - z.mean(0)).T @ zca
    torch.testing.assert_close(cross, cross.T)
    assert torch.linalg.eigvalsh(cross).min() > 0
    cross = (z - z.mean(0)).T @ pca  # columns: principal axes times root of their variance
    gram = cross.T @ cross / 49**2
    torch.testing.assert_close(gram, torch.diag(torch.linalg.eigvalsh(covariance).flip(0)))


def test_zca_moves_the_batch_less_than_any_other_whitening():
    z = correlated(50, 5, seed=4)
    centred, zca = z - z.mean(0), whiten(z)
    for seed in range(5):
        other = zca @ torch.linalg.qr(randn(5, 5, seed=seed))[0]
        assert (centred - zca).norm() < (centred - other).norm()


def test_zca_turns_with_the_channels():
    z, turn = correlated(30, 6, seed=5), torch.linalg.qr(randn(6, 6, seed=6))[0]
    torch.testing.assert_close(whiten(z @ turn), whiten(z) @ turn)


def test_eps_leaves_small_directions_small():
    z = with_variances([4.0, 1.0, 0.01], 60, seed=7)
    found = torch.linalg.eigvalsh(whiten(z, eps=0.5).T.cov())
    expected = torch.tensor([0.01 / 0.51, 1 / 1.5, 4 / 4.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variances", [[1.0] * 4, [2.0, 2.0, 0.5, 0.5], [3.0, 2.0, 1.0, 0.5]])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_the_gradient_of_zca_is_right_where_eigenvalues_coincide(variances, eps):
    z = with_variances(variances, 9, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whiten(x, eps=eps), z)


def test_the_gradient_of_zca_is_right_with_a_missing_direction():
    # along perturbations that keep the rank, where the pseudo-inverse is smooth
    basis = torch.linalg.qr(randn(5, 3, seed=9))[0]
    y = randn(12, 3, seed=10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whiten(x @ basis.T), y)
    torch.testing.assert_close(whiten(y @ basis.T), whiten(y) @ basis.T)


def test_the_gradient_of_pca_is_right_where_eigenvalues_differ():
    z = with_variances([4.0, 2.0, 1.0], 9, seed=11).requires_grad_()
    # signs of components are arbitrary, hence the square
    assert torch.autograd.gradcheck(lambda x: whiten(x, "pca").square(), z)


# ------------------------------------------------------------------------------- IterNorm


def test_iteration_arrives_at_zca_and_stays_there():
    z = with_variances([100.0, 10.0, 1.0, 0.1], 40, seed=12)
    for iterations in (25, 200):
        found = iterative_whiten(z, iterations=iterations, eps=0, correction=1)
        torch.testing.assert_close(found, whiten(z), rtol=0, atol=1e-10)
    # the plain iteration in powers of P blows up here in float32
    found = iterative_whiten(z.float(), iterations=200, eps=0, correction=1)
    torch.testing.assert_close(found.double(), whiten(z), rtol=0, atol=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_every_eigenvalue_follows_the_scalar_recursion(iterations):
    variances = torch.tensor([5.0, 1.0, 0.2, 0.05], dtype=torch.float64)
    z = with_variances(variances.tolist(), 40, seed=13)
    sigma = variances + 0.1
    p = torch.ones(4, dtype=torch.float64)
    for _ in range(iterations):
        p = (3 * p - p**3 * sigma / sigma.sum()) / 2
    w = iterative_whiten(z, iterations=iterations, eps=0.1, correction=1)
    expected = (p**2 * variances / sigma.sum()).sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(w.T.cov()), expected)


def test_iterates_are_those_of_the_published_form():
    z = correlated(30, 4, seed=14)
    centred = z - z.mean(0)
    sigma = centred.T @ centred / 30 + 1e-5 * torch.eye(4)
    trace, p = sigma.trace(), torch.eye(4).double()
    for _ in range(5):
        p = (3 * p - p @ p @ p @ sigma / trace) / 2
    torch.testing.assert_close(iterative_whiten(z), centred @ p / trace.sqrt())


# ------------------------------------------------------------------------------- batch norm


def test_batch_normalization_is_that_of_torch_in_training():
    z = correlated(30, 6, seed=15)
    torch.testing.assert_close(batch_normalize(z), batch_norm(z, None, None, training=True))
    z = z.float()
    expected = batch_norm(z, None, None, training=True, eps=0.3)
    torch.testing.assert_close(batch_normalize(z, eps=0.3), expected)


def test_normalized_channels_have_variance_one_over_n_and_keep_their_correlations():
    z = correlated(30, 6, seed=16)
    covariance = batch_normalize(z, eps=0).T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.corrcoef(z.T))


# ------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("n", [4, 6, 30])
def test_the_penalty_is_the_distance_of_standard_deviations_from_one(n):
    z = correlated(n, 5, seed=17)
    roots = torch.linalg.eigvalsh(z.T.cov()).clamp_min(0).sqrt()
    torch.testing.assert_close(whitening_penalty(z), (roots - 1).square().sum())


def test_the_penalty_is_the_way_to_the_whitened_batch_and_its_gradient_points_there():
    z = correlated(30, 5, seed=18)
    way = z - z.mean(0) - whiten(z)
    torch.testing.assert_close(whitening_penalty(z), way.square().sum() / 29)
    torch.testing.assert_close(gradient(whitening_penalty, z), 2 * way / 29)


def test_near_the_identity_squared_weak_is_four_times_the_penalty():
    z = whiten(randn(40, 6, seed=19)) * (1 + 1e-5 * randn(6, seed=20))
    ratio = weak_sigreg(z, squared=True) / whitening_penalty(z)
    assert ratio.item() == pytest.approx(4, rel=1e-4)


def test_the_pull_of_the_penalty_does_not_fade_as_a_direction_collapses_and_that_of_weak_does():
    for small in (1e-2, 1e-6):
        z = with_variances([1.0, 1.0, small**2], 50, seed=21)
        # 2 |w| / (N - 1) with one direction of variance 1
        pull = gradient(whitening_penalty, z).norm().item()
        assert pull == pytest.approx(2 / math.sqrt(49), rel=2 * small)
        weak = gradient(lambda x: weak_sigreg(x, squared=True), z).norm().item()
        assert weak == pytest.approx(4 * small / math.sqrt(49), rel=1e-3)


# ------------------------------------------------------------------------------- all


@every_transform
@pytest.mark.parametrize("collapse", ["zero", "one point", "line"])
def test_collapsed_batches_give_finite_values_and_those_without_variance_zero(transform, collapse):
    z = torch.zeros(10, 4)
    if collapse == "one point":
        z = torch.full_like(z, 0.1)
    if collapse == "line":
        z = torch.randn(10, 1, generator=seeded(22)) * torch.ones(4)
    w = transform(z)
    assert w.isfinite().all()
    if collapse != "line":
        assert w.abs().max() == 0


@pytest.mark.parametrize("collapse", ["zero", "line"])
@pytest.mark.parametrize(
    "transform",
    [whiten, iterative_whiten, batch_normalize, lambda z: batch_normalize(z, eps=0)],
    ids=["zca", "iterative", "batch norm", "batch norm, eps = 0"],
)
def test_gradients_of_collapsed_batches_are_finite(transform, collapse):
    z = torch.zeros(10, 4)
    if collapse == "line":
        z = torch.randn(10, 1, generator=seeded(23)) * torch.ones(4)
    weight = torch.randn(10, 4, generator=seeded(24))
    assert gradient(lambda x: (transform(x) * weight).sum(), z).isfinite().all()
    assert gradient(whitening_penalty, z).isfinite().all()


@every_transform
def test_leading_dimensions_are_separate_batches(transform):
    z = randn(2, 3, 20, 4, seed=25) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    alone = torch.stack([transform(batch) for batch in z.flatten(0, 1)]).view_as(z)
    # signs of principal components are arbitrary
    torch.testing.assert_close(transform(z).abs(), alone.abs())


@every_transform
def test_statistics_are_float32_inside_autocast_and_for_half_precision(transform):
    z = (torch.randn(64, 5, generator=seeded(26)) * torch.arange(1.0, 6.0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = transform(z)
        penalty = whitening_penalty(z)
    assert found.dtype == penalty.dtype == torch.float32
    expected = transform(z.double())
    torch.testing.assert_close(found.double().abs(), expected.abs(), rtol=1e-3, atol=1e-4)


def test_errors_name_the_argument_and_what_would_be_right():
    z = torch.randn(8, 3, generator=seeded(27))
    with pytest.raises(ValueError, match="unknown kind of whitening 'zac'; did you mean 'zca'"):
        whiten(z, "zac")
    with pytest.raises(ValueError, match=r"correction must be 0 \(over N\) or 1"):
        whiten(z, correction=2)
    with pytest.raises(ValueError, match="iterations must be an int >= 0, not -1"):
        iterative_whiten(z, iterations=-1)
    for function in (*TRANSFORMS.values(), whitening_penalty):
        with pytest.raises(ValueError, match="needs 2"):
            function(z[:1])
        with pytest.raises(TypeError, match="floating-point"):
            function(torch.ones(8, 3, dtype=torch.int64))
    for function in (whiten, iterative_whiten, batch_normalize):
        with pytest.raises(ValueError, match=r"eps must be >= 0 and finite, not -1\.0"):
            function(z, eps=-1.0)


def test_the_gradient_of_whitening_survives_small_features():
    # both whiten to the same: their gradients differ by the factor alone
    z, g = (torch.randn(32, 4, generator=seeded(s)) for s in (70, 71))
    large, small = z.clone().requires_grad_(), (1e-10 * z).requires_grad_()
    for leaf in (large, small):
        whiten(leaf).backward(g)
    torch.testing.assert_close(1e-10 * small.grad, large.grad, rtol=1e-3, atol=1e-4)


def test_a_backward_pass_of_the_inverse_root_leaves_autocast():
    a = torch.eye(4) + torch.ones(4, 4) / 8
    g = torch.randn(4, 4, generator=seeded(72))
    gradients = []
    for enabled in (False, True):
        leaf = a.clone().requires_grad_()
        root = _InverseRoot.apply(leaf, 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients += torch.autograd.grad(root, leaf, g)
    torch.testing.assert_close(*gradients)
