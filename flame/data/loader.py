"""DataLoader: batches of a data set, in a given or random order, made ahead by background threads.

Invariant: the batches of an epoch depend on the data set, the loader's settings, its seed and the
number of the epoch, and not on the number of workers; so (seed, epoch, batches handed out) is all
the state that a resume needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from typing import Any

from flame.core.device import Device
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    StateError,
    UnsupportedError,
)
from flame.data._arguments import whole_number
from flame.data._batches import BatchMaker, BatchTransform, Collate, SampleStream
from flame.data._random import seed_of
from flame.data._workers import BatchIterator, Progress, Task, WorkerPool
from flame.data.dataset import IterableDataset
from flame.data.sampler import BatchSampler, RandomSampler, SequentialSampler
from flame.ops.generator import Generator

__all__ = ["DataLoader"]


class DataLoader:
    """Batches of a data set.

    Args:
        dataset: anything with `__getitem__` and `__len__`, or an IterableDataset.
        batch_size: samples in a batch; None gives single samples without a first dimension.
        shuffle: take the samples in random order, another one in each epoch.
        sampler: gives the indices instead.
        batch_sampler: gives lists of indices, instead of batch_size, shuffle, sampler, drop_last.
        num_workers: threads that make batches ahead; 0 makes each batch when it is asked for.
        collate_fn: joins a list of samples; by default `default_collate`, for which data sets may
            have a faster way (`Dataset.get_batch`).
        pin_memory: put the tensors of a batch into page-locked memory, from where
            ``.to("cuda", non_blocking=True)`` copies beside other work. Needs a GPU.
        drop_last: leave out a last batch that is smaller.
        timeout: seconds to wait for a batch from a worker; 0 waits forever.
        worker_init_fn: called in each thread with its number, from 0, before its first batch.
        multiprocessing_context: must be None, workers are threads.
        generator: whose seed decides the order and all augmentation; by default that of
            `flame.manual_seed`. Only the seed is read, at the first iteration.
        prefetch_factor: batches made ahead for each worker; by default 2.
        persistent_workers: keep the threads from epoch to epoch.
        pin_memory_device: a GPU's name; pinned memory serves all of them, so it changes nothing.
        batch_transform: `batch_transform(batch, generator)` changes each finished batch, in the
            worker; `generator` holds the random numbers of that batch in that epoch.

    An exception in a worker is raised here, with its traceback, and ends the iteration.

    Raises:
        ArgumentError: arguments out of range, or that exclude each other.
        StateError: while iterating, a batch that did not come within `timeout`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: None = None,
        generator: Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        batch_transform: BatchTransform | None = None,
    ) -> None:
        _check_workers(num_workers, timeout, prefetch_factor, persistent_workers)
        _check_order(dataset, batch_size, shuffle, sampler, batch_sampler, drop_last)
        if pin_memory_device and Device(pin_memory_device).type != "cuda":
            raise DeviceError(
                f"DataLoader: pin_memory_device must name a GPU, got {pin_memory_device!r}"
            )
        if multiprocessing_context is not None:
            raise UnsupportedError(
                "DataLoader: multiprocessing_context must be None, workers are threads"
            )
        self.dataset = dataset
        self.batch_size = None if batch_sampler is not None else batch_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.generator = generator
        self.prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        self.persistent_workers = persistent_workers
        self.batch_transform = batch_transform
        self.sampler = sampler if sampler is not None else self._default_sampler(bool(shuffle))
        self.batch_sampler = batch_sampler
        if batch_sampler is None and batch_size is not None and self.sampler is not None:
            self.batch_sampler = BatchSampler(self.sampler, batch_size, drop_last)
        self._single = batch_size is None and batch_sampler is None
        self._seed: int | None = None
        self._progress = Progress(epoch=0, batches=0)
        self._started = False  # whether the progress is of an iteration, or where the next begins
        self._sampler_state: Any = None  # as it was when the latest iteration began
        self._pool: WorkerPool | None = None

    def __iter__(self) -> Iterator[Any]:
        """The next epoch, or the rest of the one that `load_state_dict` went back to."""
        if self._seed is None:
            self._seed = seed_of(self.generator)
        if self._started:
            self._progress = Progress(self._progress.epoch + 1, batches=0)
        self._started = True
        self._sampler_state = self._present_sampler_state()
        maker = BatchMaker(
            dataset=self.dataset,
            collate=self.collate_fn,
            transform=self.batch_transform,
            seed=self._seed,
            epoch=self._progress.epoch,
            single=self._single,
            pin=self.pin_memory,
        )
        if isinstance(self.dataset, IterableDataset):
            stream = SampleStream(
                iter(self.dataset), self.batch_size or 1, drop_last=self.drop_last
            )
            stream.skip(self._progress.batches)
            return self._iterate(_stream_tasks(maker, stream, self._progress.batches), stream)
        # The indices of batches that were handed out are passed over; their samples are not read.
        rest = islice(enumerate(self._batches()), self._progress.batches, None)
        tasks = (partial(maker.from_indices, number, indices) for number, indices in rest)
        return self._iterate(tasks, None)

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        if isinstance(self.dataset, IterableDataset):
            if not hasattr(self.dataset, "__len__"):
                raise DTypeError(
                    f"DataLoader: {type(self.dataset).__name__} has no length, so neither has its "
                    "loader"
                )
            size = len(self.dataset)
            batch = self.batch_size or 1
            return size // batch if self.drop_last else -(-size // batch)
        return len(self._batches())  # type: ignore[arg-type]  # a sampler without it has no length

    @property
    def epoch(self) -> int:
        """The number of the epoch that is being iterated, or will be next, from 0."""
        return self._position()[0]

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands: the next one of a loader that loads it goes on there.

        Batches made ahead and not handed out yet count as not made. After a whole epoch it is the
        beginning of the next.
        """
        if self._seed is None:
            self._seed = seed_of(self.generator)
        epoch, batches = self._position()
        within = self._started and not self._progress.finished
        return {
            "seed": self._seed,
            "epoch": epoch,
            "batches": batches,
            "sampler": self._sampler_state if within else self._present_sampler_state(),
            "batch_size": self.batch_size,
            "samples": self._samples(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state_dict()` stood, bit for bit.

        An iterable data set is read up to there again.

        Raises:
            StateError: the state is not a loader's, or is in the middle of an epoch of other data.
        """
        missing = {"seed", "epoch", "batches", "sampler"} - state_dict.keys()
        if missing:
            raise StateError(f"DataLoader.load_state_dict: missing {', '.join(sorted(missing))}")
        for name, present in (("batch_size", self.batch_size), ("samples", self._samples())):
            saved = state_dict.get(name)
            if state_dict["batches"] and saved != present:
                raise StateError(
                    f"DataLoader.load_state_dict: the epoch was begun with {name}={saved}, this "
                    "loader "
                    f"has {present}; go on with the same data, or begin at a whole epoch"
                )
        source = self._seeded_sampler()
        if source is not None and state_dict["sampler"] is not None:
            source.load_state_dict(state_dict["sampler"])
        self._seed = int(state_dict["seed"])
        self._progress = Progress(int(state_dict["epoch"]), int(state_dict["batches"]))
        self._started = False

    def _default_sampler(self, shuffle: bool) -> Iterable[int] | None:
        if isinstance(self.dataset, IterableDataset):
            return None
        if shuffle:
            return RandomSampler(self.dataset, generator=self.generator)
        return SequentialSampler(self.dataset)

    def _batches(self) -> Iterable[Any]:
        """What gives the indices: a list for each batch, or one for each single sample."""
        batches = self.sampler if self.batch_sampler is None else self.batch_sampler
        assert batches is not None
        return batches

    def _iterate(self, tasks: Iterator[Task], stream: SampleStream | None) -> BatchIterator:
        if not self.num_workers:
            return BatchIterator(tasks, self._progress, stream)
        pool = self._pool
        if pool is None:
            pool = WorkerPool(self.num_workers, self.worker_init_fn)
            self._pool = pool if self.persistent_workers else None
        return BatchIterator(
            tasks,
            self._progress,
            stream,
            pool=pool,
            owned=not self.persistent_workers,
            ahead=self.num_workers * self.prefetch_factor,
            timeout=self.timeout,
        )

    def _position(self) -> tuple[int, int]:
        """The epoch and the batches handed out of it."""
        progress = self._progress
        return (progress.epoch + 1, 0) if progress.finished else (progress.epoch, progress.batches)

    def _samples(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    def _seeded_sampler(self) -> Any:
        """The sampler whose state decides the order, if there is one."""
        source = None if self.sampler is None and self.batch_sampler is None else self._batches()
        return source if hasattr(source, "load_state_dict") else None

    def _present_sampler_state(self) -> Any:
        source = self._seeded_sampler()
        return None if source is None else source.state_dict()


def _stream_tasks(maker: BatchMaker, stream: SampleStream, first: int) -> Iterator[Task]:
    return (partial(maker.from_stream, number, stream) for number in count(first))


def _check_workers(
    workers: int, timeout: float, prefetch_factor: int | None, persistent: bool
) -> None:
    whole_number("DataLoader", "num_workers", workers, least=0)
    if not timeout >= 0:
        raise ArgumentError(f"DataLoader: timeout must be at least 0 seconds, got {timeout}")
    if prefetch_factor is not None:
        whole_number("DataLoader", "prefetch_factor", prefetch_factor, least=1)
    for name, given in (
        ("prefetch_factor", prefetch_factor is not None),
        ("persistent_workers", persistent),
        ("timeout", timeout > 0),
    ):
        if given and workers == 0:
            raise ArgumentError(f"DataLoader: {name} needs background workers; set num_workers")


def _check_order(
    dataset: Any,
    batch_size: int | None,
    shuffle: bool | None,
    sampler: Any,
    batch_sampler: Any,
    drop_last: bool,
) -> None:
    if isinstance(dataset, IterableDataset):
        if shuffle or sampler is not None or batch_sampler is not None:
            raise ArgumentError(
                "DataLoader: an iterable data set decides its own order; "
                "it takes no shuffle, sampler or batch_sampler"
            )
    elif not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DTypeError(
            f"DataLoader: a data set has __getitem__ and __len__, or is an IterableDataset; got "
            f"{type(dataset).__name__}"
        )
    if sampler is not None and shuffle:
        raise ArgumentError("DataLoader: give sampler or shuffle, not both")
    if batch_sampler is not None and (
        batch_size != 1 or shuffle or sampler is not None or drop_last
    ):
        raise ArgumentError(
            "DataLoader: a batch_sampler decides batch_size, shuffle, sampler and drop_last"
        )
    if batch_size is None and drop_last:
        raise ArgumentError("DataLoader: drop_last needs a batch_size")
    if batch_size is not None:
        whole_number("DataLoader", "batch_size", batch_size, least=1)
