"""The kind of op that gives a new shape and strides to the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flame.core.errors import StateError
from flame.core.types import TensorType
from flame.kernel.builder import Lowering
from flame.ops.op import Op, Sample, Types, Vjp


class ViewOp(Op):
    """``view(types, **attributes) -> (TensorType, offset in elements)``; no kernel runs."""

    def __init__(
        self,
        name: str,
        view: Callable[..., tuple[TensorType, int]],
        *,
        vjp: Vjp,
        reference: Callable[..., Any],
        samples: Sequence[Sample],
        of_memory: bool = False,
    ) -> None:
        self.view = view
        super().__init__(
            name,
            inputs=("x",),
            infer=self._infer,
            lower=self._lower,
            vjp=vjp,
            reference=reference,
            samples=samples,
            of_memory=of_memory,
        )

    def _infer(self, types: Types, **attributes: Any) -> TensorType:
        return self.view(types, **attributes)[0]

    def _lower(self, types: Types, outputs: Any, **attributes: Any) -> Lowering:
        raise StateError(f"view {self.name} has no kernel")
