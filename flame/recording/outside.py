"""What a step saw of tensors and arrays from outside, apart from using them: guards for it.

Invariant: a tensor from outside is after a recording what it was before, but for the flags that
the step sets, which every later run sets too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from flame.core.changes import changes
from flame.core.errors import TraceError
from flame.recording.lines import user_line
from flame.recording.memory import is_recorded
from flame.tensor import Tensor

_LARGEST = 1 << 16  # bytes of a tensor whose numbers may be looked at, and compared at each call


class Seen:
    """Collected while a step is recorded."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        self.flags: dict[int, tuple[Tensor, bool]] = {}
        self.values: list[tuple[Tensor, bytes, str]] = []

    def use(self, tensor: Tensor) -> None:
        """An operation met a tensor from outside."""
        if id(tensor) not in self.parts:
            self.parts[id(tensor)] = tensor, _parts(tensor)

    def flag(self, tensor: Tensor) -> None:
        """``requires_grad`` is about to change."""
        if not is_recorded(tensor):
            self.flags.setdefault(id(tensor), (tensor, tensor.tracked))

    def value(self, tensor: Tensor) -> None:
        """Python looks at the numbers of a tensor from outside."""
        if tensor.nbytes > _LARGEST:
            raise TraceError(
                f"{user_line()}: the numbers of a large tensor from outside were asked for; a "
                "compiled step would keep them as they are now. Ask outside of the step"
            )
        self.values.append((tensor, _bytes(tensor), user_line()))

    def check(self, recorder: Any) -> None:
        """Raise TraceError for what later calls could not repeat."""
        for tensor, before in self.parts.values():
            if tensor.node is not before[0] and tensor.node is not None:
                raise TraceError(
                    f"{user_line()}: a tensor from outside of shape {tensor.shape} was changed in "
                    "place by values that have a history; it would belong to the recording. Change "
                    "it under flame.no_grad(), or by values that are detached"
                )
        for tensor, _, line in self.values:
            if recorder.has_written(tensor):
                raise TraceError(
                    f"{line}: the numbers of a tensor from outside were asked for, which the step "
                    "changes; later calls would see those of now. Compute with the tensor itself"
                )

    def restore(self) -> None:
        """After a failure: every tensor as it was."""
        for tensor, before in self.parts.values():
            tensor.node, tensor.output_index, tensor.tracked, tensor.base_node = before
        for tensor, tracked in self.flags.values():
            tensor.tracked = tracked


class Outside:
    """What must still be so at a later call.

    tensors: (tensor, what it was); values, arrays: with their bytes; flags: those that a run sets.
    storages: of the step's constants, which NumPy arrays may share.
    """

    def __init__(self, seen: Seen, storages: Iterable[Any]) -> None:
        first = {key: tracked for key, (_, tracked) in seen.flags.items()}
        known = [t for t, _ in seen.parts.values()] + [t for t, _ in seen.flags.values()]
        self.tensors = [
            (weakref.ref(t), (*_identity(t)[:-1], first.get(id(t), t.tracked)))
            for t in {id(t): t for t in known}.values()
        ]
        self.flags = [
            (weakref.ref(t), t.tracked) for t, before in seen.flags.values() if t.tracked != before
        ]
        self.values = [(t, b) for t, b, _ in seen.values]
        self.arrays = [(s.owner, s.owner.tobytes()) for s in storages if _is_shared(s)]
        self.count = -1

    def hold(self) -> bool:
        """Whether nothing has changed."""
        for tensor, content in self.values:
            if _bytes(tensor) != content:
                return False
        for array, content in self.arrays:
            if array.tobytes() != content:
                return False
        if changes.tensors == self.count:
            return True
        count = changes.tensors
        for reference, identity in self.tensors:
            known = reference()
            if known is not None and _identity(known) != identity:
                return False
        self.count = count
        return True

    def set_flags(self) -> None:
        """After a run: ``requires_grad`` as the step leaves it."""
        for reference, tracked in self.flags:
            tensor = reference()
            if tensor is not None and tensor.tracked != tracked:
                changes.tensors += 1
                tensor.tracked = tracked


def _parts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.node, tensor.output_index, tensor.tracked, tensor.base_node


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    hooks, after = tensor.hooks, tensor.after_hooks
    counts = len(hooks) if hooks else 0, len(after) if after else 0
    return tensor.storage, tensor.pointer, tensor.type, counts, tensor.tracked


def _bytes(tensor: Tensor) -> bytes:
    type_ = tensor.type
    offset = tensor.storage_offset()
    array = tensor.storage.as_numpy(type_.dtype.numpy, type_.shape, type_.strides, offset)
    return array.tobytes()


def _is_shared(storage: Any) -> bool:
    """Whether anybody else holds the array that a storage borrows, or what it is a view of."""
    array = storage.owner
    while isinstance(array, np.ndarray):
        if sys.getrefcount(array) > 3:  # its holder, the name here, and the call
            return True
        array = array.base
    return False
