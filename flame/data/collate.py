"""From a list of samples to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flame.core.errors import DTypeError, ShapeError
from flame.data._tensors import Tensor, as_array, as_tensor

__all__ = ["default_collate", "default_convert"]


def default_collate(batch: Sequence[Any]) -> Any:
    """Join samples of the same structure into one batch with a first dimension of their number.

    Tensors, arrays and numbers become tensors (Python floats float64, ints int64, bools bool);
    strings and bytes become a list; dicts, tuples, named tuples and lists keep their structure.

    Raises:
        ShapeError: samples whose shapes or lengths differ.
        DTypeError: something that cannot be joined.
    """
    if not batch:
        raise ShapeError("default_collate: got no samples")
    first = batch[0]
    if isinstance(first, (Tensor, np.ndarray)):
        return _stacked([_array(sample, first) for sample in batch])
    if isinstance(first, (bool, int, float, np.generic)):
        return as_tensor(np.asarray(batch, dtype=_number_dtype(batch)))
    if isinstance(first, (str, bytes)):
        return list(batch)
    if isinstance(first, Mapping):
        return {key: default_collate(_values(batch, key)) for key in first}
    if isinstance(first, Sequence):
        return _joined(first, batch)
    raise DTypeError(
        f"default_collate: cannot join samples of type {type(first).__name__}; samples are "
        "tensors, "
        "arrays, numbers, strings, or dicts, tuples and lists of them; give a collate_fn for others"
    )


def default_convert(value: Any) -> Any:
    """Arrays as tensors, in any structure; all else stays as it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        return as_tensor(value)
    if isinstance(value, Mapping):
        return {key: default_convert(entry) for key, entry in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return value
    return _like(value, [default_convert(entry) for entry in value])


def _array(sample: Any, first: Any) -> np.ndarray:
    if not isinstance(sample, (Tensor, np.ndarray)):
        raise DTypeError(
            f"default_collate: some samples are a {type(first).__name__}, others a "
            f"{type(sample).__name__}"
        )
    return as_array(sample)


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    first = arrays[0]
    for position, array in enumerate(arrays):
        if array.shape != first.shape:
            raise ShapeError(
                f"default_collate: sample 0 has shape {first.shape}, sample {position} has "
                f"{array.shape}; bring them to one shape, or give a collate_fn"
            )
    return as_tensor(np.stack(arrays))


def _number_dtype(batch: Sequence[Any]) -> Any:
    """A dtype that holds all numbers; NumPy scalars keep theirs."""
    if all(isinstance(sample, np.generic) for sample in batch):
        return np.result_type(*batch)
    if all(isinstance(sample, (bool, np.bool_)) for sample in batch):
        return np.bool_
    whole = all(isinstance(sample, (int, np.integer)) for sample in batch)
    return np.int64 if whole else np.float64


def _values(batch: Sequence[Any], key: Any) -> list[Any]:
    for position, sample in enumerate(batch):
        if key not in sample:
            raise ShapeError(
                f"default_collate: sample 0 has the key {key!r}, sample {position} not"
            )
    return [sample[key] for sample in batch]


def _joined(first: Sequence[Any], batch: Sequence[Any]) -> Any:
    for position, sample in enumerate(batch):
        if len(sample) != len(first):
            raise ShapeError(
                f"default_collate: sample 0 has {len(first)} parts, sample {position} has "
                f"{len(sample)}"
            )
    return _like(first, [default_collate(parts) for parts in zip(*batch, strict=True)])


def _like(original: Sequence[Any], parts: list[Any]) -> Any:
    """The parts in a sequence of the original's kind."""
    if isinstance(original, tuple):
        return type(original)(*parts) if hasattr(original, "_fields") else tuple(parts)
    return parts
