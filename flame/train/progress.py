"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flame.train.folder import Record
from flame.train.trainer import Trainer


class _Fields(ProgressColumn):
    """Loss, accuracy and speed, as the reporter last computed them."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")))


class ProgressReport:
    """An observer that prints to ``console``. The time left counts the steps, tests included."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Fields(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._clock = time.perf_counter
        self._began = 0.0
        self._first_step = 0
        self._items = 0
        self._busy = 0.0  # seconds in training steps, without tests
        self._last = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._began = self._last = self._clock()
        self._first_step = trainer.step
        self._task = self._bar.add_task(
            self._where(trainer),
            total=trainer.epochs * trainer.steps_per_epoch,
            completed=trainer.step,
        )
        self._seen = trainer.totals.items
        self._bar.start()

    def on_step(self, trainer: Trainer) -> None:
        now = self._clock()
        self._busy += now - self._last
        self._last = now
        self._items += trainer.totals.items - self._seen
        self._seen = trainer.totals.items
        figures = (
            f"loss {trainer.totals.loss:.3f}  accuracy {trainer.totals.accuracy:.1%}  "
            f"{self._speed:,.0f} items/s"
        )
        self._bar.update(
            self._task,
            completed=trainer.step,
            description=self._where(trainer),
            figures=figures if trainer.totals.items else "",  # a GPU's first ones come later
        )

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        self._last = self._clock()
        self._seen = 0
        self._console.print(
            f"epoch {record['epoch']}/{trainer.epochs}"
            f"  loss {record['train_loss']:.3f}  accuracy {record['train_accuracy']:.1%}"
            f"  test loss {record['test_loss']:.3f}  test accuracy {record['test_accuracy']:.2%}"
            f"  {self._speed:,.0f} items/s  {self._left(trainer)} left",
            highlight=False,
            soft_wrap=True,
        )

    def on_end(self, trainer: Trainer) -> None:
        self._bar.stop()

    @property
    def _speed(self) -> float:
        return self._items / self._busy if self._busy else 0.0

    def _left(self, trainer: Trainer) -> str:
        done = trainer.step - self._first_step
        to_do = trainer.epochs * trainer.steps_per_epoch - trainer.step
        seconds = round((self._clock() - self._began) / max(done, 1) * to_do)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _where(self, trainer: Trainer) -> str:
        return f"epoch {min(trainer.epoch + 1, trainer.epochs)}/{trainer.epochs}"
