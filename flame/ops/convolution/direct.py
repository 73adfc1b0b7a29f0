"""Convolution as plain sums: for a GPU, where no library takes the problem.

Invariant: every result is one sum in the order of channels and taps, so all dtypes and layouts work
and a run gives the same bits each time. It is meant to be right, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flame.core import dtypes
from flame.core.types import TensorType
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering, Operand
from flame.kernel.library import Direction
from flame.kernel.values import Value, cast, const, select
from flame.ops.convolution.geometry import Geometry, spatial_view
from flame.ops.elementwise import compute_dtype

Index = tuple[Value, ...]


def lower(
    direction: Direction,
    types: Mapping[str, TensorType],
    bias: TensorType | None,
    geometry: Geometry,
) -> Lowering:
    """``types``: of x, weight and y; operands as in `flame.kernel.library.ConvolutionProblem`."""
    return _Direct({n: spatial_view(t) for n, t in types.items()}, bias, geometry).lower(direction)


class _Direct:
    def __init__(
        self, types: dict[str, TensorType], bias: TensorType | None, geometry: Geometry
    ) -> None:
        self.types, self.bias, self.geometry = types, bias, geometry
        self.k = KernelBuilder("direct_convolution")
        self.wide = compute_dtype(types["x"].dtype)

    def lower(self, direction: Direction) -> Lowering:
        if direction == "weight_gradient":
            return self._weight_gradient()
        forward = direction == "forward"
        source, target = ("x", "y") if forward else ("y", "x")
        k = self.k
        given = k.tensor("input", 0, self.types[source])
        weight = k.tensor("input", 1, self.types["weight"])
        out = k.tensor("output", 0, self.types[target])
        added = None if self.bias is None else k.tensor("input", 2, self.bias)
        shape = self.types[target].shape
        own = self.types["weight"].shape[0] // self.geometry.groups
        inner = self.types["weight"].shape[1]
        mine, summed = (own, inner) if forward else (inner, own)
        work = summed * math.prod(self.geometry.kernel) * shape[-1]
        with k.parallel(*shape[:-1], work=work) as (n, c, *outer), k.vector(k.size(shape[-1])) as w:
            place = (*outer, w)
            group = values.binary("udiv", c, k.size(mine))
            total = k.register(0, self.wide)
            with k.nest([k.size(summed), *map(k.size, self.geometry.kernel)]) as (s, *taps):
                channel = group * k.size(summed) + s
                where, inside = self._source(place, taps, self.types[source], forward=forward)
                row = (c, s) if forward else (channel, c - group * k.size(mine))
                x = given.load(n, channel, *where, where=inside)
                product = cast(x, self.wide) * cast(weight[(*row, *taps)], self.wide)
                k.accumulate(total, "add", select(inside, product, const(0, self.wide)))
            made = values.read(total)
            if added is not None:
                made = made + cast(added[c], self.wide)
            k.store(out, (n, c, *place), made)
        return k.finish()

    def _source(
        self, place: Index, taps: list[Value], source: TensorType, *, forward: bool
    ) -> tuple[Index, Value]:
        """Where a tap reads, and whether there is an element."""
        k, g = self.k, self.geometry
        where: list[Value] = []
        inside = const(True, dtypes.bool_)
        for axis, (at, tap) in enumerate(zip(place, taps, strict=True)):
            stride, padding = k.size(g.stride[axis]), k.size(g.padding[axis])
            step = tap * k.size(g.dilation[axis])
            if forward:
                index = at * stride + step - padding
            else:
                reach = at + padding - step
                index = values.binary("floordiv", reach, stride)
                inside = values.binary("and", inside, index * stride == reach)
            limit = k.size(source.shape[2 + axis])
            inside = values.binary("and", inside, values.binary("and", index >= 0, index < limit))
            where.append(index)
        return tuple(where), inside

    def _weight_gradient(self) -> Lowering:
        """Each weight's gradient is a sum over images and positions."""
        k, g = self.k, self.geometry
        y = k.tensor("input", 0, self.types["y"])
        x = k.tensor("input", 1, self.types["x"])
        out = k.tensor("output", 0, self.types["weight"])
        shape, positions = self.types["weight"].shape, self.types["y"].shape
        work = positions[0] * math.prod(positions[2:])
        with k.parallel(*shape, work=work) as (o, c, *taps):
            group = values.binary("udiv", o, k.size(shape[0] // g.groups))
            channel = group * k.size(shape[1]) + c
            total = k.register(0, self.wide)
            with k.nest([k.size(positions[0]), *map(k.size, positions[2:-1])]) as (n, *outer):
                self._row(x, y, total, (n, o, channel), outer, list(taps))
            k.store(out, (o, c, *taps), values.read(total))
        return k.finish()

    def _row(
        self, x: Operand, y: Operand, total: values.Register, which: Index, outer: list[Value],
        taps: list[Value],
    ) -> None:  # fmt: skip
        k = self.k
        n, o, channel = which
        with k.vector(k.size(self.types["y"].shape[-1])) as w:
            place = (*outer, w)
            where, inside = self._source(place, taps, self.types["x"], forward=True)
            read = cast(x.load(n, channel, *where, where=inside), self.wide)
            product = read * cast(y[(n, o, *place)], self.wide)
            k.accumulate(total, "add", select(inside, product, const(0, self.wide)))
