"""Many calls of one op made ready to run together, where they touch disjoint memory.

Invariant: a ForeachPlan depends on types and attributes alone, so it serves every list of calls
with the same ones. Calls that it does not take (of libraries, with an error to tell of) it names,
to be run as any call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flame.compiler.pipeline import (
    check_operands,
    lower,
    make_plan,
    moves_between,
    results,
    unreadable,
)
from flame.compiler.plan import Step
from flame.core.types import TensorType
from flame.graph import one_op
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.compiler.gpu.grouped import Call, GroupedLaunch, SharedKernel

ALIGN: Final = 256  # bytes, as memory from the driver
MAX_CALLS: Final = 20_000  # kept; beyond, all are dropped and found again by need
MAX_LISTS: Final = 64  # kept, as each holds the tables of its launches


class CallType(NamedTuple):
    """One call: its operands, its attributes, and the tensors that it is written into."""

    types: Types
    attributes: tuple[tuple[str, Any], ...]
    out: tuple[TensorType, ...]


@dataclass(frozen=True, eq=False)
class ForeachPlan:
    """launches: of GPUs, in order. steps: on the CPU, with the call's number; their operands are
    all inputs, then all outputs. alone: numbers of the calls that are run as any call.

    Columns of launches are the inputs, the outputs, then the temporaries. temporaries: for each
    column where each call has its own: device, and offset in the memory that all calls there share,
    ``memory`` bytes of a device.
    """

    launches: tuple[GroupedLaunch, ...]
    steps: tuple[tuple[int, Step], ...]
    alone: frozenset[int]
    temporaries: tuple[tuple[tuple[str, int], ...], ...]
    memory: Mapping[str, int]


class ForeachPlans:
    """What was made ready: each call, and the latest lists of calls.

    Which parameters have gradients may change with every step, and so the list, but not what each
    of its calls is.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[Op, CallType], Any] = {}
        self._lists: dict[Any, ForeachPlan] = {}

    def find(self, key: Any) -> ForeachPlan | None:
        """The plan that was made for an equal key."""
        return self._lists.get(key)

    def make(self, key: Any, op: Op, calls: Sequence[CallType]) -> ForeachPlan:
        """Compile many calls. Raises what `make_plan` raises, before any of them runs."""
        if len(self._calls) > MAX_CALLS:
            self._calls.clear()
        found = []
        for call in calls:
            if (op, call) not in self._calls:
                prepare = _on_cpu if call.out[0].device == "cpu" else _on_gpu
                self._calls[op, call] = prepare(op, call)
            found.append(self._calls[op, call])
        if len(self._lists) >= MAX_LISTS:
            del self._lists[next(iter(self._lists))]
        plan = self._lists[key] = _joined(calls, found)
        return plan

    def clear(self) -> None:
        """Forget all."""
        self._calls.clear()
        self._lists.clear()


def _joined(calls: Sequence[CallType], prepared: Sequence[Any]) -> ForeachPlan:
    """The plan of calls, of which each is ready."""
    on_gpus: dict[str, list[Call]] = {}
    steps: list[tuple[int, Step]] = []
    alone: set[int] = set()
    memory: dict[str, int] = {}
    temporaries: list[list[tuple[str, int]]] = []  # of each call
    for number, (call, found) in enumerate(zip(calls, prepared, strict=True)):
        device, own = call.out[0].device, []
        if found is None:
            alone.add(number)
        elif isinstance(found, Step):
            steps.append((number, found))
        else:
            from flame.compiler.gpu.grouped import Call

            kernels, sizes = found
            if kernels:
                elements = sum(t.numel for t in call.out)
                on_gpus.setdefault(device, []).append(Call(number, kernels, elements))
            for nbytes in sizes:
                own.append((device, memory.get(device, 0)))
                memory[device] = own[-1][1] + -(-nbytes // ALIGN) * ALIGN
        temporaries.append(own)
    inputs, outputs = len(calls[0].types), len(calls[0].out)

    def column(role: str, position: int) -> int:
        return {"input": 0, "output": inputs, "temporary": inputs + outputs}[role] + position

    launches: list[GroupedLaunch] = []
    for device, given in on_gpus.items():
        from flame.compiler.gpu.grouped import grouped

        launches += grouped(given, device, column)
    columns = tuple(
        tuple(own[i] if i < len(own) else ("", 0) for own in temporaries)
        for i in range(max(map(len, temporaries)))
    )
    return ForeachPlan(tuple(launches), tuple(steps), frozenset(alone), columns, memory)


def _goes_alone(op: Op, call: CallType) -> bool:
    """Whether a call is for the interpreter: it copies operands first, raises, or moves."""
    check_operands(op, call.types)
    special = op.updates or isinstance(op, ViewOp) or bool(unreadable(op, call.types))
    repeats = any(t.repeats for t in call.out)
    return special or repeats or moves_between(op, call.types, call.out)


def _on_cpu(op: Op, call: CallType) -> Step | None:
    if _goes_alone(op, call):
        return None
    return make_plan(op, call.types, dict(call.attributes), call.out).direct


def _on_gpu(op: Op, call: CallType) -> tuple[tuple[SharedKernel, ...], tuple[int, ...]] | None:
    """Kernels, and bytes of temporaries."""
    from flame.compiler.gpu.grouped import kernels_to_group

    if _goes_alone(op, call):
        return None
    graph = one_op(op, call.types, dict(call.attributes))
    lowering = lower(graph, results(graph, call.out))
    kernels = kernels_to_group(lowering)
    return None if kernels is None else (kernels, lowering.temporaries)
