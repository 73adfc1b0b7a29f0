"""Data sets, splitting, samplers and collation."""

from __future__ import annotations

from collections import Counter, namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate as torch_collate

import flame
from flame.core.errors import (
    ArgumentError,
    DTypeError,
    IndexRangeError,
    ShapeError,
    StateError,
    UnsupportedError,
)
from flame.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    random_split,
)

RANDOM = np.random.default_rng(0)


class Squares(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> int:
        return index**2

    def __len__(self) -> int:
        return self.size


def rows(size: int = 6) -> TensorDataset:
    images = np.arange(size * 4, dtype=np.float32).reshape(size, 4)
    return TensorDataset(flame.tensor(images), np.arange(size))


def as_arrays(batch: Any) -> list[np.ndarray]:
    return [part.numpy() for part in batch]


# Data sets


def test_tensor_dataset_gives_rows_and_batches() -> None:
    dataset = rows()
    image, label = dataset[2]
    assert image.tolist() == [8.0, 9.0, 10.0, 11.0]
    assert label == 2
    assert len(dataset) == 6
    images, labels = dataset.get_batch([5, 0, 0], RANDOM)
    assert isinstance(images, flame.Tensor)
    assert images.dtype is flame.float32
    assert images.numpy()[:, 0].tolist() == [20.0, 0.0, 0.0]
    assert labels.tolist() == [5, 0, 0]


def test_a_batch_of_a_tensor_dataset_is_a_copy() -> None:
    dataset = rows()
    images, _ = dataset.get_batch([0, 1], RANDOM)
    images.zero_()
    assert dataset.tensors[0].numpy()[0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_subclass_that_changes_samples_is_asked_for_samples() -> None:
    class Negated(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            image, label = super().__getitem__(index)
            return -image, label

    base = rows()
    images, _ = Negated(*base.tensors).get_batch([1, 2], RANDOM)
    np.testing.assert_array_equal(images.numpy(), -base.tensors[0].numpy()[1:3])
    part = Subset(Negated(*base.tensors), [2, 1]).get_batch([1, 0], RANDOM)[0]
    np.testing.assert_array_equal(part.numpy(), images.numpy())


@pytest.mark.parametrize(
    "arguments",
    [(), (np.zeros(()),), (np.zeros((2, 1)), np.zeros((3, 1)))],
    ids=["none", "no dimension", "unequal"],
)
def test_tensor_dataset_refuses_shapes(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ShapeError, match="same first dimension"):
        TensorDataset(*arguments)


def test_tensor_dataset_refuses_lists() -> None:
    with pytest.raises(DTypeError, match="argument 0 must be a tensor or an array, got list"):
        TensorDataset([1, 2])  # type: ignore[arg-type]


def test_subset_and_concatenation_agree_with_single_samples() -> None:
    whole = rows(4) + Subset(rows(6), [5, 3, 1])
    assert isinstance(whole, ConcatDataset)
    assert len(whole) == 7
    assert [int(whole[i][1]) for i in range(7)] == [0, 1, 2, 3, 5, 3, 1]
    assert int(whole[-1][1]) == 1
    for indices in ([0, 3], [4, 6, 5], [6, 0, 5, 1, 1]):
        ours = as_arrays(whole.get_batch(indices, RANDOM))
        expected = [np.stack([np.asarray(whole[i][part]) for i in indices]) for part in (0, 1)]
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    for index in (7, -8):
        with pytest.raises(IndexRangeError, match="of 7 samples"):
            whole[index]


def test_concatenation_refuses_what_has_no_indices() -> None:
    class Stream(IterableDataset[int]):
        pass

    with pytest.raises(ArgumentError, match="at least one"):
        ConcatDataset([])
    with pytest.raises(DTypeError, match="is iterable"):
        ConcatDataset([Squares(2), Stream()])
    with pytest.raises(UnsupportedError, match="cannot be concatenated"):
        Stream() + Squares(2)


def test_a_data_set_without_methods_says_which_are_missing() -> None:
    class Empty(Dataset[int]):
        pass

    with pytest.raises(UnsupportedError, match="defines __getitem__"):
        Empty()[0]
    with pytest.raises(DTypeError, match="defines __len__"):
        random_split(Empty(), [1])
    with pytest.raises(UnsupportedError, match="defines __iter__"):
        iter(IterableDataset())
    with pytest.raises(UnsupportedError, match="defines __iter__"):
        iter(Sampler())


def test_pytorchs_protocol_for_many_samples_is_used() -> None:
    class Together(Squares):
        def __getitems__(self, indices: Sequence[int]) -> list[int]:
            return [-index for index in indices]

    assert Together(5).get_batch([1, 2], RANDOM).tolist() == [-1, -2]


# Splitting


def test_random_split_divides_without_overlap_and_repeats() -> None:
    dataset = Squares(103)
    generator = flame.Generator().manual_seed(3)
    parts = random_split(dataset, [50, 53], generator)
    assert [len(part) for part in parts] == [50, 53]
    together = [index for part in parts for index in part.indices]
    assert sorted(together) == list(range(103))
    assert together != list(range(103))
    again = random_split(dataset, [50, 53], flame.Generator().manual_seed(3))
    assert [part.indices for part in again] == [part.indices for part in parts]
    other = random_split(dataset, [50, 53], flame.Generator().manual_seed(4))
    assert other[0].indices != parts[0].indices


@pytest.mark.parametrize(
    ("size", "fractions"), [(103, [0.5, 0.3, 0.2]), (10, [0.9, 0.1]), (7, [1 / 3] * 3)]
)
def test_random_split_takes_fractions_as_pytorch(size: int, fractions: list[float]) -> None:
    ours = [len(part) for part in random_split(Squares(size), fractions)]
    theirs = [len(part) for part in torch.utils.data.random_split(Squares(size), fractions)]  # type: ignore[arg-type]
    assert ours == theirs


@pytest.mark.parametrize("lengths", [[3, 3], [0.5, 0.6], [-1, 11], [11]])
def test_random_split_refuses_lengths(lengths: list[float]) -> None:
    with pytest.raises(ArgumentError, match="lengths must"):
        random_split(Squares(10), lengths)


# Samplers


def test_random_sampler_gives_each_index_once_and_another_order_each_epoch() -> None:
    sampler = RandomSampler(Squares(50), generator=flame.Generator().manual_seed(1))
    orders = [list(sampler) for _ in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    again = RandomSampler(Squares(50), generator=flame.Generator().manual_seed(1))
    assert [list(again) for _ in range(3)] == orders


def test_random_sampler_goes_back_by_its_state() -> None:
    sampler = RandomSampler(Squares(20))
    list(sampler)
    state = sampler.state_dict()
    second = list(sampler)
    other = RandomSampler(Squares(20), generator=flame.Generator().manual_seed(9))
    other.load_state_dict(state)
    assert list(other) == second
    with pytest.raises(StateError, match="seed and epoch"):
        other.load_state_dict({"seed": 1})


def test_random_sampler_draws_more_and_with_replacement() -> None:
    more = list(RandomSampler(Squares(4), num_samples=10))
    assert Counter(more[:8]) == Counter({0: 2, 1: 2, 2: 2, 3: 2})
    assert len(more) == 10
    drawn = list(RandomSampler(Squares(4), replacement=True, num_samples=4000))
    assert len(RandomSampler(Squares(4), replacement=True)) == 4
    assert all(850 < count < 1150 for count in Counter(drawn).values())
    assert list(RandomSampler(Squares(0))) == []
    with pytest.raises(ArgumentError, match="num_samples"):
        RandomSampler(Squares(4), num_samples=0)


def test_weighted_sampler_follows_its_weights() -> None:
    drawn = Counter(WeightedRandomSampler([0.0, 1.0, 3.0], 4000))
    assert drawn[0] == 0
    assert 850 < drawn[1] < 1150
    without = list(WeightedRandomSampler([0.1, 0.0, 0.5, 9.0], 3, replacement=False))
    assert sorted(without) == [0, 2, 3]


@pytest.mark.parametrize(
    ("weights", "number", "replacement"),
    [
        ([1.0, -1.0], 2, True),
        ([1.0, float("nan")], 2, True),
        ([0.0, 0.0], 2, True),
        ([[1.0]], 1, True),
        ([1.0, 0.0], 2, False),
        ([1.0], 0, True),
    ],
)
def test_weighted_sampler_refuses(weights: Any, number: int, replacement: bool) -> None:
    with pytest.raises(ArgumentError, match="WeightedRandomSampler"):
        WeightedRandomSampler(weights, number, replacement)


def test_batch_sampler_groups_indices() -> None:
    order = SequentialSampler(Squares(7))
    assert list(BatchSampler(order, 3, drop_last=False)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(BatchSampler(order, 3, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    for drop_last in (False, True):
        sampler = BatchSampler(order, 3, drop_last)
        assert len(sampler) == len(list(sampler))
    for size in (0, 2.5, True):
        with pytest.raises(ArgumentError, match="batch_size"):
            BatchSampler(order, size, drop_last=False)  # type: ignore[arg-type]


# Collation


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    "samples",
    [
        [1.5, 2.5],
        [1, 2],
        [True, False],
        [np.float32(1), np.float32(2)],
        [np.arange(3), np.arange(3)],
        [np.zeros((2, 1), np.uint8)],
        ["a", "b"],
        [{"x": 1, "y": [np.ones(2), 2.0]}, {"x": 3, "y": [np.zeros(2), 4.0]}],
        [(np.ones(2), 1), (np.zeros(2), 2)],
        [Pair(1, np.ones(1)), Pair(2, np.ones(1))],
    ],
    ids=str,
)
def test_collation_equals_pytorchs(samples: list[Any]) -> None:
    assert_same(default_collate(samples), torch_collate(samples))


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, flame.Tensor)
        assert str(theirs.dtype).removeprefix("torch.") == ours.dtype.name
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)) and not all(isinstance(part, str) for part in theirs):
        assert len(ours) == len(theirs)
        assert getattr(ours, "_fields", None) == getattr(theirs, "_fields", None)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


def test_collation_stacks_tensors() -> None:
    batch = default_collate([flame.tensor(np.full(2, i, np.float32)) for i in range(3)])
    assert batch.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("samples", "error", "match"),
    [
        ([], ShapeError, "no samples"),
        ([np.ones(2), np.ones(3)], ShapeError, r"shape \(2,\), sample 1 has \(3,\)"),
        ([(1, 2), (1,)], ShapeError, "2 parts, sample 1 has 1"),
        ([{"a": 1}, {"b": 1}], ShapeError, "sample 1 not"),
        ([None, None], DTypeError, "NoneType"),
        ([np.ones(1), 2], DTypeError, "others a int"),
    ],
    ids=str,
)
def test_collation_refuses(samples: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        default_collate(samples)


def test_conversion_reaches_into_structures() -> None:
    converted = default_convert({"a": np.ones(2), "b": (np.float32(1), "text", None)})
    assert converted["a"].tolist() == [1.0, 1.0]
    assert converted["b"][0].dtype is flame.float32
    assert converted["b"][1:] == ("text", None)
