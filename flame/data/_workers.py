"""Background workers of a loader: threads that make batches ahead, handed out in order.

Why threads: reading files, decoding images, and NumPy's copies, random numbers and arithmetic on
whole batches release the interpreter's lock, so threads do run at once where the time goes; and a
thread starts in 0.1 ms, shares the data set's memory, and needs nothing to be pickled. What gains
nothing is a data set whose samples are computed in Python loops.

Invariants:
- Batches are begun in order and handed out in order, so their number does not show in the result.
- At most `ahead` batches are made and not yet taken.
- An iterator that is dropped, at any time, leaves no thread behind: what is queued is cancelled,
  and each thread ends after the batch it is at. Nothing in a thread refers to the iterator.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

from flame.core.errors import StateError
from flame.data._batches import END, SampleStream

__all__ = ["BatchIterator", "Progress", "Task", "WorkerPool"]

Task: TypeAlias = Callable[[], Any]
Pending: TypeAlias = deque[Future[Any]]


class Progress:
    """How far an iteration has come; outlives it, so that it can be saved after a break."""

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch = epoch
        self.batches = batches
        self.finished = False


class WorkerPool:
    """Threads that run tasks; each calls `initialize` with its number before its first."""

    def __init__(self, workers: int, initialize: Callable[[int], None] | None) -> None:
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="flame-data")
        self._initialize = initialize
        self._thread = threading.local()
        self._numbers = itertools.count()

    def submit(self, task: Task) -> Future[Any]:
        """Run a task as soon as a thread is free."""
        return self._executor.submit(self._run, task)

    def stop(self) -> None:
        """Cancel what is queued and let the threads end, without waiting for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, task: Task) -> Any:
        if not hasattr(self._thread, "number"):
            number = next(self._numbers)
            if self._initialize is not None:
                self._initialize(number)
            self._thread.number = number
        try:
            return task()
        except Exception as error:
            error.add_note(f"in data worker {self._thread.number}")
            raise


class BatchIterator(Iterator[Any]):
    """One iteration over a loader.

    Args:
        tasks: one for each batch, in order.
        progress: counts the batches that were handed out.
        stream: the samples that tasks wait for, if the data set is iterable.
        pool: runs the tasks; without one they run when their batch is asked for.
        owned: whether the pool ends with this iteration.
        ahead: how many tasks may be under way.
        timeout: the seconds to wait for a batch; 0 waits forever.
    """

    def __init__(
        self,
        tasks: Iterator[Task],
        progress: Progress,
        stream: SampleStream | None,
        *,
        pool: WorkerPool | None = None,
        owned: bool = True,
        ahead: int = 0,
        timeout: float = 0,
    ) -> None:
        self._tasks = tasks
        self._progress = progress
        self._pool = pool
        self._ahead = ahead
        self._timeout = timeout
        self._pending: Pending = deque()
        # Called when the iterator is dropped, at the interpreter's end, or below; and only once.
        self._close = weakref.finalize(
            self, _release, self._pending, pool if owned else None, stream
        )

    def __next__(self) -> Any:
        if not self._close.alive:
            raise StopIteration
        try:
            batch = self._make() if self._pool is None else self._wait(self._pool)
        except BaseException:
            self._close()
            raise
        if batch is END:
            self._progress.finished = True
            self._close()
            raise StopIteration
        self._progress.batches += 1
        return batch

    def _make(self) -> Any:
        task = next(self._tasks, None)
        return END if task is None else task()

    def _wait(self, pool: WorkerPool) -> Any:
        for task in itertools.islice(self._tasks, self._ahead - len(self._pending)):
            self._pending.append(pool.submit(task))
        if not self._pending:
            return END
        future = self._pending.popleft()
        wait([future], self._timeout or None)
        if not future.done():
            raise StateError(
                f"DataLoader: batch {self._progress.batches} did not come within {self._timeout} "
                "seconds; is a file unreachable, or the timeout too short for one batch?"
            )
        return future.result()


def _release(pending: Pending, pool: WorkerPool | None, stream: SampleStream | None) -> None:
    for future in pending:
        future.cancel()
    pending.clear()
    if stream is not None:
        stream.close()
    if pool is not None:
        pool.stop()
