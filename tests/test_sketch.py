"""Laws of the random matrices, and where their draws come from."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import seeded
from torch import Tensor

from sigreg_lib.sketch import KINDS, MatrixSource, directions, gaussian, orthonormal

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)


def draws(make, n_channels: int, n_columns: int, *, count: int, seed: int) -> Tensor:
    """Independent matrices, shape (count, C, K), float64."""
    g = seeded(seed)
    matrices = [make(n_channels, n_columns, generator=g) for _ in range(count)]
    return torch.stack(matrices).double()


def standard_errors(values: Tensor, expected: Tensor | float) -> Tensor:
    """How far the mean over the first dimension lies from ``expected``, in standard errors."""
    return (values.mean(0) - expected) / (values.std(0) / math.sqrt(len(values)))


# ---------------------------------------------------------------- laws


@every_kind
def test_matrices_are_float32_of_shape_c_k_on_the_device_asked_for(kind):
    matrix = KINDS[kind](7, 5, generator=seeded(0))
    assert matrix.shape == (7, 5) and matrix.dtype == torch.float32 and matrix.device == CPU
    assert matrix.is_contiguous() and not matrix.requires_grad
    on_device = KINDS[kind](7, 5, generator=seeded(0), device="cpu")
    assert torch.equal(matrix, on_device)


@pytest.mark.parametrize("n_channels", [4, 100])
def test_gaussian_entries_have_mean_zero_variance_one_over_c_and_kurtosis_three(n_channels):
    entries = draws(gaussian, n_channels, 50, count=400, seed=1).flatten() * math.sqrt(n_channels)
    for moment, expected in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)]:
        assert abs(standard_errors(entries**moment, expected)) < 3.5


@pytest.mark.parametrize(
    ("n_channels", "n_columns"),
    [(256, 64), (256, 128), (256, 129), (256, 200), (256, 256), (1024, 64), (5, 5), (1, 1), (3, 1)],
)
def test_an_orthonormal_sketch_has_orthonormal_columns_at_every_aspect_ratio(n_channels, n_columns):
    for seed in range(3):
        sketch = orthonormal(n_channels, n_columns, generator=seeded(seed)).double()
        error = (sketch.T @ sketch - torch.eye(n_columns)).abs().max().item()
        assert (
            error < 3e-6
        )  # float32 rounding; ||S'S - I||_F of a Gaussian sketch is about K/sqrt(C)


def test_an_orthonormal_sketch_cannot_have_more_columns_than_channels():
    with pytest.raises(ValueError, match="n_columns=5, n_channels=4"):
        orthonormal(4, 5, generator=seeded(2))


@pytest.mark.parametrize(("n_channels", "n_columns"), [(3, 1), (4, 2), (4, 3), (4, 4), (9, 4)])
def test_orthonormal_sketches_have_the_moments_of_the_haar_measure(n_channels, n_columns):
    n, matrices = n_channels, draws(orthonormal, n_channels, n_columns, count=6000, seed=3)
    rotated = torch.linalg.qr(torch.randn(n, n, generator=seeded(4), dtype=torch.float64))[0]
    for s in (matrices, rotated @ matrices):  # invariance: a rotated sketch has the same law
        a, b = s[:, 0, 0], s[:, 1, 0]
        expected = {
            "E s_ik = 0": (s.flatten(1), 0.0),
            "E s_ik^2 = 1/C": (s.flatten(1) ** 2, 1 / n),
            "E s_ik^4 = 3/(C(C+2))": (s.flatten(1) ** 4, 3 / (n * (n + 2))),
            "E s_1k^2 s_2k^2 = 1/(C(C+2))": (a**2 * b**2, 1 / (n * (n + 2))),
            "E s_1k s_2k = 0": (a * b, 0.0),
        }
        if n_columns > 1:
            c, d = s[:, 0, 1], s[:, 1, 1]
            scale = n * (n - 1) * (n + 2)
            expected |= {
                "E s_11^2 s_22^2": (a**2 * d**2, (n + 1) / scale),
                "E s_11 s_22 s_12 s_21": (a * d * b * c, -1 / scale),
                "E s_11 s_12 = 0": (a * c, 0.0),
            }
        for name, (values, moment) in expected.items():
            assert standard_errors(values, moment).abs().max() < 4, name


@pytest.mark.parametrize("n_channels", [2, 3, 8])
def test_directions_are_uniform_on_the_sphere_and_independent(n_channels):
    n, a = n_channels, draws(directions, n_channels, 2, count=6000, seed=5)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(6000, 2).double(), rtol=1e-6, atol=1e-6)
    second = a[:, :, 0, None] * a[:, None, :, 0]
    assert standard_errors(second, torch.eye(n) / n).abs().max() < 4
    assert standard_errors(a[:, :, 0] ** 4, 3 / (n * (n + 2))).abs().max() < 4
    overlap = (a[:, :, 0] * a[:, :, 1]).sum(1)
    assert abs(standard_errors(overlap, 0.0)) < 4
    assert abs(standard_errors(overlap**2, 1 / n)) < 4


def test_directions_on_the_line_are_signs():
    assert directions(1, 64, generator=seeded(6)).unique().tolist() == [-1, 1]


# ---------------------------------------------------------------- sources


@every_kind
def test_a_fixed_matrix_depends_on_seed_and_channels_alone(kind):
    def fixed(seed: int, widths: list[int]) -> dict[int, Tensor]:
        source = MatrixSource(kind, 4, resample=False, seed=seed)
        return {c: source(torch.empty(3, c)) for c in widths}

    first, second, other = fixed(7, [16, 32]), fixed(7, [64, 32, 16]), fixed(8, [16, 32])
    for c in (16, 32):
        assert torch.equal(first[c], second[c])
        assert not torch.equal(first[c], other[c])
    # nor does one width repeat the draws of another
    pair = torch.stack([first[16].flatten(), first[32].flatten()[:64]])
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.4


@every_kind
def test_a_fixed_matrix_stays_and_a_redrawn_one_does_not(kind):
    like = torch.empty(3, 6)
    fixed = MatrixSource(kind, 4, resample=False)
    assert torch.equal(fixed(like), fixed(like))
    redrawn, again = (MatrixSource(kind, 4, resample=True, seed=9) for _ in range(2))
    sequence = [redrawn(like) for _ in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(sequence))
    assert all(torch.equal(a, again(like)) for a in sequence)


@every_kind
@pytest.mark.parametrize("resample", [False, True])
def test_draws_do_not_repeat_those_of_data_from_the_same_seed(kind, resample):
    # a sketch equal to the data, drawn elsewhere from seed 0, would move the loss off its floor
    for seed in (0, 1, 2026):
        matrix = MatrixSource(kind, 6, resample=resample, seed=seed)(torch.empty(3, 6))
        data = torch.randn(6, 6, generator=seeded(seed))
        assert abs(torch.corrcoef(torch.stack([matrix.flatten(), data.flatten()]))[0, 1]) < 0.5


@every_kind
def test_a_given_generator_is_used_and_advanced(kind):
    generator = seeded(10)
    source = MatrixSource(kind, 4, resample=True, generator=generator)
    assert torch.equal(source(torch.empty(3, 6)), KINDS[kind](6, 4, generator=seeded(10)))
    assert not torch.equal(generator.get_state(), seeded(10).get_state())
    after_one = generator.get_state()
    source(torch.empty(3, 6))
    assert not torch.equal(generator.get_state(), after_one)


@every_kind
def test_fixed_matrices_take_one_seed_from_a_given_generator_and_nothing_later(kind):
    generator = seeded(10)
    source, second = (MatrixSource(kind, 4, resample=False, generator=generator) for _ in range(2))
    state = generator.get_state()
    assert not torch.equal(state, seeded(10).get_state())
    matrices = {c: source(torch.empty(3, c)) for c in (6, 9)}
    assert torch.equal(generator.get_state(), state)
    assert not torch.equal(second(torch.empty(3, 6)), matrices[6])
    # a run that resumes builds its module as at first, and may see widths in another order
    resumed = MatrixSource(kind, 4, resample=False, generator=seeded(10))
    for c in (9, 6):
        assert torch.equal(resumed(torch.empty(3, c)), matrices[c])


@every_kind
def test_the_global_random_state_is_neither_read_nor_changed(kind):
    before = torch.get_rng_state()
    matrices = []
    for _ in range(2):
        for resample in (False, True):
            matrices.append(MatrixSource(kind, 4, resample=resample)(torch.empty(3, 6)))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)  # another global state gives the same draws
        before = torch.get_rng_state()
    assert torch.equal(matrices[0], matrices[2]) and torch.equal(matrices[1], matrices[3])


@every_kind
@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_goes_on_like_the_original_without_moving_it(kind, resample, given, duplicate):
    like, options = torch.empty(3, 6), {"generator": seeded(11)} if given else {}
    source = MatrixSource(kind, 4, resample=resample, **options)
    source(like)
    other = duplicate(source)
    assert other.key != source.key
    copied = [other(like) for _ in range(2)]
    assert all(torch.equal(a, source(like)) for a in copied)
    # a width that neither has seen
    assert torch.equal(other(torch.empty(3, 8)), source(torch.empty(3, 8)))


@every_kind
def test_a_fixed_matrix_is_a_plain_tensor_whatever_the_first_call_came_from(kind):
    like = torch.ones(3, 6)
    source = MatrixSource(kind, 4, resample=False)
    torch.func.grad(lambda z: (z @ source(z)).sum())(like)
    other = MatrixSource(kind, 4, resample=False)
    with torch.inference_mode():
        other(like)
    for s in (source, other):
        matrix = s(like)
        assert not matrix.is_inference() and not matrix.requires_grad
        assert not torch._C._functorch.is_functorch_wrapped_tensor(matrix)
        z = like.clone().requires_grad_()
        (z @ matrix).square().sum().backward()  # an inference tensor could not be saved
        assert torch.equal(z.grad, 2 * like @ matrix @ matrix.T)


def test_an_orthonormal_source_has_as_many_columns_as_there_are_channels_for():
    source = MatrixSource("orthonormal", 4, resample=True)
    assert [source(torch.empty(2, c)).shape for c in (3, 4, 5)] == [(3, 3), (4, 4), (5, 4)]
    assert MatrixSource("gaussian", 4, resample=True)(torch.empty(2, 3)).shape == (3, 4)


TORCH_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@TORCH_WARNS
def test_a_source_that_was_made_on_meta_draws_as_any_other():
    with torch.device("meta"):
        source = MatrixSource("gaussian", 3, resample=True, seed=5)
    z = torch.zeros(4, 8)
    compiled = torch.compile(lambda z: source(z) + 0, fullgraph=True, backend="aot_eager")
    expected = MatrixSource("gaussian", 3, resample=True, seed=5)
    for _ in range(3):
        torch.testing.assert_close(compiled(z), expected(z), rtol=0, atol=0)


@TORCH_WARNS
def test_the_compiler_takes_draws_in_the_order_of_the_code():
    source, eager = (MatrixSource("gaussian", 5, resample=True, seed=14) for _ in range(2))
    narrow, wide = torch.ones(12, 7), torch.ones(12, 10)

    def squares(narrow: Tensor, wide: Tensor, source: MatrixSource = source) -> Tensor:
        first, second = source(narrow), source(wide)  # used in the other order
        return (wide @ second).square().mean() + (narrow @ first).square().mean()

    compiled = torch.compile(squares, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(narrow, wide), squares(narrow, wide, eager))


@TORCH_WARNS
@every_kind
def test_a_compiled_draw_is_the_eager_draw_and_a_new_one_each_time(kind):
    source = MatrixSource(kind, 4, resample=True, generator=seeded(12))
    eager = MatrixSource(kind, 4, resample=True, generator=seeded(12))
    fixed = MatrixSource(kind, 4, resample=False, seed=13)
    like = torch.ones(2, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def three(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return source(z), source(z), fixed(z)

    for _ in range(2):
        first, second, kept = three(like)
        assert torch.equal(first, eager(like)) and torch.equal(second, eager(like))
        assert torch.equal(kept, MatrixSource(kind, 4, resample=False, seed=13)(like))
        kept.zero_()  # the graph's result is its own memory, not the source's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gausian", 4), "unknown kind of sketch 'gausian'; did you mean 'gaussian'"),
        ((None, 4), "unknown kind of sketch None"),
        (("gaussian", 0), "positive int, not 0"),
        (("gaussian", 4.0), "positive int, not 4.0"),
        (("gaussian", True), "positive int, not True"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixSource(*arguments, resample=True)
