"""Where a program's time on a GPU goes: events around every launch, outside of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from flame.compiler.report import covered, table
from flame.runtime.cuda import streams
from flame.runtime.cuda.driver import driver

if TYPE_CHECKING:
    from flame.compiler.gpu.program import GpuProgram


@dataclass(frozen=True)
class GpuProfileRow:
    """One task. ``how``: the names of what ran it."""

    task: int
    name: str
    how: str
    covers: str
    seconds: float
    flops: int
    nbytes: int


@dataclass(frozen=True)
class GpuProfile:
    """Medians over several runs. ``seconds``: of one replay of the graph."""

    rows: tuple[GpuProfileRow, ...]
    seconds: float

    def __str__(self) -> str:
        """The rows, the slowest first."""
        total = sum(row.seconds for row in self.rows)
        lines = [["time", "part", "TFLOP/s", "GB/s", "how", "name", "covers"]]
        for row in sorted(self.rows, key=lambda r: -r.seconds):
            seconds = max(row.seconds, 1e-9)
            lines.append(
                [
                    f"{row.seconds * 1e6:.1f} us",
                    f"{row.seconds / max(total, 1e-9):.1%}",
                    f"{row.flops / seconds / 1e12:.1f}" if row.flops else "-",
                    f"{row.nbytes / seconds / 1e9:.0f}",
                    row.how,
                    row.name,
                    row.covers,
                ]
            )
        head = (
            f"{self.seconds * 1e6:.1f} us a run as one graph; {total * 1e6:.1f} us in the launches "
            "one by one\n"
        )
        return head + table(lines, 3)


def profile(program: GpuProgram, words: Sequence[Any], runs: int) -> GpuProfile:
    """Run a program several times, all its updates included."""
    made, index = driver(), program.index
    program.run(*words)
    stream = streams.current_handle(index)
    begin, end = (made.create_event(index, timing=True) for _ in range(2))
    whole = []
    for _ in range(runs):
        made.record_event(begin, stream)
        program.run(*words)
        made.record_event(end, stream)
        made.synchronize_event(end)
        whole.append(made.elapsed(begin, end) / 1e3)
    count = len(program.steps) + 1
    marks = [made.create_event(index, timing=True) for _ in range(count)]
    each: list[list[float]] = [[] for _ in program.steps]
    for _ in range(runs):
        made.record_event(marks[0], stream)
        for mark, step, addresses in zip(marks[1:], program.steps, program.addresses, strict=True):
            step.enqueue(addresses, program.scratch.pointer, stream)
            made.record_event(mark, stream)
        made.synchronize_event(marks[-1])
        for n, found in enumerate(each):
            found.append(made.elapsed(marks[n], marks[n + 1]) / 1e3)
    for event in (begin, end, *marks):
        made.destroy_event(event)
    return GpuProfile(_rows(program, [median(found) for found in each]), median(whole))


def _rows(program: GpuProgram, each: Sequence[float]) -> tuple[GpuProfileRow, ...]:
    seconds: dict[int, float] = {}
    how: dict[int, list[str]] = {}
    launches = program.blueprint.launches
    for launch, step, time in zip(launches, program.steps, each, strict=True):
        seconds[launch.task] = seconds.get(launch.task, 0.0) + time
        how.setdefault(launch.task, []).append(step.name)
    rows = []
    for t, time in seconds.items():
        names = " ".join(dict.fromkeys(how[t]))
        if t < 0:
            rows.append(GpuProfileRow(t, "copy", names, "", time, 0, 0))
            continue
        info = program.blueprint.tasks[t]
        rows.append(
            GpuProfileRow(
                t, info.name, names, covered(info.ops), time, info.flops, info.read + info.written
            )
        )
    return tuple(rows)
