"""ImageFolder: images whose classes are the sub-folders that they lie in."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flame.core.errors import ArgumentError, DataError, ShapeError, UnsupportedError
from flame.data._random import Purpose, random_generator
from flame.data.collate import default_collate
from flame.data.dataset import Dataset

__all__ = ["ImageFolder"]

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
Transform = Callable[[np.ndarray, np.random.Generator], Any]


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images of a folder that has a sub-folder for each class:

        root/cat/1.png
        root/cat/2.jpg
        root/dog/1.png

    Sample i is (image, class): an array (C, H, W) of uint8, and the class's position among the
    sorted names of the sub-folders. Images are found at any depth below their class's folder, are
    sorted by path, and are read when they are asked for. Needs pillow (`pip install
    flame-engine[plot]`).

    Args:
        root: the folder.
        transform: `transform(image, generator)` changes each image; in a loader, the generator
            holds the random numbers of its batch.
        size: (height, width), or one number for both: crop each image in the middle to that
            shape, and scale it to that size. Without it, a batch's images must have one size.
        mode: "RGB" (3 channels) or "L" (1 channel, grey).

    Raises:
        DataError: no such folder, no classes, a class without images, an image that cannot be read.
        UnsupportedError: pillow is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        mode: Literal["RGB", "L"] = "RGB",
    ) -> None:
        if mode not in ("RGB", "L"):
            raise ArgumentError(f'ImageFolder: mode must be "RGB" or "L", got {mode!r}')
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and min(self.size) < 1:
            raise ArgumentError(f"ImageFolder: size must be at least 1, got {size}")
        _pillow()
        self.root = Path(root)
        self.transform = transform
        self.mode = mode
        folders = _class_folders(self.root)
        self.classes = tuple(folder.name for folder in folders)
        self.class_to_idx = {name: position for position, name in enumerate(self.classes)}
        self.samples = [
            (path, position) for position, folder in enumerate(folders) for path in _images(folder)
        ]
        self.targets = [position for _, position in self.samples]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image and the class of a sample, augmented as if in epoch 0 of seed 0."""
        return self._sample(index, random_generator(0, Purpose.SAMPLE, number=index))

    def __len__(self) -> int:
        return len(self.samples)

    def get_samples(self, indices: Sequence[int], generator: np.random.Generator) -> list[Any]:
        """The images and classes of a batch, augmented one after the other."""
        if type(self).__getitem__ is not ImageFolder.__getitem__:
            return super().get_samples(indices, generator)
        return [self._sample(index, generator) for index in indices]

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """Images (N, C, H, W) and classes (N,)."""
        samples = self.get_samples(indices, generator)
        try:
            return default_collate(samples)
        except ShapeError as error:
            sizes = {
                np.shape(image): self.samples[i][0]
                for i, (image, _) in zip(indices, samples, strict=True)
            }
            listed = ", ".join(f"{path} {shape}" for shape, path in list(sizes.items())[:2])
            raise DataError(
                f"ImageFolder: the images of a batch differ in size: {listed}; give size=(height, "
                "width)"
            ) from error

    def _sample(self, index: int, generator: np.random.Generator) -> tuple[Any, int]:
        path, position = self.samples[index]
        image = _read(path, self.mode, self.size)
        return image if self.transform is None else self.transform(image, generator), position

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.root)!r}: {len(self)} images, {len(self.classes)} classes)"


def _pillow() -> tuple[types.ModuleType, types.ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UnsupportedError(
            "ImageFolder: reading images needs pillow: pip install 'flame-engine[plot]'"
        ) from None
    return Image, ImageOps


def _class_folders(root: Path) -> list[Path]:
    layout = (
        f"an image folder has a sub-folder for each class, with its images: {root}/cat/1.png, "
        f"{root}/dog/1.png"
    )
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise DataError(f"ImageFolder: {root} {what}; {layout}")
    folders = sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        loose = sum(entry.suffix.lower() in SUFFIXES for entry in root.iterdir())
        found = f"only {loose} images" if loose else "nothing of the kind"
        raise DataError(f"ImageFolder: {root} has no sub-folders, {found}; {layout}")
    for folder in folders:
        if not _images(folder):
            raise DataError(
                f"ImageFolder: the class folder {folder} has no images "
                f"({', '.join(sorted(SUFFIXES))}); "
                f"remove it, or fill it: {layout}"
            )
    return folders


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _read(path: Path, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """The image as an array (C, H, W) of uint8."""
    image_module, operations = _pillow()
    try:
        with image_module.open(path) as file:
            image = operations.exif_transpose(file).convert(mode)
    # Pillow's decoders raise each of these for damaged files.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        image_module.DecompressionBombError,
    ) as error:
        raise DataError(
            f"ImageFolder: {path} cannot be read as an image: {error}; replace or remove the file"
        ) from error
    if size is not None:
        image = operations.fit(image, (size[1], size[0]), method=image_module.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
