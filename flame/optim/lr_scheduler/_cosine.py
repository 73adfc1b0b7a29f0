"""CosineAnnealingLR and CosineAnnealingWarmRestarts: the rate follows a cosine down.

Source of both: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts (2017).
"""

from __future__ import annotations

import math

from flame.core.errors import ArgumentError
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import LRScheduler, positive_int, present_rates

__all__ = ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"]


class CosineAnnealingLR(LRScheduler):
    """Let the rate go from its base to `eta_min` in `T_max` epochs along half a cosine.

    After `T_max` it goes on along the cosine, up and down.

    Args:
        optimizer: whose rates are set.
        T_max: the number of epochs down, at least 1.
        eta_min: the rate at the bottom.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if T_max < 1:
            raise ArgumentError(f"{self._name}: T_max must be at least 1, got {T_max}")
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates, their height over eta_min scaled as the cosine changes."""
        rates = present_rates(self.optimizer)
        if self._is_initial:
            return rates
        if (self.last_epoch - 1 - self.T_max) % (2 * self.T_max) == 0:
            # The epoch before was at the bottom, where the ratio is 0/0: climb the first step.
            climb = (1 - math.cos(math.pi / self.T_max)) / 2
            return [
                rate + (base - self.eta_min) * climb
                for rate, base in zip(rates, self.base_lrs, strict=True)
            ]
        ratio = self._height(self.last_epoch) / self._height(self.last_epoch - 1)
        return [ratio * (rate - self.eta_min) + self.eta_min for rate in rates]

    def _height(self, epoch: int) -> float:
        return 1 + math.cos(math.pi * epoch / self.T_max)

    def _closed_form(self) -> list[float]:
        height = self._height(self.last_epoch) / 2
        return [self.eta_min + (base - self.eta_min) * height for base in self.base_lrs]


class CosineAnnealingWarmRestarts(LRScheduler):
    """Let the rate go down along half a cosine, again and again, each time `T_mult` as long.

    Args:
        optimizer: whose rates are set.
        T_0: the number of epochs of the first descent, at least 1.
        T_mult: how much longer each descent is than the one before, at least 1.
        eta_min: the rate at the bottom.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_0 = positive_int(self._name, "T_0", T_0)
        self.T_i = self.T_0
        self.T_mult = positive_int(self._name, "T_mult", T_mult)
        self.eta_min = eta_min
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The rates at T_cur epochs into a descent of T_i epochs."""
        height = (1 + math.cos(math.pi * self.T_cur / self.T_i)) / 2
        return [self.eta_min + (base - self.eta_min) * height for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go to the next epoch, or to the given one, which may be a fraction of one."""
        self._step_count += 1
        if epoch is None and self.last_epoch < 0:
            epoch = 0
        if epoch is None:
            self.last_epoch += 1
            self.T_cur += 1
            if self.T_cur >= self.T_i:
                self.T_cur -= self.T_i
                self.T_i *= self.T_mult
        else:
            self._place(epoch)
            self.last_epoch = math.floor(epoch)
        self._apply(self.get_lr())

    def _place(self, epoch: float) -> None:
        """Find the descent that holds `epoch`, and how far into it the epoch lies."""
        if epoch < 0:
            raise ArgumentError(f"{self._name}: an epoch must be at least 0, got {epoch}")
        self.T_i, self.T_cur = self.T_0, epoch
        if self.T_mult == 1:
            self.T_cur = epoch % self.T_0
            return
        while self.T_cur >= self.T_i:
            self.T_cur -= self.T_i
            self.T_i *= self.T_mult
