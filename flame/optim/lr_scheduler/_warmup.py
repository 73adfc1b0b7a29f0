"""ConstantLR and LinearLR: a smaller rate for a number of epochs, and then the full one."""

from __future__ import annotations

from flame.core.errors import ArgumentError
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import LRScheduler, present_rates

__all__ = ["ConstantLR", "LinearLR"]


class ConstantLR(LRScheduler):
    """Multiply the rate by `factor` until epoch `total_iters`, and take it back then.

    Args:
        optimizer: whose rates are set.
        factor: in (0, 1].
        total_iters: the epoch from which the full rate holds.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0.0 < factor <= 1.0:
            raise ArgumentError(f"{self._name}: factor must lie in (0, 1], got {factor}")
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates, times factor at epoch 0 and divided by it at total_iters."""
        if self.last_epoch == 0:
            return self._scaled(self.factor)
        if self.last_epoch == self.total_iters:
            return self._scaled(1.0 / self.factor)
        return present_rates(self.optimizer)

    def _closed_form(self) -> list[float]:
        factor = 1.0 if self.last_epoch >= self.total_iters else self.factor
        return [base * factor for base in self.base_lrs]


class LinearLR(LRScheduler):
    """Let a factor of the rate go in a straight line from `start_factor` to `end_factor` in
    `total_iters` epochs.

    Args:
        optimizer: whose rates are set.
        start_factor: in (0, 1].
        end_factor: in [0, 1].
        total_iters: the epoch at which the end is reached.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0.0 < start_factor <= 1.0:
            raise ArgumentError(
                f"{self._name}: start_factor must lie in (0, 1], got {start_factor}"
            )
        if not 0.0 <= end_factor <= 1.0:
            raise ArgumentError(f"{self._name}: end_factor must lie in [0, 1], got {end_factor}")
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates, times the ratio of this epoch's factor to the one before."""
        if self.last_epoch == 0:
            return self._scaled(self.start_factor)
        if self._is_initial or self.last_epoch > self.total_iters:
            return present_rates(self.optimizer)
        rise = self.end_factor - self.start_factor
        before = self.total_iters * self.start_factor + (self.last_epoch - 1) * rise
        return self._scaled(1.0 + rise / before)

    def _closed_form(self) -> list[float]:
        part = min(self.total_iters, self.last_epoch) / self.total_iters
        factor = self.start_factor + (self.end_factor - self.start_factor) * part
        return [base * factor for base in self.base_lrs]
