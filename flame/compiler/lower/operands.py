"""Operands: the tensors and numbers of a group, bound to a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from flame.compiler.lower.space import Access, Space
from flame.core.types import Shape, tensor_type
from flame.graph import Operand as GraphOperand
from flame.graph import Symbol
from flame.kernel.builder import KernelBuilder, Operand
from flame.kernel.values import Value
from flame.ops.loops import Nest

Index = tuple[Value, ...]


def task_inputs(space: Space) -> tuple[GraphOperand, ...]:
    """What ``Ref("input", i)`` means: memory operands, then numbers."""
    return (*(a.symbol for a in space.accesses), *space.numbers)


def numbers_of(k: KernelBuilder, space: Space) -> dict[Symbol, Value]:
    """The numbers that are known at the call, as parameters."""
    first = len(space.accesses)
    return {
        symbol: k.number(first + i, symbol.type)
        for i, symbol in enumerate(space.numbers)
        if isinstance(symbol.type, type)
    }


def bind(
    k: KernelBuilder, space: Space, accesses: Sequence[Access], nest: Nest
) -> dict[Access, Operand]:
    """The memory operands, whose strides are the first ones of the nest, in their order."""
    reads = {access: i for i, access in enumerate(space.accesses)}
    stores = {access: i for i, access in enumerate(space.stores)}
    found: dict[Access, Operand] = {}
    for access, strides in zip(accesses, nest.strides, strict=False):
        type_ = tensor_type(access.type.dtype, nest.sizes, strides)
        if access in reads:
            found[access] = k.tensor("input", reads[access], type_)
        else:
            found[access] = k.tensor("output", stores[access], type_)
    return found


def strides_of(space: Space, accesses: Sequence[Access]) -> list[Shape]:
    return [access.strides(space.loops) for access in accesses]


def kernel_name(space: Space) -> str:
    """Of the nodes' names: the first ones, and the last."""
    names = list(dict.fromkeys(node.op.name.strip("_") for node in space.nodes))
    if len(names) > 4:
        names = [*names[:3], names[-1]]
    made = "_".join(names)
    return "".join(c if c.isalnum() else "_" for c in made)[:60]
