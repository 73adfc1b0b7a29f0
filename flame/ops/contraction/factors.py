"""The two factors of a product, and their copies in the order in which the inner loop reads them.

A factor is seen as (batch..., depth, width): the products are summed over the depth, and the width
is the dimension that stands in the result. A panel is a part of the width, its elements of equal
depth side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flame.core.dtypes import DType
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand, Ref
from flame.kernel.program import Matrix
from flame.kernel.values import Value, cast, const
from flame.ops.contraction.blocking import native_lanes
from flame.ops.contraction.fusion import Prologue

STAGED = 128  # depth that is converted before it is turned
PACKED_PART = 256  # depth that one iteration packs
PACKED_PANELS = 8


@dataclass(frozen=True)
class Factor:
    """A factor's type (batch..., rows, columns), and which of the last two axes is the width."""

    ref: Ref
    type: TensorType
    width_axis: int  # -2: rows of the result, -1: columns
    prologue: Prologue | None = None

    @property
    def depth_axis(self) -> int:
        return -3 - self.width_axis

    @property
    def deep(self) -> bool:
        """Whether it is the depth that stands side by side in memory."""
        return self.side_by_side(self.depth_axis) and not self.side_by_side(self.width_axis)

    @property
    def width(self) -> int:
        return self.type.shape[self.width_axis]

    def turned(self) -> Factor:
        """The same factor of the transposed product."""
        return Factor(self.ref, swapped(self.type), self.depth_axis, _turned(self.prologue))

    def plain(self, dtype: DType) -> bool:
        """Whether memory holds what is multiplied."""
        return self.prologue is None and self.type.dtype is dtype

    def side_by_side(self, axis: int) -> bool:
        return self.type.strides[axis] == 1 or self.type.shape[axis] == 1


def swapped(x: TensorType) -> TensorType:
    """The type with its last two dimensions swapped."""
    shape, strides = list(x.shape), list(x.strides)
    shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
    return tensor_type(x.dtype, tuple(shape), tuple(strides), x.device)


class _TurnedPrologue:
    def __init__(self, inner: Prologue) -> None:
        self.inner = inner

    def declare(self, k: KernelBuilder) -> None:
        self.inner.declare(k)

    def load(self, k: KernelBuilder, index: tuple[Value, ...]) -> Value:
        return self.inner.load(k, (*index[:-2], index[-1], index[-2]))


def _turned(prologue: Prologue | None) -> Prologue | None:
    return None if prologue is None else _TurnedPrologue(prologue)


@dataclass(frozen=True)
class Panels:
    """A block of panels: how wide, how many, where each begins, how much of it exists."""

    lanes: int
    count: Value
    first: Callable[[Value], Value]
    valid: Callable[[Value], Value]


class Reader:
    """A factor inside a kernel."""

    def __init__(self, k: KernelBuilder, factor: Factor, dtype: DType) -> None:
        self.k, self.factor, self.dtype = k, factor, dtype
        self.operand: Operand | None = None
        if factor.prologue is None:
            self.operand = k.tensor(factor.ref.role, factor.ref.position, factor.type)
        else:
            factor.prologue.declare(k)
        self.wide = k.size(factor.width)

    def element(self, batch: Sequence[Value], depth: Value, width: Value) -> Value:
        """One element, of the dtype of the sums; ``batch`` is an index of the whole result."""
        index = self.index(batch, depth, width)
        if self.operand is None:
            assert self.factor.prologue is not None
            return cast(self.factor.prologue.load(self.k, index), self.dtype)
        return cast(self.operand[index], self.dtype)

    def index(self, batch: Sequence[Value], depth: Value, width: Value) -> tuple[Value, ...]:
        """The index of an element in the factor."""
        last = (depth, width) if self.factor.width_axis == -1 else (width, depth)
        return (*self._own(batch), *last)

    def _own(self, batch: Sequence[Value]) -> tuple[Value, ...]:
        """The part of a batch index that this factor has; 0 where it is broadcast."""
        sizes = self.factor.type.shape[:-2]
        given = batch[len(batch) - len(sizes) :]
        return tuple(i if s > 1 else const(0) for i, s in zip(given, sizes, strict=True))

    # --- packing ----------------------------------------------------------------------------------

    def pack(
        self, batch: Sequence[Value], depth: tuple[Value, Value], panels: Panels, target: Operand,
        place: Callable[[Value], Value],
    ) -> None:  # fmt: skip
        """Copy panels to ``target``; panel i of the block from offset ``place(i)`` on.

        ``depth``: (begin, length). Lanes beyond the valid ones are left as they are.
        """
        k, factor, (begin, length), lanes = self.k, self.factor, depth, panels.lanes
        if factor.deep:
            turn = self._turn if factor.plain(self.dtype) else self._stage
            with k.loop(panels.count) as i:
                turn(batch, depth, panels.first(i), panels.valid(i), lanes, target, place(i))
            return
        vectors = max(1, lanes // native_lanes(self.dtype))
        # rows of memory are read as far as they go, as each may stand on a page of its own
        with k.loop(length) as d, k.loop(panels.count) as i:
            first = panels.first(i)
            with k.vector(panels.valid(i), vectors) as v:
                value = self.element(batch, begin + d, first + v)
                k.store(flat_of(target), (place(i) + d * lanes + v,), value)

    def _turn(
        self, batch: Sequence[Value], depth: tuple[Value, Value], first: Value, valid: Value,
        lanes: int, target: Operand, at: Value,
    ) -> None:  # fmt: skip
        """A panel whose depth is side by side in memory."""
        assert self.operand is not None
        last = (depth[0], first) if self.factor.width_axis == -1 else (first, depth[0])
        source = self.operand.at((*self._own(batch), *last))
        stride = self.operand.strides[self.factor.width_axis]
        self.k.transpose(
            valid, depth[1], Matrix(self.operand.buffer, source, stride),
            Matrix(target.buffer, at, const(lanes)),
        )  # fmt: skip

    def _stage(
        self, batch: Sequence[Value], depth: tuple[Value, Value], first: Value, valid: Value,
        lanes: int, target: Operand, at: Value,
    ) -> None:  # fmt: skip
        """Elements that are converted first, a few along the depth, and then turned."""
        k, (begin, length) = self.k, depth
        rows = k.local(self.dtype, (lanes, STAGED))
        pieces = values.binary("udiv", length + (STAGED - 1), const(STAGED))
        with k.loop(pieces) as piece:
            done = piece * STAGED
            count = values.binary("min", length - done, const(STAGED))
            with k.loop(valid) as w, k.vector(count, 2) as v:
                k.store(rows, (w, v), self.element(batch, begin + done + v, first + w))
            k.transpose(
                valid, count, Matrix(rows.buffer, const(0), const(STAGED)),
                Matrix(target.buffer, at + done * lanes, const(lanes)),
            )  # fmt: skip


def open_both(
    k: KernelBuilder, first: Factor, second: Factor, dtype: DType
) -> tuple[Reader, Reader]:
    """Both factors in a kernel whose operands stand in the order of the operation's."""
    if first.ref.position <= second.ref.position:
        one = Reader(k, first, dtype)
        return one, Reader(k, second, dtype)
    other = Reader(k, second, dtype)
    return Reader(k, first, dtype), other


def flat_of(operand: Operand) -> Operand:
    """The same memory addressed by one offset."""
    return Operand(operand.buffer, (1,), (const(1),))


def packed_type(factor: Factor, dtype: DType, panels: int, lanes: int) -> TensorType:
    """(batch..., panels, depth, lanes)."""
    depth = factor.type.shape[factor.depth_axis]
    return tensor_type(dtype, (*factor.type.shape[:-2], panels, depth, lanes))


def pack_panels(factor: Factor, packed: TensorType, temporary: int) -> BoundKernel:
    """The kernel that packs a whole factor into a temporary; the last panel reaches back."""
    k = KernelBuilder("pack_panels")
    reader = Reader(k, factor, packed.dtype)
    target = k.tensor("temporary", temporary, packed)
    *batch, count, depth, lanes = packed.shape
    part = min(depth, PACKED_PART)
    together = min(count, PACKED_PANELS)
    valid, last = panel_bounds(k, factor.width, lanes)
    blocks = (-(-count // together), -(-depth // part))
    with k.parallel(*batch, *blocks, work=together * part * lanes // 8) as (*index, block, p):
        first, begin = block * together, p * part
        panels = Panels(
            lanes,
            values.binary("min", k.size(count) - first, const(together)),
            lambda i: first_of(first + i, lanes, last),
            lambda _: valid,
        )
        length = values.binary("min", k.size(depth) - begin, const(part))
        start = target.at((*index, first, begin, const(0)))
        if factor.width < lanes:
            clear(k, target, start, length, lanes)
        reader.pack(
            index, (begin, length), panels, target, lambda i: start + i * target.strides[-3]
        )
    return k.bind()


def clear(k: KernelBuilder, target: Operand, at: Value, length: Value, lanes: int) -> None:
    """Zeros in the lanes of a panel: what is never stored must still be cheap to multiply."""
    with k.loop(length) as d, k.vector(lanes, max(1, lanes // native_lanes(target.dtype))) as v:
        k.store(flat_of(target), (at + d * lanes + v,), const(0, target.dtype))


def panel_bounds(k: KernelBuilder, width: int, lanes: int) -> tuple[Value, Value | None]:
    """(elements of a panel, where the last one begins; None where all begin at multiples)."""
    if width < lanes:
        return const(width), const(0)
    return const(lanes), None if width % lanes == 0 else k.size(width - lanes)


def first_of(panel: Value, lanes: int, last: Value | None) -> Value:
    """Where a panel begins."""
    first = panel * lanes
    return first if last is None else values.binary("min", first, last)
