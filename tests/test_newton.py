"""The inverse root by Newton's iteration, and the layer that whitens with it."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib._blocks import IterativeNorm
from sigreg_lib._newton import newton_inverse_root
from sigreg_lib.losses import iterative_whiten
from sigreg_lib.models import build_model


def correlated(n: int, c: int, *, seed: int, spread: float = 2.0) -> Tensor:
    """Samples of a covariance whose eigenvalues go from 1 to spread^2."""
    g = seeded(seed)
    basis = torch.linalg.qr(torch.randn(c, c, generator=g, dtype=torch.float64))[0]
    scales = torch.linspace(1, spread, c, dtype=torch.float64)
    return torch.randn(n, c, generator=g, dtype=torch.float64) * scales @ basis + 3


def test_the_inverse_root_converges_to_that_of_the_eigenvalues():
    covariance = correlated(200, 6, seed=0).T.cov()
    values, vectors = torch.linalg.eigh(covariance + 0.1 * torch.eye(6))
    exact = vectors * values.rsqrt() @ vectors.T
    torch.testing.assert_close(newton_inverse_root(covariance, 12, 0.1), exact)
    assert (newton_inverse_root(covariance, 2, 0.1) - exact).norm() > 0.1  # 2 steps are not enough


def test_one_step_is_the_published_equation():
    covariance = correlated(50, 4, seed=1).T.cov()
    normed = covariance / covariance.trace()
    by_hand = (3 * torch.eye(4) - normed) / 2 / covariance.trace().sqrt()
    torch.testing.assert_close(newton_inverse_root(covariance, 1, 0.0), by_hand)


def test_zeros_give_a_finite_matrix():
    assert newton_inverse_root(torch.zeros(3, 3), 5, 0.0).isfinite().all()


@pytest.mark.parametrize("shape", [(60, 8), (6, 10, 8)])
def test_in_training_each_group_has_covariance_near_the_identity(shape):
    norm = IterativeNorm(8, group_size=4, iterations=9).double()
    x = correlated(60, 8, seed=2).view(shape)
    y = norm(x)
    assert y.shape == x.shape
    flat = y.flatten(0, -2)
    assert flat.mean(0).abs().max() < 1e-12
    covariance = flat.T.cov(correction=0)
    for group in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(
            covariance[group, group], torch.eye(4).double(), rtol=0, atol=1e-3
        )
    assert covariance[:4, 4:].abs().max() > 0.05  # across groups nothing is decorrelated


def test_in_training_it_is_the_whitening_of_the_losses_with_its_gradient():
    norm = IterativeNorm(5).double()
    x = correlated(40, 5, seed=3).requires_grad_()
    toward = torch.randn(40, 5, generator=seeded(4), dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((norm(x) * toward).sum(), x),
        torch.autograd.grad((iterative_whiten(x) * toward).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(norm(x), iterative_whiten(x))


def test_in_eval_mode_running_statistics_are_used_and_kept():
    norm = IterativeNorm(4, momentum=0.25).double()
    first, second = correlated(50, 4, seed=5), correlated(50, 4, seed=6, spread=3.0)
    norm(first), norm(second)
    mean, root = torch.zeros(4).double(), torch.eye(4).double()
    for z in (first, second):
        mean = 0.75 * mean + 0.25 * z.mean(0)
        root = 0.75 * root + 0.25 * newton_inverse_root(z.T.cov(correction=0), 5, 1e-5)
    norm.eval()
    x = correlated(7, 4, seed=7)
    torch.testing.assert_close(norm(x), (x - mean) @ root)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))  # a sample alone is what it is in a batch
    torch.testing.assert_close(norm.running_mean[0, 0], mean)
    assert not norm.running_root.requires_grad


def test_scale_and_shift_follow_the_whitening():
    norm = IterativeNorm(3).double()
    x = correlated(30, 3, seed=8)
    plain = norm(x)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0, 4.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(norm(x), plain * norm.weight + norm.bias)


@pytest.mark.parametrize(("width", "size"), [(128, 64), (32, 32), (96, 48), (67, 1)])
def test_a_group_is_the_largest_divisor_of_the_width_up_to_64(width, size):
    assert IterativeNorm(width).running_root.shape == (width // size, size, size)


def test_statistics_are_float32_inside_autocast():
    norm = IterativeNorm(4)
    z = (3 + correlated(512, 4, seed=9)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(z)
    torch.testing.assert_close(out.double(), iterative_whiten(z.double()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_networks_take_it_as_their_norm_and_keep_its_statistics(kind):
    sizes = {"width": 16, "depth": 2} | ({"heads": 2} if kind == "vit" else {})
    model = build_model(kind, (1, 8, 8), 3, seed=0, norm="iterative", **sizes)
    seen = {}
    layer = model.get_submodule("norms.1" if kind == "mlp" else "blocks.1.norm2")
    layer.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    model(torch.randn(64, 1, 8, 8, generator=seeded(10)))
    torch.testing.assert_close(
        seen["y"], iterative_whiten(seen["x"].flatten(0, -2)).view_as(seen["x"])
    )
    assert {"running_mean", "running_root"} <= {n.rpartition(".")[2] for n in model.state_dict()}
