"""Where a program's time goes: the clock is read before and after every native step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flame.compiler.report import covered, table
from flame.runtime.cpu.executor_text import HOST, INLINE, PARALLEL, REGION

if TYPE_CHECKING:
    from flame.compiler.program import Program

KINDS: Final = {INLINE: "inline", PARALLEL: "parallel", REGION: "region", HOST: "host call"}


@dataclass(frozen=True)
class ProfileRow:
    """Native steps that belong together: those of one task, or of tasks that run at once."""

    steps: tuple[int, ...]
    tasks: tuple[int, ...]
    kind: str
    name: str
    covers: str
    seconds: float
    flops: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Profile:
    """The medians of several runs. ``clocks``: nanoseconds (run, native step, begin and end)."""

    rows: tuple[ProfileRow, ...]
    seconds: float  # from the first step's beginning to the last one's end
    clocks: Any

    def __str__(self) -> str:
        """The rows, the slowest first."""
        lines = [["time", "part", "GFLOP/s", "GB/s", "how", "name", "covers"]]
        for row in sorted(self.rows, key=lambda r: -r.seconds):
            seconds = max(row.seconds, 1e-9)
            lines.append(
                [
                    f"{row.seconds * 1e6:.1f} us",
                    f"{row.seconds / max(self.seconds, 1e-9):.1%}",
                    f"{row.flops / seconds / 1e9:.1f}" if row.flops else "-",
                    f"{row.nbytes / seconds / 1e9:.1f}",
                    row.kind,
                    row.name,
                    row.covers,
                ]
            )
        runs = len(self.clocks)
        head = f"{self.seconds * 1e6:.1f} us a run, medians of {runs} runs\n"
        return head + table(lines, 3)


def profile(program: Program, words: Sequence[Any], runs: int) -> Profile:
    """Run a program several times, all its updates included, and read the clock at each step."""
    program.run(*words)
    timed = program.executor.timed
    clocks = np.stack([timed(lambda: program.run(*words)) for _ in range(runs)])
    each = np.median(clocks[:, :, 1] - clocks[:, :, 0], axis=0) / 1e9
    whole = float(np.median(clocks[:, -1, 1] - clocks[:, 0, 0]) / 1e9) if clocks.size else 0.0
    return Profile(_rows(program, each), whole, clocks)


def _rows(program: Program, each: Any) -> tuple[ProfileRow, ...]:
    blueprint, layout = program.blueprint, program.layout
    rows: list[ProfileRow] = []
    collected: list[tuple[list[int], list[int]]] = []  # steps, tasks
    for number, step in enumerate(layout.steps):
        tasks = list(dict.fromkeys(blueprint.steps[m].task for m in step.members))
        if collected and set(tasks) & set(collected[-1][1]) - {-1}:
            collected[-1][0].append(number)
            collected[-1][1].extend(t for t in tasks if t not in collected[-1][1])
        else:
            collected.append(([number], tasks))
    for steps, tasks in collected:
        infos = [blueprint.tasks[t] for t in tasks if t >= 0]
        kinds = dict.fromkeys(KINDS[layout.steps[s].kind] for s in steps)
        name = " + ".join(dict.fromkeys(i.name for i in infos)) or "copy"
        rows.append(
            ProfileRow(
                tuple(steps),
                tuple(tasks),
                " ".join(kinds),
                name if len(infos) < 2 else f"{len(infos)} tasks: {name}",
                covered([op for i in infos for op in i.ops]),
                float(each[steps].sum()),
                sum(i.flops for i in infos),
                sum(i.read + i.written for i in infos),
            )
        )
    return tuple(rows)


def write_trace(program: Program, taken: Profile, path: str | Path) -> None:
    """The last profiled run for chrome://tracing or ui.perfetto.dev."""
    if not taken.clocks.size:
        events: list[dict[str, Any]] = []
    else:
        last = taken.clocks[-1]
        start = int(last[0, 0])
        events = [
            {
                "name": row.name,
                "cat": row.kind,
                "ph": "X",
                "ts": (int(last[s, 0]) - start) / 1e3,
                "dur": int(last[s, 1] - last[s, 0]) / 1e3,
                "pid": 0,
                "tid": 0,
                "args": {
                    "covers": row.covers,
                    "flops": row.flops,
                    "bytes": row.nbytes,
                    "lines": [
                        line
                        for t in row.tasks
                        if t >= 0
                        for line in program.blueprint.tasks[t].lines
                    ],
                },
            }
            for row in taken.rows
            for s in row.steps
        ]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
