"""Transforms of whole batches of images, as a loader's `batch_transform` or by themselves.

A transform takes `(images, generator)`, images of shape (N, C, H, W), a tensor or an array, and
returns new images of the same kind; it never changes its input. Random ones draw from the given
`numpy.random.Generator` alone, once for the batch, so a batch is augmented the same whichever
worker does it. All work is done by NumPy on the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from flame.core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from flame.data._tensors import Tensor, as_array, as_tensor

__all__ = [
    "Compose",
    "Normalize",
    "OnField",
    "RandomCrop",
    "RandomHorizontalFlip",
    "ToFloat",
    "Transform",
]

Images: TypeAlias = Any  # a tensor or an array (N, C, H, W)


class Transform(Protocol):
    """Anything that changes a batch, with random numbers if it needs them."""

    def __call__(self, images: Images, generator: np.random.Generator) -> Images:
        """The changed batch."""
        ...


class BatchTransform:
    """Base of the transforms below: gives them an array, and returns a tensor for a tensor."""

    def __call__(self, images: Images, generator: np.random.Generator | None = None) -> Images:
        """The changed images (N, C, H, W); random transforms need a generator."""
        if not isinstance(images, (Tensor, np.ndarray)):
            raise DTypeError(
                f"{self._name}: images must be a tensor or an array, got {type(images).__name__}"
            )
        if images.ndim != 4:
            raise ShapeError(
                f"{self._name}: images must have the shape (N, C, H, W), got {tuple(images.shape)}"
            )
        changed = self._apply(as_array(images), generator)
        return as_tensor(changed) if isinstance(images, Tensor) else changed

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        raise UnsupportedError(f"{self._name}: a transform defines _apply")

    def _random(self, generator: np.random.Generator | None) -> np.random.Generator:
        if generator is None:
            raise ArgumentError(
                f"{self._name}: needs a generator, such as numpy.random.default_rng(0); "
                "as a loader's batch_transform it gets one"
            )
        return generator

    @property
    def _name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{self._name}({options})"


class RandomCrop(BatchTransform):
    """Cut a window out of each image, at a place of its own.

    Args:
        size: (height, width) of the window, or one number for both.
        padding: pixels added on each side before: one number, (left and right, top and bottom), or
            (left, top, right, bottom).
        fill: the value of added pixels, in "constant" mode.
        padding_mode: "constant", "edge", "reflect" or "symmetric".

    Raises:
        ShapeError: images that are smaller than the window, padding included.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        padding: int | Sequence[int] = 0,
        fill: float = 0,
        padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant",
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise ArgumentError(f"RandomCrop: size must be at least 1, got {size}")
        self.padding = _four_sides(padding)
        if padding_mode not in ("constant", "edge", "reflect", "symmetric"):
            raise ArgumentError(f"RandomCrop: unknown padding_mode {padding_mode!r}")
        self.fill = fill
        self.padding_mode = padding_mode

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        random = self._random(generator)
        padded = self._padded(images)
        number, (height, width) = len(padded), self.size
        rows, columns = padded.shape[2] - height + 1, padded.shape[3] - width + 1
        if rows < 1 or columns < 1:
            raise ShapeError(
                f"RandomCrop: images of {images.shape[2]} by {images.shape[3]} with padding "
                f"{self.padding} are smaller than the window of {height} by {width}"
            )
        top, left = random.integers(rows, size=number), random.integers(columns, size=number)
        # (N, C, rows, columns, height, width): a view of all windows, of which one each is copied
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.size, axis=(2, 3))
        return windows[np.arange(number), :, top, left]

    def _padded(self, images: np.ndarray) -> np.ndarray:
        left, top, right, bottom = self.padding
        if not any(self.padding):
            return images
        widths = ((0, 0), (0, 0), (top, bottom), (left, right))
        if self.padding_mode == "constant":
            return np.pad(images, widths, constant_values=self.fill)
        return np.pad(images, widths, mode=self.padding_mode)


class RandomHorizontalFlip(BatchTransform):
    """Mirror each image left to right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise ArgumentError(f"RandomHorizontalFlip: p must lie in [0, 1], got {p}")
        self.p = p

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        chosen = self._random(generator).random(len(images)) < self.p
        flipped = images.copy()
        flipped[chosen] = images[chosen, :, :, ::-1]
        return flipped


class ToFloat(BatchTransform):
    """Whole numbers from 0 to their largest, such as pixels of 0 to 255, to float32 in [0, 1].

    Floating images become float32 and keep their values.
    """

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        if images.dtype.kind not in "ui":
            return images.astype(np.float32)
        largest = np.iinfo(images.dtype).max
        scaled: np.ndarray = np.multiply(images, np.float32(1 / largest), dtype=np.float32)
        return scaled


class Normalize(BatchTransform):
    """Subtract a mean from each channel and divide by a standard deviation, of floating images.

    Args:
        mean, std: one number for each channel, or one for all. In the images' units: for pixels of
            0 to 255, put ToFloat before.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean = np.atleast_1d(np.asarray(mean, dtype=np.float64))
        self.std = np.atleast_1d(np.asarray(std, dtype=np.float64))
        if self.mean.ndim != 1 or self.std.ndim != 1 or not (self.std > 0).all():
            raise ArgumentError(
                f"Normalize: mean and std must be numbers, one a channel, std above 0, got {mean}, "
                f"{std}"
            )

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        if images.dtype.kind in "uib":
            raise DTypeError(f"Normalize: images have dtype {images.dtype}; put ToFloat before it")
        channels = images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ShapeError(
                    f"Normalize: images have {channels} channels, {name} has {len(values)} values"
                )
        scale = (1.0 / self.std).astype(images.dtype)[:, None, None]
        shift = (-self.mean / self.std).astype(images.dtype)[:, None, None]
        normalized: np.ndarray = images * scale
        normalized += shift
        return normalized


class Compose(BatchTransform):
    """One transform after the other.

    Args:
        transforms: called with the images and the same generator.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def _apply(self, images: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
        changed: Any = images
        for transform in self.transforms:
            changed = transform(changed, generator)  # type: ignore[arg-type]
        return as_array(changed)


class OnField:
    """Apply a transform to one part of each batch, such as the images of (images, labels).

    Args:
        transform: called with that part and the generator.
        field: an index into a tuple or list, or a key of a dict.
    """

    def __init__(self, transform: Transform, field: Any = 0) -> None:
        self.transform = transform
        self.field = field

    def __call__(self, batch: Any, generator: np.random.Generator) -> Any:
        """The batch with the changed part."""
        if isinstance(batch, Mapping):
            return {**batch, self.field: self.transform(batch[self.field], generator)}
        if not isinstance(batch, (tuple, list)):
            raise DTypeError(
                f"OnField: a batch must be a tuple, list or dict, got {type(batch).__name__}"
            )
        parts = list(batch)
        parts[self.field] = self.transform(parts[self.field], generator)
        if isinstance(batch, list):
            return parts
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)

    def __repr__(self) -> str:
        return f"OnField({self.transform!r}, field={self.field!r})"


def _four_sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom."""
    values = (padding,) if isinstance(padding, int) else tuple(padding)
    if len(values) not in (1, 2, 4) or min(values) < 0:
        raise ArgumentError(
            f"RandomCrop: padding must be 1, 2 or 4 numbers of at least 0, got {padding}"
        )
    left, top, right, bottom = (values * 4)[:4]
    return left, top, right, bottom
