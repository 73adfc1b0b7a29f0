"""An optimizer's step inside a compiled step: the kernels are recorded once, the scalars anew.

Invariant: what Python does at a later step is counting and computing the scalars of each group, in
the order of the first time; a change of anything else (options that select another update, state
that was loaded) is noticed and recorded again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame.ops.op import Stale, interpreter

if TYPE_CHECKING:
    from flame.optim._optimizer import Optimizer, Updates

Numbers = tuple[Any, ...]


def recorded(optimizer: Optimizer) -> list[Updates]:
    """This step's kernel calls, with stand-ins for the scalars that each step computes anew."""
    updates: list[Updates] = []

    def first() -> Numbers:
        updates.extend(optimizer._prepare())
        return as_numbers([each.scalars for each in updates])

    chosen = _chosen(optimizer)
    fresh = [tuple(p for _, _, found in chosen for p in found if not optimizer.state.get(p))]
    known: dict[Any, tuple[tuple[Any, ...], int]] = {}

    def again() -> Numbers:
        fresh.clear()
        return _again(optimizer, chosen, known)

    made = interpreter().repeat(first, again, lambda: _undo(optimizer, chosen, fresh))
    stand_ins = iter(made)
    known |= {
        parameter: (tuple(buffers), number)
        for number, each in enumerate(updates)
        for parameter, *buffers in each.outputs
    }
    return [each._replace(scalars=tuple(next(stand_ins) for _ in each.scalars)) for each in updates]


def _chosen(optimizer: Optimizer) -> list[tuple[dict[str, Any], Any, list[Any]]]:
    """(group, update, parameters that have gradients) of every group."""
    return [
        (group, optimizer._update(group), [p for p in group["params"] if p.grad is not None])
        for group in optimizer.param_groups
    ]


def _again(
    optimizer: Optimizer, chosen: Any, known: dict[Any, tuple[tuple[Any, ...], int]]
) -> Numbers:
    """The scalars of a later step. known: of each parameter its buffers, and which of the Updates
    it is in."""
    if optimizer._counts:
        raise Stale("where the optimizer's steps are counted")
    if len(optimizer.param_groups) != len(chosen):
        raise Stale("the optimizer's groups")
    for now, (group, update, parameters) in zip(optimizer.param_groups, chosen, strict=True):
        if now is not group or optimizer._update(group) != update:
            raise Stale("the optimizer's options")
        for parameter in parameters:
            state = optimizer.state[parameter]
            for name, buffer in zip(update.buffers, known[parameter][0], strict=True):
                if state.get(name) is not buffer:
                    raise Stale("the optimizer's state")
    found: list[Numbers] = []
    for group, _, parameters in chosen:
        for parameter in parameters:
            step = 2
            if optimizer._counts_steps:
                state = optimizer.state[parameter]
                step = state["step"] = state.get("step", 0) + 1
            if known[parameter][1] == len(found):  # who shared scalars once shares them always
                found.append(optimizer._scalars(group, step))
    return as_numbers(found)


def _undo(optimizer: Optimizer, chosen: Any, fresh: list[tuple[Any, ...]]) -> None:
    """Take back the latest count. fresh: parameters that had no state before the first one."""
    for parameter in fresh[0] if fresh else ():
        optimizer.state.pop(parameter, None)
    fresh.clear()
    if not optimizer._counts_steps:
        return
    for _, _, parameters in chosen:
        for parameter in parameters:
            state = optimizer.state.get(parameter)
            if state:
                state["step"] -= 1


def as_numbers(scalars: list[Numbers]) -> Numbers:
    """The scalars, those too that are tensors: a rate may be one."""
    return tuple(s.item() if _is_tensor(s) else s for each in scalars for s in each)


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "storage")
