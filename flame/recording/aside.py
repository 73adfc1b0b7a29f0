"""What runs at once while a step is recorded: Python's own work, such as a schedule's.

Invariant: it sees and changes only memory that the recorded step has not touched yet, for nothing
of the step itself has run; so it may come before the whole step at every later call.
"""

from __future__ import annotations

import threading
from typing import Any

from flame.core.dtypes import DType
from flame.core.errors import TraceError
from flame.core.types import TensorType
from flame.ops.op import Interpreter, Op
from flame.recording.lines import user_line
from flame.recording.memory import is_recorded
from flame.tensor import Tensor


class Aside(Interpreter):
    """Hands every call to the interpreter beneath a recorder, after a look at its tensors."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        self.beneath: Interpreter = recorder.beneath

    def apply(
        self,
        op: Op,
        inputs: tuple[Any, ...],
        attributes: dict[str, Any],
        out: tuple[Any, ...] | None = None,
    ) -> Any:
        if threading.get_ident() == self.recorder.thread:
            for x in inputs:
                if isinstance(x, Tensor):
                    self.meets_value(x)
            for target in out or ():
                self._changes(target)
        return self.beneath.apply(op, inputs, attributes, out)

    def constant(self, data: Any, **options: Any) -> Any:
        return self.beneath.constant(data, **options)

    def cast(self, tensor: Any, dtype: DType) -> Any:
        return self.beneath.cast(tensor, dtype)

    def empty(self, type_: TensorType) -> Any:
        return self.beneath.empty(type_)

    def meets_value(self, tensor: Tensor) -> None:
        """Numbers of a tensor are read. Raises TraceError where the step computes them."""
        if is_recorded(tensor) or self.recorder.has_written(tensor):
            raise TraceError(
                f"{user_line()}: a schedule or optimizer reads a tensor that the compiled step "
                "computes, which is not known before the step runs; do this outside of the step"
            )

    def _changes(self, target: Tensor) -> None:
        if id(target.storage) in self.recorder.memories:
            raise TraceError(
                f"{user_line()}: a schedule or optimizer changes a tensor that the compiled step "
                "has read before; read it after that, or do this outside of the step"
            )

    def meets_gradient(self, tensor: Tensor, *, read: bool) -> None:
        """As a recorder's; here nothing follows from it."""

    def meets_flag(self, tensor: Tensor) -> None:
        """As a recorder's; here nothing follows from it."""

    def meets_replacement(self, tensor: Tensor) -> None:
        """As a recorder's; here nothing follows from it."""
