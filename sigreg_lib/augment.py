r"""Augmentation of whole batches of uint8 images on the device, each image with its own draws.

Crop, flip and RandAugment (Cubuk et al., arXiv 1909.13719) equal torchvision's transforms of single
images to the last bit; MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv
1905.04899) follow in floating point. What is drawn depends on (seed, epoch, step) alone, and is
drawn on the host: images are grouped by operation there, and the device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as tvf
from torch import Tensor
from torch.nn.functional import pad

from sigreg_lib._types import is_integer

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""RandAugment's operations, in the order in which ``Draws.operation`` counts them."""

N_MAGNITUDES = 31  # counted from 0 to 30, evenly between an operation's two ends

_GEOMETRIC = frozenset(OPERATIONS[1:6])
_HAS_SIGN = np.array([name in OPERATIONS[1:10] for name in OPERATIONS])  # negated with p = 1/2
_IMAGE_STREAM, _MIX_STREAM = 0, 1


@dataclass(frozen=True)
class Policy:
    """Which augmentations are on; by default none.

    Attributes:
        crop_padding: zeros added on each side, in pixels, before a random crop back to size.
        flip: mirror left and right with probability 1/2.
        rand_augment: (number of operations, magnitude index in 0 to 30), such as (2, 9).
        mixup_alpha: MixUp's share is drawn from Beta(alpha, alpha); 0 turns MixUp off.
        cutmix_alpha: likewise for CutMix. If both are on, a fair coin chooses for every batch.

    Raises:
        ValueError, TypeError: an attribute is out of range, or ``flip`` is not a bool.
    """

    crop_padding: int = 0
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        pair = self.rand_augment
        if not is_integer(self.crop_padding) or self.crop_padding < 0:
            raise ValueError(f"crop_padding must be an integer >= 0, not {self.crop_padding!r}")
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, not {self.flip!r}")
        if pair is not None:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            if not is_pair or not all(map(is_integer, pair)) or min(pair[0] - 1, pair[1]) < 0:
                raise ValueError(f"rand_augment must be None or e.g. (2, 9), not {pair!r}")
            if pair[1] >= N_MAGNITUDES:
                raise ValueError(f"rand_augment's magnitude must be at most 30, not {pair[1]}")
            object.__setattr__(self, "rand_augment", tuple(pair))  # a list comes out of JSON
        for name in ("mixup_alpha", "cutmix_alpha"):
            alpha = getattr(self, name)
            is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not is_number or not 0 <= alpha < math.inf:
                raise ValueError(f"{name} must be finite and at least 0 (off), not {alpha!r}")


@dataclass(frozen=True, eq=False)
class Draws:
    """What was drawn for N images, as arrays on the host.

    Attributes:
        crop: int64, shape (N, 2), (top, left) of the crop in the padded image, 0 to 2 crop_padding.
        flip: bool, shape (N,).
        operation: int64, shape (N, number of operations), indices into ``OPERATIONS``.
        negative: bool, the same shape; for the operations that have no sign it means nothing.
    """

    crop: np.ndarray
    flip: np.ndarray
    operation: np.ndarray
    negative: np.ndarray

    def __len__(self) -> int:
        return len(self.crop)


class Mix(NamedTuple):
    """How a batch of N images is mixed with itself.

    Attributes:
        partner: int64, shape (N,), a permutation of the batch.
        weight: float32, shape (H, W), share of the own image at each pixel: constant for MixUp,
            1 outside and 0 inside the box for CutMix.
        lam: float32, shape (), share of the own label: the mean of weight, to rounding.
    """

    partner: Tensor
    weight: Tensor
    lam: Tensor

    def to(self, device: torch.device | str) -> Mix:
        """The same on ``device``, without waiting for it."""
        return Mix(*(_to_device(tensor, device) for tensor in self))


def draw(policy: Policy, n: int, *, seed: int, epoch: int, step: int) -> Draws:
    """Draw crop, flip and RandAugment for the ``n`` images of one step.

    The laws are those of torchvision's ``RandomCrop``, ``RandomHorizontalFlip`` and
    ``RandAugment``: all values uniform and independent. Nothing global is read or changed.

    Raises:
        ValueError: ``n``, ``seed``, ``epoch`` or ``step`` is no integer in [0, 2^32).
    """
    rng = _generator(_IMAGE_STREAM, n, seed, epoch, step)
    operations = policy.rand_augment[0] if policy.rand_augment else 0
    crop = rng.integers(0, 2 * policy.crop_padding, (n, 2), dtype=np.int64, endpoint=True)
    flip = rng.random(n) < 0.5 if policy.flip else np.zeros(n, dtype=bool)
    operation = rng.integers(0, len(OPERATIONS), (n, operations), dtype=np.int64)
    return Draws(crop, flip, operation, rng.random((n, operations)) < 0.5)


def concatenate(draws: Sequence[Draws]) -> Draws:
    """Join the draws of several steps, to augment the images of all of them in one call.

    Raises:
        ValueError: ``draws`` is empty, or its members differ in the number of operations.
    """
    widths = sorted({part.operation.shape[1] for part in draws})
    if len(widths) != 1:
        raise ValueError(f"draws must agree in the number of operations, 1 value, not {widths}")
    names = [item.name for item in fields(Draws)]
    return Draws(*(np.concatenate([getattr(part, name) for part in draws]) for name in names))


def augment(images: Tensor, draws: Draws, policy: Policy) -> Tensor:
    """Crop, flip and apply RandAugment, in this order, to each image as drawn for it.

    Every image comes out as if alone, so the result does not depend on how a stream of images is
    cut into calls. On a CPU 500 to 8,000 images a call are best.

    Args:
        images: uint8, shape (N, C, H, W), not changed; RandAugment needs C of 1 or 3.
        draws: from ``draw`` under the same policy, for N images.
        policy: which augmentations are on.

    Returns:
        uint8, shape (N, C, H, W), on the same device; ``images`` itself if nothing is on.

    Raises:
        ValueError: ``images`` has another dtype or shape, or ``draws`` does not fit.
    """
    operations, magnitude = policy.rand_augment or (0, 0)
    _check_images(images, draws, policy, operations)
    if policy.crop_padding or policy.flip:
        images = _crop_and_flip(images, draws, policy.crop_padding)
    if not operations or not len(draws):
        return images
    position = np.arange(len(draws))  # position[i] is the original place of the image now at i
    for slot in range(operations):
        operation, negative = draws.operation[position, slot], draws.negative[position, slot]
        key = 2 * operation + (negative & _HAS_SIGN[operation])
        order = np.argsort(key, kind="stable")
        position, key = position[order], key[order]
        images = images.index_select(0, _to_device(torch.from_numpy(order), images.device))
        starts = np.flatnonzero(np.diff(key, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(key)], strict=True):
            name, sign = OPERATIONS[key[start] // 2], -1.0 if key[start] % 2 else 1.0
            group = images[start:stop]
            group.copy_(_apply(group, name, sign * _magnitude(name, magnitude, group.shape)))
    return images.index_select(0, _to_device(torch.from_numpy(np.argsort(position)), images.device))


def draw_mix(
    policy: Policy, n: int, size: int | tuple[int, int], *, seed: int, epoch: int, step: int
) -> Mix | None:
    r"""Draw MixUp or CutMix for one batch of ``n`` images; None if the policy has neither.

    MixUp draws :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`. CutMix draws the same, then
    a centre uniform over the pixels, and cuts a box of sides :math:`2 \lfloor \tfrac{1}{2} W
    \sqrt{1 - \lambda} \rfloor` and likewise H around it; what sticks out of the image is clipped,
    and the label's share is the area that is left (as in torchvision's ``v2.CutMix``). The partner
    is a uniform random permutation of the batch.

    Args:
        policy: its ``mixup_alpha`` and ``cutmix_alpha``; a fair coin if both are positive.
        n: number of images.
        size: (H, W) in pixels, or one number for both.
        seed, epoch, step: what the draw depends on; independent of that of ``draw``.

    Returns:
        tensors on the host; ``.to(device)`` takes them over.

    Raises:
        ValueError: likewise, or ``size`` is not positive.
    """
    rng = _generator(_MIX_STREAM, n, seed, epoch, step)
    height, width = (size, size) if is_integer(size) else size
    if not (is_integer(height) and is_integer(width) and height > 0 and width > 0):
        raise ValueError(f"size must be a positive integer or two, (H, W), not {size!r}")
    if not policy.mixup_alpha and not policy.cutmix_alpha:
        return None
    coin = rng.random() < 0.5  # drawn in any case, to keep the rest of the stream in place
    cut = coin if policy.mixup_alpha and policy.cutmix_alpha else bool(policy.cutmix_alpha)
    partner = torch.from_numpy(rng.permutation(n).astype(np.int64, copy=False))
    alpha = policy.cutmix_alpha if cut else policy.mixup_alpha
    lam = rng.beta(alpha, alpha)
    weight = torch.ones(height, width, dtype=torch.float32)
    if not cut:
        weight *= lam
        return Mix(partner, weight, weight[0, 0].clone())
    x, y = int(rng.integers(width)), int(rng.integers(height))
    half = 0.5 * math.sqrt(1 - lam)
    half_x, half_y = int(half * width), int(half * height)
    weight[max(y - half_y, 0) : y + half_y, max(x - half_x, 0) : x + half_x] = 0
    return Mix(partner, weight, weight.mean(dtype=torch.float64).float())


def mix(x: Tensor, m: Mix) -> Tensor:
    r"""Mix each image with its partner.

    .. math:: x'_n = w \, x_n + (1 - w) \, x_{\pi(n)}

    with w the weight of each pixel and :math:`\pi` the partner. Shapes are static and nothing is
    read on the host, so that it can be compiled and captured in a CUDA graph. For the labels use
    ``m.lam``: the loss is lam loss(own label) + (1 - lam) loss(partner's label).

    Args:
        x: images in floating point, shape (N, C, H, W).
        m: from ``draw_mix`` for N images of this size, on the same device.

    Returns:
        shape (N, C, H, W), the dtype of x.
    """
    mixed = m.weight * x + (1 - m.weight) * x.index_select(0, m.partner)
    return mixed.to(x.dtype)  # computed in float32 at least


def _crop_and_flip(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """Both in one gather from the padded images."""
    height, width = images.shape[2:]
    crop = _to_device(torch.from_numpy(draws.crop), images.device)
    flip = _to_device(torch.from_numpy(draws.flip), images.device)
    padded = pad(images, [padding] * 4)
    rows = crop[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = crop[:, 1:] + torch.where(flip[:, None], width - 1 - columns, columns)
    source = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)[:, None]
    return padded.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)


def _magnitude(name: str, index: int, shape: torch.Size) -> float:
    """RandAugment's magnitude of one operation at an index in 0 to 30, before the sign."""
    if name == "Posterize":
        return 8 - round(index / ((N_MAGNITUDES - 1) / 4))  # bits that are kept
    ends = {
        **dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3)),  # tangent of the angle
        "TranslateX": (0.0, 150 / 331 * shape[-1]),  # pixels
        "TranslateY": (0.0, 150 / 331 * shape[-2]),
        "Rotate": (0.0, 30.0),  # degrees
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.9)),
        "Solarize": (255.0, 0.0),  # threshold
    }.get(name, (0.0, 0.0))
    return torch.linspace(*ends, N_MAGNITUDES, dtype=torch.float32)[index].item()


def _apply(images: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation at one magnitude on a batch: uint8 (N, C, H, W) to the same."""
    if name in _GEOMETRIC:
        source, inside = _source(name, magnitude, *images.shape[-2:], images.device)
        return images.flatten(2).index_select(2, source).mul_(inside).view_as(images)
    match name:
        case "Brightness":
            return _blend(images, torch.zeros((), device=images.device), 1 + magnitude)
        case "Color" if images.shape[1] == 3:
            return _blend(images, tvf.rgb_to_grayscale(images), 1 + magnitude)
        case "Contrast":
            grey = tvf.rgb_to_grayscale(images).float()
            return _blend(images, grey.mean((1, 2, 3), keepdim=True), 1 + magnitude)
        case "Sharpness" if min(images.shape[-2:]) > 2:  # else no pixel has all its neighbours
            return _blend(images, _blur(images), 1 + magnitude)
        case "Posterize":
            return tvf.posterize(images, int(magnitude))
        case "Solarize":
            return tvf.solarize(images, magnitude)
        case "AutoContrast":
            return tvf.autocontrast(images)
        case "Equalize":
            return _equalize(images)
    return images  # Identity, Color of a grey image, Sharpness of a tiny one


def _blend(images: Tensor, other: Tensor, ratio: float) -> Tensor:
    """ratio images + (1 - ratio) other, clamped and truncated to uint8.

    The products are rounded before they are added, as in torchvision; its own function mixes uint8
    and float operands, which is several times slower on a CPU.
    """
    blended = images.float().mul_(ratio).add_(other.float().mul(1 - ratio))
    return blended.clamp_(0, 255).to(torch.uint8)


def _blur(images: Tensor) -> Tensor:
    """Weighted mean of 3 x 3 pixels, weights 1 and 5 in the centre, rounded; border unchanged.

    Sums of integers are exact in float32 and never half-way between two multiples of 13, so this is
    the rounded convolution whatever the order of the sum, and needs no convolution.
    """
    blurred = images.float()
    rows = blurred[..., :-2, :] + blurred[..., 1:-1, :] + blurred[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    centre = blurred[..., 1:-1, 1:-1]
    centre.copy_(box.add_(centre, alpha=4).div_(13).round_())
    return blurred


def _equalize(images: Tensor) -> Tensor:
    """Histogram equalization of each channel of each image by a lookup table."""
    pixels = images.flatten(2).flatten(0, 1).long()
    histogram = torch.zeros(len(pixels), 256, dtype=torch.int32, device=images.device)
    one = torch.ones((), dtype=torch.int32, device=images.device)
    histogram.scatter_add_(1, pixels, one.expand_as(pixels))
    brightest = histogram.gather(1, pixels.amax(1, keepdim=True))
    step = (pixels.shape[1] - brightest) // 255  # 0: too few pixels, left as they are
    above_zero = step.clamp(min=1)
    table = (histogram.cumsum(1, dtype=torch.int32) + step // 2) // above_zero
    table = pad(table[:, :-1], [1, 0]).clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table).to(torch.uint8)
    return table.gather(1, pixels).view_as(images)


@lru_cache(maxsize=256)
def _source(
    name: str, magnitude: float, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each pixel of the output, the flat index of its source, and 1 if that lies inside.

    torchvision's own transform of an image of pixel numbers gives it, always on the CPU, so that
    the rounding of coordinates is the same on every device.
    """
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    if name == "Rotate":
        moved = tvf.rotate(numbers, magnitude)
    else:
        degrees, pixels = math.degrees(math.atan(magnitude)), int(magnitude)
        moved = tvf.affine(
            numbers,
            angle=0.0,
            translate=[pixels * (name == "TranslateX"), pixels * (name == "TranslateY")],
            scale=1.0,
            shear=[degrees * (name == "ShearX"), degrees * (name == "ShearY")],
            center=[0, 0] if name.startswith("Shear") else None,
        )
    source = moved.flatten().long() - 1  # -1: filled with zero from outside
    inside = (source >= 0).to(torch.uint8)
    return _to_device(source.clamp_(min=0), device), _to_device(inside, device)


def _check_images(images: Tensor, draws: Draws, policy: Policy, operations: int) -> None:
    shape, n, slots = tuple(images.shape), len(draws), draws.operation.shape[1]
    good_channels = not operations or shape[1:2] in ((1,), (3,))
    if images.dtype != torch.uint8 or len(shape) != 4 or not good_channels:
        needed = "torch.uint8 and (N, C, H, W), for RandAugment with C of 1 or 3"
        raise ValueError(f"images must be {needed}, not {images.dtype} and {shape}")
    if (n, slots) != (shape[0], operations):
        expected = f"{shape[0]} images and the policy's {operations} RandAugment operations"
        raise ValueError(f"draws must be for {expected}, not for {n} and {slots}")
    low, high, most = draws.crop.min(initial=0), draws.crop.max(initial=0), 2 * policy.crop_padding
    if low < 0 or high > most:
        raise ValueError(f"draws.crop must lie in 0 to {most}, twice the padding: {low} to {high}")


def _generator(stream: int, n: int, seed: int, epoch: int, step: int) -> np.random.Generator:
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch), ("step", step)):
        if not is_integer(value) or not 0 <= value < 2**32:
            raise ValueError(f"{name} must be an integer in [0, 2^32), not {value!r}")
    # the spawn key, unlike a fourth number, keeps streams apart from any other use of the three
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, step), spawn_key=(stream,)))


def _to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the host without waiting, which CUDA does only from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
