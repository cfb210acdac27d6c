"""The losses against float64 transcriptions, closed forms, Monte Carlo and invariances."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import torch
from helpers import seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sigreg_lib.losses import (
    STRONG_GRIDS,
    LogWeakSIGReg,
    SIGReg,
    WeakSIGReg,
    _kernels,
    combine,
    strong_floor,
    strong_sigreg,
    strong_values,
    weak_floor,
    weak_sigreg,
    weak_values,
    whiten,
)
from sigreg_lib.sketch import directions, gaussian, orthonormal

LEJEPA = {"t_max": 3.0, "n_points": 33}


class Case(NamedTuple):
    """A loss, its transcription for one batch, and its random matrix."""

    function: Callable[..., Tensor]
    transcription: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    options: dict
    transcription_options: dict

    def matrix(self, c: int, k: int, *, seed: int) -> Tensor:
        return self.draw(c, k, generator=seeded(seed))

    def loss(self, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: self.function(z, matrix, **self.options)

    def reference(self, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: self.transcription(z, matrix, **self.transcription_options)


CASES = {
    "weak": Case(weak_sigreg, reference.weak, gaussian, {}, {}),
    "weak squared": Case(
        weak_sigreg, reference.weak, gaussian, {"squared": True}, {"squared": True}
    ),
    "weak unbiased": Case(
        weak_sigreg,
        reference.weak_unbiased,
        orthonormal,
        {"squared": True, "unbiased": True},
        {},
    ),
    "strong": Case(strong_sigreg, reference.strong, directions, {}, {}),
    "strong on LeJEPA's grid": Case(strong_sigreg, reference.strong, directions, LEJEPA, LEJEPA),
    "strong unbiased": Case(
        strong_sigreg, reference.strong_unbiased, directions, {"unbiased": True}, {}
    ),
}
PAPER = ["weak", "weak squared", "strong", "strong on LeJEPA's grid"]
# torch uses deprecated parts of itself in its compiler and in forward-mode differentiation
TORCH_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def skewed(*shape: int, seed: int) -> Tensor:
    """Far from Gaussian: shifted exponential channels whose scales span a decade."""
    g = seeded(seed)
    scales = torch.logspace(-0.5, 0.5, shape[-1])
    return torch.empty(shape).exponential_(generator=g) * scales + torch.randn(
        shape[-1], generator=g
    )


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def standard_errors(values: Tensor, expected: float) -> float:
    """How far the mean lies from the expected value, in its standard errors."""
    values = values.double()
    return ((values.mean() - expected) / (values.std() / math.sqrt(len(values)))).item()


# ---------------------------------------------------------------- the published formula


@pytest.mark.parametrize("make", [normal, skewed])
@pytest.mark.parametrize("size", [(128, 256, 64), (128, 1024, 64), (8192, 96, 64)], ids=str)
@pytest.mark.parametrize("name", PAPER)
def test_float32_value_and_gradient_equal_the_float64_formula_to_five_digits(name, size, make):
    case, (n, c, k) = CASES[name], size
    if n > 1000 and (make is skewed or name == "weak squared"):
        k = 16  # the transcription holds N x K x points complex numbers
    z, matrix = make(n, c, seed=0), case.matrix(c, k, seed=1)
    found = value_and_gradient(case.loss(matrix), z)
    expected = value_and_gradient(case.reference(matrix.double()), z.double())
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-5


@every_case
@pytest.mark.parametrize("size", [(4, 9, 5), (5, 9, 7), (6, 3, 3)], ids=str)
def test_float64_stays_float64_and_equals_the_formula_below_and_above_full_rank(case, size):
    n, c, k = size
    z, matrix = skewed(n, c, seed=2).double(), case.matrix(c, k, seed=3).double()
    found = value_and_gradient(case.loss(matrix), z)
    expected = value_and_gradient(case.reference(matrix), z)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [*PAPER, "strong unbiased"])
def test_two_samples_suffice(name):
    case = CASES[name]
    z, matrix = skewed(2, 5, seed=4).double(), case.matrix(5, 4, seed=5).double()
    found = value_and_gradient(case.loss(matrix), z)
    expected = value_and_gradient(case.reference(matrix), z)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@every_case
def test_leading_dimensions_are_averaged(case):
    z, matrix = skewed(2, 3, 6, 5, seed=6).double(), case.matrix(5, 4, seed=7).double()

    def single_calls(x: Tensor) -> Tensor:
        return torch.stack([case.reference(matrix)(b) for b in x.flatten(0, 1)]).mean()

    found = value_and_gradient(case.loss(matrix), z)
    torch.testing.assert_close(found, value_and_gradient(single_calls, z), rtol=1e-11, atol=1e-12)


@every_case
@pytest.mark.parametrize("leading", [(2, 3), (3,), (2, 1)], ids=str)
def test_each_batch_may_have_a_matrix_of_its_own(case, leading):
    z = skewed(2, 3, 6, 5, seed=6).double()
    own = torch.stack([case.matrix(5, 4, seed=i) for i in range(math.prod(leading))]).double()
    matrices = own.view(*leading, 5, 4)
    each = matrices.expand(2, 3, 5, 4).flatten(0, 1)

    def single_calls(x: Tensor) -> Tensor:
        pairs = zip(x.flatten(0, 1), each, strict=True)
        return torch.stack([case.reference(m)(b) for b, m in pairs]).mean()

    found = value_and_gradient(case.loss(matrices), z)
    torch.testing.assert_close(found, value_and_gradient(single_calls, z), rtol=1e-11, atol=1e-12)
    for wrong in (own[:1].expand(2, 5, 4), own[:1, None, None].expand(1, 2, 3, 5, 4)):
        with pytest.raises(ValueError, match=r"in front must be those of z, \(2, 3\)"):
            case.loss(wrong)(z)


def test_no_sketch_is_the_identity_sketch():
    z = skewed(12, 5, seed=8).double()
    eye = torch.eye(5, dtype=torch.float64)
    for options in ({}, {"squared": True}, {"squared": True, "unbiased": True}):
        torch.testing.assert_close(
            value_and_gradient(lambda x, o=options: weak_sigreg(x, **o), z),
            value_and_gradient(lambda x, o=options: weak_sigreg(x, eye, **o), z),
        )


# ---------------------------------------------------------------- dtypes, layouts, transforms


@every_case
def test_statistics_are_float32_under_autocast_and_for_half_precision_input(case):
    z, matrix = skewed(40, 24, seed=9), case.matrix(24, 16, seed=10)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = z.to(dtype)
        outside = value_and_gradient(case.loss(matrix), low.float())
        for reduced in (torch.bfloat16, torch.float16):

            def under_autocast(x: Tensor, reduced=reduced) -> Tensor:
                with torch.autocast("cpu", dtype=reduced):
                    return case.loss(matrix)(x)

            value, gradient = value_and_gradient(under_autocast, low)
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(outside[0].item(), rel=1e-6)
            assert gradient.dtype == dtype
            # rounded once, at the end: half an ulp of a format with 8, 11 or 24 bits
            assert relative_error(gradient, outside[1].double()) < torch.finfo(dtype).eps


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_exactly_zero_at_collapse_onto_the_origin(case, dtype):
    z, matrix = torch.zeros(16, 12, dtype=dtype), case.matrix(12, 8, seed=11)
    value, gradient = value_and_gradient(case.loss(matrix), z)
    assert value.isfinite()
    assert torch.equal(gradient, torch.zeros_like(z))


def whitened(n_channels: int) -> Tensor:
    """Up to 7 channels whose covariance is I to the last bit: a Hadamard matrix and a zero row."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = torch.kron(torch.kron(two, two), two)
    return torch.cat([hadamard[:, 1 : n_channels + 1], torch.zeros(1, n_channels)])


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("squared", [False, True])
def test_weak_is_zero_with_zero_gradient_where_the_covariance_is_exactly_the_identity(
    n_channels, squared
):
    z = whitened(n_channels)
    assert torch.equal(z.T @ z / 8, torch.eye(n_channels))
    for transform in (value_and_gradient, lambda f, x: (f(x), torch.func.grad(f)(x))):
        value, gradient = transform(lambda x: weak_sigreg(x, squared=squared), z)
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(z))


@every_case
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_inside_autocast_is_that_outside_near_the_goal_too(case, create_graph):
    z = whiten(normal(64, 7, seed=60)) + 1e-2 * normal(64, 7, seed=61)
    loss = case.loss(orthonormal(7, 7, generator=seeded(62)))
    _, expected = value_and_gradient(loss, z)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(loss(leaf), leaf, create_graph=create_graph)
    assert relative_error(found.detach(), expected) < 5e-4


@every_case
def test_memory_layout_of_the_input_does_not_matter(case):
    matrix = case.matrix(10, 6, seed=12).double()
    loss = case.loss(matrix)
    wide = skewed(2, 14, 20, seed=13).double()
    one = skewed(1, 14, 10, seed=14).double()
    for view in (
        wide[:, ::2, ::2],
        skewed(10, 14, seed=15).double().T,
        skewed(14, 2, 10, seed=16).double().transpose(0, 1),
        one.expand(3, 14, 10),
        one[:, :1].expand(1, 6, 10),
    ):
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        value = loss(leaf)
        found = value.detach(), torch.autograd.grad(value, leaf)[0]
        torch.testing.assert_close(found, value_and_gradient(loss, view.contiguous()))


@every_case
def test_first_and_second_derivatives_equal_finite_differences(case):
    matrix = case.matrix(4, 3, seed=17).double().requires_grad_()
    z = normal(2, 5, 4, seed=18, dtype=torch.float64).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, m: case.loss(m)(x), (z, matrix))
        assert check(case.loss(matrix.detach()), z)


@TORCH_WARNS
@every_case
def test_functional_transforms_equal_autograd(case):
    z, matrix = skewed(3, 6, 5, seed=19).double(), case.matrix(5, 4, seed=20).double()
    loss = case.loss(matrix)
    _, gradient = value_and_gradient(loss, z)
    torch.testing.assert_close(torch.func.grad(loss)(z), gradient)
    torch.testing.assert_close(torch.func.vmap(loss)(z).mean(), loss(z))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(z) / 3, gradient)
    tangent = normal(3, 6, 5, seed=21, dtype=torch.float64)
    _, slope = torch.func.jvp(loss, (z,), (tangent,))
    torch.testing.assert_close(slope, (gradient * tangent).sum())
    hessian = torch.func.hessian(loss)(z[0])
    expected = torch.autograd.functional.hessian(loss, z[0])
    torch.testing.assert_close(hessian, expected)


@TORCH_WARNS
def test_compiled_losses_equal_eager_ones_also_under_autocast_and_at_degenerate_points():
    sketch, slices = (make(7, 5, generator=seeded(22)) for make in (gaussian, directions))

    def losses(z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.stack(
                [
                    weak_sigreg(z),
                    weak_sigreg(z, sketch),
                    weak_sigreg(z, sketch, squared=True, unbiased=True),
                    strong_sigreg(z, slices),
                    strong_sigreg(z, slices, **LEJEPA, unbiased=True),
                ]
            )

    compiled = torch.compile(losses, fullgraph=True)
    for z in (skewed(9, 7, seed=23), torch.zeros(9, 7), whitened(7)):
        leaf, compiled_leaf = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected, found = losses(leaf), compiled(compiled_leaf)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        weight = torch.tensor([1.0, 2.0, 0.5, 3.0, -1.0])
        expected.backward(weight)
        found.backward(weight)
        torch.testing.assert_close(compiled_leaf.grad, leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["hessian", "fake", "inference"])
def test_strong_works_whatever_its_first_call_on_a_grid_was(first, monkeypatch):
    monkeypatch.setattr(_kernels, "_GRIDS", {})
    z, slices = normal(6, 4, seed=1), directions(4, 3, generator=seeded(2))

    def loss(x: Tensor) -> Tensor:
        return strong_sigreg(x, slices)

    if first == "hessian":
        torch.func.hessian(loss)(z)
    elif first == "inference":
        with torch.inference_mode():
            loss(z)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            strong_sigreg(mode.from_tensor(z), mode.from_tensor(slices))
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(z), expected, rtol=1e-4, atol=1e-6)
    second = torch.autograd.grad(expected.sum(), leaf)[0]  # through the constants of the grid
    assert torch.isfinite(second).all()
    assert all(
        type(t) is Tensor and not t.is_inference() for t in next(iter(_kernels._GRIDS.values()))
    )


# ---------------------------------------------------------------- unbiasedness


def exponential_batches(count: int, n: int, mixing: Tensor, seed: int) -> Tensor:
    """Batches of x = A u with independent centred exponential u; covariance A A'."""
    u = torch.empty(count, n, len(mixing), dtype=torch.float64).exponential_(generator=seeded(seed))
    return (u - 1) @ mixing.T


@pytest.mark.parametrize("distribution", ["Gaussian", "exponential"])
def test_weak_unbiased_estimates_the_population_value_and_the_plain_one_does_not(distribution):
    count, n = 40_000, 6
    mixing = torch.tensor([[1.2, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 1.0]], dtype=torch.float64)
    population = (mixing @ mixing.T - torch.eye(3, dtype=torch.float64)).square().sum().item()
    if distribution == "Gaussian":
        z = normal(count, n, 3, seed=24, dtype=torch.float64) @ mixing.T
    else:
        z = exponential_batches(count, n, mixing, seed=25)
    unbiased = weak_values(z, squared=True, unbiased=True)
    assert abs(standard_errors(unbiased, population)) < 3
    assert standard_errors(weak_values(z, squared=True), population) > 30


def test_weak_unbiased_under_a_sketch_estimates_the_sketched_population():
    sketch = orthonormal(5, 2, generator=seeded(26)).double()
    scales = torch.tensor([0.5, 0.8, 1.0, 1.3, 1.6], dtype=torch.float64)
    z = normal(30_000, 5, 5, seed=27, dtype=torch.float64) * scales + 3
    covariance = sketch.T @ torch.diag(scales**2) @ sketch
    population = (covariance - torch.eye(2, dtype=torch.float64)).square().sum().item()
    unbiased = weak_values(z, sketch, squared=True, unbiased=True)
    assert abs(standard_errors(unbiased, population)) < 3
    assert standard_errors(weak_values(z, sketch, squared=True), population) > 30


@pytest.mark.parametrize("grid", STRONG_GRIDS.values(), ids=STRONG_GRIDS.keys())
def test_strong_unbiased_estimates_the_population_value_and_the_plain_one_does_not(grid):
    t_max, n_points = grid
    n, slices = 5, directions(3, 4, generator=seeded(28)).double()
    z = exponential_batches(20_000, n, torch.eye(3, dtype=torch.float64), seed=29)
    t = torch.linspace(-t_max, t_max, n_points, dtype=torch.float64)
    s = 1j * t[:, None, None] * slices  # (points, C, K)
    phi = (torch.exp(-s) / (1 - s)).prod(1)  # of a projection: product over channels
    gauss = torch.exp(-t.square() / 2)[:, None]
    integrand = (phi - gauss).abs().square() * gauss
    population = n * torch.trapezoid(integrand, t, dim=0).mean().item()
    options = {"t_max": t_max, "n_points": n_points}
    unbiased = strong_values(z, slices, unbiased=True, **options)
    assert abs(standard_errors(unbiased, population)) < 3
    assert standard_errors(strong_values(z, slices, **options), population) > 30


# ---------------------------------------------------------------- floors


def white_values(regularizer: WeakSIGReg | SIGReg, n: int, c: int, seed: int) -> Tensor:
    """The loss of many white Gaussian batches; each of Weak's has its own sketch."""
    g, count = seeded(seed), 400 if n * c > 10_000 else 4000
    if isinstance(regularizer, SIGReg):  # its floor holds for any directions
        z = torch.randn(500, n, c, generator=g)
        return regularizer.values(z, regularizer.matrix(z))
    return torch.stack([regularizer(torch.randn(n, c, generator=g)) for _ in range(count)])


@pytest.mark.parametrize(
    ("n", "c", "k", "sketch"),
    [
        (128, 256, 64, "gaussian"),
        (128, 256, 64, "orthonormal"),
        (16, 40, 24, "gaussian"),
        (16, 40, 24, "orthonormal"),
        (32, 24, 24, "gaussian"),  # C <= K: no sketch
        (32, 16, 24, "orthonormal"),
    ],
)
def test_weak_floors_are_the_means_over_white_batches(n, c, k, sketch):
    regularizer = WeakSIGReg(k, sketch=sketch, squared=True)
    floor = weak_floor(n, c, k, sketch=sketch, squared=True)
    assert regularizer.floor(n, c) == floor
    squares = white_values(regularizer, n, c, seed=30)
    assert abs(standard_errors(squares, floor)) < 3
    assert standard_errors(squares, 0.98 * floor) > 3  # so an error of 2% would be seen
    root = weak_floor(n, c, k, sketch=sketch)
    assert root == math.sqrt(floor)
    assert 0.985 * root < squares.sqrt().mean().item() < 1.002 * root  # Jensen's inequality


@pytest.mark.parametrize(("n", "c", "k"), [(2, 2, 1), (3, 4, 2), (6, 3, 2)])
def test_every_term_of_the_gaussian_floor_counts_in_tiny_batches(n, c, k):
    g, count = seeded(50), 200_000
    z = torch.randn(count, n, c, generator=g)
    sketches = torch.randn(count, c, k, generator=g) / math.sqrt(c)
    squares = weak_values(z @ sketches, squared=True)
    floor = weak_floor(n, c, k, squared=True)
    assert abs(standard_errors(squares, floor)) < 3
    for missing in (k * (k + 1) / c, k * (k + 1) / (n - 1), 2 * k / (c * (n - 1))):
        assert standard_errors(squares, floor - missing) > 3


@pytest.mark.parametrize("sketch", ["gaussian", "orthonormal"])
def test_floor_of_the_unbiased_estimate_is_what_the_sketch_leaves(sketch):
    regularizer = WeakSIGReg(24, sketch=sketch, squared=True, unbiased=True)
    floor = weak_floor(32, 40, 24, sketch=sketch, squared=True, unbiased=True)
    assert floor == regularizer.floor(32, 40) == (24 * 25 / 40 if sketch == "gaussian" else 0)
    values = white_values(regularizer, 32, 40, seed=31)
    assert abs(standard_errors(values, floor)) < 3
    assert abs(standard_errors(values, floor + 0.5)) > 3


def test_corrected_mode_has_floor_zero_and_the_tables_sizes_have_floor_seven():
    assert WeakSIGReg.corrected(64).floor(128, 256) == 0
    assert WeakSIGReg(64).floor(128, 256) == pytest.approx(7.0, abs=0.05)
    # an isotropic Gaussian costs more than collapse at K = 128
    assert weak_floor(128, 256, 128) == pytest.approx(13.95, abs=0.15)
    assert weak_floor(128, 256, 128) > math.sqrt(128)


@pytest.mark.parametrize("make", [SIGReg, SIGReg.lejepa])
@pytest.mark.parametrize(("n", "c"), [(4, 3), (64, 96)])
def test_strong_floor_is_the_mean_over_white_batches_of_any_size(make, n, c):
    regularizer = make(16)
    values = white_values(regularizer, n, c, seed=32)
    floor = strong_floor(t_max=regularizer.t_max, n_points=regularizer.n_points)
    assert regularizer.floor(n, c) == floor
    assert abs(standard_errors(values, floor)) < 3
    assert standard_errors(values, 0.9 * floor) > 3
    corrected = white_values(make(16, unbiased=True), n, c, seed=33)
    assert strong_floor(unbiased=True) == make(16, unbiased=True).floor(n, c) == 0
    assert abs(standard_errors(corrected, 0)) < 3


@pytest.mark.parametrize("grid", [*STRONG_GRIDS.values(), (1.0, 5), (2.0, 3)])
def test_strong_floor_is_the_trapezoid_of_its_integrand(grid):
    t_max, n_points = grid
    t = torch.linspace(-t_max, t_max, n_points, dtype=torch.float64)
    integrand = torch.exp(-t.square() / 2) * (1 - torch.exp(-t.square()))
    expected = torch.trapezoid(integrand, t).item()
    assert strong_floor(t_max=t_max, n_points=n_points) == pytest.approx(expected, rel=1e-12)


def test_strong_floor_on_a_dense_grid_is_its_integral():
    integral = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert strong_floor(t_max=12.0, n_points=2001) == pytest.approx(integral, rel=1e-9)
    for t_max, n_points in STRONG_GRIDS.values():
        assert strong_floor(t_max=t_max, n_points=n_points) == pytest.approx(integral, rel=0.01)


# ---------------------------------------------------------------- known values


@pytest.mark.parametrize("k", [1, 16, 64])
def test_weak_costs_the_root_of_k_at_total_collapse(k):
    point = normal(1, 80, seed=34)
    z = point.expand(32, 80)
    loss = weak_sigreg(z, gaussian(80, k, generator=seeded(35)))
    assert loss.item() == pytest.approx(math.sqrt(k), rel=1e-6)


@pytest.mark.parametrize("s", [0.0, 0.25, 1.0, 9.0])
def test_weak_is_the_distance_of_an_isotropic_covariance_from_one(s):
    z = math.sqrt(s) * whitened(6) + 5
    assert weak_sigreg(z).item() == pytest.approx(abs(s - 1) * math.sqrt(6), rel=1e-5, abs=1e-6)
    assert weak_sigreg(z, squared=True).item() == pytest.approx(
        6 * (s - 1) ** 2, rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("grid", STRONG_GRIDS.values(), ids=STRONG_GRIDS.keys())
@pytest.mark.parametrize("n", [2, 37])
def test_strong_at_collapse_is_n_times_a_known_integral(grid, n):
    t_max, n_points = grid
    slices = directions(5, 3, generator=seeded(36))
    loss = strong_sigreg(torch.zeros(n, 5), slices, t_max=t_max, n_points=n_points)
    t = torch.linspace(-t_max, t_max, n_points, dtype=torch.float64)
    gauss = torch.exp(-t.square() / 2)
    collapsed = n * torch.trapezoid((1 - gauss).square() * gauss, t).item()
    assert loss.item() == pytest.approx(collapsed, rel=1e-6)
    integral = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert loss.item() == pytest.approx(n * integral, rel=0.02)


def test_strong_grids_agree_at_scale_one_and_the_published_one_misses_a_third_at_scale_ten():
    n, scale = 256, 10.0
    z = normal(n, 256, seed=37, dtype=torch.float64)
    slices = directions(256, 64, generator=seeded(38)).double()
    grids = [*STRONG_GRIDS.values(), (12.0, 4001)]
    near = [strong_sigreg(z, slices, t_max=t, n_points=p).item() for t, p in grids]
    far = [strong_sigreg(scale * z, slices, t_max=t, n_points=p).item() for t, p in grids]
    assert near == pytest.approx([near[-1]] * 3, rel=0.02)
    assert far[:2] == pytest.approx([211, 296], rel=0.01)

    def integral(a: float) -> float:  # of exp(-a t^2 / 2)
        return math.sqrt(2 * math.pi / a)

    s = scale**2
    squared_bias = integral(3) - 2 * integral(2 + s) + integral(1 + 2 * s)
    expected = n * squared_bias + integral(1) - integral(1 + 2 * s)
    assert far[2] == pytest.approx(expected, rel=0.01)


def test_weak_cannot_tell_a_cube_from_a_gaussian_and_strong_can():
    g = seeded(39)
    cube = torch.empty(4000, 2, dtype=torch.float64).uniform_(-(3**0.5), 3**0.5, generator=g)
    ball = torch.randn(4000, 2, generator=g, dtype=torch.float64)
    axes = torch.eye(2, dtype=torch.float64)
    weak = [weak_sigreg(z, squared=True, unbiased=True).item() for z in (cube, ball)]
    strong = [strong_sigreg(z, axes, unbiased=True).item() for z in (cube, ball)]
    assert weak == pytest.approx([0, 0], abs=0.01)
    assert strong[0] > 5 > 1 > strong[1]


# ---------------------------------------------------------------- modules and arguments

MODULES = {
    "weak": lambda **o: WeakSIGReg(4, **o),
    "corrected": lambda **o: WeakSIGReg.corrected(4, **o),
    "strong": lambda **o: SIGReg(4, **o),
    "lejepa": lambda **o: SIGReg.lejepa(4, **o),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def test_modules_are_the_functions_with_the_matrix_drawn():
    z, g = skewed(12, 9, seed=40), seeded
    pairs = [
        (WeakSIGReg(4, generator=g(41)), weak_sigreg(z, gaussian(9, 4, generator=g(41)))),
        (
            WeakSIGReg.corrected(4, generator=g(41)),
            weak_sigreg(z, orthonormal(9, 4, generator=g(41)), squared=True, unbiased=True),
        ),
        (SIGReg(4, generator=g(41)), strong_sigreg(z, directions(9, 4, generator=g(41)))),
        (
            SIGReg.lejepa(4, generator=g(41)),
            strong_sigreg(z, directions(9, 4, generator=g(41)), t_max=3.0, n_points=33),
        ),
    ]
    for module, expected in pairs:
        assert torch.equal(module(z), expected)
        assert module.state_dict() == {}


@pytest.mark.parametrize("n_channels", [1, 3, 4])
def test_no_sketch_is_drawn_where_the_channels_are_few(n_channels):
    z = skewed(12, n_channels, seed=42)
    for module in (WeakSIGReg(4), WeakSIGReg(4, resample=False)):
        assert module.matrix(z) is None
        assert torch.equal(module(z), weak_sigreg(z))


@every_module
@pytest.mark.parametrize("resample", [False, True])
def test_copies_go_on_like_the_original(make, resample):
    z = skewed(12, 9, seed=43)
    for options in ({}, {"generator": seeded(44)}):
        module = make(resample=resample, **options)
        module(z)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        expected = [module(z), module(z)]
        assert (expected[0] == expected[1]).item() != resample
        for other in copies:
            assert [other(z), other(z)] == expected


@every_module
@pytest.mark.parametrize("resample", [False, True])
def test_vmap_of_a_module_uses_one_matrix_as_leading_dimensions_do(make, resample):
    z = skewed(3, 12, 9, seed=45)
    expected, module = make(resample=resample)(z), make(resample=resample)
    torch.testing.assert_close(torch.func.vmap(module)(z).mean(), expected)


@TORCH_WARNS
def test_compiled_modules_draw_anew_at_every_call_and_as_eager_ones_do():
    class Both(torch.nn.Module):
        """The same loss twice: two draws that the compiler must not merge."""

        def __init__(self) -> None:
            super().__init__()
            self.weak = WeakSIGReg(4, generator=seeded(46))
            self.strong = SIGReg(4, generator=seeded(47), resample=False)

        def forward(self, z: Tensor) -> Tensor:
            return torch.stack([self.weak(z), self.weak(z), self.strong(z)])

    z = skewed(12, 9, seed=48)
    eager, module = Both(), Both()
    compiled = torch.compile(module, fullgraph=True)
    seen = []
    for _ in range(3):
        leaf, compiled_leaf = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected, found = eager(leaf), compiled(compiled_leaf)
        torch.testing.assert_close(found, expected)
        for values in (expected, found):  # a draw repeated in the backward pass would be another
            values.backward(torch.tensor([1.0, 3.0, 1.0]))
        torch.testing.assert_close(compiled_leaf.grad, leaf.grad)
        seen += found[:2].tolist()
        torch.testing.assert_close(found[2], module.strong(z))
    assert len(set(seen)) == 6


def test_combine_is_convex_by_default_and_additive_on_request():
    task, r = torch.tensor(2.0), torch.tensor(5.0)
    assert combine(task, r, 0.1).item() == pytest.approx(0.9 * 2 + 0.1 * 5)
    assert combine(task, r, 0.1, convex=False).item() == pytest.approx(2 + 0.1 * 5)
    assert combine(task, r, 3.0, convex=False).item() == pytest.approx(17)
    for lam, convex in [(-0.1, True), (1.1, True), (-1, False), (math.nan, False)]:
        with pytest.raises(ValueError, match="lam must lie in"):
            combine(task, r, lam, convex=convex)


def test_modules_say_what_they_take_and_whether_they_gather():
    assert repr(LogWeakSIGReg(5)).endswith("(sketch_dim=5, sketch='gaussian', resample=True)")
    for make in (WeakSIGReg, SIGReg):
        assert "gather" not in repr(make())
        assert repr(make(gather_distributed=True)).endswith(", gather_distributed=True)")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weak_sigreg(torch.ones(4, 3, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: strong_sigreg(torch.ones(4, 3) > 0, torch.eye(3)), TypeError, "torch.bool"),
        (lambda: weak_sigreg(torch.ones(3)), ValueError, r"\(\.\.\., N, C\), not \(3,\)"),
        (lambda: weak_sigreg(torch.ones(2, 1, 3)), ValueError, "1 samples .* needs 2"),
        (
            lambda: weak_sigreg(torch.ones(3, 3), squared=True, unbiased=True),
            ValueError,
            "3 samples .* needs 4",
        ),
        (lambda: weak_sigreg(torch.ones(9, 3), unbiased=True), ValueError, "squared=True"),
        (lambda: weak_sigreg(torch.ones(9, 3), torch.eye(4)), ValueError, r"C = 3, not \(4, 4\)"),
        (lambda: strong_sigreg(torch.ones(9, 3), torch.ones(3)), ValueError, "directions must"),
        (lambda: strong_sigreg(torch.ones(9, 3), torch.eye(3), n_points=16), ValueError, "odd.*16"),
        (lambda: strong_sigreg(torch.ones(9, 3), torch.eye(3), t_max=0.0), ValueError, "positive"),
        (lambda: SIGReg(t_max=math.inf), ValueError, "t_max must be positive and finite"),
        (lambda: SIGReg()(torch.ones(9, 0)), ValueError, r"no channels: shape \(9, 0\)"),
        (lambda: WeakSIGReg()(torch.ones(9, 0)), ValueError, r"no channels: shape \(9, 0\)"),
        (lambda: SIGReg(num_slices=0), ValueError, "positive int, not 0"),
        (lambda: WeakSIGReg(sketch="orthonomal"), ValueError, "did you mean 'orthonormal'"),
        (lambda: WeakSIGReg(sketch="directions"), ValueError, "'gaussian' or 'orthonormal'"),
        (lambda: WeakSIGReg(unbiased=True), ValueError, "squared=True"),
        (lambda: weak_floor(128, 256, 64, sketch="orthonomal"), ValueError, "'orthonomal'"),
        (lambda: weak_floor(1, 256), ValueError, "at least 2, not 1"),
        (
            lambda: weak_floor(3, 256, 64, squared=True, unbiased=True),
            ValueError,
            "at least 4, not 3",
        ),
        (lambda: weak_sigreg(torch.ones(9, 3), torch.ones(3, 0)), ValueError, "sketch has no col"),
        (lambda: strong_sigreg(torch.ones(9, 3), torch.ones(3, 0)), ValueError, "directions has"),
        (lambda: weak_floor(9, 256, unbiased=True), ValueError, "squared=True"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
