"""The training loop.

Invariant: `Trainer.state_dict` is all that the next step depends on (weights, optimizer, schedule,
loss scale, random state, position in the data, sums of the epoch), so that a run that goes on from
it on the same device ends bitwise equal to one that was never interrupted.

On a GPU the host runs ahead: batches are copied while the step before runs, and losses are read
some steps behind (`flame.train.readings`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import flame
from flame.amp import GradScaler
from flame.core.errors import CheckpointError, FlameError, StateError
from flame.data import prefetch_to_device
from flame.tensor import Tensor
from flame.train.folder import Record, RunFolder
from flame.train.interrupt import Interrupt
from flame.train.readings import Readings
from flame.train.task import Task
from flame.train.totals import Totals, figures


class Observer(Protocol):
    """Is told of the course of a run. Observers read the trainer and change nothing of it."""

    def on_start(self, trainer: "Trainer") -> None:
        """The first step comes next."""

    def on_step(self, trainer: "Trainer") -> None:
        """A step was queued; ``trainer.totals`` are those of the steps of this epoch that were
        read, on a GPU up to `readings.BEHIND` less, but none less after the epoch's last step."""

    def on_epoch(self, trainer: "Trainer", record: Record) -> None:
        """An epoch was done and tested."""

    def on_end(self, trainer: "Trainer") -> None:
        """No step follows, whether the run is finished, interrupted, or failed."""


class Trainer:
    """Runs ``task`` for ``epochs`` epochs, keeping metrics and the checkpoint in ``folder``.

    The step runs as one compiled program, or, with ``eager``, operation by operation; in float16
    with a loss scale (`flame.amp.GradScaler`).
    """

    def __init__(
        self,
        task: Task,
        folder: RunFolder,
        *,
        epochs: int,
        observers: Sequence[Observer] = (),
        record_every: int = 10,
        eager: bool = False,
    ) -> None:
        self.task = task
        self.folder = folder
        self.epochs = epochs
        self.epoch = 0  # epochs that are done
        self.step = 0  # steps that are done, or queued on the device, over all epochs
        self.totals = Totals()  # of the epoch that runs now
        self._observers = tuple(observers)
        self._record_every = record_every
        self._learn = _learn if eager else flame.compile(_learn)
        self._scaler = GradScaler(task.device_type, enabled=task.precision == "fp16")
        self._batches = prefetch_to_device(task.train_batches, task.device)
        self._readings: Readings[_Step] = Readings(task.device)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self.task.train_batches)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    def fit(self) -> bool:
        """Trains until the last epoch is done or SIGINT comes; True where the run is finished.

        The checkpoint is written after every epoch and on SIGINT, once the step at hand is done.
        """
        with Interrupt() as interrupt, _reproducible(self.task):
            self._tell("on_start")
            try:
                while not self.finished and not interrupt.requested:
                    if self._train_epoch(interrupt):
                        self._end_epoch()
                    self.folder.save(self.state_dict())
            finally:
                self._tell("on_end")
        return self.finished

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch; False where SIGINT cut it."""
        self.task.model.train()
        last = (self.epoch + 1) * self.steps_per_epoch
        for images, labels in self._batches:
            self._train_step(images, labels)
            self._read(everything=self.step == last)
            self._tell("on_step")
            if interrupt.requested and self.step < last:
                self._read(everything=True)
                return False
        return True

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        rate = float(self.task.optimizer.param_groups[0]["lr"])
        values = self._learn(self.task, self._scaler, images, labels)
        self.step += 1
        self._readings.put(_Step(self.step, rate, labels.shape[0]), values)

    def _read(self, *, everything: bool) -> None:
        """Take in the figures of steps that the device has done, or of all."""
        for step, (loss, hits) in self._readings.take(everything=everything):
            if not math.isfinite(loss):
                raise FlameError(
                    f"the loss is {loss} at step {step.number}, and training cannot recover from "
                    "it; start again with a smaller --lr, or look for bad values in the data"
                )
            self.totals.add(loss, int(hits), step.items)
            if step.number % self._record_every == 0:
                record = {"kind": "step", "step": step.number, "loss": loss, "lr": step.rate}
                self.folder.append(record)

    def _end_epoch(self) -> None:
        test = evaluate(self.task)
        self.epoch += 1
        record: Record = {
            "kind": "epoch",
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": self.totals.loss,
            "train_accuracy": self.totals.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
        }
        self.totals = Totals()
        self.folder.append({**record, "time": round(time.time(), 3)})
        self._tell("on_epoch", record)

    def _tell(self, event: str, *details: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(self, *details)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        task = self.task
        return {
            "model": task.model.state_dict(),
            "optimizer": task.optimizer.state_dict(),
            "scheduler": task.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "batches": self._batches.state_dict(),
            "random": flame.get_rng_state(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken. Raises CheckpointError if it does not fit."""
        task = self.task
        try:
            task.model.load_state_dict(state["model"])
            task.optimizer.load_state_dict(state["optimizer"])
            task.scheduler.load_state_dict(state["scheduler"])
            self._scaler.load_state_dict(state["scaler"])
            self._batches.load_state_dict(state["batches"])
            flame.set_rng_state(state["random"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.totals = Totals(**state["totals"])
        except (KeyError, TypeError, StateError) as error:
            raise CheckpointError(
                f"{self.folder.checkpoint_file} does not fit the run: {error}; "
                "it was written by another recipe or version, so start a new run"
            ) from error


@contextmanager
def _reproducible(task: Task) -> Iterator[None]:
    """The same bits on every run: on a GPU that has to be asked of NVIDIA's libraries."""
    before = flame.are_deterministic_algorithms_enabled()
    flame.use_deterministic_algorithms(before or task.device != "cpu")
    try:
        yield
    finally:
        flame.use_deterministic_algorithms(before)


class _Step(NamedTuple):
    """What the host knows of a step when it queues it."""

    number: int
    rate: float
    items: int


def _learn(task: Task, scaler: GradScaler, images: Tensor, labels: Tensor) -> Tensor:
    """One step of training; its `figures`."""
    task.optimizer.zero_grad()
    with task.autocast():
        logits = task.model(images)
        loss = task.loss(logits, labels)
    scaler.scale(loss).backward()
    scaler.step(task.optimizer)
    scaler.update()
    task.scheduler.step()
    return figures(loss, logits, labels)


def evaluate(task: Task) -> Totals:
    """Loss and accuracy over the test images; the model is in evaluation mode afterwards."""
    task.model.eval()
    totals = Totals()
    readings: Readings[int] = Readings(task.device)

    def read(*, everything: bool) -> None:
        for count, (loss, hits) in readings.take(everything=everything):
            totals.add(loss, int(hits), count)

    with flame.no_grad(), _reproducible(task):
        for images, labels in prefetch_to_device(task.test_batches, task.device):
            with task.autocast():
                logits = task.model(images)
                loss = task.loss(logits, labels)
            readings.put(labels.shape[0], figures(loss, logits, labels))
            read(everything=False)
        read(everything=True)
    return totals
