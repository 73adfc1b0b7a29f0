"""Running a recorded step: memory for its results, the program, and Python's own part.

Invariants: what a run returns is the caller's own; a gradient's memory is used again only where
nobody but the leaf itself holds that gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from flame.autograd.engine import edge_of
from flame.compiler.compilation import compile_graph
from flame.core.errors import TraceError
from flame.recording.differentiable import Backward, CompiledNode
from flame.recording.step import Gradient, Recording, Source, undo
from flame.recording.structure import filled
from flame.runtime.storage import Storage
from flame.tensor import Tensor


class Step:
    """A program with what Python does around it."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        state = recording.addresses()
        self.program = compile_graph(recording.graph, state)
        self.repeated = recording.repeated
        changed = {id(s) for s in recording.written_states}
        changed |= {id(g.leaf.storage) for g in recording.gradients if g.leaf is not None}
        self.own = frozenset(changed)  # ids of storages that no argument may share
        self.reached = frozenset(id(m.storage) for m in recording.states)  # and no changed one
        self.numbers = [s for r in recording.repeated for s in r.numbers]
        self.gradients = _Gradients(recording.gradients, self.program.output_places)

    def holds(self) -> bool:
        """Whether nothing that the recording depends on has changed."""
        r = self.recording
        for gradient in r.gradients:
            if not gradient.holds():
                return False
        return r.modes.hold() and r.surroundings.hold() and r.holders.hold() and r.outside.hold()

    def first(self, tensors: Sequence[Tensor]) -> Any:
        """The step that was recorded, whose Python has already run."""
        try:
            return self._run(tensors, self.first_numbers())
        except BaseException:
            undo(self.repeated)
            raise

    def first_numbers(self) -> list[Any]:
        """The numbers of the step that was recorded."""
        return [n for r in self.recording.repeated for n in r.first]

    def again(self, tensors: Sequence[Tensor]) -> Any:
        """A later step. Raises Stale where Python's part is no longer what was recorded."""
        numbers: list[Any] = []
        done = 0
        try:
            for action in self.repeated:
                made = action.again()
                done += 1
                if made.__class__ is tuple:
                    numbers += made
            return self._run(tensors, numbers)
        except BaseException:
            undo(self.repeated[:done])
            raise

    def _run(self, tensors: Sequence[Tensor], numbers: list[Any]) -> Any:
        r, program = self.recording, self.program
        self._check_apart(tensors)
        memory = self.gradients.release()
        results = [
            memory[i] if i in memory else Storage.allocate(nbytes, program.device)
            for i, (_, nbytes) in enumerate(program.result_types)
        ]
        try:
            program.run(*[t.pointer for t in tensors], *numbers, *[s.pointer for s in results])
        except BaseException:
            self.gradients.forget()
            raise
        for storage in r.written_states:
            storage.version += 1
        for i in r.written_arguments:
            tensors[i].storage.version += 1
        back = _Back(self, tensors, results)
        self.gradients.put(back)
        if r.outside.flags:
            r.outside.set_flags()
        if not r.sources:
            return r.result
        returned = [back.tensor(source) for source in r.sources]
        if r.backward is not None:
            self._attach(r.backward, back, returned, tensors, numbers)
        return filled(r.result, returned)

    def _check_apart(self, tensors: Sequence[Tensor]) -> None:
        """Raise TraceError where an argument shares memory with something that the step changes."""
        own, written = self.own, self.recording.written_arguments
        for number, tensor in enumerate(tensors):
            if id(tensor.storage) in own:
                raise TraceError(
                    f"argument {number} of a compiled step, of shape {tensor.shape}, shares memory "
                    "with a tensor that the step changes or gives a gradient, and reaches from "
                    "outside; hand in a clone, or reach it from outside alone"
                )
        for number in written:
            storage = tensors[number].storage
            if id(storage) in self.reached or sum(t.storage is storage for t in tensors) > 1:
                raise TraceError(
                    f"argument {number} of a compiled step is changed in place, and shares memory "
                    "with another argument or a tensor that the step reaches from outside; hand in "
                    "a clone"
                )

    def _attach(
        self,
        backward: Backward,
        back: _Back,
        returned: list[Tensor],
        tensors: Sequence[Tensor],
        numbers: list[Any],
    ) -> None:
        """Let gradients flow from what is returned through the recorded backward pass."""
        leaves = [tensors[x] if isinstance(x, int) else x for x in backward.leaves]
        known = dict(zip(self.numbers, numbers, strict=True))
        node = CompiledNode(
            backward,
            [edge_of(leaf) for leaf in leaves],
            [back.memory(i) for i in self.recording.saved],
            [tensors[i] for i in backward.arguments],
            [known[s] for s in backward.numbers],
        )
        for position, i in enumerate(backward.outputs):
            made = returned[i]
            made.node, made.output_index, made.tracked = node, position, True


class _Back:
    """Tensors over what a run has filled."""

    def __init__(self, step: Step, tensors: Sequence[Tensor], results: list[Storage]) -> None:
        self.places = step.program.output_places
        self.tensors, self.results = tensors, results

    def tensor(self, source: Source) -> Tensor:
        if source.kind == "outside":
            assert source.tensor is not None
            return source.tensor
        if source.kind == "part":
            assert source.tensor is not None
            return source.tensor.detach()
        assert source.type is not None
        if source.kind == "result":
            storage, offset = self.memory(source.index)
            return Tensor.wrap(storage, storage.pointer + offset + source.offset, source.type)
        given = self.tensors[source.index]
        if source.offset == 0 and source.type is given.type:
            return given
        return Tensor.wrap(given.storage, given.pointer + source.offset, source.type)

    def memory(self, output: int) -> tuple[Storage, int]:
        """Where an output of the graph lies: storage and bytes from its start."""
        place = self.places[output]
        assert place.space == "result"  # by `compilation.set_apart`
        return self.results[place.index], place.offset


class _Gradients:
    """The ``grad`` of every leaf that the step sees, before and after each run.

    ``result``: for each gradient the program's result that holds it and nothing else, or -1.
    ``last``: the tensors that the last run left in the leaves.
    """

    def __init__(self, gradients: Sequence[Gradient], places: Sequence[Any]) -> None:
        self.gradients = gradients
        held = [
            places[g.after.index].index if g.after is not None and g.after.kind == "result" else -1
            for g in gradients
        ]
        self.result = [
            i if held.count(i) == 1 and g.leaf is not None and not g.was_read else -1
            for i, g in zip(held, gradients, strict=True)
        ]
        self.last: list[Tensor | None] = [None] * len(gradients)

    def release(self) -> dict[int, Storage]:
        """Forget the gradients of the last run; gives memory that they leave to results."""
        memory: dict[int, Storage] = {}
        last = self.last
        for number, gradient in enumerate(self.gradients):
            leaf = gradient.leaf
            if leaf is None or gradient.was_read:
                continue
            made = last[number]
            # a tensor is held by the leaf, `last`, `made`, and the call that counts
            if (
                made is not None
                and leaf._grad is made
                and sys.getrefcount(made) == 4
                and sys.getrefcount(made.storage) == 2
            ):
                memory[self.result[number]] = made.storage
            else:
                leaf._grad = last[number] = None
        return memory

    def forget(self) -> None:
        """After a run that failed: nothing of it is left in the leaves."""
        for gradient, made in zip(self.gradients, self.last, strict=True):
            if made is not None and gradient.leaf is not None:
                gradient.leaf._grad = None
        self.last = [None] * len(self.gradients)

    def put(self, back: _Back) -> None:
        """Give the leaves what the run has made."""
        for number, gradient in enumerate(self.gradients):
            made = self.last[number]
            if made is not None:
                made.storage.version += 1
                continue
            made = None if gradient.after is None else back.tensor(gradient.after)
            leaf = gradient.leaf
            if leaf is None:
                leaf = back.tensors[gradient.argument]
                if made is not None and not leaf.is_leaf:
                    leaf.backward(made)  # on into the history that it came with
                    continue
                if gradient.was_read and leaf._grad is not None and made is not None:
                    made = leaf._grad + made
            leaf._grad = made
            if self.result[number] >= 0:
                self.last[number] = made
