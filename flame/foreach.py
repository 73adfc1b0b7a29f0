"""Many calls of one op at once, for eager execution: what optimizers and gradient clipping are.

Invariant: the result is that of the calls one after the other, bit for bit. So calls run together
only where none writes memory that another one reads or writes, and without the tape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

from flame.autograd.mode import mode
from flame.compiler.foreach import ForeachPlan, make_foreach_plan
from flame.core.autocast import autocast
from flame.ops.op import Op
from flame.ops.transfer import move
from flame.runtime import cpu
from flame.tensor import Tensor

if TYPE_CHECKING:
    from flame.eager import Eager

Column = tuple[Any, ...]  # the n-th operand of all calls


def can_run_together(
    op: Op, inputs: Sequence[Column], shared: Column, out: Sequence[Column]
) -> bool:
    """Whether calls are worth it, and such that `run_together` takes them."""
    if len(inputs) < 2 or not inputs[0] or mode.enabled:
        return False
    if op.autocast is not None and autocast.on:
        return False
    shapely = len({*map(len, inputs)}) == 1 == len({*map(len, out)}) and len(inputs) == len(out)
    plain = all(x.__class__ is not int or -(1 << 63) <= x < 1 << 63 for x in shared)
    return shapely and plain and all(isinstance(x, Tensor) for own in inputs for x in own)


def by_device(
    inputs: Sequence[Column], shared: Column, out: Sequence[Column]
) -> Iterator[tuple[Sequence[Column], Column, Sequence[Column]]]:
    """The calls as they are; or where numbers on the CPU (0-d tensors) are shared, the calls of
    each device, with the numbers moved there once."""
    if not any(isinstance(x, Tensor) and _is_number_on_cpu(x) for x in shared):
        yield inputs, shared, out
        return
    parts: dict[str, list[int]] = {}
    for number, own in enumerate(inputs):
        parts.setdefault(own[0].type.device, []).append(number)
    for device, numbers in parts.items():
        moved = tuple(
            [
                move(x, device)
                if device != "cpu" and isinstance(x, Tensor) and _is_number_on_cpu(x)
                else x
                for x in shared
            ]
        )
        yield [inputs[i] for i in numbers], moved, [out[i] for i in numbers]


def _is_number_on_cpu(x: Tensor) -> bool:
    return not x.type.ndim and x.type.device == "cpu"


def run_together(
    eager: Eager, op: Op, inputs: Sequence[Column], shared: Column, out: Sequence[Column]
) -> bool:
    """Run the calls; False, and nothing done, where they share memory."""
    columns, targets = list(zip(*inputs, strict=True)), list(zip(*out, strict=True))
    same = [_position(target, columns) for target in targets]
    if not _apart(columns, targets, same, shared):
        return False
    plan = _plan_of(eager, op, columns, shared, targets, same)
    pointers: list[Any] = [[x.pointer for x in column] for column in columns]
    written = [
        [x.pointer for x in target] if at is None else pointers[at]
        for target, at in zip(targets, same, strict=True)
    ]
    common = [x.pointer if isinstance(x, Tensor) else x for x in shared]
    if plan.launches:
        count = len(inputs)
        repeated = [
            [c] * count if isinstance(x, Tensor) else c for x, c in zip(shared, common, strict=True)
        ]
        operands = [*pointers, *repeated, *written]
        for launch in plan.launches:
            launch.enqueue(operands)
    if plan.steps:
        launched, rows = cpu.launch, list(zip(*pointers, strict=True))
        places = list(zip(*written, strict=True))
        for number, step in plan.steps:
            launched(
                step.address, step.extent, step.grain, *rows[number], *common, *places[number],
                *step.sizes,
            )  # fmt: skip
    alone = set(plan.alone)
    for number in plan.alone:
        eager.apply(op, (*inputs[number], *shared), {}, out[number])
    for target in targets:
        for number, x in enumerate(target):
            if number not in alone:
                x.storage.version += 1
    return True


def _position(target: Column, columns: Sequence[Column]) -> int | None:
    """Which operand the calls write into; None if no single one."""
    return next((i for i, c in enumerate(columns) if all(map(is_, target, c))), None)


def _plan_of(
    eager: Eager,
    op: Op,
    columns: Sequence[Column],
    shared: Column,
    targets: Sequence[Column],
    same: Sequence[int | None],
) -> ForeachPlan:
    kinds = [tuple([x.type for x in column]) for column in columns]
    results = [
        tuple([x.type for x in target]) if at is None else kinds[at]
        for target, at in zip(targets, same, strict=True)
    ]
    common = tuple([x.type if isinstance(x, Tensor) else x.__class__ for x in shared])
    key = (op, tuple(kinds), common, tuple(results))
    plan: ForeachPlan | None = eager.plans.get(key)
    if plan is None:
        rows, outputs = zip(*kinds, strict=True), zip(*results, strict=True)
        calls = [((*own, *common), made) for own, made in zip(rows, outputs, strict=True)]
        plan = make_foreach_plan(op, calls)
        eager.keep(key, plan)
    return plan


def _apart(
    columns: Sequence[Column],
    targets: Sequence[Column],
    same: Sequence[int | None],
    shared: Column,
) -> bool:
    """Whether no call writes what another one reads or writes, or what it reads itself at another
    place."""
    read = [x for i, column in enumerate(columns) if i not in same for x in column]
    read += [x for x in shared if isinstance(x, Tensor)]
    written = {id(x.storage) for target in targets for x in target}
    distinct = len(written) == sum(map(len, targets))
    if distinct and written.isdisjoint([id(x.storage) for x in read]):
        return True
    ranges = [(*_bytes_of(x), True) for target in targets for x in target]
    ranges += [(*_bytes_of(x), False) for x in read]
    end_written = end_read = 0
    for begin, end, writes in sorted(ranges):
        if begin < end_written or (writes and begin < end_read):
            return False
        if writes:
            end_written = max(end_written, end)
        else:
            end_read = max(end_read, end)
    return True


def _bytes_of(x: Tensor) -> tuple[int, int]:
    """From the first byte of a tensor to behind its last."""
    return x.pointer, x.pointer + x.type.span * x.type.dtype.itemsize
