"""ReduceLROnPlateau: the rate falls when a metric has stopped getting better."""

from __future__ import annotations

import math
from typing import Literal, SupportsFloat

from flame.core.errors import ArgumentError
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import (
    LRScheduler,
    check_optimizer,
    one_per_group,
    present_rates,
    set_rate,
)

__all__ = ["ReduceLROnPlateau"]


class ReduceLROnPlateau(LRScheduler):
    """Multiply the rate by `factor` after `patience` epochs in which the metric got no better.

    Args:
        optimizer: whose rates are set.
        mode: "min" if a smaller metric is better, "max" if a larger one is.
        factor: below 1.
        patience: the number of epochs without improvement that are let pass.
        threshold: how much better than the best a metric must be to count.
        threshold_mode: "rel" takes the threshold as a part of the best, "abs" as it is.
        cooldown: the number of epochs after a fall in which none counts as bad.
        min_lr: the smallest rate, or a list with one for each group.
        eps: a fall by less than this is not made.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float | list[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        # The base's constructor takes a first step, which needs a metric here.
        check_optimizer(self._name, optimizer)
        if not 0.0 <= factor < 1.0:
            raise ArgumentError(f"{self._name}: factor must lie in [0, 1), got {factor}")
        if mode not in ("min", "max"):
            raise ArgumentError(f'{self._name}: mode must be "min" or "max", got {mode!r}')
        if threshold_mode not in ("rel", "abs"):
            raise ArgumentError(
                f'{self._name}: threshold_mode must be "rel" or "abs", got {threshold_mode!r}'
            )
        self.optimizer = optimizer
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.min_lrs = one_per_group(self._name, "min_lr", min_lr, optimizer)
        self.eps = eps
        self.last_epoch = 0
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = 0
        self.cooldown_counter = 0
        self._last_lr = present_rates(optimizer)

    @property
    def in_cooldown(self) -> bool:
        """Whether bad epochs do not count at present."""
        return self.cooldown_counter > 0

    def step(  # as PyTorch's, it takes a metric first
        self, metrics: SupportsFloat, epoch: int | None = None
    ) -> None:
        """Take note of an epoch's metric, a number or a tensor of one element."""
        current = float(metrics)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self._is_better(current):
            self.best = current
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = present_rates(self.optimizer)

    def _is_better(self, current: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        if self.threshold_mode == "rel":
            bound = self.best * (1.0 + sign * self.threshold)
        else:
            bound = self.best + sign * self.threshold
        return current > bound if self.mode == "max" else current < bound

    def _reduce(self) -> None:
        groups = self.optimizer.param_groups
        if len(self.min_lrs) != len(groups):
            raise ArgumentError(
                f"{self._name}: made for {len(self.min_lrs)} groups, but the optimizer now has "
                f"{len(groups)}; "
                "make the schedule after adding groups"
            )
        for group, rate, least in zip(
            groups, present_rates(self.optimizer), self.min_lrs, strict=True
        ):
            reduced = max(rate * self.factor, least)
            if rate - reduced > self.eps:
                set_rate(group, reduced)
