"""Kernels of rows in cache, and sums over the rows beside them: a normalization's backward.

Invariants: rows are taken in at most `PARTS` runs, one after the other; each run adds what its rows
give to sums of its own in a temporary, in cache, and a second kernel adds the runs, in order. The
cut depends on shapes alone.
"""

from __future__ import annotations

from flame.compiler.lower.rows import RowKernel, Write, finish_fold, total_of
from flame.compiler.lower.scalars import Scalars
from flame.compiler.lower.space import Space
from flame.core.dtypes import DType
from flame.core.types import tensor_type
from flame.graph import Node, tensor_of
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.values import Value, cast, const
from flame.ops import schedules
from flame.ops.norm_gradients import PARTS
from flame.ops.reductions import COLUMNS, Reduction
from flame.ops.rows import Index, Rows, unroll_for


def can_cross(space: Space, rows: Rows) -> bool:
    """Whether the rows lie along memory, as one range each, and the crossed reductions are sums."""
    plain = not rows.columns and len(rows.kept.sizes) == len(rows.row.sizes) == 1
    return plain and all(
        isinstance(n.op, Reduction) and n.op.combine == "add" for n in space.crossed
    )


def lower_crossed(space: Space) -> Lowering:
    """The kernel over runs of rows, then one for each crossed sum."""
    return _Crossed(space).lowering()


class _Crossed(RowKernel):
    def __init__(self, space: Space) -> None:
        super().__init__(space)
        (self.total,), (self.length,) = self.rows.kept.sizes, self.rows.row.sizes
        gpu = space.on_gpu
        most = schedules.row_runs(self.total, self._row_bytes()) if gpu else PARTS
        self.step = -(-self.total // most)
        self.parts = -(-self.total // self.step)
        self.sums = [node for node in space.nodes if node in space.crossed]
        self.room: dict[Node, Operand] = {}
        self.part: Value = const(0)
        for i, node in enumerate(self.sums):
            type_ = tensor_type(total_of(node), (self.parts, self.length))
            self.room[node] = self.k.tensor("temporary", i, type_)
        self.own: dict[Node, Operand] = {}  # sums in registers, until a run's end
        if gpu and self.length <= schedules.HELD:
            room = (schedules.power_of_two(self.length),)
            self.own = {node: self.k.local(total_of(node), room) for node in self.sums}

    def _row_bytes(self) -> int:
        space = self.space
        return self.length * max(a.type.dtype.itemsize for a in (*space.accesses, *space.stores))

    def _place_of(self, node: Node, i: Value) -> tuple[Operand, Index]:
        """Where a run's sum at a place of the row stands."""
        if node in self.own:
            return self.own[node], (i,)
        return self.room[node], (self.part, i)

    def lowering(self) -> Lowering:
        k = self.k
        (size,), total, run = self.loops.sizes, k.size(self.total), k.size(self.step)
        work = self.step * self.length * self.passes.count
        with k.parallel(self.parts, work=work) as (self.part,):
            begin = self.part * run
            for node in self.sums:
                with k.vector(size, self.loops.unroll) as i:
                    k.store(*self._place_of(node, i), const(0, total_of(node)))
            with k.loop(values.binary("min", total - begin, run)) as offset:
                self.visit((begin + offset,))
            for node, own in self.own.items():
                with k.vector(size, self.loops.unroll) as i:
                    k.store(self.room[node], (self.part, i), own[i])
        nbytes = [self.parts * self.length * total_of(n).itemsize for n in self.sums]
        if self.space.on_gpu:
            return self._summed_on_gpu(nbytes)
        totals = [self._sum(i, node) for i, node in enumerate(self.sums)]
        return Lowering((k.bind(), *totals), tuple(nbytes))

    def _summed_on_gpu(self, nbytes: list[int]) -> Lowering:
        """The kernel, then the runs in two steps; see `schedules.sum_runs`."""
        found, kernels = list(nbytes), [self.k.bind()]
        for i, node in enumerate(self.sums):
            type_ = tensor_type(total_of(node), (self.parts, self.length))
            position, stride, dtype = self._target(node)
            out = tensor_type(dtype, (self.length,), (stride,))

            def finish(k: KernelBuilder, total: Value, node: Node = node) -> Value:
                return finish_fold(node, total, k.size(self.total))

            more, rest = schedules.sum_runs(
                [(i, type_)], [(position, out)], len(found), finish=finish
            )
            kernels += more
            found += rest
        return Lowering(tuple(kernels), tuple(found))

    def _target(self, node: Node) -> tuple[int, int, DType]:
        """Number, stride and dtype of the output that a crossed sum is."""
        position, store = next(
            (i, s) for i, s in enumerate(self.space.stores) if s.symbol is node.outputs[0]
        )
        accesses = (*self.space.accesses, *self.space.stores)
        (stride,) = self.rows.row.strides[1 + accesses.index(store)]
        return position, stride, store.type.dtype

    def more(self, number: int, index: Index, scalars: Scalars) -> list[Write]:
        made: list[Write] = []
        for node in self.passes.crossed(number):
            assert isinstance(node.op, Reduction)
            total = total_of(node)
            room, place = self._place_of(node, index[-1])
            prepared = node.op.prepared(tensor_of(node.inputs[0]).dtype, total)
            made.append(
                (room, place, room[place] + cast(prepared(scalars.operand(node, 0)), total))
            )
        return made

    def _sum(self, which: int, node: Node) -> BoundKernel:
        """A crossed sum from those of all runs."""
        k = KernelBuilder("crossed_sum")
        source = k.tensor(
            "temporary", which, tensor_type(total_of(node), (self.parts, self.length))
        )
        position, stride, dtype = self._target(node)
        out = k.tensor("output", position, tensor_type(dtype, (self.length,), (stride,)))
        size, parts, count = k.size(self.length), k.size(self.parts), k.size(self.total)
        with k.parallel(-(-self.length // COLUMNS), work=self.parts * COLUMNS) as (block,):
            start = block * COLUMNS
            extent = values.binary("min", size - start, const(COLUMNS))
            with k.vector(extent, unroll_for(self.length)) as i:
                total = k.register(0, total_of(node))
                with k.loop(parts) as part:
                    k.accumulate(total, "add", source[part, start + i])
                k.store(out, (start + i,), finish_fold(node, values.read(total), count))
        return k.bind()
