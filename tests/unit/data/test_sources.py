"""Image folders, text files, and the bundled Fashion-MNIST."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flame
from flame.core.errors import ArgumentError, DataError, IndexRangeError, UnsupportedError
from flame.data import DataLoader, FashionMNIST, ImageFolder, Subset, TextFile, fashion_mnist

RANDOM = np.random.default_rng(0)


def save(path: Path, height: int = 5, width: int = 7, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), value, dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(4):
        save(root / "dog" / f"{number}.png", value=number)
    for number in range(3):
        save(root / "cat" / "deep" / f"{number}.png", value=100 + number)
    save(root / ".hidden" / "0.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".DS_Store.png").write_text("not an image")
    return root


# Image folders


def test_an_image_folder_is_sorted_by_class_and_path(folder: Path) -> None:
    dataset = ImageFolder(folder)
    assert dataset.classes == ("cat", "dog")
    assert dataset.class_to_idx == {"cat": 0, "dog": 1}
    assert dataset.targets == [0, 0, 0, 1, 1, 1, 1]
    assert len(dataset) == 7
    image, label = dataset[1]
    assert label == 0
    assert image.shape == (3, 5, 7)
    assert image.dtype == np.uint8
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 1, 1].tolist() == [101, 101, 101]
    assert "7 images, 2 classes" in repr(dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_folder_loads_in_batches(folder: Path, workers: int) -> None:
    loader = DataLoader(ImageFolder(str(folder), mode="L", size=4), 4, num_workers=workers)
    batches = [(images.shape, labels.tolist()) for images, labels in loader]
    assert [(tuple(shape), labels) for shape, labels in batches] == [
        ((4, 1, 4, 4), [0, 0, 0, 1]),
        ((3, 1, 4, 4), [1, 1, 1]),
    ]


def test_a_size_crops_the_middle_and_scales(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 8:22] = 200
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    image, _ = ImageFolder(tmp_path, size=(5, 5))[0]
    assert image.shape == (3, 5, 5)
    assert (image == 200).all()


def test_a_transform_gets_the_random_numbers_of_its_batch(folder: Path) -> None:
    def noisy(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return image + generator.random(image.shape)

    def epoch(workers: int, collate: Any = None) -> list[Any]:
        generator = flame.Generator()
        generator.manual_seed(2)
        loader = DataLoader(
            ImageFolder(folder, noisy), 2, num_workers=workers, generator=generator,
            collate_fn=collate,
        )  # fmt: skip
        return list(loader)

    for a, b in zip(epoch(0), epoch(3), strict=True):
        np.testing.assert_array_equal(a[0].numpy(), b[0].numpy())
    samples = [sample for batch in epoch(2, list) for sample in batch]
    np.testing.assert_array_equal(samples[0][0], epoch(0)[0][0].numpy()[0])
    dataset = ImageFolder(folder, noisy)
    np.testing.assert_array_equal(dataset[3][0], dataset[3][0])


def test_missing_and_wrong_folders_say_what_a_right_one_looks_like(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(
        DataError, match="does not exist; an image folder has a sub-folder"
    ) as caught:
        ImageFolder(missing)
    assert f"{missing}/cat/1.png" in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no folder"):
        ImageFolder(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="has no sub-folders, nothing of the kind"):
        ImageFolder(empty)
    save(empty / "1.png")
    with pytest.raises(DataError, match="only 1 images"):
        ImageFolder(empty)
    (empty / "cat").mkdir()
    with pytest.raises(DataError, match=r"class folder .*cat has no images"):
        ImageFolder(empty)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_a_damaged_image_is_named(folder: Path, damage: str, workers: int) -> None:
    path = folder / "dog" / "2.png"
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "garbage": b"this is no image",
        "empty": b"",
        "header": content[:20],
    }[damage]
    path.write_bytes(damaged)
    loader = DataLoader(ImageFolder(folder), 2, num_workers=workers)
    with pytest.raises(DataError, match=r"dog.2\.png cannot be read as an image"):
        list(loader)


def test_an_image_that_vanished_is_named(folder: Path) -> None:
    dataset = ImageFolder(folder)
    (folder / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"dog.0\.png cannot be read"):
        dataset[3]


def test_images_of_different_sizes_are_named(folder: Path) -> None:
    save(folder / "dog" / "9.png", 8, 9)
    with pytest.raises(DataError, match=r"differ in size.*give size"):
        ImageFolder(folder).get_batch([0, 7], RANDOM)
    assert ImageFolder(folder, size=4).get_batch([0, 7], RANDOM)[0].shape == (2, 3, 4, 4)


def test_image_folder_needs_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'flame-engine\[plot\]'"):
        ImageFolder(folder)


def test_image_folder_refuses_options(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="mode must"):
        ImageFolder(folder, mode="CMYK")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="size must"):
        ImageFolder(folder, size=0)


# Text files


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 3 + "ä€", encoding="utf-8")
    return path


def test_bytes_are_tokens_and_targets_are_one_further(text: Path) -> None:
    dataset = TextFile(text, 8)
    content = text.read_bytes()
    assert dataset.vocabulary_size == 256
    assert len(dataset) == (len(content) - 1) // 8
    for i in range(len(dataset)):
        tokens, targets = dataset[i]
        assert tokens.dtype is flame.int64
        assert bytes(tokens.tolist()) == content[8 * i : 8 * i + 8]
        assert bytes(targets.tolist()) == content[8 * i + 1 : 8 * i + 9]
    assert "sequences of 8" in repr(dataset)


@pytest.mark.parametrize("level", ["byte", "character"])
@pytest.mark.parametrize("stride", [None, 1, 3, 20])
def test_text_batches_equal_single_sequences(text: Path, level: Any, stride: int | None) -> None:
    dataset = TextFile(text, 8, level, stride=stride)
    indices = [len(dataset) - 1, 0, -1]
    tokens, targets = dataset.get_batch(indices, RANDOM)
    for row, index in enumerate(indices):
        assert tokens.numpy()[row].tolist() == dataset[index][0].tolist()
        assert targets.numpy()[row].tolist() == dataset[index][1].tolist()
    last = (len(dataset) - 1) * dataset.stride + dataset.block_size + 1
    assert len(dataset.tokens) - dataset.stride < last <= len(dataset.tokens)


def test_characters_are_tokens(text: Path) -> None:
    dataset = TextFile(text, 8, "character")
    assert dataset.vocabulary == tuple("abcdefghijä€")
    assert len(dataset.tokens) == 32
    assert dataset.decode(dataset[0][1]) == "bcdefghi"
    assert dataset.decode(dataset.encode("jäh€")) == "jäh€"
    with pytest.raises(DataError, match="has no 'x', 'z'"):
        dataset.encode("abzx")


def test_bytes_encode_and_decode(text: Path) -> None:
    dataset = TextFile(text, 8)
    assert dataset.decode(dataset.encode("jäh€")) == "jäh€"
    assert dataset.decode([0xE4]) == "�"
    with pytest.raises(IndexRangeError, match=r"\[0, 256\)"):
        dataset.decode([256])


def test_a_split_shares_no_token(text: Path) -> None:
    whole = TextFile(text, 4, "character", stride=1)
    first, second = whole.split(0.5)
    assert len(first.tokens) == len(second.tokens) == 16
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens]), whole.tokens)
    assert second.vocabulary == whole.vocabulary
    assert len(first) == 12
    with pytest.raises(ArgumentError, match="fraction"):
        whole.split(1.0)
    with pytest.raises(DataError, match="gives 3 tokens"):
        whole.split(0.1)


def test_text_loads_shuffled(text: Path) -> None:
    loader = DataLoader(TextFile(text, 4, stride=1), 6, shuffle=True, num_workers=2)
    for tokens, targets in loader:
        np.testing.assert_array_equal(tokens.numpy()[:, 1:], targets.numpy()[:, :-1])


def test_texts_that_cannot_be_used(tmp_path: Path, text: Path) -> None:
    with pytest.raises(DataError, match=r"missing.txt cannot be read: No such file"):
        TextFile(tmp_path / "missing.txt", 4)
    empty = tmp_path / "empty.txt"
    empty.touch()
    for level in ("byte", "character"):
        with pytest.raises(DataError, match="gives 0 tokens"):
            TextFile(empty, 4, level)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gives 35 tokens, a sequence of 35"):
        TextFile(text, 35)
    assert len(TextFile(text, 34)) == 1
    latin = tmp_path / "latin.txt"
    latin.write_bytes("abcä".encode("latin-1") * 5)
    with pytest.raises(DataError, match="no UTF-8 text at byte 3"):
        TextFile(latin, 4, "character")
    with pytest.raises(ArgumentError, match="level"):
        TextFile(text, 4, "word")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="block_size"):
        TextFile(text, 0)
    with pytest.raises(IndexRangeError, match="index 8 of 8"):
        TextFile(text, 4)[8]
    with pytest.raises(IndexRangeError, match="of 8 sequences"):
        TextFile(text, 4).get_batch([0, 8], RANDOM)


# Fashion-MNIST


@pytest.mark.parametrize(("split", "size"), [("train", 10_000), ("test", 2_000)])
def test_fashion_mnist_is_bundled(split: Any, size: int) -> None:
    dataset = fashion_mnist(split)
    assert isinstance(dataset, FashionMNIST)
    assert len(dataset) == size
    assert len(dataset.classes) == 10
    images, labels = dataset.get_batch([0, size - 1], RANDOM)
    assert tuple(images.shape) == (2, 1, 28, 28)
    assert images.dtype is flame.uint8
    assert labels.dtype is flame.int64
    assert dataset.images.shape == (size, 1, 28, 28)
    counts = np.bincount(dataset.labels, minlength=10)
    assert counts.min() > size / 13
    assert 60 < dataset.images.mean() < 85
    image, label = dataset[3]
    np.testing.assert_array_equal(image.numpy(), dataset.images[3])
    assert int(label) == dataset.labels[3]


def test_fashion_mnist_has_two_splits() -> None:
    with pytest.raises(ArgumentError, match='"train" or "test"'):
        fashion_mnist("validation")  # type: ignore[arg-type]


def test_an_epoch_of_a_part_of_fashion_mnist() -> None:
    part = Subset(fashion_mnist("test"), range(100, 300))
    labels = [label for _, batch in DataLoader(part, 64, num_workers=2) for label in batch.tolist()]
    assert labels == part.dataset.labels[100:300].tolist()  # type: ignore[attr-defined]
