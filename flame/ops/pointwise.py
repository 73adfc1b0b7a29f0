"""`pointwise`: a Python function of elementwise ops becomes one kernel with one or several results.

Invariant: the function is traced with scalar values, once for each set of operand types; Python
numbers among its operands are run-time scalars, so a changing learning rate compiles nothing anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from flame.core.dtypes import DType
from flame.core.errors import ArgumentError
from flame.kernel import values
from flame.kernel.values import Value
from flame.ops.elementwise import Elementwise, common_dtype, compute_dtype
from flame.ops.op import NOT_DIFFERENTIABLE, Types

__all__ = ["Pointwise", "pointwise"]


class Pointwise:
    """``fused(*operands, out=None)``: the operands are broadcast tensors and Python numbers.

    Computes in the operands' promoted dtype (half-width floats in float32). ``out``: tensors, one
    for each result, that are written in place, each in its own dtype; they may be operands. The
    kernel has no derivative: no gradient flows through its results.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "pointwise")
        self.__doc__ = function.__doc__
        names = tuple(inspect.signature(function).parameters)
        self.op = Elementwise(
            self.__name__, self._scalar, inputs=names, rule=self._rule, vjp=NOT_DIFFERENTIABLE,
            reference=None, register=False,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<pointwise {self.__name__}>"

    def __call__(self, *operands: Any, out: Sequence[Any] | None = None) -> Any:
        self._expect(len(operands))
        return self.op(*operands) if out is None else self.op.into(tuple(out), *operands)

    def foreach(
        self,
        inputs: Sequence[tuple[Any, ...]],
        *shared: Any,
        out: Sequence[tuple[Any, ...]],
    ) -> None:
        """``fused(*own, *shared, out=targets)`` for each ``own`` of ``inputs`` and ``targets`` of
        ``out``, in few launches on a GPU. ``inputs``: tensors; ``shared``: tensors and numbers."""
        for count in {*map(len, inputs)}:
            self._expect(count + len(shared))
        self.op.foreach(inputs, *shared, out=out)

    def _expect(self, count: int) -> None:
        if count != len(self.op.inputs):
            raise ArgumentError(
                f"{self.__name__} takes {len(self.op.inputs)} operands "
                f"({', '.join(self.op.inputs)}), got {count}"
            )

    def _scalar(self, *operands: Value) -> tuple[Value, ...]:
        made = self.function(*operands)
        results = made if isinstance(made, tuple) else (made,)
        return tuple(
            r if isinstance(r, Value) else values.const(r, operands[0].dtype) for r in results
        )

    def _rule(self, name: str, types: Types) -> tuple[list[DType], list[DType]]:
        common = common_dtype(types)
        inside = compute_dtype(common)
        leaves = [values.param(f"operand{i}", inside) for i in range(len(types))]
        found = [r.dtype for r in self._scalar(*leaves)]
        return [common] * len(types), [common if d is inside else d for d in found]


def pointwise(function: Callable[..., Any]) -> Pointwise:
    """Fuse a function of elementwise ops and operators into one kernel; see `Pointwise`.

    @pointwise
    def step(p, g, lr):
        return p - lr * g

    step(p, g, 0.1, out=(p,))
    """
    return Pointwise(function)
