"""What is joined at once lies where it is joined, if it is laid out so (`passes.pieces`).

A task that joins such parts has nothing to do: it stands for the moment from which on the result is
whole. Its operands are parts of its result's memory, which is taken when the first is computed.
"""

from __future__ import annotations

from dataclasses import replace

from flame.compiler.schedule.task import Schedule, Task
from flame.core.types import TensorType
from flame.graph import Symbol
from flame.kernel.builder import Lowering
from flame.ops.joining import pieces_of
from flame.ops.op import OPS

Owners = dict[Symbol, tuple[Symbol, int]]


def in_pieces(schedule: Schedule) -> Schedule:
    """The schedule with `cat` tasks that need not copy."""
    made = {s for task in schedule.tasks for s in task.outputs}
    readers: dict[Symbol, int] = {}
    for task in schedule.tasks:
        for owner in {schedule.owner(x)[0] for x in task.inputs if isinstance(x, Symbol)}:
            readers[owner] = readers.get(owner, 0) + 1
    for result in schedule.graph.results:
        readers[schedule.owner(result)[0]] = 2
    parts: Owners = {}
    tasks = []
    for task in schedule.tasks:
        found = _parts(task, schedule)
        if found and all(s in made and readers[s] == 1 and s not in parts for s in found):
            parts.update(found)
            tasks.append(replace(task, lowering=Lowering(())))
        else:
            tasks.append(task)
    if not parts:
        return schedule
    owners = {view: _moved(place, parts) for view, place in schedule.owners.items()}
    return replace(schedule, tasks=tuple(tasks), owners={**owners, **parts})


def _moved(place: tuple[Symbol, int], parts: Owners) -> tuple[Symbol, int]:
    owner, offset = place
    if owner not in parts:
        return place
    whole, start = parts[owner]
    return whole, start + offset


def _parts(task: Task, schedule: Schedule) -> Owners:
    """Whose memory may be a part of that of the result, and where; empty where one's may not."""
    if len(task.nodes) != 1 or task.nodes[0].op is not OPS["cat"]:
        return {}
    (out,) = task.outputs
    assert isinstance(out.type, TensorType)
    types = tuple(x.type for x in task.inputs if isinstance(x, Symbol))
    wanted = pieces_of(types, out.type, task.nodes[0].attributes["dim"])
    found: Owners = {}
    for x, (piece, start) in zip(task.inputs, wanted, strict=True):
        assert isinstance(x, Symbol)
        owner, offset = schedule.owner(x)
        if not _same(x.type, piece) or offset or owner in found:
            return {}
        found[owner] = out, start
    return found


def _same(a: TensorType | type, b: TensorType) -> bool:
    """Whether two types say the same of where elements lie."""
    if not isinstance(a, TensorType) or a.shape != b.shape or a.dtype is not b.dtype:
        return False
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True))
