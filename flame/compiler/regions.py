"""Steps that may run at once become one parallel region: one barrier, and work for all threads.

Invariant: scratch memory of different kernels of one region lies apart, as a worker of one kernel
runs beside the same worker's number in another one's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from flame.compiler.blueprint import HOST as HOST_KERNEL
from flame.compiler.blueprint import StepPlan
from flame.runtime.cpu.executor_text import HOST, INLINE, PARALLEL, REGION

# A chunk below this part of a kernel's own chunk costs more to hand out than it takes.
SMALLEST: Final = 0.1
CHUNKS_A_THREAD: Final = 4


@dataclass(frozen=True)
class Piece:
    """Iterations of one step that run in one go."""

    plan: int
    begin: int
    end: int


@dataclass(frozen=True)
class NativeStep:
    """What native code does at once. ``members``: numbers of steps of the blueprint."""

    kind: int
    members: tuple[int, ...]
    chunks: tuple[tuple[Piece, ...], ...] = ()


@dataclass(frozen=True)
class Layout:
    """All native steps, and the offset in the scratch memory for each word that names a part."""

    steps: tuple[NativeStep, ...]
    scratch: int
    scratch_offsets: dict[int, int]


def arrange(steps: Sequence[StepPlan], threads: int) -> Layout:
    """The native steps for a number of threads."""
    made: list[NativeStep] = []
    for _, row in groupby(range(len(steps)), lambda i: _together(steps, i)):
        made += _region(steps, list(row), threads)
    offsets: dict[int, int] = {}
    most = 0
    for step in made:
        used = 0
        for member in step.members:
            plan = steps[member]
            for position, nbytes in plan.scratch:
                offsets[plan.words[0] + position] = used
                used += -(-nbytes * threads // 64) * 64
        most = max(most, used)
    return Layout(tuple(made), most, offsets)


def _together(steps: Sequence[StepPlan], i: int) -> tuple[int, ...]:
    """Equal for consecutive steps that may run at once."""
    step = steps[i]
    if step.error >= 0 or step.kernel == HOST_KERNEL:
        return (i,)
    return step.group, step.stage, -1


def _region(steps: Sequence[StepPlan], row: list[int], threads: int) -> list[NativeStep]:
    total = sum(steps[i].work for i in row)
    if len(row) == 1 or threads == 1 or total <= 1:
        return [NativeStep(_kind(steps[i], threads), (i,)) for i in row]
    target = max(SMALLEST, min(1.0, total / (CHUNKS_A_THREAD * threads)))
    chunks: list[tuple[Piece, ...]] = []
    open_pieces: list[Piece] = []
    filled = 0.0
    for i in row:
        step = steps[i]
        if step.n > step.grain:
            length = max(step.grain, -(-step.n // (CHUNKS_A_THREAD * CHUNKS_A_THREAD * threads)))
            chunks += [
                (Piece(i, begin, min(begin + length, step.n)),)
                for begin in range(0, step.n, length)
            ]
            continue
        open_pieces.append(Piece(i, 0, step.n))
        filled += step.work
        if filled >= target:
            chunks.append(tuple(open_pieces))
            open_pieces, filled = [], 0.0
    if open_pieces:
        chunks.append(tuple(open_pieces))
    if len(chunks) == 1:
        return [NativeStep(_kind(steps[i], threads), (i,)) for i in row]
    return [NativeStep(REGION, tuple(row), tuple(chunks))]


def _kind(step: StepPlan, threads: int) -> int:
    if step.kernel == HOST_KERNEL:
        return HOST
    return INLINE if threads == 1 or step.n <= step.grain else PARALLEL
