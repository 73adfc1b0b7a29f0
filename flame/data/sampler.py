"""Samplers: the order in which a loader asks for samples.

A random sampler is a function of (seed, epoch): each iteration is the next epoch, and its
state_dict, taken before an iteration, brings that iteration back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Generic, TypeVar

import numpy as np

from flame.core.errors import ArgumentError, StateError, UnsupportedError
from flame.data._arguments import whole_number
from flame.data._random import Purpose, random_generator, seed_of
from flame.ops.generator import Generator

__all__ = [
    "BatchSampler",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "WeightedRandomSampler",
]

T_co = TypeVar("T_co", covariant=True)


class Sampler(Generic[T_co]):
    """Gives indices, or lists of them. A subclass defines `__iter__`, and `__len__` if it can."""

    def __iter__(self) -> Iterator[T_co]:
        raise UnsupportedError(f"{type(self).__name__}: a sampler defines __iter__")


class SequentialSampler(Sampler[int]):
    """All indices in order."""

    def __init__(self, data_source: Sized) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source)))

    def __len__(self) -> int:
        return len(self.data_source)


class SeededSampler(Sampler[int]):
    """What random samplers share: a seed, read when it is first needed, and a count of epochs."""

    def __init__(self, generator: Generator | None) -> None:
        self._generator = generator
        self._seed: int | None = None
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = self._order(self._seed_now(), self._epoch)
        self._epoch += 1
        return iter(order.tolist())

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch."""
        raise UnsupportedError(f"{type(self).__name__}: a random sampler defines _order")

    def _seed_now(self) -> int:
        if self._seed is None:
            self._seed = seed_of(self._generator)
        return self._seed

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration depends on."""
        return {"seed": self._seed_now(), "epoch": self._epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration be the one that `state_dict()` was taken before."""
        if not {"seed", "epoch"} <= state_dict.keys():
            raise StateError(
                f"{type(self).__name__}.load_state_dict: needs seed and epoch, got "
                f"{sorted(state_dict)}"
            )
        self._seed, self._epoch = int(state_dict["seed"]), int(state_dict["epoch"])


class RandomSampler(SeededSampler):
    """All indices in random order, another one in each epoch.

    Args:
        data_source: the data set, for its length.
        replacement: draw each index independently, so some come twice.
        num_samples: how many to draw; by default all. Without replacement, more than there are
            begin another order.
        generator: whose seed decides; by default that of `flame.manual_seed`.
    """

    def __init__(
        self,
        data_source: Sized,
        replacement: bool = False,
        num_samples: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        if num_samples is not None:
            num_samples = whole_number("RandomSampler", "num_samples", num_samples, least=1)
        self.data_source = data_source
        self.replacement = replacement
        self._num_samples = num_samples

    @property
    def num_samples(self) -> int:
        """How many indices an epoch has."""
        return len(self.data_source) if self._num_samples is None else self._num_samples

    def __len__(self) -> int:
        return self.num_samples

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        random = random_generator(seed, Purpose.ORDER, epoch)
        size, wanted = len(self.data_source), self.num_samples
        if size == 0:
            return np.empty(0, dtype=np.int64)
        if self.replacement:
            return random.integers(size, size=wanted)
        rounds = -(-wanted // size)
        return np.concatenate([random.permutation(size) for _ in range(rounds)])[:wanted]


class WeightedRandomSampler(SeededSampler):
    """Indices drawn with probabilities in proportion to weights.

    Args:
        weights: one for each sample, finite and at least 0; they need not add up to 1.
        num_samples: how many to draw in each epoch.
        replacement: whether an index may come again.
        generator: whose seed decides; by default that of `flame.manual_seed`.

    Raises:
        ArgumentError: weights that cannot be used, or too few of them.
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        num_samples: int,
        replacement: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
            raise ArgumentError(
                "WeightedRandomSampler: weights must be a list of finite numbers of at least 0"
            )
        possible = int(np.count_nonzero(values))
        if num_samples < 1 or possible < (1 if replacement else num_samples):
            raise ArgumentError(
                f"WeightedRandomSampler: cannot draw {num_samples} samples "
                f"{'with' if replacement else 'without'} replacement from {possible} weights above "
                "0"
            )
        self.weights = values
        self.num_samples = num_samples
        self.replacement = replacement

    def __len__(self) -> int:
        return self.num_samples

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        random = random_generator(seed, Purpose.WEIGHTED, epoch)
        odds = self.weights / self.weights.sum()
        return random.choice(len(odds), self.num_samples, replace=self.replacement, p=odds)


class BatchSampler(Sampler[list[int]]):
    """The indices of a sampler in lists of `batch_size`.

    Args:
        sampler: gives the indices.
        batch_size: at least 1.
        drop_last: leave out a last list that is shorter.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = whole_number("BatchSampler", "batch_size", batch_size, least=1)
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[int]]:
        return self._lists(iter(self.sampler))  # the sampler begins its epoch now, not later

    def _lists(self, indices: Iterator[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in indices:
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch and not self.drop_last:
            yield batch

    def __len__(self) -> int:
        size = len(self.sampler)  # type: ignore[arg-type]  # a sampler without it has no length
        return size // self.batch_size if self.drop_last else -(-size // self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state, where it has one."""
        return self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hand a state back to the sampler."""
        if hasattr(self.sampler, "load_state_dict"):
            self.sampler.load_state_dict(state_dict)
