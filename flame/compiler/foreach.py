"""Many calls of one op made ready to run together: `make_plan`, for calls that touch disjoint
memory.

Invariant: a ForeachPlan depends on types alone, so it serves every list of calls with the same
ones. What it does not take (ops of several kernels, a call that is like no other on its GPU) it
names, to be run as any call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame.compiler.pipeline import (
    check_operands,
    direct_refs,
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

CallTypes = tuple[Types, tuple[TensorType, ...]]  # of the operands, of the tensors written


@dataclass(frozen=True, eq=False)
class ForeachPlan:
    """launches: of GPUs. steps: on the CPU, with the call's number. alone: numbers of other calls.

    Operands of launches and steps are all inputs, then all outputs.
    """

    launches: tuple[GroupedLaunch, ...]
    steps: tuple[tuple[int, Step], ...]
    alone: tuple[int, ...]


def make_foreach_plan(op: Op, calls: Sequence[CallTypes]) -> ForeachPlan:
    """Compile many calls. Raises what `make_plan` raises, before any of them runs."""
    made: dict[CallTypes, Step | BoundKernel | None] = {}
    on_gpus: dict[str, list[Call]] = {}
    steps: list[tuple[int, Step]] = []
    alone: list[int] = []
    for number, (types, outputs) in enumerate(calls):
        key = (types, outputs)
        if key not in made:
            made[key] = _only_kernel(op, types, outputs)
        found = made[key]
        if found is None:
            alone.append(number)
        elif isinstance(found, Step):
            steps.append((number, found))
        else:
            from flame.compiler.gpu.grouped import Call

            elements = sum(t.numel for t in outputs)
            on_gpus.setdefault(outputs[0].device, []).append(Call(number, found, elements))
    launches: list[GroupedLaunch] = []
    for device, given in on_gpus.items():
        from flame.compiler.gpu.grouped import grouped

        together, others = grouped(given, device)
        launches += together
        alone += others
    return ForeachPlan(tuple(launches), tuple(steps), tuple(alone))


def _only_kernel(
    op: Op, types: Types, outputs: tuple[TensorType, ...]
) -> Step | BoundKernel | None:
    """The one kernel that a call is, if it is no more than that."""
    check_operands(op, types)
    if op.updates or isinstance(op, ViewOp) or unreadable(op, types):
        return None
    if any(t.repeats for t in outputs) or moves_between(op, types, outputs):
        return None
    if outputs[0].device == "cpu":
        return make_plan(op, types, {}, outputs).direct
    graph = one_op(op, types, {})
    lowering = lower(graph, results(graph, outputs))
    if lowering.temporaries or lowering.constants or len(lowering.steps) != 1:
        return None
    (bound,) = lowering.steps
    if not isinstance(bound, BoundKernel) or not bound.extent:
        return None
    from flame.compiler.gpu.grouped import can_group

    wanted = direct_refs(types, outputs)
    return bound if bound.operands == wanted and can_group(bound) else None
