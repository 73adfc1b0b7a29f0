"""What a program does, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame.compiler.schedule.memory import Held, nbytes_of
from flame.compiler.schedule.task import Task
from flame.core.types import TensorType
from flame.graph import Node, Symbol
from flame.runtime.cpu.allocator import readable
from flame.runtime.cpu.executor_text import HOST, PARALLEL, REGION

if TYPE_CHECKING:
    from flame.compiler.program import Program

NODES_SHOWN = 6
HELD_SHOWN = 8  # kinds of memory


@dataclass(frozen=True)
class TaskInfo:
    """What reports say of a task: the ops that it covers, where they were called, its work."""

    name: str
    ops: tuple[str, ...]
    lines: tuple[str, ...]
    flops: int
    read: int  # bytes
    written: int


def flops_of(node: Node) -> int:
    """Multiplications and additions of a node, where its op says them; else 0."""
    results = [s.type for s in node.outputs if isinstance(s.type, TensorType)]
    return 0 if node.op.flops is None else node.op.flops(node.types, results)


def task_info(task: Task) -> TaskInfo:
    read = {x for x in task.inputs if isinstance(x, Symbol)}
    return TaskInfo(
        task.name,
        tuple(node.op.name for node in task.nodes),
        tuple(dict.fromkeys(node.line for node in task.nodes if node.line is not None)),
        sum(map(flops_of, task.nodes)),
        sum(nbytes_of(s.type) for s in read if isinstance(s.type, TensorType)),
        sum(nbytes_of(s.type) for s in task.outputs if isinstance(s.type, TensorType)),
    )


def covered(ops: Sequence[str]) -> str:
    """The ops of a task, repeats counted."""
    counts: dict[str, int] = {}
    for op in ops:
        counts[op] = counts.get(op, 0) + 1
    shown = [op if n == 1 else f"{op} x{n}" for op, n in counts.items()]
    more = f" and {len(shown) - NODES_SHOWN} more" if len(shown) > NODES_SHOWN else ""
    return " ".join(shown[:NODES_SHOWN]) + more


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns aligned; the last ``left`` ones to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first_left = len(widths) - left
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i >= first_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits and a unit, as 1.23 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value else "-"


def memory_line(program: Program) -> str:
    blueprint = program.blueprint
    results = sum(blueprint.results)
    return (
        f"planned peak {readable(program.peak)}: arena {readable(blueprint.arena)}, "
        f"results {readable(results)}; beside it scratch {readable(program.layout.scratch)} for "
        f"{program.threads} threads, constants {readable(program.constant_bytes)}"
    )


def peak_lines(fullest: str, held: Sequence[Held]) -> str:
    """What the arena is in use for where it is fullest, most bytes first."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for one in held:
        kind = "temporaries" if one.type is None else str(one.type)
        alike.setdefault((kind, one.maker, one.reader), []).append(one.nbytes)
    order = sorted(alike.items(), key=lambda item: -sum(item[1]))
    rows = [
        [readable(sum(sizes)), f"{len(sizes)} x", kind, f"{maker} -> {reader}"]
        for (kind, maker, reader), sizes in order[:HELD_SHOWN]
    ]
    if not rows:
        return ""
    rest = sum(sum(sizes) for _, sizes in order[HELD_SHOWN:])
    more = f"\n  and {readable(rest)} more" if rest else ""
    return f"\nthe arena is fullest in {fullest}:\n{table(rows, 2)}{more}"


def report(program: Program) -> str:
    """Every task with what it covers and moves, then memory and the seconds of compiling."""
    blueprint, layout = program.blueprint, program.layout
    kernels: dict[int, list[int]] = {}
    for step in blueprint.steps:
        kernels.setdefault(step.task, []).append(step.kernel)
    region_of = {
        blueprint.steps[m].task: number
        for number, step in enumerate(layout.steps)
        if step.kind == REGION
        for m in step.members
    }
    rows = [["task", "FLOPs", "read", "written", "region", "kernels", "name", "covers"]]
    for t, info in enumerate(blueprint.tasks):
        used = kernels.get(t, [])
        host = any(call.task == t for call in blueprint.host_calls)
        rows.append(
            [
                str(t),
                number(info.flops),
                readable(info.read),
                readable(info.written),
                str(region_of.get(t, "-")),
                "host call" if host else " ".join(f"[{k}]" for k in used) or "none",
                info.name,
                covered(info.ops),
            ]
        )
    peak = peak_lines(blueprint.fullest, blueprint.held)
    return head_of(program) + "\n" + table(rows, 2) + peak


def head_of(program: Program) -> str:
    """Counts, memory, and the seconds of compiling."""
    blueprint = program.blueprint
    kinds = [step.kind for step in program.layout.steps]
    counts = (
        f"{len(blueprint.tasks)} tasks, {len(blueprint.kernels)} kernels, {len(kinds)} native "
        f"steps: {kinds.count(PARALLEL)} parallel, {kinds.count(REGION)} regions of several, "
        f"{kinds.count(HOST)} host calls, {sum(s.task < 0 for s in blueprint.steps)} copies"
    )
    return "\n".join([counts, memory_line(program), stage_line(program.stages)])


def stage_line(stages: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items())
    return f"compiled in {sum(stages.values()):.3f} s: {told}" if stages else "not timed"
