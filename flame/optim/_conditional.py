"""Steps that the device may skip: nobody on the host knows whether a step is taken.

A `GradScaler` gives the optimizer ``found_inf``, a tensor. Where it is not 0, every parameter and
buffer keeps its value, bit for bit. So the number of steps that were taken is known on the device
alone, and what follows from it (bias corrections) is computed there.

Invariants: once a step of an optimizer was conditional, its counts stay on the device until a
state_dict is loaded. Parameters that have always stepped together share one count, a float64
tensor without dimensions, so that it costs one small kernel for all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.core.errors import UnsupportedError
from flame.ops.op import Stale, interpreter
from flame.optim._recording import as_numbers
from flame.optim._tensors import Tensor, float64, full, pointwise, where

if TYPE_CHECKING:
    from flame.optim._optimizer import Optimizer, Update, Updates

Numbers = tuple[Any, ...]


class Counted(NamedTuple):
    """How the first scalars of an update follow from a count on the device.

    ``function(count, *numbers)`` gives a tuple of ``results`` of them.
    """

    function: Callable[..., Any]
    numbers: Numbers
    results: int


class _Part(NamedTuple):
    """Parameters of one group that have a gradient and share a count."""

    group: dict[str, Any]
    update: Update
    steps: Tensor
    parameters: list[Tensor]


def conditional(optimizer: Optimizer, found_inf: Tensor | None) -> list[Updates]:
    """Count this step, and give the kernel calls that are left of it."""
    parts: list[_Part] = []
    # a tuple in a list, as a list of tensors would be taken for a place where the user keeps them
    fresh: list[tuple[Tensor, ...]] = []
    recording = interpreter().recording
    taking_part = {p for p in optimizer._parameters() if p.grad is not None}

    def first() -> Numbers:
        without = [p for p in taking_part if not optimizer.state.get(p)]
        fresh.append(tuple(p for p in without if p not in optimizer._counts))
        parts.extend(_parts(optimizer, taking_part))
        return _all_numbers(optimizer, parts, recording)

    def again() -> Numbers:
        fresh.clear()
        _check_same(optimizer, parts, buffers)
        return _all_numbers(optimizer, parts, recording)

    numbers = iter(interpreter().repeat(first, again, lambda: _undo(optimizer, fresh)))
    buffers = [
        [optimizer.state[p][name] for name in part.update.buffers]
        for part in parts
        for p in part.parameters
    ]
    for count in {id(part.steps): part.steps for part in parts}.values():
        if found_inf is None:
            count.add_(1.0)
        else:
            count_taken(count, found_inf.to(count.device), out=(count,))
    return [made for part in parts for made in _updates(optimizer, part, numbers, found_inf)]


@pointwise
def count_taken(count: Any, found_inf: Any) -> Any:
    return where(found_inf == 0.0, count + 1.0, count)


def _updates(
    optimizer: Optimizer, part: _Part, numbers: Any, found_inf: Tensor | None
) -> list[Updates]:
    """The updates of a part, those of each device by themselves."""
    from flame.optim._optimizer import Updates

    group, update, steps, parameters = part
    counted = optimizer._counted(group)
    scalars: Numbers = ()
    if counted is not None:
        given = counted.function(steps, *[next(numbers) for _ in counted.numbers])
        scalars = given if isinstance(given, tuple) else (given,)
    rest = len(optimizer._scalars(group, 2)) - len(scalars)
    scalars = (*scalars, *[next(numbers) for _ in range(rest)])
    function = update.function
    if found_inf is not None:
        function, scalars = skippable(function), (*scalars, found_inf)
    made: dict[Any, Updates] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        device = parameter.device
        if device not in made:
            there = tuple(s.to(device) if isinstance(s, Tensor) else s for s in scalars)
            made[device] = Updates(function, there, [], [])
        buffers = [optimizer.state[parameter][name] for name in update.buffers]
        made[device].inputs.append((parameter, gradient, *buffers))
        made[device].outputs.append((parameter, *buffers))
    return list(made.values())


@functools.cache
def skippable(update: Any) -> Any:
    """The update with ``found_inf`` as last operand: where that is not 0, nothing changes."""
    plain = update.function
    names = list(inspect.signature(plain).parameters)

    def function(*operands: Any) -> tuple[Any, ...]:
        *given, found_inf = operands
        parameter, _, *rest = given
        made = plain(*given)
        kept = (parameter, *rest)[: len(made)]
        taken = found_inf == 0.0
        return tuple(where(taken, new, old) for new, old in zip(made, kept, strict=True))

    function.__name__ = f"{update.__name__}_or_none"
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in (*names, "found_inf")
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return pointwise(function)


# --- the host's part ------------------------------------------------------------------------------


def _parts(optimizer: Optimizer, taking_part: set[Tensor]) -> list[_Part]:
    """Who takes part in this step; state that is missing is made."""
    known: list[tuple[dict[str, Any], Update, list[Tensor]]] = []
    begun: dict[Tensor, int | Tensor] = {}
    for group in optimizer.param_groups:
        update = optimizer._update(group)
        parameters = [p for p in group["params"] if p in taking_part]
        for parameter in parameters:
            optimizer._check_gradient(parameter)
            begun[parameter] = optimizer._begin(parameter, update, group)
        known.append((group, update, parameters))
    counts = _counts(optimizer, begun)
    found: list[_Part] = []
    for group, update, parameters in known:
        shared: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            shared.setdefault(id(counts[parameter]), []).append(parameter)
        _check_counted(optimizer, group)
        found += [_Part(group, update, counts[each[0]], each) for each in shared.values()]
    return found


def _check_counted(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Raise UnsupportedError where scalars depend on the count and nothing says how."""
    if optimizer._counted(group) is not None:
        return
    first, later = optimizer._scalars(group, 1), optimizer._scalars(group, 2)
    pairs = zip(first, later, strict=True)
    if any(a is not b and not isinstance(a, Tensor) and a != b for a, b in pairs):
        raise UnsupportedError(
            f"{optimizer._name}: its scalars depend on the number of steps, which only the device "
            "knows where steps may be skipped; define `_counted` beside `_scalars`"
        )


def _counts(optimizer: Optimizer, begun: dict[Tensor, int | Tensor]) -> dict[Tensor, Tensor]:
    """The count of each parameter, on the device, shared by those that have always stepped as one.

    begun: the counts before this step.
    """
    holders: dict[int, int] = {}
    for held in optimizer._counts.values():
        holders[id(held)] = holders.get(id(held), 0) + 1
    members: dict[Any, list[Tensor]] = {}
    for parameter, count in begun.items():
        key = id(count) if isinstance(count, Tensor) else (parameter.device, count)
        members.setdefault(key, []).append(parameter)
    found: dict[Tensor, Tensor] = {}
    for parameters in members.values():
        count = begun[parameters[0]]
        if not isinstance(count, Tensor):
            device = parameters[0].device
            count = full((), float(count), dtype=float64, device=device)
        elif holders[id(count)] > len(parameters):  # the others do not step this time
            count = count.clone()
        for parameter in parameters:
            optimizer._counts[parameter] = found[parameter] = count
            if optimizer._counts_steps:
                optimizer.state[parameter]["step"] = count
    return found


def _all_numbers(optimizer: Optimizer, parts: list[_Part], recording: bool) -> Numbers:
    """What the groups' options give, read anew at each step."""
    found: list[Numbers] = []
    for part in parts:
        scalars = optimizer._scalars(part.group, 2)
        counted = optimizer._counted(part.group)
        if counted is not None:
            found.append(counted.numbers)
            scalars = scalars[counted.results :]
        found.append(scalars)
    return as_numbers(found) if recording else tuple(x for each in found for x in each)


def _check_same(optimizer: Optimizer, parts: list[_Part], buffers: list[list[Tensor]]) -> None:
    """Raise Stale where the kernels that were recorded are not those of this step."""
    groups = optimizer.param_groups
    known = iter(buffers)
    for part in parts:
        if not any(part.group is group for group in groups):
            raise Stale("the optimizer's groups")
        if optimizer._update(part.group) != part.update:
            raise Stale("the optimizer's options")
        for parameter in part.parameters:
            state = optimizer.state.get(parameter, {})
            held = next(known)
            pairs = zip(part.update.buffers, held, strict=True)
            if any(state.get(name) is not buffer for name, buffer in pairs):
                raise Stale("the optimizer's state")
            if optimizer._counts.get(parameter) is not part.steps:
                raise Stale("the optimizer's counts")


def _undo(optimizer: Optimizer, fresh: list[tuple[Tensor, ...]]) -> None:
    """Take back the state that the first step made."""
    for parameter in fresh[0] if fresh else ():
        optimizer.state.pop(parameter, None)
        optimizer._counts.pop(parameter, None)
    fresh.clear()
