"""The bundled Fashion-MNIST images; `files/README.md` names their source and licence."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

import numpy as np

from flame.core.errors import ArgumentError
from flame.data._tensors import as_tensor
from flame.data.dataset import TensorDataset

__all__ = ["FASHION_CLASSES", "FashionMNIST", "fashion_mnist"]

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class FashionMNIST(TensorDataset):
    """Grey images of clothes, as tensors: sample i is (image (1, 28, 28) uint8, class int64).

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
    Learning Algorithms (2017). This is a random part of it, with a division of its own.

    Args:
        split: "train" (10,000 images) or "test" (2,000).
    """

    classes = FASHION_CLASSES

    def __init__(self, split: Literal["train", "test"] = "train") -> None:
        if split not in ("train", "test"):
            raise ArgumentError(f'FashionMNIST: split must be "train" or "test", got {split!r}')
        with (
            as_file(files("flame.data") / "files" / "fashion_mnist.npz") as path,
            np.load(path) as arrays,
        ):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        self.split = split
        super().__init__(as_tensor(images[:, None]), as_tensor(labels.astype(np.int64)))

    @property
    def images(self) -> np.ndarray:
        """All images (N, 1, 28, 28), uint8, shared with the tensors."""
        shared: np.ndarray = self.tensors[0].numpy()  # type: ignore[union-attr]
        return shared

    @property
    def labels(self) -> np.ndarray:
        """All classes (N,), int64, shared with the tensors."""
        shared: np.ndarray = self.tensors[1].numpy()  # type: ignore[union-attr]
        return shared


def fashion_mnist(split: Literal["train", "test"] = "train") -> FashionMNIST:
    """The bundled Fashion-MNIST: "train" (10,000 images) or "test" (2,000)."""
    return FashionMNIST(split)
