"""What a program on a GPU does, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.compiler.report import covered, number, peak_lines, stage_line, table
from flame.runtime.cpu.allocator import readable

if TYPE_CHECKING:
    from flame.compiler.gpu.program import GpuProgram


def report(program: GpuProgram) -> str:
    """Counts and memory; then every task with what runs it: kernels by number, library calls by
    name."""
    numbers = {step.text: k for k, step in enumerate(program.kernels)}
    runs: dict[int, list[str]] = {}
    for launch, step in zip(program.blueprint.launches, program.steps, strict=True):
        told = f"[{numbers[step.text]}]" if step.text else step.name
        runs.setdefault(launch.task, []).append(told)
    rows = [["task", "FLOPs", "read", "written", "runs", "name", "covers"]]
    for t, info in enumerate(program.blueprint.tasks):
        rows.append(
            [
                str(t),
                number(info.flops),
                readable(info.read),
                readable(info.written),
                " ".join(runs.get(t, [])) or "none",
                info.name,
                covered(info.ops),
            ]
        )
    peak = peak_lines(program.blueprint.fullest, program.blueprint.held)
    return head_of(program) + "\n" + table(rows, 2) + peak


def head_of(program: GpuProgram) -> str:
    """Counts, memory, and the seconds of compiling."""
    calls = sum(not s.text for s in program.steps)
    arena = program.blueprint.arena
    results = sum(port.nbytes for port in program.results)
    counts = (
        f"{len(program.blueprint.tasks)} tasks, {len(program.steps)} launches in one graph on "
        f"{program.device}: {len(program.kernels)} kernels, {calls} library calls"
    )
    memory = (
        f"planned peak {readable(program.peak)}: arena {readable(arena)}, results "
        f"{readable(results)}, scratch {readable(program.scratch.nbytes)}; "
        f"beside it constants {readable(program.constant_bytes)}"
    )
    return "\n".join([counts, memory, stage_line(program.stages)])
