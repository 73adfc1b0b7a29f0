"""A recorded step: its graph, what of Python belongs to it, and how its results come back.

Invariants: the graph is pure and reads nothing of Python; gradients that the step leaves in
``.grad`` are results of the graph and are put there after each run; no tensor of the recording
outlives it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flame.autograd.mode import mode
from flame.core.errors import TraceError
from flame.core.types import TensorType
from flame.graph import Graph, Symbol
from flame.ops.op import interpreter, set_interpreter
from flame.recording.differentiable import Backward, record_backward
from flame.recording.gone import close
from flame.recording.guards import Holders, Modes
from flame.recording.memory import Memory, RecordedStorage, is_recorded
from flame.recording.outside import Outside
from flame.recording.recorder import Recorder, Repeated
from flame.recording.structure import Place, objects_in, outline, replaced, tensors_in
from flame.recording.surroundings import Surroundings
from flame.runtime.transfer import on_host
from flame.tensor import Tensor


@dataclass(frozen=True)
class Source:
    """Where a tensor that comes back lies: ``offset`` bytes into memory number ``index`` of a kind.

    kind: "result" (of the graph), "argument", "outside" (``tensor`` itself), or "part" (of memory
    from outside, as ``tensor`` shows it).
    """

    kind: str
    index: int
    offset: int
    type: TensorType | None
    tensor: Tensor | None = None


@dataclass
class Gradient:
    """What a step does with the ``grad`` of a leaf. ``leaf`` is None for argument ``argument``.

    ``before``: what it was, and has to be where it was read; ``after``: None, or where it lies.
    ``kind``: where it was looked at and its numbers were not read, its type is all that counts.
    """

    leaf: Tensor | None
    argument: int
    before: Tensor | None
    was_read: bool
    after: Source | None
    kind: TensorType | None = None

    def holds(self) -> bool:
        """Whether the gradient that was read is still there, or another like it."""
        if not self.was_read or self.leaf is None:
            return True
        now = self.leaf._grad
        if self.kind is not None:
            return now is not None and now.type is self.kind
        return now is self.before


@dataclass
class Recording:
    """All that is kept of one run of a function under a recorder."""

    graph: Graph
    arguments: tuple[Symbol, ...]
    states: tuple[Memory, ...]
    repeated: tuple[Repeated, ...]
    result: Any
    sources: list[Source]
    gradients: list[Gradient]
    written_states: tuple[Any, ...]
    written_arguments: tuple[int, ...]
    backward: Backward | None
    saved: tuple[int, ...]  # numbers of the graph's outputs that backward reads
    holders: Holders
    modes: Modes
    surroundings: Surroundings
    outside: Outside

    def addresses(self) -> dict[Symbol, int]:
        """Where the state lies."""
        return {_given(m): m.storage.pointer for m in self.states}

    def state(self) -> dict[Symbol, Any]:
        """What the state holds, as arrays over its memory, or over copies of a GPU's."""
        return {
            _given(m): on_host(m.storage).as_numpy(m.type.dtype.numpy, m.type.shape, m.type.strides)
            for m in self.states
        }


class _StepRecorder(Recorder):
    """A recorder with what the step does to gradients and modules."""

    def __init__(self, beneath: Any) -> None:
        super().__init__(beneath)
        self.gradients: dict[int, tuple[Tensor, Tensor | None, bool]] = {}
        self.modes = Modes()
        self.modes_set: set[int] = set()
        self.backward: Backward | None = None

    def meets(self, module: Any) -> None:
        if threading.get_ident() == self.thread:
            self.modes.meet(module)

    def meets_gradient(self, tensor: Tensor, *, read: bool) -> None:
        if id(tensor) not in self.gradients:
            self.gradients[id(tensor)] = (tensor, tensor._grad, read)


def record(
    function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]
) -> Recording:
    """Run ``function`` once with stand-ins for ``tensors``, writing down what it does.

    Raises TraceError, with the line of the user's code, where something cannot be recorded.
    """
    beneath = interpreter()
    recorder = _StepRecorder(beneath)
    surroundings = Surroundings(function, objects_in((args, kwargs)))
    inputs = [recorder.argument(t) for t in tensors]
    args, kwargs = given = _stand_ins((args, kwargs), inputs)
    outlines = outline(given)
    set_interpreter(recorder)
    before, mode.recorder = mode.recorder, recorder
    for module in surroundings.modules:
        recorder.meets(module)
    failed = True
    try:
        held = [function(*args, **kwargs)]
        if outline(given) != outlines:
            raise TraceError(
                "the step changes a list or dict among its arguments; a compiled step runs Python "
                "only when it is recorded, so later calls would not. Return the values"
            )
        del args, kwargs, given
        surroundings.check_unchanged()
        recorder.seen.check(recorder)
        recorder.modes.check_unchanged("the compiled function", recorder.modes_set)
        recorder.modes.ignore(recorder.modes_set)
        if mode.enabled:
            recorder.backward = record_backward(recorder, tensors_in(held), inputs)
        recording = _Finish(recorder, inputs, surroundings).recording(held)
        failed = False
        return recording
    finally:
        mode.recorder = before
        set_interpreter(beneath)
        if failed:
            recorder.seen.restore()
            undo(recorder.repeated)
            close(list(recorder.recorded))
        for tensor, gradient, _ in recorder.gradients.values():
            tensor._grad = gradient


def undo(repeated: Sequence[Repeated]) -> None:
    """Take back what Python did last, the latest first."""
    for action in reversed(repeated):
        if action.undo is not None:
            action.undo()


def _stand_ins(given: Any, inputs: list[Tensor]) -> Any:
    """The same arguments with the recorded tensors in place of those of the call."""
    following = iter(inputs)
    return replaced(given, lambda _: next(following))


class _Finish:
    """Turns what a recorder saw into a Recording."""

    def __init__(
        self, recorder: _StepRecorder, inputs: list[Tensor], surroundings: Surroundings
    ) -> None:
        self.recorder, self.surroundings = recorder, surroundings
        self.outputs: dict[Symbol, int] = {}
        self.sources: list[Source] = []
        self.argument_of = {id(t): i for i, t in enumerate(inputs)}
        inputs.clear()

    def recording(self, held: list[Any]) -> Recording:
        recorder = self.recorder
        result = replaced(held.pop(), self._returned)  # and with this the recorded tensors go
        known = [self._gradient(*entry) for entry in recorder.gradients.values()]
        gradients = [gradient for gradient in known if gradient is not None]
        kept = () if recorder.backward is None else recorder.backward.saved
        saved = tuple(self.outputs.setdefault(s, len(self.outputs)) for s in kept)
        arguments = tuple(_given(m) for m in recorder.arguments)
        numbers = tuple(s for r in recorder.repeated for s in r.numbers)
        states = tuple(_given(m) for m in recorder.states)
        memories = (*recorder.arguments, *recorder.states)
        updates = tuple(
            (_given(m), m.whole) for m in memories if m.whole is not m.given and m.whole is not None
        )
        graph = Graph(
            (*arguments, *numbers, *states), tuple(recorder.nodes), tuple(self.outputs), updates,
            dict(recorder.constants),
        )  # fmt: skip
        written = {old for old, _ in updates}
        recording = Recording(
            graph,
            arguments,
            tuple(recorder.states),
            tuple(recorder.repeated),
            result,
            self.sources,
            gradients,
            tuple(m.storage for m in recorder.states if _given(m) in written),
            tuple(i for i, symbol in enumerate(arguments) if symbol in written),
            recorder.backward,
            saved,
            self._holders(),
            recorder.modes,
            self.surroundings,
            Outside(recorder.seen, [s for s in recorder.kept if id(s) in recorder.memories]),
        )
        self._check_nothing_is_kept()
        return recording

    def _returned(self, tensor: Tensor) -> Place:
        self.sources.append(self._source(tensor))
        return Place(len(self.sources) - 1)

    def _source(self, tensor: Tensor) -> Source:
        """Where a tensor's memory will be after a run."""
        recorder = self.recorder
        memory = recorder.memory_of(tensor)
        offset = tensor.pointer - memory.begin
        if memory in recorder.arguments:
            return Source("argument", recorder.arguments.index(memory), offset, tensor.type)
        if not is_recorded(tensor) and memory.given is not None:
            if tensor.base is None and tensor.node is None:
                return Source("outside", 0, 0, None, tensor)
            return Source("part", 0, 0, None, tensor.detach())
        symbol = recorder._whole(memory)
        index = self.outputs.setdefault(symbol, len(self.outputs))
        return Source("result", index, offset, tensor.type)

    def _gradient(self, tensor: Tensor, before: Tensor | None, was_read: bool) -> Gradient | None:
        after = tensor._grad
        tensor._grad = before
        argument = self.argument_of.get(id(tensor), -1)
        if argument < 0 and is_recorded(tensor):
            return None  # of a tensor that the step made, and that goes with it
        place = None if after is None else self._source(after)
        kind: TensorType | None = None
        if before is not None and id(before.storage) not in self.recorder.memories:
            kind = before.type
            before = None
        return Gradient(None if argument >= 0 else tensor, argument, before, was_read, place, kind)

    def _holders(self) -> Holders:
        recorder = self.recorder
        captured = list(recorder.captured.values())
        return Holders(captured, (id(recorder.captured), id(recorder.kept)))

    def _check_nothing_is_kept(self) -> None:
        """Raise TraceError where Python keeps a tensor that exists only in the recording."""
        recorder = self.recorder
        recorder.captured.clear()
        recorder.gradients = {
            key: entry for key, entry in recorder.gradients.items() if not is_recorded(entry[0])
        }
        if not recorder.recorded:
            return
        gc.collect()  # what is left of autograd may be cycles
        for storage in list(recorder.recorded):
            raise TraceError(
                f"{storage.line}: a tensor that the step made here is kept after it, "
                f"{_holder_of(storage)}; it exists only in the recording. Return it, or write it "
                "in place into a tensor that lives outside (x.copy_(...))"
            )


def _holder_of(storage: RecordedStorage) -> str:
    """Who holds a tensor over this storage, in words."""
    tensors = [t for t in gc.get_referrers(storage) if isinstance(t, Tensor)]
    for tensor in tensors:
        for holder in gc.get_referrers(tensor):
            if holder is tensors or (isinstance(holder, (list, tuple)) and not len(holder)):
                continue
            if isinstance(holder, dict):
                name = next((k for k, v in holder.items() if v is tensor), None)
                return f"under the name {name!r}"
            if isinstance(holder, (list, tuple, set)):
                return f"in a {type(holder).__name__}"
            if hasattr(holder, "__dict__"):
                return f"by a {type(holder).__name__}"
    return "by something outside"


def _given(memory: Memory) -> Symbol:
    assert memory.given is not None
    return memory.given
