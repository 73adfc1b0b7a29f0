"""ExponentialLR: the rate falls by the same factor at every epoch."""

from __future__ import annotations

from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import LRScheduler, present_rates

__all__ = ["ExponentialLR"]


class ExponentialLR(LRScheduler):
    """Multiply the rate by `gamma` at every epoch.

    Args:
        optimizer: whose rates are set.
        gamma: the factor.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates times gamma, but at construction as they are."""
        return present_rates(self.optimizer) if self._is_initial else self._scaled(self.gamma)

    def _closed_form(self) -> list[float]:
        factor: float = self.gamma**self.last_epoch
        return [base * factor for base in self.base_lrs]
