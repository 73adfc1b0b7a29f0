"""OneCycleLR: up to a large rate and down to almost none, while momentum goes the other way."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from flame.core.errors import ArgumentError, StateError
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import (
    LRScheduler,
    check_optimizer,
    one_per_group,
    positive_int,
)

__all__ = ["OneCycleLR"]


class Phase(NamedTuple):
    """A stretch of the cycle that ends at step `end`; the keys name values in the groups."""

    end: float
    start_lr: str
    end_lr: str
    start_momentum: str
    end_momentum: str


def _phases(total: int, part: float, *, three: bool) -> list[Phase]:
    up = Phase(part * total - 1, "initial_lr", "max_lr", "max_momentum", "base_momentum")
    if not three:
        return [up, Phase(total - 1, "max_lr", "min_lr", "base_momentum", "max_momentum")]
    return [
        up,
        Phase(2 * part * total - 2, "max_lr", "initial_lr", "base_momentum", "max_momentum"),
        Phase(total - 1, "initial_lr", "min_lr", "max_momentum", "max_momentum"),
    ]


class OneCycleLR(LRScheduler):
    """One cycle over the whole training; step it after every batch.

    Source: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates (2018).

    Args:
        optimizer: whose rates, and momentum or beta1, are set.
        max_lr: the rate at the top, or a list with one for each group.
        total_steps: the number of steps, or else
        epochs, steps_per_epoch: whose product it is.
        pct_start: the part of the steps that goes up, in [0, 1].
        anneal_strategy: "cos" or "linear".
        cycle_momentum: let momentum go from max_momentum down to base_momentum and back.
        base_momentum, max_momentum: its ends, or lists with one for each group.
        div_factor: max_lr divided by the rate at the start.
        final_div_factor: the rate at the start divided by the rate at the end.
        three_phase: go down to the start symmetrically first, and then to the end.
        last_epoch: the number of steps already taken; −1 begins anew.

    Raises:
        ArgumentError: a value out of range, or a step after the last.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(self._name, optimizer)
        self.optimizer = optimizer
        self.total_steps = self._total(total_steps, epochs, steps_per_epoch)
        if not 0.0 <= pct_start <= 1.0:
            raise ArgumentError(f"{self._name}: pct_start must lie in [0, 1], got {pct_start}")
        if anneal_strategy not in ("cos", "linear"):
            raise ArgumentError(
                f'{self._name}: anneal_strategy must be "cos" or "linear", got {anneal_strategy!r}'
            )
        self.pct_start = float(pct_start)
        self.anneal_strategy = anneal_strategy
        self.three_phase = three_phase
        self.cycle_momentum = cycle_momentum
        self.use_beta1 = "betas" in optimizer.defaults
        tops = one_per_group(self._name, "max_lr", max_lr, optimizer)
        if last_epoch == -1:
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["max_lr"] = top
                group["initial_lr"] = top / div_factor
                group["min_lr"] = group["initial_lr"] / final_div_factor
        if cycle_momentum:
            self._begin_momentum(base_momentum, max_momentum, last_epoch)
        super().__init__(optimizer, last_epoch)

    def _total(
        self, total_steps: int | None, epochs: int | None, steps_per_epoch: int | None
    ) -> int:
        if total_steps is None and epochs is not None and steps_per_epoch is not None:
            total_steps = epochs * steps_per_epoch
        if total_steps is None:
            raise ArgumentError(
                f"{self._name}: give total_steps, or both epochs and steps_per_epoch"
            )
        return positive_int(self._name, "the number of steps", total_steps)

    def _begin_momentum(
        self, low: float | list[float], high: float | list[float], last_epoch: int
    ) -> None:
        if not self.use_beta1 and "momentum" not in self.optimizer.defaults:
            raise ArgumentError(
                f"{self._name}: {type(self.optimizer).__name__} has neither momentum nor betas to "
                "cycle; "
                "set cycle_momentum=False"
            )
        lows = one_per_group(self._name, "base_momentum", low, self.optimizer)
        highs = one_per_group(self._name, "max_momentum", high, self.optimizer)
        if last_epoch == -1:
            for group, base, top in zip(self.optimizer.param_groups, lows, highs, strict=True):
                group["max_momentum"] = top
                group["base_momentum"] = base
                self._set_momentum(group, top)

    def get_lr(self) -> list[float]:
        """The rates at `last_epoch`; sets the momentum besides."""
        step = self.last_epoch
        if step > self.total_steps:
            raise ArgumentError(
                f"{self._name}: step {step} is after the last of the {self.total_steps} it was "
                "made for"
            )
        phase, part = self._position(step)
        rates = []
        for position, group in enumerate(self.optimizer.param_groups):
            if "max_lr" not in group:
                raise StateError(
                    f'{self._name}: group {position} has no "max_lr" to go on from; load the '
                    "optimizer's state_dict"
                )
            rates.append(self._between(group[phase.start_lr], group[phase.end_lr], part))
            if self.cycle_momentum:
                ends = group[phase.start_momentum], group[phase.end_momentum]
                self._set_momentum(group, self._between(*ends, part))
        return rates

    def _position(self, step: int) -> tuple[Phase, float]:
        """The phase that holds a step, and the part of it that lies behind."""
        phases = _phases(self.total_steps, self.pct_start, three=self.three_phase)
        start = 0.0
        for phase in phases[:-1]:
            if step <= phase.end:
                return phase, (step - start) / (phase.end - start)
            start = phase.end
        return phases[-1], (step - start) / (phases[-1].end - start)

    def _between(self, start: float, end: float, part: float) -> float:
        if self.anneal_strategy == "linear":
            return (end - start) * part + start
        return end + (start - end) / 2.0 * (1 + math.cos(math.pi * part))

    def _set_momentum(self, group: dict[str, Any], value: float) -> None:
        if self.use_beta1:
            group["betas"] = (value, *group["betas"][1:])
        else:
            group["momentum"] = value
