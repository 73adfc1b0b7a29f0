"""How one batch is made, from its number and its indices.

Invariant: a batch depends on (data set, indices, seed, epoch, number) and on nothing else, so it
does not matter which thread makes it, or when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

import numpy as np

from flame.core.errors import DataError
from flame.data._random import Purpose, random_generator
from flame.data.collate import default_collate, default_convert
from flame.data.dataset import batch_of, samples_of
from flame.data.placement import pinned

__all__ = ["END", "BatchMaker", "BatchTransform", "Collate", "SampleStream"]

Collate: TypeAlias = Callable[[Any], Any]
BatchTransform: TypeAlias = Callable[[Any, np.random.Generator], Any]


class _End:
    """Stands for the batch after the last one, which only an iterable data set knows."""


END: Final = _End()


class SampleStream:
    """The samples of an iterable data set, which several threads take in turns, batch by batch.

    Batch n is taken only after batch n − 1: threads begin their batches in order, so the one whose
    turn it is is always at work or about to be, and the others wait for it.
    """

    def __init__(self, samples: Iterator[Any], size: int, *, drop_last: bool) -> None:
        self._samples = samples
        self._size = size
        self._drop_last = drop_last
        self._turn = 0
        self._closed = False
        self._condition = threading.Condition()

    def skip(self, batches: int) -> None:
        """Pass over the first batches."""
        for number in range(batches):
            self.take(number)

    def take(self, number: int) -> list[Any]:
        """The samples of a batch; none after the end, or once the stream is closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._turn == number)
            if self._closed:
                return []
        try:
            # The turn keeps others out; holding the lock would keep `close` waiting for the data.
            samples = list(islice(self._samples, self._size))
        finally:
            with self._condition:
                self._turn += 1
                self._condition.notify_all()
        return [] if self._drop_last and len(samples) < self._size else samples

    def close(self) -> None:
        """Let no thread wait any longer."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of one epoch.

    `single` batches are one sample each, without a first dimension; `pin`: their tensors are put
    into page-locked memory.
    """

    dataset: Any
    collate: Collate | None
    transform: BatchTransform | None
    seed: int
    epoch: int
    single: bool
    pin: bool = False

    def from_indices(self, number: int, indices: Any) -> Any:
        """Batch `number`, of the samples at `indices` (or at one index, if single)."""
        generator = random_generator(self.seed, Purpose.BATCH, self.epoch, number)
        try:
            if self.single:
                sample = samples_of(self.dataset, [indices], generator)[0]
                batch = (self.collate or default_convert)(sample)
            elif self.collate is not None:
                batch = self.collate(samples_of(self.dataset, indices, generator))
            else:
                batch = batch_of(self.dataset, indices, generator)
            return self._transformed(batch, generator)
        except StopIteration as error:
            raise _ended(self.dataset, number) from error
        except Exception as error:
            error.add_note(f"while making batch {number}, of the samples {_shortened(indices)}")
            raise

    def from_stream(self, number: int, stream: SampleStream) -> Any:
        """Batch `number` of an iterable data set, or END."""
        generator = random_generator(self.seed, Purpose.BATCH, self.epoch, number)
        try:
            samples = stream.take(number)
            if not samples:
                return END
            if self.single:
                batch = (self.collate or default_convert)(samples[0])
            else:
                batch = (self.collate or default_collate)(samples)
            return self._transformed(batch, generator)
        except StopIteration as error:
            raise _ended(self.dataset, number) from error
        except Exception as error:
            error.add_note(f"while making batch {number} of an iterable data set")
            raise

    def _transformed(self, batch: Any, generator: np.random.Generator) -> Any:
        made = batch if self.transform is None else self.transform(batch, generator)
        return pinned(made) if self.pin else made


def _ended(dataset: Any, number: int) -> DataError:
    """A StopIteration that went on would end the loop over the loader as if all were well."""
    return DataError(
        f"{type(dataset).__name__}: StopIteration while making batch {number}; a data set, "
        "collate_fn "
        "or transform called next() on something that was used up"
    )


def _shortened(indices: Any) -> str:
    if isinstance(indices, Sequence) and len(indices) > 8:
        return f"{', '.join(map(str, indices[:8]))}, … ({len(indices)} in all)"
    return str(indices)
