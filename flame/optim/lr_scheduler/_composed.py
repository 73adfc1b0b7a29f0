"""SequentialLR and ChainedScheduler: schedules one after the other, and schedules at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flame.core.errors import ArgumentError, StateError, UnsupportedError
from flame.optim._arguments import as_float
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._plateau import ReduceLROnPlateau
from flame.optim.lr_scheduler._scheduler import LRScheduler, present_rates, set_rate

__all__ = ["ChainedScheduler", "SequentialLR"]


class ComposedScheduler(LRScheduler):
    """What schedules of schedules share: the checks of their parts, and their state."""

    _not_saved: ClassVar[frozenset[str]] = LRScheduler._not_saved | {"_schedulers"}

    def __init__(self, optimizer: Optimizer | None, schedulers: Sequence[LRScheduler]) -> None:
        # The base's constructor takes a first step, which the parts have taken already.
        if not schedulers:
            raise ArgumentError(f"{self._name}: needs at least one schedule")
        self.optimizer = schedulers[0].optimizer if optimizer is None else optimizer
        for position, scheduler in enumerate(schedulers):
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ArgumentError(
                    f"{self._name}: schedule {position} is a ReduceLROnPlateau, whose step needs a "
                    "metric; "
                    "step it by itself"
                )
            if scheduler.optimizer is not self.optimizer:
                raise ArgumentError(f"{self._name}: schedule {position} is of another optimizer")
        self._schedulers = list(schedulers)
        self._step_count = 0
        self._is_initial = False

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts, and this schedule's own."""
        parts = [scheduler.state_dict() for scheduler in self._schedulers]
        return {**super().state_dict(), "_schedulers": parts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        parts = state_dict.get("_schedulers", [])
        if len(parts) != len(self._schedulers):
            raise StateError(
                f"{self._name}.load_state_dict: {len(parts)} schedules saved, "
                f"{len(self._schedulers)} here"
            )
        super().load_state_dict(state_dict)
        for scheduler, part in zip(self._schedulers, parts, strict=True):
            scheduler.load_state_dict(part)


class SequentialLR(ComposedScheduler):
    """Run one schedule until the first milestone, the next until the second, and so on.

    Each starts at its own epoch 0.

    Args:
        optimizer: whose rates are set.
        schedulers: schedules of that optimizer.
        milestones: the epochs at which the next takes over, rising, one fewer than schedules.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, schedulers)
        if len(milestones) != len(schedulers) - 1:
            raise ArgumentError(
                f"{self._name}: {len(schedulers)} schedules need {len(schedulers) - 1} milestones, "
                f"got {len(milestones)}"
            )
        for position, scheduler in enumerate(schedulers[1:], 1):
            if isinstance(scheduler, ComposedScheduler):
                raise UnsupportedError(
                    f"{self._name}: schedule {position} is a {type(scheduler).__name__}, which "
                    "cannot be started anew "
                    "in the middle; only the first may be one"
                )
        self._milestones = list(milestones)
        self.last_epoch = last_epoch + 1
        # The parts have each taken their first step; only the one that holds epoch 0 may have.
        for group in optimizer.param_groups:
            set_rate(group, as_float(group["initial_lr"]))
        for scheduler in schedulers:
            _undo_first_step(scheduler)
        first = self._schedulers[bisect_right(self._milestones, 0)]
        first._take_first_step()
        self._last_lr = first.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, with the schedule whose turn it is."""
        if epoch is not None:
            raise UnsupportedError(f"{self._name}: cannot be moved to an epoch by number")
        self._step_count += 1
        self.last_epoch += 1
        turn = bisect_right(self._milestones, self.last_epoch)
        scheduler = self._schedulers[turn]
        if turn > 0 and self._milestones[turn - 1] == self.last_epoch:
            scheduler._move(0)
        else:
            scheduler.step()
        self._last_lr = scheduler.get_last_lr()


class ChainedScheduler(ComposedScheduler):
    """Step several schedules together, each acting on the rates that the one before has left.

    Args:
        schedulers: schedules of one optimizer.
        optimizer: that optimizer; by default that of the first schedule.
    """

    def __init__(
        self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None
    ) -> None:
        super().__init__(optimizer, schedulers)
        self._last_lr = present_rates(self.optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Step every part."""
        if epoch is not None:
            raise UnsupportedError(f"{self._name}: cannot be moved to an epoch by number")
        self._step_count += 1
        for scheduler in self._schedulers:
            scheduler.step()
        self._last_lr = present_rates(self.optimizer)


def _undo_first_step(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, ComposedScheduler):
        for part in scheduler._schedulers:
            _undo_first_step(part)
    else:
        scheduler.last_epoch -= 1
