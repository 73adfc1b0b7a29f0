"""Many calls of one op at once, for eager execution: what optimizers and gradient clipping are.

Invariant: results are those of the calls one after the other, bit for bit. So calls run together
only without the tape, and where none writes memory that another one reads or writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

from flame.autograd.mode import mode
from flame.compiler.foreach import CallType, ForeachPlan
from flame.core.autocast import autocast
from flame.ops.op import Op
from flame.ops.transfer import move
from flame.runtime import cpu
from flame.runtime.storage import Storage
from flame.tensor import Tensor

if TYPE_CHECKING:
    from flame.eager import Eager

Row = tuple[Any, ...]  # operands or results of one call
Column = tuple[Any, ...]  # the n-th operand or result of all calls

_pointer, _storage, _type = attrgetter("pointer"), attrgetter("storage"), attrgetter("type")


class Calls(NamedTuple):
    """See `flame.ops.op.Interpreter.foreach`."""

    op: Op
    inputs: Sequence[Row]
    shared: Row
    out: Sequence[Row]
    attributes: Sequence[dict[str, Any]]


def can_run_together(calls: Calls) -> bool:
    """Whether calls are worth it, and of the kind that `run_together` takes."""
    op, inputs, shared, out, attributes = calls
    if len(inputs) < 2 or mode.enabled or (op.autocast is not None and autocast.on):
        return False
    if len(out) != len(inputs) or (attributes and len(attributes) != len(inputs)):
        return False
    if len({*map(len, inputs)}) > 1 or len({*map(len, out)}) > 1 or not inputs[0]:
        return False
    if any(x.__class__ is int and not -(1 << 63) <= x < 1 << 63 for x in shared):
        return False
    return all(issubclass(kind, Tensor) for kind in {*map(type, chain.from_iterable(inputs))})


def by_device(calls: Calls) -> Iterator[Calls]:
    """The calls as they are; or where they share numbers on the CPU (0-d tensors), the calls of
    each device, with the numbers moved there once."""
    if not any(map(_is_number_on_cpu, calls.shared)):
        yield calls
        return
    parts: dict[str, list[int]] = {}
    for number, row in enumerate(calls.inputs):
        parts.setdefault(row[0].type.device, []).append(number)
    for device, numbers in parts.items():
        shared = calls.shared
        if device != "cpu":
            shared = tuple([move(x, device) if _is_number_on_cpu(x) else x for x in shared])
        yield Calls(
            calls.op,
            [calls.inputs[i] for i in numbers],
            shared,
            [calls.out[i] for i in numbers],
            [calls.attributes[i] for i in numbers] if calls.attributes else (),
        )


def _is_number_on_cpu(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.type.ndim and x.type.device == "cpu"


def run_together(eager: Eager, calls: Calls) -> bool:
    """Run the calls; False, with nothing done, where they share memory."""
    columns: list[Column] = list(zip(*calls.inputs, strict=True))
    targets: list[Column] = list(zip(*calls.out, strict=True))
    in_place = [_position(target, columns) for target in targets]
    if not _apart(columns, targets, in_place, calls.shared):
        return False
    plan = _plan_of(eager, calls, columns, targets, in_place)
    read = [tuple(map(_pointer, column)) for column in columns]
    written = [
        tuple(map(_pointer, target)) if at is None else read[at]
        for target, at in zip(targets, in_place, strict=True)
    ]
    if plan.launches:
        _launch(plan, calls, read, written)
    if plan.steps:
        shared = [x.pointer if isinstance(x, Tensor) else x for x in calls.shared]
        sources, places = list(zip(*read, strict=True)), list(zip(*written, strict=True))
        launch = cpu.launch
        for n, step in plan.steps:
            launch(
                step.address, step.extent, step.grain, *sources[n], *shared, *places[n],
                *step.sizes,
            )  # fmt: skip
    for n, row in enumerate(calls.out):
        if n not in plan.alone:
            for x in row:
                x.storage.version += 1
    for n in sorted(plan.alone):
        attributes = calls.attributes[n] if calls.attributes else {}
        eager.apply(calls.op, (*calls.inputs[n], *calls.shared), attributes, calls.out[n])
    return True


def _launch(
    plan: ForeachPlan, calls: Calls, read: Sequence[Column], written: Sequence[Column]
) -> None:
    count = len(calls.inputs)
    shared = [(x.pointer,) * count if isinstance(x, Tensor) else x for x in calls.shared]
    memory = {device: Storage.allocate(nbytes, device) for device, nbytes in plan.memory.items()}
    base = {"": 0} | {device: storage.pointer for device, storage in memory.items()}
    temporaries = [[base[device] + at for device, at in column] for column in plan.temporaries]
    operands = [*read, *shared, *written, *temporaries]
    for launch in plan.launches:
        launch.enqueue(operands)


def _position(target: Column, columns: Sequence[Column]) -> int | None:
    """Which operand the calls write into, if it is one and the same."""
    return next((i for i, c in enumerate(columns) if all(map(is_, target, c))), None)


def _plan_of(
    eager: Eager,
    calls: Calls,
    columns: Sequence[Column],
    targets: Sequence[Column],
    in_place: Sequence[int | None],
) -> ForeachPlan:
    inputs = [tuple(map(_type, column)) for column in columns]
    out = [
        tuple(map(_type, target)) if at is None else inputs[at]
        for target, at in zip(targets, in_place, strict=True)
    ]
    shared = tuple([x.type if isinstance(x, Tensor) else x.__class__ for x in calls.shared])
    attributes = tuple([tuple(each.items()) for each in calls.attributes])
    key = (calls.op, tuple(inputs), shared, tuple(out), attributes)
    plan = eager.lists.find(key)
    if plan is None:
        rows = zip(*inputs, strict=True), zip(*out, strict=True)
        given = attributes or ((),) * len(calls.inputs)
        plan = eager.lists.make(
            key,
            calls.op,
            [
                CallType((*own, *shared), each, made)
                for own, made, each in zip(*rows, given, strict=True)
            ],
        )
    return plan


def _apart(
    columns: Sequence[Column],
    targets: Sequence[Column],
    in_place: Sequence[int | None],
    shared: Row,
) -> bool:
    """Whether no call writes what another one reads or writes, or what it reads itself at another
    place."""
    read = [x for i, column in enumerate(columns) if i not in in_place for x in column]
    read += [x for x in shared if isinstance(x, Tensor)]
    written = {*map(id, map(_storage, chain.from_iterable(targets)))}
    distinct = len(written) == sum(map(len, targets))
    if distinct and written.isdisjoint(map(id, map(_storage, read))):
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
