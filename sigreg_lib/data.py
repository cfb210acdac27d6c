"""Image data sets, loaded once as uint8 tensors on the device.

``digits`` is embedded in scikit-learn and needs no file: 1,797 images of 8 x 8 pixels. CIFAR-100
(Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) is read from the
parquet files of the Hugging Face hub (``uoft-cs/cifar100``) or from torchvision's own files.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from sigreg_lib._names import suggest
from sigreg_lib._types import is_integer

NAMES = ("cifar100", "digits")
CIFAR100_SIZE = 32
CIFAR100_CLASSES = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905 (a literal list takes a hundred lines)
)
_DIGITS_TEST = 500
_SPLIT_SEED = 0  # every split is fixed, so that runs and machines agree on what was held out
_LAYOUTS = (
    "a folder with the hub's files (train-00000-of-*.parquet and test-00000-of-*.parquet, there or "
    "in cifar100/) or with torchvision's (cifar-100-python/)"
)


_Split = tuple[Tensor, Tensor]  # images and labels


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set, all of it in memory on one device.

    Attributes:
        name: "digits" or "cifar100", with "-holdoutN" when N training images are the test set.
        train_images: uint8, shape (N, C, H, W).
        train_labels: int64, shape (N,), in [0, n_classes).
        test_images: uint8, shape (M, C, H, W).
        test_labels: int64, shape (M,).
        class_names: one name a class, in the order of the labels.
        mean: of the training images for each channel, computed in float64, in units where 255 is 1.
        std: population standard deviation, likewise.
        holdout: number of training images that are the test set; 0, the default, where it is the
            true one. A recipe with another ``holdout`` refuses the data.

    Raises:
        ValueError: images are not uint8 (N, C, H, H), or labels do not pair with them.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holdout: int = 0

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images = getattr(self, f"{split}_images")
            labels = getattr(self, f"{split}_labels")
            if (
                images.dtype != torch.uint8
                or images.ndim != 4
                or images.shape[2] != images.shape[3]
            ):
                raise ValueError(
                    f"{split}_images has dtype {images.dtype} and shape {tuple(images.shape)}; "
                    "it must be torch.uint8 and (N, C, H, H)"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}_labels has dtype {labels.dtype} and shape {tuple(labels.shape)}; "
                    f"it must be torch.int64 and ({len(images)},), one label for each image"
                )

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Number of channels C: 1 for grey, 3 for RGB."""
        return self.train_images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of the square images, in pixels."""
        return self.train_images.shape[-1]

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """Numbers of images and labels, 8 hexadecimal digits a split; computed once.

        ``images`` is the sum of the CRC-32 of each image with its label, which does not depend on
        their order (the hub's files and torchvision's differ in that), ``order`` the CRC-32 of the
        split as it lies there.
        """
        found: dict[str, list[str]] = {"images": [], "order": []}
        for images, labels in (
            (self.train_images, self.train_labels),
            (self.test_images, self.test_labels),
        ):
            pixels, classes = (v.cpu().contiguous().numpy() for v in (images, labels))
            pairs = zip(pixels, classes, strict=True)
            whole = sum(zlib.crc32(k.tobytes(), zlib.crc32(x)) for x, k in pairs) % 2**32
            found["images"].append(f"{whole:08x}")
            found["order"].append(f"{zlib.crc32(classes, zlib.crc32(pixels)):08x}")
        return {name: "-".join(numbers) for name, numbers in found.items()}

    def to(self, device: torch.device | str) -> ImageData:
        """The same data set with its tensors on ``device``."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def load(
    data: str | Path = "digits",
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
    holdout: int = 0,
) -> ImageData:
    """Load a data set; the order of the images and every split are fixed.

    Args:
        data: "digits" (scikit-learn's handwritten digits, values 0 to 16 scaled to 0 to 255,
            stratified into 1,297 training and 500 test images); "cifar100" (50,000 and 10,000
            images, fine labels), looked for in the folder that the environment variable
            ``SIGREG_DATA`` names, or in ``$XDG_CACHE_HOME/sigreg`` (``~/.cache/sigreg``) where it
            is not set; or that folder itself. Parquet files of the hub's layout may lie in it, in
            its ``cifar100/`` or in ``cifar100/cifar100/``, torchvision's in its
            ``cifar-100-python/``; where both exist, parquet is read.
        device: where the tensors are put.
        download: let torchvision download CIFAR-100 (169 MB) into that folder if it is not there.
            Nothing is ever downloaded without it.
        holdout: if positive, a validation split for tuning: the last ``holdout`` images of a fixed
            stratified permutation of the training images become the test set, the others remain
            for training, and the true test images are dropped. Each class is held out in
            proportion, a smaller holdout is a subset of a larger one, and mean and std are of the
            images that remain. The permutation is one of positions in the files, so the parquet
            files and torchvision's, which differ in order, hold out different images.

    Returns:
        The data set, named "digits", "cifar100", or with "-holdoutN" appended.

    Raises:
        TypeError: ``data`` is neither a string nor a path, or ``holdout`` is not an integer.
        ValueError: ``data`` is an unknown name, ``holdout`` is out of range, or files are damaged,
            incomplete or not CIFAR-100.
        FileNotFoundError: no CIFAR-100 in the folder.
        ImportError: scikit-learn (digits) or pyarrow (parquet) is not installed.
    """
    if not isinstance(data, str | os.PathLike):
        raise TypeError(f"data must be a string or a path, not {type(data).__name__}")
    if not is_integer(holdout):
        raise TypeError(f"holdout must be an integer number of images, not {holdout!r}")
    if data == "digits":
        name, (train, test, class_names) = "digits", _digits()
    else:
        name, (train, test, class_names) = "cifar100", _cifar100(_folder(data), data, download)
    if not 0 <= holdout < len(train[0]):
        raise ValueError(
            f"holdout must lie in [0, {len(train[0])}), leaving images of {name} to train on, "
            f"not {holdout}"
        )
    if holdout:
        kept, held = _stratified_split(train[1].numpy(), holdout)
        train, test = (train[0][kept], train[1][kept]), (train[0][held], train[1][held])
        name = f"{name}-holdout{holdout}"
    mean, std = _channel_statistics(train[0])
    return ImageData(name, *train, *test, class_names, mean, std, holdout).to(device)


def with_holdout(
    data: ImageData | str | Path, holdout: int, *, download: bool = False
) -> ImageData:
    """A data set as it is, or what :func:`load` makes of anything else.

    Raises:
        ValueError: it holds out another number of images: tuning would be on the test set, or what
            was held out pass for it.
    """
    if not isinstance(data, ImageData):
        return load(data, download=download, holdout=holdout)
    if data.holdout != holdout:
        raise ValueError(
            f"the recipe says holdout={holdout}, but the data {data.name!r} has "
            f"holdout={data.holdout}: load(..., holdout={holdout}) it, or override the recipe"
        )
    return data


def _folder(data: str | os.PathLike[str]) -> Path:
    """The folder in which ``data`` is to be found, which may not exist."""
    if data == "cifar100":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sigreg"
        return Path(os.environ.get("SIGREG_DATA") or cache).expanduser()
    folder = Path(data).expanduser()
    if isinstance(data, str) and folder.name == data and not folder.exists():  # a bare word
        raise ValueError(f"unknown data {data!r}; {suggest(data, NAMES)}, or {_LAYOUTS}")
    return folder


def _digits() -> tuple[_Split, _Split, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data='digits' needs the package scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    kept, held = _stratified_split(labels.numpy(), _DIGITS_TEST)
    names = tuple(str(digit) for digit in range(10))
    return (images[kept], labels[kept]), (images[held], labels[held]), names


def _cifar100(
    root: Path, data: str | os.PathLike[str], download: bool
) -> tuple[_Split, _Split, tuple[str, ...]]:
    for folder in (root, root / "cifar100", root / "cifar100" / "cifar100"):
        if any(folder.glob("train*.parquet")) or any(folder.glob("test*.parquet")):
            return _read_hub(folder, "train"), _read_hub(folder, "test"), CIFAR100_CLASSES
    base = torchvision.datasets.CIFAR100.base_folder
    roots = (root.parent if root.name == base else root, root / "cifar100")
    found = next((folder for folder in roots if (folder / base).is_dir()), None)
    if found is None and not download:
        state = "holds no CIFAR-100" if root.is_dir() else "is not a folder"
        unset = data == "cifar100" and not os.environ.get("SIGREG_DATA")
        origin = "SIGREG_DATA is not set and " if unset else ""
        raise FileNotFoundError(
            f"data={str(data)!r}: {origin}{root} {state}. Set SIGREG_DATA or data to {_LAYOUTS}, "
            "or pass download=True (--download) to have torchvision download 169 MB into it"
        )
    return _read_torchvision(found or root, download)


def _read_hub(folder: Path, split: str) -> _Split:
    """Read all shards ``split-I-of-N.parquet`` of one split."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {folder}/*.parquet needs the package pyarrow") from error
    images, labels = [], []
    for path in _shards(folder, split):
        try:
            file = pyarrow.parquet.ParquetFile(path)
            missing = {"img", "fine_label"} - set(file.schema_arrow.names)
            if missing:
                raise ValueError(
                    f"{path} lacks the column(s) {', '.join(sorted(missing))}; it has "
                    f"{', '.join(file.schema_arrow.names)}. The hub's uoft-cs/cifar100 has img "
                    "(a struct of bytes and path) and fine_label"
                )
            table = file.read(columns=["img", "fine_label"])
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged or no parquet file: {error}") from error
        images += [_decode(cell, path, row) for row, cell in enumerate(table["img"].to_pylist())]
        labels += table["fine_label"].to_pylist()
    if not images:
        raise ValueError(f"{folder} has no {split} image in its {split}-*.parquet files")
    wrong = [label for label in labels if label is None or not 0 <= label < len(CIFAR100_CLASSES)]
    if wrong:
        raise ValueError(f"{folder}: fine_label must lie in 0 to 99, but {wrong[0]} occurs")
    return _channels_first(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


def _shards(folder: Path, split: str) -> list[Path]:
    paths = sorted(folder.glob(f"{split}*.parquet"))
    totals = [re.search(r"-of-(\d{5})$", path.stem) for path in paths]
    total = max([int(match[1]) for match in totals if match], default=1) or 1
    expected = {f"{split}-{index:05d}-of-{total:05d}.parquet" for index in range(total)}
    missing = sorted(expected - {path.name for path in paths})
    surplus = sorted({path.name for path in paths} - expected)
    if missing or surplus:
        lacks = f"it lacks {', '.join(missing)}" if missing else ""
        has = f"it has {', '.join(surplus)} besides" if surplus else ""
        raise ValueError(
            f"{folder} must hold the {total} file(s) {split}-I-of-{total:05d}.parquet with I from "
            f"00000 on: {'; '.join(filter(None, (lacks, has)))}"
        )
    return paths


def _decode(cell: dict[str, bytes | None] | None, path: Path, row: int) -> np.ndarray:
    """Decode one PNG to uint8, shape (32, 32, 3)."""
    from PIL import Image  # torchvision's own decoders are deprecated

    where = f"{path}, row {row}"
    if not isinstance(cell, dict) or not cell.get("bytes"):
        raise ValueError(f"{where}: img holds no bytes; a struct with a PNG in bytes is needed")
    try:
        image = Image.open(io.BytesIO(cell["bytes"]), formats=("PNG",)).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where}: img is not a readable PNG: {error}") from error
    if image.size != (CIFAR100_SIZE, CIFAR100_SIZE):
        raise ValueError(
            f"{where}: the image has {image.width} x {image.height} pixels; CIFAR-100 has "
            f"{CIFAR100_SIZE} x {CIFAR100_SIZE}"
        )
    return np.asarray(image)


def _read_torchvision(root: Path, download: bool) -> tuple[_Split, _Split, tuple[str, ...]]:
    splits = []
    for train in (True, False):
        try:
            part = torchvision.datasets.CIFAR100(root, train=train, download=download)
        except RuntimeError as error:  # torchvision checks the MD5 sum of every file
            raise ValueError(
                f"{root / torchvision.datasets.CIFAR100.base_folder} is incomplete or damaged "
                f"({error}); pass download=True (--download) to fetch it again"
            ) from error
        splits.append((_channels_first(part.data), torch.tensor(part.targets, dtype=torch.int64)))
    return splits[0], splits[1], tuple(part.classes)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _stratified_split(labels: np.ndarray, n_held: int) -> tuple[Tensor, Tensor]:
    """Positions kept and held out, each ascending: the last ``n_held`` of a fixed permutation.

    The k-th of the n_c shuffled images of class c stands at (k + 1/2) / n_c of the permutation,
    so that each stretch of it has all classes in proportion, to about one image a class.
    """
    rng = np.random.default_rng(_SPLIT_SEED)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        place[members] = (rng.permutation(len(members)) + 0.5) / len(members)
    order = np.lexsort((rng.random(len(labels)), place))  # equal places in random order
    first = len(labels) - n_held
    return torch.from_numpy(np.sort(order[:first])), torch.from_numpy(np.sort(order[first:]))


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel of uint8 images (N, C, H, W)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        # a histogram makes float64 exact and spares a copy eight times the size of the images
        counts = torch.bincount(channel.flatten(), minlength=256)
        share = counts.double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean).square()).sum().sqrt().item())
    return tuple(means), tuple(stds)
