"""Kernels of groups without reductions: every point of the loops by itself."""

from __future__ import annotations

from flame.compiler.lower.operands import bind, kernel_name, numbers_of, strides_of
from flame.compiler.lower.scalars import Scalars, weight_of
from flame.compiler.lower.space import Space
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.ops.loops import coalesce
from flame.ops.rows import Index
from flame.ops.schedules import block_of


def unroll_of(weight: int) -> int:
    """Native vectors side by side: as many as keep the values of an iteration in registers."""
    return 4 if weight <= 16 else 2 if weight <= 48 else 1


def lower_pointwise(space: Space) -> Lowering:
    """One kernel: a flat range in blocks where all operands lie alike, else rows."""
    k = KernelBuilder(kernel_name(space))
    accesses = (*space.accesses, *space.stores)
    nest = coalesce(space.sizes, strides_of(space, accesses))
    bound = bind(k, space, accesses, nest)
    numbers = numbers_of(k, space)
    unroll = unroll_of(sum(weight_of(node) for node in space.nodes))

    def body(index: Index) -> None:
        scalars = Scalars(space, numbers, lambda a: bound[a][index], {})
        k.store_all([(bound[s], index, scalars.of(s.symbol)) for s in space.stores])

    if len(nest.sizes) <= 1:
        count = nest.sizes[0] if nest.sizes else 1
        size = block_of(count, space.device)
        with k.parallel(-(-count // size), work=size) as (block,):
            start = block * size
            extent = values.binary("min", k.size(count) - start, values.const(size))
            with k.vector(extent, unroll) as i:
                body((start + i,) if nest.sizes else ())
    else:
        inner = nest.sizes[-1]
        with (
            k.parallel(*nest.sizes[:-1], work=inner) as outer,
            k.vector(k.size(inner), unroll) as i,
        ):
            body((*outer, i))
    return k.finish()
