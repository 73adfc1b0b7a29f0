"""Looking into a compiled step: where its time goes, and where a wrong number first arises.

Invariant: looking changes nothing; state that the step writes is as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flame.compiler.compilation import schedule_of
from flame.compiler.replay import Replay, replay
from flame.runtime.storage import Storage
from flame.runtime.transfer import duplicate, restore
from flame.tensor import Tensor

if TYPE_CHECKING:
    from flame.compiler.gpu.profile import GpuProfile
    from flame.compiler.profile import Profile
    from flame.recording.running import Step


def profiled(step: Step, tensors: Sequence[Tensor], runs: int) -> Profile | GpuProfile:
    """The time of every task on these arguments, with the numbers of the step as recorded."""
    program = step.program
    results = [Storage.allocate(nbytes, program.device) for _, nbytes in program.result_types]
    given = [t.clone().detach() for t in tensors]  # the step may write into its arguments
    with _unchanged(step):
        found: Profile | GpuProfile = program.profile(
            *[t.pointer for t in given],
            *step.first_numbers(),
            *[s.pointer for s in results],
            runs=runs,
        )
    return found


def replayed(step: Step, tensors: Sequence[Tensor]) -> Replay:
    """Every task of the step by itself, compared with what its ops mean."""
    recording = step.recording
    arrays: dict[Any, Any] = dict(
        zip(recording.arguments, [t.numpy(force=True) for t in tensors], strict=True)
    )
    arrays.update(zip(step.numbers, step.first_numbers(), strict=True))
    arrays.update(recording.state())
    schedule = schedule_of(recording.graph)
    return replay(schedule, [arrays[symbol] for symbol in schedule.graph.inputs])


@contextmanager
def _unchanged(step: Step) -> Iterator[None]:
    """Inside, the step's state may be written to; afterwards it is as it was."""
    storages = step.recording.written_states
    before = [duplicate(s) for s in storages]
    try:
        yield
    finally:
        for storage, content in zip(storages, before, strict=True):
            restore(storage, content)
