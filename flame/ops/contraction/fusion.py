"""What may stand in front of and behind the sums of products: prologues and epilogues."""

from __future__ import annotations

from typing import Protocol

from flame.core.types import Shape, TensorType
from flame.kernel.builder import KernelBuilder, Operand, Ref
from flame.kernel.values import Value, binary, cast
from flame.kernel.values import const as constant


class Epilogue(Protocol):
    """What becomes of a sum. One object may serve several kernels, one after the other.

    ``repeatable``: short, and without harm where an element passes several times, in parallel even:
    it then stands in the text once for each row of a tile, and the sums come from registers.
    """

    repeatable: bool

    def declare(self, k: KernelBuilder) -> None:
        """Declare the operands that `store` uses in ``k``; called once, before the loops."""

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        """Use the sum at ``index`` (batch..., row, column) of the result, in a vector loop.

        Unless the epilogue is repeatable, it is called in one place of the text, and each element
        passes once.
        """


class Prologue(Protocol):
    """Computes the elements of a factor that is in no memory, or in another form."""

    def declare(self, k: KernelBuilder) -> None:
        """Declare the operands that `load` uses in ``k``; called once, before the loops."""

    def load(self, k: KernelBuilder, index: tuple[Value, ...]) -> Value:
        """The element at ``index`` (batch..., row, column) of the factor, in a vector loop."""


class PlainStore:
    """Stores a sum as it is."""

    repeatable = True

    def __init__(self, type_: TensorType, ref: Ref | None = None) -> None:
        self.type, self.ref = type_, Ref("output", 0) if ref is None else ref
        self.out: Operand

    def declare(self, k: KernelBuilder) -> None:
        self.out = k.tensor(self.ref.role, self.ref.position, self.type)

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        k.store(self.out, index, value)


class BiasStore:
    """Adds a number for each column, then leaves the sum to another epilogue."""

    def __init__(self, bias: TensorType, ref: Ref, then: Epilogue) -> None:
        self.type, self.ref, self.then = bias, ref, then
        self.bias: Operand
        self.repeatable = then.repeatable

    def declare(self, k: KernelBuilder) -> None:
        self.bias = k.tensor(self.ref.role, self.ref.position, self.type)
        self.then.declare(k)

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        column = index[-1] if self.type.shape[-1] > 1 else constant(0)
        self.then.store(k, index, value + cast(self.bias[column], value.dtype))


class SplitRows:
    """An epilogue behind a product whose rows are those of all entries of a batch."""

    def __init__(self, then: Epilogue, shape: Shape) -> None:
        self.then, self.shape = then, shape  # (batch..., rows)
        self.repeatable = then.repeatable
        self.sizes: list[Value] = []

    def declare(self, k: KernelBuilder) -> None:
        self.sizes = [k.size(s) for s in self.shape[1:]]
        self.then.declare(k)

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        rest, column = index
        split: list[Value] = []
        for size in reversed(self.sizes):
            split.insert(0, binary("urem", rest, size))
            rest = binary("udiv", rest, size)
        self.then.store(k, (rest, *split, column), value)


class Turned:
    """An epilogue behind the transposed product."""

    def __init__(self, then: Epilogue) -> None:
        self.then = then
        self.repeatable = then.repeatable

    def declare(self, k: KernelBuilder) -> None:
        self.then.declare(k)

    def store(self, k: KernelBuilder, index: tuple[Value, ...], value: Value) -> None:
        self.then.store(k, (*index[:-2], index[-1], index[-2]), value)
