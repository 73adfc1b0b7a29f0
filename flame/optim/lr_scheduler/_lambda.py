"""LambdaLR: the base rate times a function of the epoch."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flame.core.errors import StateError
from flame.optim._optimizer import Optimizer
from flame.optim.lr_scheduler._scheduler import LRScheduler, check_optimizer, one_per_group

__all__ = ["LambdaLR"]


class LambdaLR(LRScheduler):
    """Set each group's rate to its base rate times `lr_lambda(epoch)`.

    Args:
        optimizer: whose rates are set.
        lr_lambda: a function of the epoch, or a list with one for each group.
        last_epoch: the number of steps already taken; −1 begins anew.

    A state_dict holds the attributes of `lr_lambda` if it is an object that can be called, and
    nothing of functions.
    """

    _not_saved: ClassVar[frozenset[str]] = LRScheduler._not_saved | {"lr_lambdas"}

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | list[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(self._name, optimizer)
        self.lr_lambdas = one_per_group(self._name, "lr_lambda", lr_lambda, optimizer)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """The base rates times the functions' values."""
        return [
            base * function(self.last_epoch)
            for function, base in zip(self.lr_lambdas, self.base_lrs, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that the schedule is, but for the optimizer and plain functions."""
        saved = [
            None if isinstance(function, types.FunctionType) else copy.deepcopy(vars(function))
            for function in self.lr_lambdas
        ]
        return {**super().state_dict(), "lr_lambdas": saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; functions stay those that this schedule was made with."""
        saved = state_dict.get("lr_lambdas", [])
        if len(saved) != len(self.lr_lambdas):
            raise StateError(
                f"{self._name}.load_state_dict: {len(saved)} functions saved, "
                f"{len(self.lr_lambdas)} here"
            )
        super().load_state_dict(state_dict)
        for function, values in zip(self.lr_lambdas, saved, strict=True):
            if values is not None:
                vars(function).update(copy.deepcopy(values))
