"""Data sets are exact, split without overlap and in proportion, and never taken for another."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import seeded
from torch import Tensor
from torchvision.datasets import CIFAR100

from sigreg_lib.data import CIFAR100_CLASSES, ImageData, load


def images_and_labels(n: int, *, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 100, (n,), generator=generator)


def png(image: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, cells: list, labels: list, *, label_name: str = "fine_label") -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    img = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {"img": img, label_name: pa.array(labels, pa.int64())}
    columns["coarse_label"] = pa.array([0] * len(labels), pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def write_hub(folder: Path, *, size: int = 32) -> dict[str, tuple[Tensor, Tensor]]:
    """Seven training images in three shards, four test images in one."""
    splits = {}
    for split, parts in (("train", [3, 3, 1]), ("test", [4])):
        images, labels = splits[split] = images_and_labels(sum(parts), seed=len(parts), size=size)
        pairs = zip(images.split(parts), labels.split(parts), strict=True)
        for index, (some, their) in enumerate(pairs):
            cells = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(some)]
            path = folder / f"{split}-{index:05d}-of-{len(parts):05d}.parquet"
            write_parquet(path, cells, their.tolist())
    return splits


def write_torchvision(root: Path, monkeypatch) -> dict[str, tuple[Tensor, Tensor]]:
    """The same in torchvision's files; its own check of MD5 sums stays in force for them."""
    folder, splits = root / CIFAR100.base_folder, {}
    folder.mkdir(parents=True)
    for split, n in (("train", 7), ("test", 4)):
        images, labels = splits[split] = images_and_labels(n, seed=n)
        content = {"data": images.flatten(1).numpy(), "fine_labels": labels.tolist()}
        digest = write_pickle(folder / split, content)
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, digest]])
    digest = write_pickle(folder / "meta", {"fine_label_names": list(CIFAR100_CLASSES)})
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digest})
    return splits


def write_pickle(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_holds(data: ImageData, splits: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert torch.equal(data.train_images, splits["train"][0])
    assert torch.equal(data.train_labels, splits["train"][1])
    assert torch.equal(data.test_images, splits["test"][0])
    assert torch.equal(data.test_labels, splits["test"][1])
    assert data.class_names == CIFAR100_CLASSES
    assert (data.name, data.n_classes, data.channels, data.size) == ("cifar100", 100, 3, 32)


def rows(images: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
    """Label and pixels of each image, to compare parts of a data set whatever their order."""
    return [tuple(row) for row in torch.cat([labels[:, None], images.flatten(1)], 1).tolist()]


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    """Neither SIGREG_DATA nor a cache that an earlier download may have filled."""
    monkeypatch.delenv("SIGREG_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Digits


@pytest.fixture(scope="module")
def digits() -> ImageData:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    return load("digits")


def test_digits_are_scikit_learns_each_once_scaled_to_the_full_range(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scaled = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)
    expected = sorted(rows(scaled, torch.from_numpy(bunch.target)))
    train = rows(digits.train_images, digits.train_labels)
    test = rows(digits.test_images, digits.test_labels)
    assert sorted(train + test) == expected
    assert len(set(expected)) == 1797  # no image twice, so the two parts share none
    assert (scaled.min(), scaled.max()) == (0, 255)
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    assert (digits.name, digits.n_classes, digits.channels, digits.size) == ("digits", 10, 1, 8)


def test_digits_are_split_in_proportion_and_always_alike(digits):
    total = torch.bincount(torch.cat([digits.train_labels, digits.test_labels]))
    test = torch.bincount(digits.test_labels)
    assert (test - total * 500 / 1797).abs().max() < 1
    again = load("digits")
    assert torch.equal(again.train_images, digits.train_images)
    assert torch.equal(again.test_labels, digits.test_labels)


def test_mean_and_std_are_those_of_the_training_images_in_float64(digits):
    pixels = digits.train_images.double() / 255
    assert digits.mean == pytest.approx([pixels.mean().item()], rel=1e-12)
    assert digits.std == pytest.approx([pixels.std(correction=0).item()], rel=1e-12)


def test_a_holdout_partitions_the_training_images_in_proportion(digits):
    held = load("digits", holdout=200)
    assert (held.name, held.holdout, digits.holdout) == ("digits-holdout200", 200, 0)
    assert held.to("cpu").holdout == 200
    assert (len(held.train_images), len(held.test_images)) == (1097, 200)
    kept = rows(held.train_images, held.train_labels)
    out = rows(held.test_images, held.test_labels)
    assert sorted(kept + out) == sorted(rows(digits.train_images, digits.train_labels))
    total = torch.bincount(digits.train_labels)
    assert (torch.bincount(held.test_labels) - total * 200 / 1297).abs().max() < 1
    pixels = held.train_images.double() / 255
    assert held.mean == pytest.approx([pixels.mean().item()], rel=1e-12)


def test_a_smaller_holdout_is_part_of_a_larger_one(digits):
    held = [load("digits", holdout=n) for n in (50, 300)]
    small, large = (set(rows(data.test_images, data.test_labels)) for data in held)
    assert small < large


@pytest.mark.parametrize("holdout", [-1, 1297, 5000])
def test_a_holdout_out_of_range_is_refused(holdout):
    with pytest.raises(ValueError, match=rf"holdout must lie in \[0, 1297\).* not {holdout}"):
        load("digits", holdout=holdout)


@pytest.mark.parametrize("holdout", [0.1, True, None])
def test_a_holdout_is_a_number_of_images_and_no_fraction(holdout):
    with pytest.raises(TypeError, match="holdout must be an integer"):
        load("digits", holdout=holdout)


def test_the_checksum_sees_every_image_label_and_their_order(digits):
    ordered, content = digits.checksums["order"], digits.checksums["images"]
    assert load("digits").checksums["order"] == ordered != content
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        values = getattr(digits, name)
        one = values.clone()
        one[-1] = (one[-1] + 1) % 10
        for other in (one, values.flip(0)):  # images without their labels are other pairs
            changed = replace(digits, **{name: other})
            assert changed.checksums["order"] != ordered
            assert changed.checksums["images"] != content
    turned = {f"{s}_{v}": getattr(digits, f"{s}_{v}").flip(0)
              for s in ("train", "test") for v in ("images", "labels")}  # fmt: skip
    turned = replace(digits, **turned)
    assert turned.checksums["order"] != ordered
    assert turned.checksums["images"] == content


def test_moving_keeps_everything_and_moves_every_tensor(digits):
    moved = digits.to("meta")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert getattr(moved, name).device.type == "meta"
    assert (moved.mean, moved.std, moved.name) == (digits.mean, digits.std, digits.name)
    assert load("digits", device="meta").train_images.device.type == "meta"


# Finding CIFAR-100


@pytest.mark.parametrize("given", [".", "root", "root/cifar100"])
@pytest.mark.parametrize("through", ["argument", "environment"])
def test_parquet_files_are_found_from_their_folder_and_the_two_above(
    tmp_path, monkeypatch, no_environment, given, through
):
    splits = write_hub(tmp_path / "cifar100" / "cifar100")
    folder = tmp_path / given.replace("root", "cifar100")
    if through == "environment":
        monkeypatch.setenv("SIGREG_DATA", str(folder))
        assert_holds(load("cifar100"), splits)
    else:
        assert_holds(load(folder), splits)
        assert_holds(load(str(folder)), splits)


@pytest.mark.parametrize("given", [".", CIFAR100.base_folder])
def test_torchvisions_files_are_found_from_their_folder_and_the_one_above(
    tmp_path, monkeypatch, given
):
    splits = write_torchvision(tmp_path, monkeypatch)
    assert_holds(load(tmp_path / given), splits)


def test_a_holdout_of_parquet_files_is_taken_from_the_training_images(tmp_path):
    splits = write_hub(tmp_path)
    held = load(tmp_path, holdout=3)
    assert held.name == "cifar100-holdout3"
    parts = [rows(held.train_images, held.train_labels), rows(held.test_images, held.test_labels)]
    assert [len(part) for part in parts] == [4, 3]
    assert sorted(parts[0] + parts[1]) == sorted(rows(*splits["train"]))


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch, no_environment):
    downloads = []

    def download(self):
        if not downloads:
            downloads.append(Path(self.root))
            splits.update(write_torchvision(Path(self.root), monkeypatch))

    splits: dict[str, tuple[Tensor, Tensor]] = {}
    monkeypatch.setattr(CIFAR100, "download", download)
    with pytest.raises(FileNotFoundError, match=r"SIGREG_DATA is not set and .*download=True"):
        load("cifar100")
    monkeypatch.setenv("SIGREG_DATA", str(tmp_path / "named"))
    with pytest.raises(FileNotFoundError, match=r"named is not a folder.*download=True"):
        load("cifar100")
    assert not downloads
    assert not (tmp_path / "named").exists()
    assert_holds(load("cifar100", download=True), splits)
    assert downloads == [tmp_path / "named"]
    assert_holds(load("cifar100"), splits)


def test_an_earlier_download_is_found_in_the_cache(tmp_path, monkeypatch, no_environment):
    splits = write_torchvision(tmp_path / "cache" / "sigreg", monkeypatch)
    assert_holds(load("cifar100"), splits)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar10", "unknown data 'cifar10'; did you mean 'cifar100'"),
        ("digit", "unknown data 'digit'; did you mean 'digits'"),
        ("imagenet", "unknown data 'imagenet'; known: cifar100, digits"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(data, message, no_environment):
    with pytest.raises(ValueError, match=message):
        load(data)


def test_data_must_be_a_name_or_a_path():
    with pytest.raises(TypeError, match="data must be a string or a path, not NoneType"):
        load(None)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_the_data_set_is_named(tmp_path, made):
    folder = tmp_path / "here"
    if made:
        folder.mkdir()
    state = "holds no CIFAR-100" if made else "is not a folder"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder))} {state}"):
        load(folder)


# Damaged and incomplete files


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("train-00001-of-00003", r"must hold the 3 file.* lacks train-00001-of-00003\.parquet$"),
        ("train-00002-of-00003", r"must hold the 3 file.* lacks train-00002-of-00003\.parquet$"),
        ("test-00000-of-00001", r"must hold the 1 file.* lacks test-00000-of-00001\.parquet$"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, lost, message):
    write_hub(tmp_path)
    (tmp_path / f"{lost}.parquet").unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("extra", ["train-00000-of-00002", "train", "train-00003-of-00003"])
def test_files_that_do_not_belong_to_the_shards_are_named(tmp_path, extra):
    write_hub(tmp_path)
    shutil.copy(tmp_path / "train-00000-of-00003.parquet", tmp_path / f"{extra}.parquet")
    with pytest.raises(ValueError, match=rf"must hold the 3 file.*it has {extra}\.parquet besides"):
        load(tmp_path)


def test_missing_columns_are_named(tmp_path):
    write_hub(tmp_path)
    path = tmp_path / "train-00001-of-00003.parquet"
    write_parquet(path, [{"bytes": b"", "path": ""}], [3], label_name="label")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} lacks .* fine_label; it has"):
        load(tmp_path)


def test_a_wrong_size_is_named(tmp_path):
    write_hub(tmp_path, size=16)
    with pytest.raises(ValueError, match=r"row 0: the image has 16 x 16 pixels.* 32 x 32"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("cell", "label", "message"),
    [
        ({"bytes": None, "path": "elsewhere.png"}, 3, "row 1: img holds no bytes"),
        (None, 3, "row 1: img holds no bytes"),
        ({"bytes": b"no image", "path": "x.png"}, 3, "row 1: img is not a readable PNG"),
        ("good", 100, "fine_label must lie in 0 to 99, but 100 occurs"),
        ("good", -1, "fine_label must lie in 0 to 99, but -1 occurs"),
        ("good", None, "fine_label must lie in 0 to 99, but None occurs"),
    ],
)
def test_a_bad_row_is_named(tmp_path, cell, label, message):
    write_hub(tmp_path)
    good = {"bytes": png(images_and_labels(1, seed=0)[0][0]), "path": "good.png"}
    path = tmp_path / "train-00000-of-00003.parquet"
    write_parquet(path, [good, good if cell == "good" else cell], [0, label])
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_empty_split_is_named(tmp_path):
    write_hub(tmp_path)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [], [])
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has no test image"):
        load(tmp_path)


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_hub(tmp_path)
    path = tmp_path / "train-00002-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["lost", "changed"])
@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_damaged_torchvision_files_are_refused(tmp_path, monkeypatch, file, damage):
    write_torchvision(tmp_path, monkeypatch)
    path = tmp_path / CIFAR100.base_folder / file
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{re.escape(str(path.parent))} is incomplete or damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("module", "package"), [("pyarrow", "pyarrow"), ("sklearn.datasets", "scikit-learn")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, package):
    write_hub(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs the package {package}"):
        load(tmp_path if package == "pyarrow" else "digits")


def test_tensors_that_do_not_belong_together_are_refused():
    images, labels = images_and_labels(4, seed=0)
    rest = (images, labels, CIFAR100_CLASSES, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ValueError, match=r"train_images has dtype torch\.float32"):
        ImageData("x", images.float(), labels, *rest)
    with pytest.raises(ValueError, match=r"train_images .* must be torch.uint8 and \(N, C, H, H\)"):
        ImageData("x", images[..., :8], labels, *rest)
    with pytest.raises(ValueError, match=r"train_labels .* one label for each image"):
        ImageData("x", images, labels[:3], *rest)
    with pytest.raises(ValueError, match=r"train_labels has dtype torch\.int32"):
        ImageData("x", images, labels.int(), *rest)


# CIFAR-100 itself


@pytest.fixture(scope="module")
def cifar100(cifar100_root) -> ImageData:
    return load(cifar100_root)


def test_cifar100_has_its_published_counts_and_statistics(cifar100):
    assert cifar100.train_images.shape == (50_000, 3, 32, 32)
    assert cifar100.test_images.shape == (10_000, 3, 32, 32)
    assert torch.equal(torch.bincount(cifar100.train_labels), torch.full((100,), 500))
    assert torch.equal(torch.bincount(cifar100.test_labels), torch.full((100,), 100))
    published_mean = (0.50707516, 0.48654887, 0.44091784)
    published_std = (0.26733429, 0.25643846, 0.27615047)
    assert cifar100.mean == pytest.approx(published_mean, abs=1e-8)
    assert cifar100.std == pytest.approx(published_std, abs=1e-8)


def test_cifar100_class_names_are_a_hundred_in_alphabetical_order():
    assert len(set(CIFAR100_CLASSES)) == 100
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


def test_cifar100_labels_mean_what_their_names_say(cifar100):
    """The classes with the most blue and the most red and green are those one expects."""
    warmth = {}
    for label, name in enumerate(cifar100.class_names):
        red, _, blue = (
            cifar100.train_images[cifar100.train_labels == label].double().mean((0, 2, 3))
        )
        warmth[name] = (red - blue).item()
    ordered = sorted(warmth, key=warmth.__getitem__)
    assert set(ordered[:3]) == {"dolphin", "shark", "whale"}
    assert set(ordered[-4:]) == {"orange", "poppy", "sunflower", "sweet_pepper"}


def test_a_cifar100_holdout_takes_as_many_of_each_class(cifar100_root):
    held = load(cifar100_root, holdout=5000)
    assert held.name == "cifar100-holdout5000"
    assert torch.equal(torch.bincount(held.train_labels), torch.full((100,), 450))
    assert torch.equal(torch.bincount(held.test_labels), torch.full((100,), 50))
