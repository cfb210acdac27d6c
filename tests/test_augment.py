"""Augmentation equals torchvision's, image by image, and its draws have torchvision's laws."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from helpers import never_waiting, seeded
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, autoaugment, v2

from sigreg_lib.augment import (
    N_MAGNITUDES,
    OPERATIONS,
    Draws,
    Mix,
    Policy,
    augment,
    concatenate,
    draw,
    draw_mix,
    mix,
)

FULL = Policy(crop_padding=4, flip=True, rand_augment=(2, 9), mixup_alpha=0.8, cutmix_alpha=1.0)
SPACE = RandAugment()._augmentation_space
UNLIKELY = 1e-3  # the draws are seeded, so a test that passes once passes always


def uniform_images(*shape: int, seed: int = 0, below: int = 256) -> Tensor:
    return torch.randint(0, below, shape, generator=seeded(seed), dtype=torch.uint8)


def photographs() -> Tensor:
    """Three windows of 32 x 32 pixels of scikit-learn's sample photograph."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the photograph")
    photo = torch.from_numpy(datasets.load_sample_image("china.jpg")[::6, ::6].copy())
    corners = [(0, 0), (39, 40), (20, 74)]
    return torch.stack([photo[y : y + 32, x : x + 32] for y, x in corners]).permute(0, 3, 1, 2)


def digits() -> Tensor:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the digits")
    images = torch.from_numpy(datasets.load_digits().images[:3])
    return (images * 255 / 16).round().to(torch.uint8).unsqueeze(1)


IMAGES = {
    "photographs": photographs,
    "digits": digits,
    "noise": lambda: uniform_images(2, 3, 32, 32),
    "grey": lambda: uniform_images(2, 1, 32, 32, seed=1),
    "not square": lambda: uniform_images(2, 3, 20, 27, seed=2),
    "three levels": lambda: uniform_images(2, 3, 32, 32, seed=3, below=3),
    "constant": lambda: torch.full((1, 3, 32, 32), 7, dtype=torch.uint8),
    "tiny": lambda: uniform_images(2, 3, 2, 3, seed=4),
}


def fixed_draws(n: int, *, operation: str = "Identity", negative: bool = False) -> Draws:
    index = OPERATIONS.index(operation)
    return Draws(
        crop=np.zeros((n, 2), dtype=np.int64),
        flip=np.zeros(n, dtype=bool),
        operation=np.full((n, 1), index, dtype=np.int64),
        negative=np.full((n, 1), negative),
    )


def torchvision_operation(image: Tensor, operation: str, negative: bool, index: int) -> Tensor:
    magnitudes, signed = SPACE(N_MAGNITUDES, tuple(image.shape[-2:]))[operation]
    magnitude = float(magnitudes[index].item()) if magnitudes.ndim else 0.0
    sign = -1.0 if signed and negative else 1.0
    return autoaugment._apply_op(
        image, operation, sign * magnitude, InterpolationMode.NEAREST, None
    )


def torchvision_crop_and_flip(image: Tensor, crop: np.ndarray, flip: bool, padding: int) -> Tensor:
    top, left = crop.tolist()
    image = tvf.crop(tvf.pad(image, [padding]), top, left, *image.shape[-2:])
    return tvf.hflip(image) if flip else image


def equal_draws(one: Draws, other: Draws) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Draws)
    )


# Images


def test_operations_are_torchvisions_in_its_order():
    assert tuple(SPACE(N_MAGNITUDES, (32, 32))) == OPERATIONS


@pytest.mark.parametrize("source", IMAGES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_equals_torchvisions_at_every_magnitude_and_sign(operation, source):
    images = IMAGES[source]()
    for index in range(N_MAGNITUDES):
        for negative in (False, True):
            expected = torch.stack(
                [torchvision_operation(image, operation, negative, index) for image in images]
            )
            draws = fixed_draws(len(images), operation=operation, negative=negative)
            got = augment(images, draws, Policy(rand_augment=(1, index)))
            assert torch.equal(got, expected), f"magnitude {index}, negative {negative}"


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_crop_and_flip_equal_torchvisions_image_by_image(channels):
    policy = Policy(crop_padding=4, flip=True)
    images = uniform_images(200, channels, 16, 24)
    draws = draw(policy, 200, seed=0, epoch=0, step=0)
    expected = [
        torchvision_crop_and_flip(image, crop, flip, 4)
        for image, crop, flip in zip(images, draws.crop, draws.flip, strict=True)
    ]
    assert torch.equal(augment(images, draws, policy), torch.stack(expected))


def test_the_whole_chain_equals_torchvisions_image_by_image():
    images, draws = uniform_images(150, 3, 32, 32), draw(FULL, 150, seed=1, epoch=2, step=3)
    expected = []
    for i, image in enumerate(images):
        image = torchvision_crop_and_flip(image, draws.crop[i], draws.flip[i], 4)
        for operation, negative in zip(draws.operation[i], draws.negative[i], strict=True):
            image = torchvision_operation(image, OPERATIONS[operation], negative, 9)
        expected.append(image)
    assert torch.equal(augment(images, draws, FULL), torch.stack(expected))


def test_augmenting_a_concatenation_equals_augmenting_step_by_step():
    sizes = [128, 128, 80, 1]
    steps = [draw(FULL, n, seed=0, epoch=5, step=step) for step, n in enumerate(sizes)]
    images = uniform_images(sum(sizes), 3, 32, 32)
    together = augment(images, concatenate(steps), FULL)
    apart = map(augment, images.split(sizes), steps, [FULL] * len(sizes))
    assert torch.equal(together, torch.cat(list(apart)))


def test_images_are_not_changed_in_place():
    images = uniform_images(64, 3, 32, 32)
    before = images.clone()
    augment(images, draw(FULL, 64, seed=0, epoch=0, step=0), FULL)
    augment(images, fixed_draws(64, operation="Solarize"), Policy(rand_augment=(1, 20)))
    assert torch.equal(images, before)


def test_the_empty_policy_and_the_empty_batch_give_their_images_back():
    images, none = uniform_images(5, 3, 32, 32), Policy()
    assert torch.equal(augment(images, draw(none, 5, seed=0, epoch=0, step=0), none), images)
    draws = draw(FULL, 0, seed=0, epoch=0, step=0)
    assert augment(images[:0], draws, FULL).shape == (0, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_images_and_is_never_waited_for():
    images, policy = uniform_images(2000, 3, 32, 32), dataclasses.replace(FULL, rand_augment=(3, 9))
    draws = draw(policy, 2000, seed=0, epoch=0, step=0)
    m = draw_mix(policy, 2000, 32, seed=0, epoch=0, step=0)
    assert m is not None
    on_device = images.cuda()
    augment(on_device, draws, policy)  # fills the cache of indices
    with never_waiting():
        augmented = augment(on_device, draws, policy)
        mixed = mix(augmented.float(), m.to("cuda"))
    expected = augment(images, draws, policy)
    assert torch.equal(augmented.cpu(), expected)
    torch.testing.assert_close(mixed.cpu(), mix(expected.float(), m))


@pytest.mark.parametrize(
    ("images", "n", "policy", "message"),
    [
        (torch.zeros(4, 3, 32, 32), 4, FULL, r"images must be torch.uint8 .* not torch.float32"),
        (uniform_images(3, 32, 32), 3, FULL, r"images must be .* \(3, 32, 32\)"),
        (uniform_images(4, 2, 32, 32), 4, FULL, "C of 1 or 3"),
        (uniform_images(4, 3, 32, 32), 5, FULL, "draws must be for 4 images .* not for 5"),
        (uniform_images(4, 3, 32, 32), 4, Policy(crop_padding=4), "policy's 0 RandAugment"),
        (uniform_images(4, 3, 32, 32), 4, Policy(rand_augment=(2, 9)), r"draws\.crop .* 0 to 0"),
    ],
)
def test_images_and_draws_that_do_not_fit_are_named(images, n, policy, message):
    with pytest.raises(ValueError, match=message):
        augment(images, draw(FULL, n, seed=0, epoch=0, step=0), policy)


# Draws


def test_draws_depend_on_seed_epoch_and_step_and_on_nothing_else():
    def of(seed, epoch, step):
        return draw(FULL, 64, seed=seed, epoch=epoch, step=step)

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = of(1, 2, 3)
    draw_mix(FULL, 64, 32, seed=1, epoch=2, step=3)
    augment(uniform_images(64, 3, 32, 32), first, FULL)
    assert torch.equal(torch.get_rng_state(), torch_state)
    for ours, theirs in zip(np.random.get_state(), numpy_state, strict=True):  # noqa: NPY002
        assert np.array_equal(ours, theirs)
    assert equal_draws(of(1, 2, 3), first)
    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1), (2, 1, 3), (0, 0, 0), (0, 0, 1)]
    for i, key in enumerate(keys):
        assert not any(equal_draws(of(*key), of(*other)) for other in keys[:i])


def test_mixing_depends_on_seed_epoch_and_step_and_on_nothing_else():
    def of(seed, epoch, step):
        return draw_mix(FULL, 64, 32, seed=seed, epoch=epoch, step=step)

    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1), (2, 1, 3), (0, 0, 0), (0, 0, 1)]
    for i, key in enumerate(keys):
        assert all(map(torch.equal, of(*key), of(*key)))
        assert not any(torch.equal(of(*key).partner, of(*other).partner) for other in keys[:i])


def test_operations_signs_crops_and_flips_are_uniform_and_independent():
    steps = [draw(FULL, 128, seed=0, epoch=0, step=step) for step in range(391)]
    draws = concatenate(steps)
    first, second = draws.operation.T
    columns = {
        "both operations": np.bincount(first * 14 + second, minlength=14**2),
        "operation and sign": np.bincount(first * 2 + draws.negative[:, 0], minlength=28),
        "both signs": np.bincount(draws.negative @ [2, 1], minlength=4),
        "crop": np.bincount(draws.crop @ [9, 1], minlength=81),
        "crop and flip": np.bincount(draws.crop[:, 0] * 2 + draws.flip, minlength=18),
        "flip and operation": np.bincount(draws.flip * 14 + second, minlength=28),
    }
    for name, counts in columns.items():
        assert stats.chisquare(counts).pvalue > UNLIKELY, name


def test_operations_and_signs_are_as_frequent_as_torchvisions(monkeypatch):
    seen = []

    def note(image, name, magnitude, **_):
        seen.append((name, magnitude < 0))
        return image

    monkeypatch.setattr(autoaugment, "_apply_op", note)
    image, transform = torch.zeros(3, 32, 32, dtype=torch.uint8), RandAugment(2, 9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(4000):
            transform(image)
    draws = draw(FULL, 4000, seed=0, epoch=0, step=0)
    signed = [SPACE(N_MAGNITUDES, (32, 32))[name][1] for name in OPERATIONS]
    ours = [
        (OPERATIONS[operation], bool(negative and signed[operation]))
        for operation, negative in zip(draws.operation.flat, draws.negative.flat, strict=True)
    ]
    kinds = sorted(set(seen))
    assert kinds == sorted(set(ours))
    assert len(kinds) == 14 + 9
    table = [[sample.count(kind) for kind in kinds] for sample in (seen, ours)]
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


def test_concatenation_refuses_what_does_not_go_together():
    one = draw(FULL, 2, seed=0, epoch=0, step=0)
    with pytest.raises(ValueError, match=r"draws must agree .* \[0, 2\]"):
        concatenate([one, draw(Policy(), 2, seed=0, epoch=0, step=0)])
    with pytest.raises(ValueError, match="draws must agree"):
        concatenate([])


@pytest.mark.parametrize("name", ["n", "seed", "epoch", "step"])
@pytest.mark.parametrize("value", [-1, 2**32, 1.0, True, None])
def test_what_draws_depend_on_must_be_an_integer_in_range(name, value):
    arguments = {"n": 4, "seed": 0, "epoch": 0, "step": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be an integer in"):
        draw(FULL, **arguments)
    with pytest.raises(ValueError, match=f"{name} must be an integer in"):
        draw_mix(FULL, size=32, **arguments)


# MixUp and CutMix


def mixes(policy: Policy, *, n: int = 16, size: int | tuple[int, int] = 32, steps: int = 4000):
    drawn = [draw_mix(policy, n, size, seed=0, epoch=0, step=step) for step in range(steps)]
    return [m for m in drawn if m is not None]


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixup_shares_follow_the_beta_law_and_are_the_same_at_every_pixel(alpha):
    drawn = mixes(Policy(mixup_alpha=alpha))
    assert stats.kstest([m.lam.item() for m in drawn], stats.beta(alpha, alpha).cdf).pvalue > (
        UNLIKELY
    )
    assert all(torch.equal(m.weight, m.lam.expand(32, 32)) for m in drawn)


def test_cutmix_cuts_one_box_and_its_label_share_is_the_area_that_is_left():
    for m in mixes(Policy(cutmix_alpha=0.5), size=(20, 27), steps=500):
        cut = m.weight == 0
        assert torch.equal(m.weight, 1 - cut.float())
        rows, columns = cut.any(1), cut.any(0)
        assert torch.equal(cut, rows[:, None] & columns[None, :])  # a product of two sets ...
        for side in (rows, columns):  # ... of neighbours
            assert side.int().diff().abs().sum() <= 2 - int(side[0]) - int(side[-1])
        assert m.lam == torch.tensor(1 - int(cut.sum()) / (20 * 27))


def test_cutmix_shares_have_the_law_of_torchvisions_cutmix():
    theirs = v2.CutMix(alpha=0.5, num_classes=2)
    image = torch.zeros(2, 3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shares = [theirs.make_params([image])["lam_adjusted"] for _ in range(4000)]
    ours = [m.lam.item() for m in mixes(Policy(cutmix_alpha=0.5))]
    assert stats.ks_2samp(ours, shares).pvalue > UNLIKELY


def test_cutmix_cuts_each_pixel_with_the_probability_of_the_box_law():
    # For alpha = 1 the half side k = floor(16 sqrt(u)), u uniform, has probability
    # (2 k + 1) / 256, and column j is cut by the centres x with x - k <= j < x + k.
    half, column, centre = np.arange(16), np.arange(32), np.arange(32)
    covers = (centre[:, None] - half <= column[:, None, None]) & (
        column[:, None, None] < centre[:, None] + half
    )
    share = covers.mean(1)  # (column, half), over the 32 centres
    expected = np.einsum("ik,jk,k->ij", share, share, (2 * half + 1) / 256)
    drawn = mixes(Policy(cutmix_alpha=1.0))
    measured = 1 - torch.stack([m.weight for m in drawn]).double().mean(0).numpy()
    z = (measured - expected) / np.sqrt(expected * (1 - expected) / len(drawn))
    assert np.abs(z).max() < stats.norm.isf(UNLIKELY / 2 / z.size)


def test_cutmix_centres_are_uniform_over_the_pixels():
    # In 4 x 4 pixels, alpha = 1, the half side is 1 with probability 3/4 and else 0; a box of half
    # side 1 leaves columns x - 1 and x, row likewise, so that each of the 16 centres can be told.
    counts = np.zeros((4, 4))
    drawn = mixes(Policy(cutmix_alpha=1.0), size=4)
    for cut in (m.weight == 0 for m in drawn):
        if cut.any():
            counts[cut.any(1).nonzero().max(), cut.any(0).nonzero().max()] += 1
    assert stats.chisquare(counts.flat).pvalue > UNLIKELY
    assert stats.binomtest(int(counts.sum()), len(drawn), 0.75).pvalue > UNLIKELY


def test_a_fair_coin_chooses_between_mixup_and_cutmix_for_every_batch():
    coins = [bool(((m.weight == 0) | (m.weight == 1)).all()) for m in mixes(FULL)]
    assert stats.binomtest(sum(coins), len(coins)).pvalue > UNLIKELY
    changes = sum(a != b for a, b in itertools.pairwise(coins))
    assert stats.binomtest(changes, len(coins) - 1).pvalue > UNLIKELY


def test_partners_are_uniform_permutations():
    partners = torch.stack([m.partner for m in mixes(FULL, n=3, steps=3000)])
    assert torch.equal(partners.sort(1).values, torch.arange(3).expand(3000, 3))
    counts = np.bincount((partners @ torch.tensor([9, 3, 1])).numpy())
    assert stats.chisquare(counts[counts > 0]).pvalue > UNLIKELY
    assert (counts > 0).sum() == 6


def test_nothing_is_mixed_when_both_are_off():
    off = Policy(crop_padding=4, flip=True)
    assert draw_mix(off, 128, 32, seed=0, epoch=0, step=0) is None


@pytest.mark.parametrize("policy", [Policy(mixup_alpha=0.8), Policy(cutmix_alpha=1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixing_equals_a_loop_over_images(policy, dtype):
    x = torch.randn(10, 3, 8, 12, generator=seeded(0), dtype=torch.float64).to(dtype)
    m = draw_mix(policy, 10, (8, 12), seed=0, epoch=0, step=2)
    w = m.weight.double()
    expected = [
        (w * x[i].double() + (1 - w) * x[m.partner[i]].double()).to(dtype) for i in range(10)
    ]
    assert 0 < m.lam < 1
    assert m.lam.item() == pytest.approx(w.mean().item(), abs=1e-7)
    torch.testing.assert_close(mix(x, m), torch.stack(expected))
    assert mix(x, m).dtype == dtype


def test_cutmix_moves_pixels_without_rounding():
    x = torch.randn(6, 3, 32, 32, generator=seeded(0))
    m = draw_mix(Policy(cutmix_alpha=1.0), 6, 32, seed=0, epoch=0, step=0)
    assert torch.equal(mix(x, m), torch.where(m.weight == 1, x, x[m.partner]))


def test_mixing_compiles_to_one_graph_without_recompilation():
    torch._dynamo.reset()
    compiled = torch.compile(mix, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(8, 3, 32, 32, generator=seeded(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in mixes(FULL, n=8, steps=6):  # both kinds among them
            assert torch.equal(compiled(x, m), mix(x, m))


def test_a_mix_keeps_its_values_and_dtypes_on_the_way_to_a_device():
    m = draw_mix(FULL, 8, 32, seed=0, epoch=0, step=0)
    assert all(map(torch.equal, m, m.to("cpu")))
    assert isinstance(m.to("cpu"), Mix)
    assert [tensor.dtype for tensor in m] == [torch.int64, torch.float32, torch.float32]
    assert [tuple(tensor.shape) for tensor in m] == [(8,), (32, 32), ()]


@pytest.mark.parametrize("size", [0, -1, (32, 0), (32.0, 32), (True, 32)])
def test_the_size_of_a_mix_must_be_positive(size):
    with pytest.raises(ValueError, match="size must be a positive integer"):
        draw_mix(FULL, 8, size, seed=0, epoch=0, step=0)


# Policy


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"crop_padding": -1}, ValueError, "crop_padding must be .* not -1"),
        ({"crop_padding": 4.0}, ValueError, "crop_padding must be an integer"),
        ({"crop_padding": True}, ValueError, "crop_padding must be an integer"),
        ({"flip": 0.5}, TypeError, "flip must be True or False, not 0.5"),
        ({"rand_augment": 9}, ValueError, "rand_augment must be None"),
        ({"rand_augment": (2,)}, ValueError, "rand_augment must be None"),
        ({"rand_augment": (2, 9.0)}, ValueError, "rand_augment must be None"),
        ({"rand_augment": (0, 9)}, ValueError, "rand_augment must be None"),
        ({"rand_augment": (2, -1)}, ValueError, "rand_augment must be None"),
        ({"rand_augment": (2, 31)}, ValueError, "rand_augment's magnitude .* not 31"),
        ({"mixup_alpha": -0.1}, ValueError, "mixup_alpha must be finite"),
        ({"mixup_alpha": float("nan")}, ValueError, "mixup_alpha must be finite"),
        ({"cutmix_alpha": float("inf")}, ValueError, "cutmix_alpha must be finite"),
        ({"cutmix_alpha": "1"}, ValueError, "cutmix_alpha must be finite"),
        ({"cutmix_alpha": True}, ValueError, "cutmix_alpha must be finite"),
    ],
)
def test_a_bad_policy_names_its_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Policy(**arguments)


def test_a_policy_survives_the_way_through_lists():
    policy = Policy(rand_augment=[2, 9])
    assert policy == Policy(rand_augment=(2, 9))
    assert hash(policy) == hash(Policy(rand_augment=(2, 9)))
