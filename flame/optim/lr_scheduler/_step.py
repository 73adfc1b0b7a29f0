"""StepLR and MultiStepLR: the rate falls by a factor at certain epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import LRScheduler, positive_int, present_rates

__all__ = ["MultiStepLR", "StepLR"]


class StepLR(LRScheduler):
    """Multiply the rate by `gamma` every `step_size` epochs.

    Args:
        optimizer: whose rates are set.
        step_size: the number of epochs between two falls, at least 1.
        gamma: the factor.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size = positive_int(self._name, "step_size", step_size)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates, times gamma at each multiple of step_size."""
        falls = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return self._scaled(self.gamma) if falls else present_rates(self.optimizer)

    def _closed_form(self) -> list[float]:
        factor: float = self.gamma ** (self.last_epoch // self.step_size)
        return [base * factor for base in self.base_lrs]


class MultiStepLR(LRScheduler):
    """Multiply the rate by `gamma` at each of the milestones; one that is named twice counts twice.

    Args:
        optimizer: whose rates are set.
        milestones: epochs, in any order.
        gamma: the factor.
        last_epoch: the number of steps already taken; −1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = sorted(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The present rates, times gamma for each milestone that is now."""
        times = self.milestones.count(self.last_epoch)
        return self._scaled(self.gamma**times) if times else present_rates(self.optimizer)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; PyTorch's, which counts each milestone in a mapping, is
        understood too.
        """
        milestones = state_dict.get("milestones")
        if isinstance(milestones, Mapping):
            listed = sorted(int(epoch) for epoch, times in milestones.items() for _ in range(times))
            state_dict = {**state_dict, "milestones": listed}
        super().load_state_dict(state_dict)

    def _closed_form(self) -> list[float]:
        factor: float = self.gamma ** bisect_right(self.milestones, self.last_epoch)
        return [base * factor for base in self.base_lrs]
