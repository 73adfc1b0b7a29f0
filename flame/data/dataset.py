"""Data sets: what has samples, by index or one after the other.

A loader asks a data set for whole batches. `Dataset.get_batch` answers with the joined samples of
`Dataset.get_samples`, which asks for them one by one; a data set that can do better overrides
either, as TensorDataset does with one indexing of each whole array.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np

from flame.core.errors import (
    ArgumentError,
    DTypeError,
    IndexRangeError,
    ShapeError,
    UnsupportedError,
)
from flame.data._random import Purpose, random_generator, seed_of
from flame.data._tensors import Tensor, as_array, as_tensor
from flame.data.collate import default_collate
from flame.ops.generator import Generator

__all__ = [
    "ConcatDataset",
    "Dataset",
    "IterableDataset",
    "Subset",
    "TensorDataset",
    "batch_of",
    "random_split",
    "samples_of",
]

T_co = TypeVar("T_co", covariant=True)


class Dataset(Generic[T_co]):
    """Samples by index. A subclass defines `__getitem__` and `__len__`.

    Loaders call from several threads at once, so reading a sample must not change the data set.
    """

    def __getitem__(self, index: int) -> T_co:
        raise UnsupportedError(f"{type(self).__name__}: a data set defines __getitem__")

    def __add__(self, other: Dataset[Any]) -> ConcatDataset:
        return ConcatDataset([self, other])

    def get_samples(self, indices: Sequence[int], generator: np.random.Generator) -> list[Any]:
        """The samples at `indices`, in order.

        Args:
            indices: the samples of one batch.
            generator: for augmentation: the random numbers of this batch in this epoch.
        """
        return _plain_samples(self, indices)

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """The samples at `indices` joined into one batch, as `default_collate` would."""
        return default_collate(self.get_samples(indices, generator))


class IterableDataset(Dataset[T_co]):
    """Samples one after the other. A subclass defines `__iter__`, which starts anew each time.

    With background workers there is still one iteration: workers take the samples of their batch in
    turns, in order, so no sample comes twice and the data set need not know of workers.
    """

    def __iter__(self) -> Iterator[T_co]:
        raise UnsupportedError(f"{type(self).__name__}: an iterable data set defines __iter__")

    def __getitem__(self, index: int) -> T_co:
        raise UnsupportedError(f"{type(self).__name__}: an iterable data set has no indices")

    def __add__(self, other: Dataset[Any]) -> ConcatDataset:
        raise UnsupportedError(
            f"{type(self).__name__}: an iterable data set cannot be concatenated"
        )


def samples_of(dataset: Any, indices: Sequence[int], generator: np.random.Generator) -> list[Any]:
    """`Dataset.get_samples`, of anything that has `__getitem__`."""
    if isinstance(dataset, Dataset):
        return dataset.get_samples(indices, generator)
    return _plain_samples(dataset, indices)


def _plain_samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    together = getattr(dataset, "__getitems__", None)  # PyTorch's protocol for many at once
    if together is not None:
        return list(together(indices))
    return [dataset[index] for index in indices]


def batch_of(dataset: Any, indices: Sequence[int], generator: np.random.Generator) -> Any:
    """`Dataset.get_batch`, of anything that has `__getitem__`."""
    if isinstance(dataset, Dataset):
        return dataset.get_batch(indices, generator)
    return default_collate(samples_of(dataset, indices, generator))


class TensorDataset(Dataset[tuple[Any, ...]]):
    """Sample i is the tuple of the i-th rows of tensors or arrays.

    Args:
        tensors: tensors or NumPy arrays with the same first dimension.

    Raises:
        ShapeError: first dimensions that differ, or none.
    """

    def __init__(self, *tensors: Tensor | np.ndarray) -> None:
        for position, tensor in enumerate(tensors):
            if not isinstance(tensor, (Tensor, np.ndarray)):
                raise DTypeError(
                    f"TensorDataset: argument {position} must be a tensor or an array, got "
                    f"{type(tensor).__name__}"
                )
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ShapeError(
                f"TensorDataset: needs tensors with the same first dimension, got shapes {shapes}"
            )
        self.tensors = tensors

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """The rows of each tensor, taken at once: NumPy lets other threads run while it copies."""
        if type(self).__getitem__ is not TensorDataset.__getitem__:
            return super().get_batch(indices, generator)  # a subclass changed what a sample is
        rows = np.asarray(indices, dtype=np.intp)
        return tuple(as_tensor(as_array(tensor)[rows]) for tensor in self.tensors)


class Subset(Dataset[T_co]):
    """The samples of a data set at some of its indices.

    Args:
        dataset: the whole.
        indices: the parts, in their new order.
    """

    def __init__(self, dataset: Dataset[T_co], indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __getitem__(self, index: int) -> T_co:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)

    def get_samples(self, indices: Sequence[int], generator: np.random.Generator) -> list[Any]:
        """The whole's samples."""
        if type(self).__getitem__ is not Subset.__getitem__:
            return super().get_samples(indices, generator)
        return samples_of(self.dataset, [self.indices[index] for index in indices], generator)

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """The whole's batch."""
        if type(self).__getitem__ is not Subset.__getitem__:
            return super().get_batch(indices, generator)
        return batch_of(self.dataset, [self.indices[index] for index in indices], generator)


class ConcatDataset(Dataset[Any]):
    """Several data sets one behind the other.

    Args:
        datasets: data sets with indices, at least one.
    """

    def __init__(self, datasets: Iterable[Dataset[Any]]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ArgumentError("ConcatDataset: needs at least one data set")
        for position, dataset in enumerate(self.datasets):
            if isinstance(dataset, IterableDataset):
                raise DTypeError(
                    f"ConcatDataset: data set {position} is iterable and has no indices"
                )
        self.cumulative_sizes = list(accumulate(_size(dataset) for dataset in self.datasets))

    def __getitem__(self, index: int) -> Any:
        part, position = self._place(index)
        return self.datasets[part][position]

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def get_samples(self, indices: Sequence[int], generator: np.random.Generator) -> list[Any]:
        """Each part's samples, back in the order that was asked for."""
        if type(self).__getitem__ is not ConcatDataset.__getitem__:
            return super().get_samples(indices, generator)
        samples: list[Any] = [None] * len(indices)
        places = [self._place(index) for index in indices]
        for part in sorted({part for part, _ in places}):
            slots = [slot for slot, place in enumerate(places) if place[0] == part]
            found = samples_of(self.datasets[part], [places[slot][1] for slot in slots], generator)
            for slot, sample in zip(slots, found, strict=True):
                samples[slot] = sample
        return samples

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """A part's own batch where all samples are of one part."""
        places = [self._place(index) for index in indices]
        parts = {part for part, _ in places}
        if len(parts) > 1 or type(self).__getitem__ is not ConcatDataset.__getitem__:
            return super().get_batch(indices, generator)
        return batch_of(self.datasets[parts.pop()], [place[1] for place in places], generator)

    def _place(self, index: int) -> tuple[int, int]:
        """The data set that holds an index, and the index there."""
        if not -len(self) <= index < len(self):
            raise IndexRangeError(f"ConcatDataset: index {index} of {len(self)} samples")
        index %= len(self)
        part = bisect_right(self.cumulative_sizes, index)
        return part, index - (self.cumulative_sizes[part - 1] if part else 0)


def random_split(
    dataset: Dataset[T_co], lengths: Sequence[int | float], generator: Generator | None = None
) -> list[Subset[T_co]]:
    """Divide a data set into parts at random, which share no sample.

    Args:
        dataset: the whole.
        lengths: the sizes of the parts, or fractions that add up to 1. Samples that rounding down
            leaves over go to the first parts, one each.
        generator: whose seed decides; by default that of `flame.manual_seed`.

    Raises:
        ArgumentError: lengths that do not add up.
    """
    total = _size(dataset)
    sizes = _sizes(lengths, total)
    order = random_generator(seed_of(generator), Purpose.SPLIT).permutation(total).tolist()
    ends = list(accumulate(sizes))
    return [Subset(dataset, order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _sizes(lengths: Sequence[int | float], total: int) -> list[int]:
    if any(length < 0 for length in lengths):
        raise ArgumentError(f"random_split: lengths must be at least 0, got {list(lengths)}")
    if all(isinstance(length, (int, np.integer)) for length in lengths) and sum(lengths) == total:
        return [int(length) for length in lengths]
    if abs(sum(lengths) - 1.0) > 1e-9:
        raise ArgumentError(
            f"random_split: lengths must add up to the {total} samples, or fractions to 1, got "
            f"{list(lengths)}"
        )
    sizes = [int(total * length) for length in lengths]
    for part in range(total - sum(sizes)):
        sizes[part % len(sizes)] += 1
    return sizes


def _size(dataset: Any) -> int:
    if not hasattr(dataset, "__len__"):
        raise DTypeError(f"{type(dataset).__name__}: a data set with indices defines __len__")
    return len(dataset)
