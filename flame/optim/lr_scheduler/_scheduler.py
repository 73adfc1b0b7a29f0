"""The base of all schedules, which set the rate of every group at construction and at each step.

Invariants:
- `last_epoch` counts the steps since construction, which itself takes step 0.
- A schedule that has a recursion computes each rate from the group's present rate, so several
  schedules may act on one optimizer; one that has a closed form besides uses it when it is moved to
  an epoch by number.
- A rate that is a tensor stays that tensor and is filled, so a compiled step sees the new value.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from flame.core.errors import ArgumentError, DTypeError, StateError, UnsupportedError
from flame.ops.op import interpreter
from flame.optim._arguments import as_float
from flame.optim._optimizer import Optimizer
from flame.optim._tensors import Tensor, no_grad

__all__ = [
    "LRScheduler",
    "check_optimizer",
    "one_per_group",
    "positive_int",
    "present_rates",
    "set_rate",
]

T = TypeVar("T")


def check_optimizer(owner: str, optimizer: object) -> None:
    """Refuse what is no optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise DTypeError(
            f"{owner}: the first argument must be an optimizer, got {type(optimizer).__name__}"
        )


def one_per_group(owner: str, name: str, value: T | Iterable[T], optimizer: Optimizer) -> list[T]:
    """`value` for each group: itself repeated, or a list with one for each."""
    groups = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [value] * groups  # type: ignore[list-item]
    if len(value) != groups:
        raise ArgumentError(
            f"{owner}: {name} has {len(value)} values, but the optimizer has {groups} groups"
        )
    return list(value)


def positive_int(owner: str, name: str, value: object) -> int:
    """The value, which must be an int of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{owner}: {name} must be an int of at least 1, got {value!r}")
    return value


def present_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group."""
    return [as_float(group["lr"]) for group in optimizer.param_groups]


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        with no_grad():
            group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def each_step(step: Callable[..., None]) -> Callable[..., None]:
    """A schedule's step as Python's own work: a compiled step does it again at each call."""

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if not interpreter().recording:
            step(self, *args, **kwargs)
            return
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        rates: list[float] = []

        def action() -> None:
            before[:], rates[:] = _snapshot(self), present_rates(self.optimizer)
            try:
                step(self, *args, **kwargs)
            except BaseException:
                for namespace, values in before:
                    namespace.update(values)
                raise

        def undo() -> None:
            for namespace, values in before:
                namespace.update(values)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                set_rate(group, rate)

        interpreter().repeat(action, undo=undo)

    return wrapper


def _snapshot(scheduler: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a step may change of a schedule, its parts and its groups, as (namespace, values)."""
    parts = [scheduler]
    for part in parts:
        parts += getattr(part, "_schedulers", ())
    namespaces = [vars(part) for part in parts] + scheduler.optimizer.param_groups
    return [(namespace, dict(namespace)) for namespace in namespaces]


class LRScheduler:
    """Base class of schedules; a subclass defines `get_lr`.

    Args:
        optimizer: whose groups' rates are set.
        last_epoch: the number of steps already taken; −1 begins anew.

    Raises:
        StateError: last_epoch is given, but the optimizer's groups hold no "initial_lr" to go on
            from.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            cls.step = each_step(cls.step)  # type: ignore[method-assign]

    _not_saved: ClassVar[frozenset[str]] = frozenset({"optimizer", "_is_initial"})

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        check_optimizer(self._name, optimizer)
        self.optimizer = optimizer
        for position, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", as_float(group["lr"]))
            elif "initial_lr" not in group:
                raise StateError(
                    f'{self._name}: group {position} has no "initial_lr" to go on from at epoch '
                    f"{last_epoch}; "
                    "load the optimizer's state_dict first, or begin with last_epoch=-1"
                )
        self.base_lrs = [as_float(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._last_lr: list[float] = []
        self._step_count = 0
        self._is_initial = False
        self._take_first_step()

    def get_last_lr(self) -> list[float]:
        """The rate of each group that the last step set."""
        interpreter().refuse("the rate of a schedule")
        return list(self._last_lr)

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_epoch`, from the present rates in a recursion."""
        raise UnsupportedError(f"{self._name}: a schedule defines get_lr")

    @each_step
    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, or to the given one, after the optimizer's steps."""
        self._step_count += 1
        self._move(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that the schedule is, but for the optimizer."""
        return {
            name: copy.deepcopy(value)
            for name, value in vars(self).items()
            if name not in self._not_saved
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. The rates themselves are part of the optimizer's state_dict.

        Raises:
            StateError: the state is of another kind of schedule, or for another number of groups.
        """
        self._load(state_dict, vars(self).keys() - self._not_saved)

    def _load(self, state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
        missing = sorted(name for name in names if name not in state_dict)
        if missing:
            raise StateError(
                f"{self._name}.load_state_dict: missing {', '.join(missing)}; is it of another "
                "schedule?"
            )
        rates = state_dict.get("base_lrs", ())
        if rates and len(rates) != len(self.optimizer.param_groups):
            raise StateError(
                f"{self._name}.load_state_dict: saved for {len(rates)} groups, "
                f"but the optimizer has {len(self.optimizer.param_groups)}"
            )
        vars(self).update({name: copy.deepcopy(state_dict[name]) for name in names})

    def _take_first_step(self) -> None:
        """Step 0, which sets the rates before the first optimizer step."""
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _closed_form(self) -> list[float] | None:
        """The rates at `last_epoch` from the base rates alone, where the schedule has such a
        form.
        """
        return None

    def _move(self, epoch: int | None) -> None:
        rates: list[float] | None = None
        if epoch is None:
            self.last_epoch += 1
        else:
            self.last_epoch = epoch
            rates = self._closed_form()
        self._apply(self.get_lr() if rates is None else rates)

    def _apply(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, rate)
        self._last_lr = present_rates(self.optimizer)

    def _scaled(self, factor: float) -> list[float]:
        return [rate * factor for rate in present_rates(self.optimizer)]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self._name}(last_epoch={self.last_epoch}, lr={self.get_last_lr()})"
