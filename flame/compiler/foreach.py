"""Many calls of one op made ready to run together, where they touch disjoint memory.

Invariant: a ForeachPlan depends on types and attributes alone, so it serves every list of calls
with the same ones. Calls that it does not take (of libraries, with an error to tell of) it names,
to be run as any call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

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
from flame.kernel.builder import BoundKernel
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.compiler.gpu.grouped import Call, GroupedLaunch

ALIGN: Final = 256  # bytes, as memory from the driver


@dataclass(frozen=True, eq=False)
class CallType:
    """One call: its operands, its attributes, and the tensors that it is written into."""

    types: Types
    attributes: Mapping[str, Any]
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


def make_foreach_plan(op: Op, calls: Sequence[CallType]) -> ForeachPlan:
    """Compile many calls. Raises what `make_plan` raises, before any of them runs."""
    lowered: dict[Any, Any] = {}
    on_gpus: dict[str, list[Call]] = {}
    steps: list[tuple[int, Step]] = []
    alone: set[int] = set()
    memory: dict[str, int] = {}
    temporaries: list[list[tuple[str, int]]] = []  # of each call
    for number, call in enumerate(calls):
        device, own = call.out[0].device, []
        key = (call.types, tuple(call.attributes.items()), call.out)
        if key not in lowered:
            lowered[key] = _on_cpu(op, call) if device == "cpu" else _on_gpu(op, call)
        found = lowered[key]
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


def _on_gpu(op: Op, call: CallType) -> tuple[tuple[BoundKernel, ...], tuple[int, ...]] | None:
    """Kernels, and bytes of temporaries."""
    from flame.compiler.gpu.grouped import kernels_to_group

    if _goes_alone(op, call):
        return None
    graph = one_op(op, call.types, call.attributes)
    lowering = lower(graph, results(graph, call.out))
    kernels = kernels_to_group(lowering)
    return None if kernels is None else (kernels, lowering.temporaries)
