"""Weak-SIGReg's scale and shape, and the scale in logarithms: against float64, at the goal, and
near collapse."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib import RECIPES
from sigreg_lib.losses import (
    LogWeakSIGReg,
    WeakPart,
    log_weak_sigreg,
    weak_floor,
    weak_parts,
    weak_sigreg,
)
from sigreg_lib.sketch import gaussian


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def transcription(z: Tensor, sketch: Tensor | None = None) -> Tensor:
    """The formula for one batch, from the eigenvalues of the covariance."""
    y = z if sketch is None else z @ sketch
    values = torch.linalg.eigvalsh(torch.cov(y.T))
    mean = values.mean()
    return ((values / mean - 1).square().sum() + len(values) * mean.log().square()).sqrt()


def value_and_gradient(loss, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("k", [None, 8])
def test_float32_value_and_gradient_equal_the_float64_formula(k, scale):
    sketch = None if k is None else gaussian(24, k, generator=seeded(0))
    z = normal(64, 24, seed=1) * scale * torch.linspace(0.3, 2, 24) + 3 * scale
    found = value_and_gradient(lambda x: log_weak_sigreg(x, sketch), z)
    wide = None if sketch is None else sketch.double()
    expected = value_and_gradient(lambda x: transcription(x, wide), z.double())
    for a, b in zip(found, expected, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-5


def test_weak_splits_into_scale_and_shape_as_the_docstring_says():
    z = normal(50, 12, seed=2, dtype=torch.float64) * torch.linspace(0.2, 1, 12)
    variance = torch.cov(z.T).diagonal().mean()
    shape = weak_sigreg(z / variance.sqrt()).square()
    torch.testing.assert_close(
        weak_sigreg(z).square(), variance**2 * shape + 12 * (variance - 1) ** 2
    )
    torch.testing.assert_close(log_weak_sigreg(z).square(), shape + 12 * variance.log().square())
    found = weak_parts(z)
    torch.testing.assert_close(found[0], 12**0.5 * (variance - 1).abs())
    torch.testing.assert_close(found[1], shape.sqrt())


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("part", ["scale", "shape"])
def test_float32_parts_and_their_gradients_equal_those_from_eigenvalues(part, k, scale):
    sketch = None if k is None else gaussian(24, k, generator=seeded(0))
    wide = None if sketch is None else sketch.double()
    z = normal(64, 24, seed=1) * scale * torch.linspace(0.3, 2, 24) + 3 * scale

    def expected(x: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh(torch.cov((x if wide is None else x @ wide).T))
        mean = values.mean()
        if part == "scale":
            return math.sqrt(len(values)) * (mean - 1).abs()
        return (values / mean - 1).square().sum().sqrt()

    found = value_and_gradient(lambda x: weak_parts(x, sketch)[part == "shape"], z)
    for a, b in zip(found, value_and_gradient(expected, z.double()), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-5


def test_the_shape_is_the_effective_dimension_and_knows_no_scale():
    z = normal(400, 12, seed=10, dtype=torch.float64) * torch.linspace(0.2, 1, 12)
    values = torch.linalg.eigvalsh(torch.cov(z.T))
    d = values.sum() ** 2 / values.square().sum()
    for factor in (1.0, 1e-6, 1e6):
        torch.testing.assert_close(weak_parts(factor * z)[1], (12 * (12 / d - 1)).sqrt())
    line = normal(40, 1, seed=11) * torch.ones(12)
    assert weak_parts(line)[1].item() == pytest.approx(math.sqrt(12 * 11), rel=1e-5)


@pytest.mark.parametrize("part", ["scale", "shape"])
@pytest.mark.parametrize(
    ("n", "c", "k", "sketch"),
    [(64, 20, 16, "gaussian"), (32, 48, 16, "orthonormal"), (64, 16, 64, "gaussian")],
)
def test_floors_of_the_parts_are_their_root_mean_squares_over_white_batches(part, n, c, k, sketch):
    module = WeakPart(part, k, sketch=sketch)
    squares = torch.stack([module(z).square() for z in normal(6000, n, c, seed=12)])
    error = squares.std().item() / math.sqrt(len(squares))
    exact = part == "scale"  # a sixth of it is the term (K + 1) / C in the first case
    assert squares.mean().item() == pytest.approx(
        module.floor(n, c) ** 2,
        abs=4 * error if exact else 4 * error + 0.03 * squares.mean().item(),
    )


def test_one_column_has_a_scale_and_no_shape():
    for n, c in ((128, 256), (64, 40), (16, 8)):
        assert WeakPart("shape", 1).floor(n, c) == pytest.approx(0, abs=1e-6)
        assert WeakPart("scale", 1).floor(n, c) == pytest.approx(weak_floor(n, c, 1), rel=1e-12)


def test_agrees_with_weak_to_first_order_at_the_goal():
    z = normal(40, 6, seed=3, dtype=torch.float64)
    centred = z - z.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    assert log_weak_sigreg(white).item() == pytest.approx(0, abs=1e-7)
    for size in (1e-3, 1e-4):
        near = white + size * normal(40, 6, seed=4, dtype=torch.float64)
        gap = log_weak_sigreg(near) / weak_sigreg(near) - 1
        assert abs(gap.item()) < 10 * size


def test_near_collapse_its_slope_in_the_logarithm_of_the_scale_stays_where_weaks_vanishes():
    base = normal(32, 16, seed=5, dtype=torch.float64)
    slopes = {}
    for loss in (weak_sigreg, log_weak_sigreg):
        for exponent in (-4, -8):
            log_scale = torch.tensor(exponent * math.log(10), dtype=torch.float64)
            log_scale.requires_grad_()
            value = loss(log_scale.exp() * base)
            slopes[loss, exponent] = torch.autograd.grad(value, log_scale)[0].item()
    # d sqrt(K) |log s^2| / d log s = -2 sqrt(K), up to the share that the shape has in the norm
    for exponent in (-4, -8):
        assert slopes[log_weak_sigreg, exponent] == pytest.approx(-2 * 4, rel=0.05)
    # ||a^2 Cov - I|| = sqrt(K) - a^2 tr Cov / sqrt(K): slope of order a^2
    assert slopes[weak_sigreg, -4] / slopes[weak_sigreg, -8] == pytest.approx(1e8, rel=1e-3)
    assert abs(slopes[weak_sigreg, -8]) < 1e-14


@pytest.mark.parametrize(
    "z", [torch.zeros(8, 4), torch.full((8, 4), 3.0)], ids=["zero", "constant"]
)
def test_at_exact_collapse_value_and_gradient_are_finite_and_the_gradient_zero(z):
    value, gradient = value_and_gradient(log_weak_sigreg, z)
    assert value.isfinite() and value > 100
    assert not gradient.any()
    for part in (0, 1):  # both are sqrt(K) there
        value, gradient = value_and_gradient(lambda x, part=part: weak_parts(x)[part], z)
        assert value == 2.0 and not gradient.any()


@pytest.mark.parametrize("n", [37, 128])
@pytest.mark.parametrize("columns", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_coincide_anywhere_are_a_collapse(n, columns, dtype):
    # their mean, summed and divided, is another number than theirs by a rounding
    z = normal(1, 64, seed=8).to(dtype).repeat(n, 1)
    sketch = None if columns is None else normal(64, columns, seed=9).to(dtype)
    value, gradient = value_and_gradient(lambda z: log_weak_sigreg(z, sketch), z)
    k = columns or 64
    # shape: |0 - I|; scale: sqrt(K) times the logarithm of the smallest normal number, cubed
    scale = math.sqrt(k) * 3 * math.log(torch.finfo(dtype).tiny)
    assert value.item() == pytest.approx(math.hypot(math.sqrt(k), scale))
    assert not gradient.any()


def test_a_scale_whose_square_float32_cannot_hold_still_has_a_gradient():
    z = 1e-30 * normal(16, 4, seed=6)
    value, gradient = value_and_gradient(log_weak_sigreg, z)
    assert value.item() == pytest.approx(2 * 2 * 30 * math.log(10), rel=0.02)
    assert gradient.isfinite().all()
    assert (gradient * z).sum().item() == pytest.approx(-2 * 2, rel=0.02)  # the slope in log a


def test_leading_dimensions_are_batches_and_the_module_draws_its_sketch():
    z = normal(3, 40, 20, seed=7)
    module = LogWeakSIGReg(8, resample=False, seed=1)
    sketch = module.matrix(z)
    torch.testing.assert_close(
        module(z), torch.stack([log_weak_sigreg(x, sketch) for x in z]).mean()
    )


def test_its_floor_is_weaks_to_first_order():
    values = [log_weak_sigreg(normal(2048, 16, seed=s)) for s in range(20)]
    mean = torch.stack(values).mean().item()
    assert mean == pytest.approx(LogWeakSIGReg(64).floor(2048, 16), rel=0.03)
    assert LogWeakSIGReg(64).floor(2048, 16) == weak_floor(2048, 16, 64)


def test_the_recipe_mode_builds_it():
    recipe = RECIPES["digits/weak"].override(mode="log_scale", sketch_dim=32)
    regularizer = recipe.build_regularizer()
    assert isinstance(regularizer, LogWeakSIGReg)
    assert regularizer.source.n_columns == 32
    for part in ("scale", "shape"):
        module = RECIPES["digits/weak"].override(mode=part, sketch_dim=32).build_regularizer(seed=3)
        z = normal(40, 128, seed=13)
        sketch = WeakPart(part, 32, seed=3).matrix(z)
        assert sketch.shape == (128, 32) and module(z) == weak_parts(z, sketch)[part == "shape"]
        assert f"part='{part}'" in repr(module)
    with pytest.raises(ValueError, match="mode of Strong"):
        RECIPES["digits/strong"].override(mode="log_scale")


def test_refuses_what_is_no_batch():
    with pytest.raises(ValueError, match="'scale' or 'shape', not 'size'"):
        WeakPart("size")
    with pytest.raises(ValueError, match="1 samples"):
        log_weak_sigreg(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="sketch must have shape"):
        log_weak_sigreg(torch.zeros(8, 4), torch.zeros(5, 2))
    with pytest.raises(TypeError, match="floating-point"):
        log_weak_sigreg(torch.zeros(8, 4, dtype=torch.int64))


@pytest.mark.parametrize("module", [LogWeakSIGReg, WeakPart])
def test_neither_has_a_corrected_mode(module):
    with pytest.raises(TypeError, match=f"{module.__name__} has no corrected mode"):
        module.corrected(64)
