"""Loaders of small grey images, with the augmentation that recipes for them share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import flame
from flame.core.errors import ArgumentError, DataError
from flame.data import (
    DataLoader,
    ImageFolder,
    Subset,
    TensorDataset,
    fashion_mnist,
    random_split,
)
from flame.data.transforms import (
    Compose,
    Normalize,
    OnField,
    RandomCrop,
    RandomHorizontalFlip,
    ToFloat,
)
from flame.recipes.recipe import Settings
from flame.tensor import Tensor

SIZE = 28
MEAN, STD = 0.2864, 0.3533  # of the bundled training images, as fractions of white
TEST_BATCH = 250
WORKERS = 4  # threads that make batches for a GPU
Images = TensorDataset | ImageFolder | Subset[Any]


@dataclass(frozen=True)
class Loaders:
    """Batches of images (N, 1, 28, 28), normalized, and labels (N,)."""

    train: DataLoader
    test: DataLoader
    classes: tuple[str, ...]


def image_loaders(settings: Settings, *, crop_padding: int) -> Loaders:
    """The bundled Fashion-MNIST, or the image folder ``settings.data``.

    The training images are moved by up to ``crop_padding`` pixels and mirrored at random. Raises
    DataError for a folder that cannot be used, ArgumentError for a batch size that leaves no step.
    """
    train, test, classes = _bundled() if settings.data is None else _folder(settings)
    train, test = (_limited(part, settings.limit) for part in (train, test))
    if settings.data is not None:
        train, test = _decoded(train), _decoded(test)
    if len(train) < settings.batch_size:
        raise ArgumentError(
            f"--batch-size {settings.batch_size} is more than the {len(train)} training images; "
            "choose a smaller one"
        )
    # A GPU waits for no batch: threads make them ahead, in memory that it reads by itself.
    on_gpu = settings.device != "cpu"
    ways = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": True}
    making: dict[str, Any] = ways if on_gpu else {}
    augment = [RandomCrop(SIZE, padding=crop_padding), RandomHorizontalFlip()]
    normalize = [ToFloat(), Normalize(MEAN, STD)]
    return Loaders(
        train=DataLoader(
            train,
            settings.batch_size,
            shuffle=True,
            drop_last=True,
            generator=_generator(settings),
            batch_transform=OnField(Compose([*augment, *normalize])),
            **making,
        ),
        test=DataLoader(test, TEST_BATCH, batch_transform=OnField(Compose(normalize)), **making),
        classes=classes,
    )


def to_pictures(images: Tensor) -> Tensor:
    """Normalized images (N, 1, 28, 28) back to grey values in 0..1, (N, 28, 28)."""
    return (images.squeeze(1) * STD + MEAN).clamp(0, 1)


def _generator(settings: Settings) -> "flame.Generator":
    return flame.Generator().manual_seed(settings.seed)


def _bundled() -> tuple[Images, Images, tuple[str, ...]]:
    train = fashion_mnist("train")
    return train, fashion_mnist("test"), train.classes


def _folder(settings: Settings) -> tuple[Images, Images, tuple[str, ...]]:
    """DATA/train and DATA/test where they exist; else a sixth of DATA's images are for the test."""
    assert settings.data is not None
    root = Path(settings.data)
    if not (root / "train").is_dir():
        whole = ImageFolder(root, size=SIZE, mode="L")
        train, test = random_split(whole, [5 / 6, 1 / 6], generator=_generator(settings))
        if not len(test):
            raise DataError(f"{root} has {len(whole)} images, too few to keep some for the test")
        return train, test, whole.classes
    parts = [ImageFolder(root / name, size=SIZE, mode="L") for name in ("train", "test")]
    if parts[0].classes != parts[1].classes:
        raise DataError(
            f"the classes of {root / 'train'} ({', '.join(parts[0].classes)}) are not those of "
            f"{root / 'test'} ({', '.join(parts[1].classes)}); give both the same sub-folders"
        )
    return parts[0], parts[1], parts[0].classes


def _decoded(data: Images) -> TensorDataset:
    """Each picture of a folder read once: 784 bytes an image, and a bad file is told at once."""
    images, labels = zip(*(data[index] for index in range(len(data))), strict=True)
    return TensorDataset(np.stack(images), np.array(labels, dtype=np.int64))


def _limited(data: Images, limit: int | None) -> Images:
    """At most ``limit`` samples, spread evenly, as folders are sorted by class."""
    size = len(data)
    if limit is None or limit >= size:
        return data
    return Subset(data, np.linspace(0, size - 1, limit).astype(int).tolist())
