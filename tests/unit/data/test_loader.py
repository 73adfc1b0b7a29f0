"""DataLoader: order, workers, errors, leaving early, and resuming in the middle of an epoch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

import flame
from flame.core.errors import ArgumentError, DataError, DTypeError, StateError, UnsupportedError
from flame.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from flame.data.transforms import Compose, OnField, RandomCrop, RandomHorizontalFlip, ToFloat

WORKERS = [0, 1, 3]


def images(size: int = 37) -> TensorDataset:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, size=(size, 1, 6, 6), dtype=np.uint8)
    return TensorDataset(flame.tensor(pixels), flame.tensor(np.arange(size)))


def augmentation() -> OnField:
    return OnField(Compose([RandomCrop(6, padding=2), RandomHorizontalFlip(), ToFloat()]))


def seeded(seed: int = 5) -> flame.Generator:
    generator = flame.Generator()
    generator.manual_seed(seed)
    return generator


def contents(batches: Any) -> list[tuple[bytes, ...]]:
    return [tuple(part.numpy().tobytes() for part in batch) for batch in batches]


class Numbers(Dataset[int]):
    """Sample i is i, and notes which were read, in which thread."""

    def __init__(self, size: int, read: Callable[[int], None] = lambda index: None) -> None:
        self.size = size
        self.read = read
        self.threads: set[str] = set()

    def __getitem__(self, index: int) -> int:
        self.threads.add(threading.current_thread().name)
        self.read(index)
        return index

    def __len__(self) -> int:
        return self.size


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            time.sleep(0.0005)
            yield number


def data_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("flame-data")]


def assert_no_threads_stay() -> None:
    deadline = time.monotonic() + 5
    while data_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert data_threads() == []


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    yield
    assert_no_threads_stay()


# Order


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_come_in_order(workers: int) -> None:
    loader = DataLoader(Numbers(10), batch_size=4, num_workers=workers)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(loader) == 3
    short = DataLoader(Numbers(10), batch_size=4, num_workers=workers, drop_last=True)
    assert [batch.tolist() for batch in short] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(short) == 2


@pytest.mark.parametrize("workers", WORKERS)
def test_order_and_augmentation_do_not_depend_on_workers(workers: int) -> None:
    def epochs(number: int) -> list[list[tuple[bytes, ...]]]:
        loader = DataLoader(
            images(), 5, shuffle=True, num_workers=number, generator=seeded(),
            batch_transform=augmentation(),
        )  # fmt: skip
        return [contents(loader) for _ in range(3)]

    ours = epochs(workers)
    assert ours == epochs(0)
    assert ours[0] != ours[1] != ours[2]


def test_every_sample_comes_once_in_an_epoch() -> None:
    loader = DataLoader(images(), 5, shuffle=True, num_workers=2)
    for _ in range(2):
        labels = np.concatenate([batch[1].numpy() for batch in loader])
        assert sorted(labels.tolist()) == list(range(37))
        assert labels.tolist() != list(range(37))


def test_slow_batches_do_not_overtake() -> None:
    def uneven(index: int) -> None:
        time.sleep(0.02 if index % 4 == 0 else 0)

    loader = DataLoader(Numbers(24, uneven), batch_size=2, num_workers=4)
    assert [batch.tolist()[0] for batch in loader] == list(range(0, 24, 2))


def test_the_seed_decides() -> None:
    def first(seed: int) -> list[int]:
        loader = DataLoader(Numbers(50), 50, shuffle=True, generator=seeded(seed))
        return next(iter(loader)).tolist()  # type: ignore[no-any-return]

    assert first(1) == first(1) != first(2)
    flame.manual_seed(1)
    default = next(iter(DataLoader(Numbers(50), 50, shuffle=True))).tolist()
    assert default == first(1)


def test_iterating_draws_nothing_from_the_generator() -> None:
    flame.manual_seed(7)
    expected = flame.rand(3).tolist()
    flame.manual_seed(7)
    for _ in DataLoader(images(), 5, shuffle=True, batch_transform=augmentation()):
        pass
    assert flame.rand(3).tolist() == expected


def test_two_iterations_at_once_are_two_epochs() -> None:
    loader = DataLoader(Numbers(8), 4, shuffle=True, num_workers=1, generator=seeded())
    pairs = [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)]
    again = DataLoader(Numbers(8), 4, shuffle=True, generator=seeded())
    first, second = ([batch.tolist() for batch in again] for _ in range(2))
    assert [a for a, _ in pairs] == first
    assert [b for _, b in pairs] == second


@pytest.mark.parametrize("workers", WORKERS)
def test_samplers_of_all_kinds(workers: int) -> None:
    dataset = Numbers(6)
    given = DataLoader(dataset, 2, sampler=[5, 1, 3], num_workers=workers)
    assert [batch.tolist() for batch in given] == [[5, 1], [3]]
    assert len(given) == 2
    lists = DataLoader(dataset, batch_sampler=[[0], [4, 2]], num_workers=workers)
    assert [batch.tolist() for batch in lists] == [[0], [4, 2]]
    assert len(lists) == 2
    weighted = DataLoader(
        dataset, 3, sampler=WeightedRandomSampler([0, 0, 1, 0, 0, 0], 6), num_workers=workers
    )
    assert [batch.tolist() for batch in weighted] == [[2, 2, 2]] * 2


@pytest.mark.parametrize("workers", WORKERS)
def test_single_samples_and_custom_collation(workers: int) -> None:
    single = DataLoader(Numbers(3), batch_size=None, num_workers=workers)
    assert list(single) == [0, 1, 2]
    assert len(single) == 3
    rows = list(DataLoader(images(3), batch_size=None, num_workers=workers))
    assert rows[2][0].shape == (1, 6, 6)
    custom = DataLoader(images(4), 2, collate_fn=len, num_workers=workers)
    assert list(custom) == [2, 2]


def test_an_empty_data_set_has_no_batches() -> None:
    for workers in WORKERS:
        for shuffle in (False, True):
            loader = DataLoader(Numbers(0), 4, shuffle=shuffle, num_workers=workers)
            assert list(loader) == []
            assert len(loader) == 0


def test_anything_with_indices_is_a_data_set() -> None:
    assert [b.tolist() for b in DataLoader([3.0, 4.0, 5.0], 2)] == [[3.0, 4.0], [5.0]]


# Iterable data sets


@pytest.mark.parametrize("workers", WORKERS)
def test_streams_come_once_and_in_order(workers: int) -> None:
    loader = DataLoader(Stream(23), 4, num_workers=workers)
    for _ in range(2):
        batches = [batch.tolist() for batch in loader]
        assert batches == [list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)]
    short = DataLoader(Stream(23), 4, num_workers=workers, drop_last=True)
    assert len(list(short)) == 5
    single = DataLoader(Stream(3), None, num_workers=workers)
    assert list(single) == [0, 1, 2]
    with pytest.raises(DTypeError, match="no length"):
        len(loader)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stream_resumes(workers: int) -> None:
    def make() -> DataLoader:
        return DataLoader(
            Stream(30), 4, num_workers=workers, generator=seeded(),
            batch_transform=lambda batch, random: batch.numpy() + random.random(len(batch)),
        )  # fmt: skip

    whole = [batch.tolist() for batch in make()]
    loader = make()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    other = make()
    other.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in other] == whole[3:]
    del iterator


# Errors in workers


class BrokenError(Exception):
    pass


def broken(index: int) -> None:
    if index == 9:
        raise BrokenError("sample nine")


@pytest.mark.parametrize("workers", WORKERS)
def test_an_exception_comes_out_with_its_traceback_in_its_turn(workers: int) -> None:
    iterator = iter(DataLoader(Numbers(40, broken), 4, num_workers=workers))
    assert next(iterator).tolist() == [0, 1, 2, 3]
    assert next(iterator).tolist() == [4, 5, 6, 7]
    with pytest.raises(BrokenError, match="sample nine") as caught:
        next(iterator)
    frames = "".join(traceback.format_exception(caught.value))
    assert "in broken" in frames
    assert 'raise BrokenError("sample nine")' in frames
    assert "while making batch 2, of the samples [8, 9, 10, 11]" in frames
    assert ("in data worker" in frames) == (workers > 0)
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_exception_in_a_stream_or_a_transform_comes_out(workers: int) -> None:
    class Failing(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(5)
            raise BrokenError("the stream")

    with pytest.raises(BrokenError, match="the stream"):
        list(DataLoader(Failing(), 2, num_workers=workers))

    def transform(batch: Any, generator: np.random.Generator) -> Any:
        raise BrokenError("the transform")

    with pytest.raises(BrokenError, match="the transform"):
        list(DataLoader(Numbers(8), 2, num_workers=workers, batch_transform=transform))


@pytest.mark.parametrize("workers", WORKERS)
def test_stop_iteration_does_not_end_an_epoch(workers: int) -> None:
    def used_up(index: int) -> None:
        if index == 5:
            next(iter([]))

    with pytest.raises(DataError, match="StopIteration while making batch 2"):
        list(DataLoader(Numbers(8, used_up), 2, num_workers=workers))


@pytest.mark.parametrize("workers", WORKERS)
def test_an_exception_in_a_sampler_comes_out(workers: int) -> None:
    def lists() -> Iterator[list[int]]:
        yield [0, 1]
        raise BrokenError("the sampler")

    class Failing:
        def __iter__(self) -> Iterator[list[int]]:
            return lists()

    with pytest.raises(BrokenError, match="the sampler"):
        list(DataLoader(Numbers(8), batch_sampler=Failing(), num_workers=workers))


def test_an_exception_in_worker_init_comes_out() -> None:
    def fail(worker: int) -> None:
        raise BrokenError(f"worker {worker}")

    with pytest.raises(BrokenError, match="worker 0"):
        list(DataLoader(Numbers(8), 2, num_workers=1, worker_init_fn=fail))


def test_a_timeout_is_an_error() -> None:
    release = threading.Event()

    def wait(index: int) -> None:
        if index == 4:
            release.wait(10)

    iterator = iter(DataLoader(Numbers(8, wait), 2, num_workers=1, timeout=0.2))
    assert next(iterator).tolist() == [0, 1]
    assert next(iterator).tolist() == [2, 3]
    with pytest.raises(StateError, match=r"batch 2 did not come within 0\.2 seconds"):
        next(iterator)
    release.set()


def test_a_timeout_of_the_data_set_itself_is_its_own() -> None:
    def slow(index: int) -> None:
        raise TimeoutError("the server")

    with pytest.raises(TimeoutError, match="the server"):
        list(DataLoader(Numbers(8, slow), 2, num_workers=1, timeout=5))


# Leaving early


@pytest.mark.parametrize("persistent", [False, True])
def test_leaving_the_loop_ends_the_threads(persistent: bool) -> None:
    loader = DataLoader(
        Numbers(1000), 2, num_workers=3, prefetch_factor=4, persistent_workers=persistent
    )
    for _ in range(3):
        for batch in loader:
            assert batch.tolist() == [0, 1]
            break
    if not persistent:
        assert_no_threads_stay()
    del loader
    assert_no_threads_stay()


def test_leaving_while_a_worker_is_at_work_does_not_wait() -> None:
    release = threading.Event()
    started = threading.Event()

    def slow(index: int) -> None:
        if index >= 2:
            started.set()
            release.wait(10)

    begun = time.monotonic()
    for _ in DataLoader(Numbers(100, slow), 2, num_workers=1):
        started.wait(5)
        break
    assert time.monotonic() - begun < 5
    release.set()


def test_leaving_a_stream_frees_workers_that_wait_for_their_turn() -> None:
    release = threading.Event()

    class Blocking(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(4)
            release.wait(10)

    iterator = iter(DataLoader(Blocking(), 2, num_workers=3))
    next(iterator)
    next(iterator)
    begun = time.monotonic()
    del iterator
    assert time.monotonic() - begun < 5
    release.set()
    assert_no_threads_stay()


def test_an_exception_in_the_loop_body_ends_the_threads() -> None:
    def consume() -> None:
        for _ in DataLoader(Numbers(1000), 2, num_workers=3):
            raise BrokenError

    with pytest.raises(BrokenError):
        consume()


def test_the_interpreter_may_end_in_the_middle_of_an_iteration() -> None:
    script = (
        "from flame.data import DataLoader\n"
        "iterator = iter(DataLoader(list(range(1000)), 2, num_workers=2))\n"
        "print(next(iterator).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n", "")


def test_no_more_than_the_prefetched_are_made() -> None:
    read: list[int] = []
    loader = DataLoader(Numbers(100, read.append), 1, num_workers=2, prefetch_factor=3)
    iterator = iter(loader)
    next(iterator)
    time.sleep(0.2)
    assert len(read) <= 7
    del iterator


def test_workers_run_in_threads_and_are_initialized_once() -> None:
    begun: list[int] = []
    dataset = Numbers(64, lambda index: time.sleep(0.001))
    loader = DataLoader(
        dataset, 2, num_workers=3, worker_init_fn=begun.append, persistent_workers=True
    )
    for _ in range(3):
        list(loader)
    assert sorted(begun) == [0, 1, 2]
    assert len(dataset.threads) == 3
    assert all(name.startswith("flame-data") for name in dataset.threads)
    del loader


# Resuming


def variants() -> dict[str, Callable[[], DataLoader]]:
    def plain(workers: int) -> DataLoader:
        return DataLoader(
            images(), 5, shuffle=True, num_workers=workers, generator=seeded(),
            batch_transform=augmentation(),
        )  # fmt: skip

    def own_sampler(workers: int) -> DataLoader:
        dataset = images()
        sampler = RandomSampler(dataset, replacement=True, generator=seeded(8))
        return DataLoader(dataset, 5, sampler=sampler, num_workers=workers, generator=seeded())

    def own_batches(workers: int) -> DataLoader:
        dataset = images()
        sampler = BatchSampler(RandomSampler(dataset, generator=seeded(8)), 6, drop_last=True)
        return DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, batch_transform=augmentation()
        )

    makers: dict[str, Callable[[int], DataLoader]] = {
        "shuffle": plain, "sampler": own_sampler, "batch_sampler": own_batches,
    }  # fmt: skip
    return {
        f"{name}-{workers}": lambda maker=maker, workers=workers: maker(workers)  # type: ignore[misc]
        for name, maker in makers.items()
        for workers in WORKERS
    }


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize(("epoch", "batches"), [(0, 0), (0, 3), (1, 1), (1, 99), (2, 5)])
def test_a_resume_in_the_middle_gives_the_same_rest(variant: str, epoch: int, batches: int) -> None:
    make = variants()[variant]
    straight = make()
    whole = [contents(straight) for _ in range(4)]

    interrupted = make()
    for _ in range(epoch):
        list(interrupted)
    assert contents(islice(interrupted, batches)) == whole[epoch][:batches]
    saved = json.loads(json.dumps(interrupted.state_dict()))

    flame.manual_seed(12345)  # neither the seed of the process nor that of the loader matters
    resumed = make()
    resumed.generator = seeded(999)
    resumed.load_state_dict(saved)
    rest = [whole[epoch][batches:]] if batches < len(whole[epoch]) else []
    rest += whole[epoch + 1 :]
    assert resumed.epoch == 4 - len(rest)
    assert [contents(resumed) for _ in rest] == rest


def test_the_state_counts_what_was_handed_out_not_what_was_made() -> None:
    loader = DataLoader(Numbers(100), 2, num_workers=2, prefetch_factor=8, generator=seeded())
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, 0)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    time.sleep(0.05)
    assert loader.state_dict()["batches"] == 3
    for _ in iterator:
        pass
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


def test_a_resume_reads_no_sample_that_was_handed_out() -> None:
    read: list[int] = []
    loader = DataLoader(Numbers(20), 2)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    other = DataLoader(Numbers(20, read.append), 2)
    other.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in other] == [[14, 15], [16, 17], [18, 19]]
    assert read == [14, 15, 16, 17, 18, 19]


def test_a_state_after_the_last_batch_leaves_nothing_of_the_epoch() -> None:
    loader = DataLoader(Numbers(4), 2)
    iterator = iter(loader)
    next(iterator)
    next(iterator)  # the loop over the epoch has not ended yet
    other = DataLoader(Numbers(4), 2)
    other.load_state_dict(loader.state_dict())
    assert list(other) == []
    assert [batch.tolist() for batch in other] == [[0, 1], [2, 3]]


def test_a_state_that_does_not_fit_is_refused() -> None:
    loader = DataLoader(Numbers(20), 2)
    next(iter(loader))
    saved = loader.state_dict()
    with pytest.raises(StateError, match="missing epoch"):
        loader.load_state_dict({name: saved[name] for name in saved if name != "epoch"})
    with pytest.raises(StateError, match="batch_size=2, this loader has 4"):
        DataLoader(Numbers(20), 4).load_state_dict(saved)
    with pytest.raises(StateError, match="samples=20, this loader has 30"):
        DataLoader(Numbers(30), 2).load_state_dict(saved)
    whole = DataLoader(Numbers(20), 2).state_dict()
    DataLoader(Numbers(30), 4).load_state_dict(whole)


# Arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": None, "drop_last": True}, "drop_last needs"),
        ({"shuffle": True, "sampler": [1]}, "sampler or shuffle"),
        ({"batch_sampler": [[1]], "batch_size": 3}, "batch_sampler decides"),
        ({"batch_sampler": [[1]], "shuffle": True}, "batch_sampler decides"),
        ({"num_workers": -1}, "num_workers"),
        ({"timeout": -1, "num_workers": 1}, "timeout must"),
        ({"timeout": 1}, "timeout needs background workers"),
        ({"prefetch_factor": 2}, "prefetch_factor needs background workers"),
        ({"prefetch_factor": 0, "num_workers": 1}, "prefetch_factor must"),
        ({"persistent_workers": True}, "persistent_workers needs background workers"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        DataLoader(Numbers(4), **options)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(DTypeError, match="__getitem__ and __len__"):
        DataLoader(3)
    with pytest.raises(ArgumentError, match="decides its own order"):
        DataLoader(Stream(4), shuffle=True)
    with pytest.raises(UnsupportedError, match="multiprocessing_context"):
        DataLoader(Numbers(4), multiprocessing_context="fork")
