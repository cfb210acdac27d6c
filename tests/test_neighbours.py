"""VICReg, VCReg, Barlow Twins and DeCov: exact values, identities with Weak, edges, modules."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from sigreg_lib import attach, weak_sigreg
from sigreg_lib.losses import (
    DeCov,
    VCReg,
    barlow_twins,
    batch_normalize,
    covariance_term,
    decov,
    invariance_term,
    variance_term,
    vicreg,
)

LOSSES = {
    "variance": variance_term,
    "variance, eps = 0": lambda z: variance_term(z, eps=0.0),
    "covariance": covariance_term,
    "decov": decov,
    "vicreg": lambda z: vicreg(z, z.flip(-2)),
    "barlow": lambda z: barlow_twins(z, z.flip(-2)),
    "invariance": lambda z: invariance_term(z, z.flip(-2)),
    "vcreg": VCReg(),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def correlated(n: int, c: int, *, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    """Correlated channels of different scale with a mean, float64."""
    g = seeded(seed)
    mixing = torch.randn(c, c, generator=g, dtype=torch.float64)
    return torch.randn(*batch, n, c, generator=g, dtype=torch.float64) @ mixing + 2


def gradient(loss, z: Tensor) -> Tensor:
    leaf = z.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


# ------------------------------------------------------------------------------- values


def test_values_of_a_batch_that_can_be_checked_by_hand():
    # two channels over four samples: variances 4/3 and 16/3, covariance 4/3
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 3.0], [-1.0, -3.0]], dtype=torch.float64)
    z[:, 1] += z[:, 0]
    s = z.T.cov()
    assert s[0, 1].item() == pytest.approx(4 / 3)
    assert covariance_term(z).item() == pytest.approx(2 * (4 / 3) ** 2 / 2)
    assert decov(z).item() == pytest.approx((4 / 4) ** 2)
    assert variance_term(z).item() == 0  # both channels are wide enough
    expected = (2 - math.sqrt(4 / 3 + 1e-4)) / 2
    assert variance_term(z, gamma=2.0).item() == pytest.approx(expected + max(0, 2 - math.sqrt(8)))
    assert invariance_term(z, z + torch.tensor([3.0, 4.0])).item() == pytest.approx(25)


def test_the_hinge_is_one_sided():
    wide, narrow = 10 * correlated(50, 4, seed=1), 0.01 * correlated(50, 4, seed=1)
    assert variance_term(wide) == 0
    assert gradient(variance_term, wide).abs().max() == 0
    std = (narrow.var(0) + 1e-4).sqrt()
    torch.testing.assert_close(variance_term(narrow), (1 - std).mean())
    assert variance_term(narrow, eps=0.0) > variance_term(narrow)


@pytest.mark.parametrize("n", [3, 20])
def test_squared_weak_is_the_covariance_term_and_two_sided_variances(n):
    z = correlated(n, 7, seed=2)
    expected = 7 * covariance_term(z) + (z.var(0) - 1).square().sum()
    torch.testing.assert_close(weak_sigreg(z, squared=True), expected, rtol=1e-12, atol=0)


def test_decov_is_the_covariance_term_over_n():
    z = correlated(20, 7, seed=3)
    expected = 7 / 2 * (19 / 20) ** 2 * covariance_term(z)
    torch.testing.assert_close(decov(z), expected, rtol=1e-12, atol=0)


def test_vicreg_is_the_weighted_sum_of_its_terms():
    a, b = 0.3 * correlated(30, 5, seed=4), 0.2 * correlated(30, 5, seed=5)
    terms = invariance_term(a, b), variance_term(a) + variance_term(b)
    found = vicreg(a, b, invariance=2.0, variance=3.0, covariance=5.0)
    expected = 2 * terms[0] + 3 * terms[1] + 5 * (covariance_term(a) + covariance_term(b))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vicreg(a, a), 50 * VCReg(1.0, 1 / 25)(a))


def test_barlow_of_equal_views_is_weak_after_batch_normalization():
    n, c, z = 25, 6, correlated(25, 6, seed=6)
    weak = weak_sigreg(batch_normalize(z, eps=0), squared=True)
    expected = (n / (n - 1)) ** 2 * barlow_twins(z, z, off_diagonal=1.0) + c / (n - 1) ** 2
    torch.testing.assert_close(weak, expected, rtol=1e-12, atol=0)


def test_barlow_uses_the_correlation_between_the_views():
    a, b = correlated(40, 5, seed=7), correlated(40, 5, seed=8)
    rho = torch.corrcoef(torch.cat([a, b], 1).T)[:5, 5:]
    off = rho.square().sum() - rho.diagonal().square().sum()
    expected = (1 - rho.diagonal()).square().sum() + 0.005 * off
    torch.testing.assert_close(barlow_twins(a, b), expected)


def test_barlow_ignores_scale_and_mean_of_every_channel():
    a, b = correlated(40, 5, seed=9), correlated(40, 5, seed=10)
    scale = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(barlow_twins(scale * a + 3, b / scale - 1), barlow_twins(a, b))


@pytest.mark.parametrize("loss", [covariance_term, decov], ids=["covariance", "decov"])
def test_scale_enters_to_the_fourth_power_and_the_mean_not_at_all(loss):
    z = correlated(30, 5, seed=11)
    torch.testing.assert_close(loss(3 * z + 7), 81 * loss(z))


@every_loss
def test_leading_dimensions_are_averaged(loss):
    z = 0.4 * correlated(12, 4, seed=12, batch=(2, 3))
    parts = torch.stack([loss(batch) for batch in z.flatten(0, 1)])
    torch.testing.assert_close(loss(z), parts.mean())


# ------------------------------------------------------------------------------- gradients, dtypes


@every_loss
def test_gradients_agree_with_finite_differences(loss):
    z = (0.3 * correlated(9, 4, seed=13)).requires_grad_()
    assert torch.autograd.gradcheck(loss, z)


@every_loss
@pytest.mark.parametrize("collapse", ["zero", "one point", "dead channel"])
def test_gradients_of_a_collapsed_batch_are_finite(loss, collapse):
    z = torch.randn(16, 4, generator=seeded(14))
    if collapse == "zero":
        z = torch.zeros_like(z)
    elif collapse == "one point":
        z = z[:1].expand(16, 4).clone()
    else:
        z[:, 0] = 0.1
    assert loss(z).isfinite()
    assert gradient(loss, z).isfinite().all()


def test_a_collapsed_batch_costs_the_hinge_its_height_and_barlow_one_a_channel():
    z = torch.full((8, 5), 0.1)  # its mean is not exactly 0.1 in float32
    assert variance_term(z, eps=0.0) == 1
    assert variance_term(z).item() == pytest.approx(1 - 0.01)
    assert barlow_twins(z, z) == 5
    assert covariance_term(z) == decov(z) == 0


@every_loss
def test_statistics_are_float32_inside_autocast_and_for_half_precision(loss):
    z = (0.5 * torch.randn(64, 8, generator=seeded(15))).bfloat16()
    expected = loss(z.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


@every_loss
def test_works_under_torch_func(loss):
    z = 0.4 * correlated(10, 4, seed=16, batch=(3,))
    together = torch.func.vmap(torch.func.grad(loss))(z)
    alone = torch.stack([gradient(loss, batch) for batch in z])
    torch.testing.assert_close(together, alone)


# ------------------------------------------------------------------------------- modules


@pytest.mark.parametrize(("gamma", "eps"), [(0.01, 1e-4), (0.5, 0.25), (0.1, 0.25)])
@pytest.mark.parametrize("n", [2, 3, 16])
def test_no_hinge_is_left_of_the_floor_where_eps_alone_is_wide_enough(gamma, eps, n):
    assert VCReg(gamma=gamma, eps=eps).floor(n, 8) == pytest.approx(0.04 * 7 / (n - 1))


@pytest.mark.parametrize("n, c", [(2, 3), (3, 5), (16, 8), (128, 32)])
@pytest.mark.parametrize("module", [VCReg(2.0, 0.3), VCReg(gamma=1.5, eps=0.1), DeCov()])
def test_the_floor_is_the_mean_over_white_gaussian_batches(module, n, c):
    z = torch.randn(6000, n, c, generator=seeded(17))
    values = module.values(z, module.matrix(z)).double()
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - module.floor(n, c)) < 4.5 * error


@pytest.mark.parametrize("module, loss", [(DeCov(), decov), (VCReg(0, 1), covariance_term)])
def test_attached_to_layers_a_module_gives_the_mean_of_the_loss_over_them(module, loss):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=seeded(18))
    handle = attach(model, ["0", "2"], module)
    x = torch.randn(20, 6, generator=seeded(19))
    model(x)
    expected = (loss(model[0](x)) + loss(model(x))) / 2
    torch.testing.assert_close(handle.loss(), expected)
    assert module.matrix(x) is None


def test_modules_hold_no_state_and_say_what_they_are():
    assert not list(VCReg().state_dict()) and not list(DeCov().state_dict())
    assert repr(VCReg()) == "VCReg(variance=1.0, covariance=0.04, gamma=1.0, eps=0.0001)"


# ------------------------------------------------------------------------------- errors


def test_errors_name_the_argument_and_what_would_be_right():
    z = torch.randn(8, 3, generator=seeded(20))
    for loss in LOSSES.values():
        with pytest.raises(TypeError, match=r"floating-point tensor, not torch\.int64"):
            loss(torch.ones(8, 3, dtype=torch.int64))
    for loss in (variance_term, covariance_term, decov):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., N, C\)"):
            loss(z[0])
        with pytest.raises(ValueError, match="needs 2"):
            loss(z[:1])
    for loss in (invariance_term, barlow_twins, vicreg):
        with pytest.raises(ValueError, match=r"one shape, not \(8, 3\), \(8, 2\)"):
            loss(z, z[:, :2])
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be positive"):
            variance_term(z, gamma=gamma)
    with pytest.raises(ValueError, match=r"eps must be >= 0 and finite, not -0\.1"):
        VCReg(eps=-0.1)
    with pytest.raises(ValueError, match="covariance must be a weight >= 0, not -1"):
        VCReg(covariance=-1)
