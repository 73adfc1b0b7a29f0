"""What the kernels of attention are made of: register tiles of sums, and blocks copied to scratch.

Vectors lie along the queries of a block wherever scores are: a block of scores is (keys, queries),
so that maxima and sums over keys need nothing from a neighbouring lane, and a key or a value enters
a product as single numbers, whatever its layout. Invariant: blocks depend on shapes and the vector
width alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Operand, Ref, Role
from flame.kernel.program import Matrix
from flame.kernel.values import Value, cast, const, fma, read
from flame.ops.convolution.blocking import vector_bytes
from flame.ops.loops import coalesce

LOG2_E = 1 / math.log(2)
KEYS = 64  # of a block; a multiple of every tile's height
LEAST_ITEMS = 16  # iterations wanted, to keep threads evenly busy
SCRATCH_BYTES = 1 << 18  # of keys, and of values: together a part of a second-level cache
# vectors of a tile's rows -> rows: 16 sums or more in 32 (else 16) registers hide their latency
# (three vectors together are no type that LLVM keeps in registers)
WIDE_HEIGHTS = {1: 16, 2: 8, 4: 4}
NARROW_HEIGHTS = {1: 8, 2: 4}
EFFICIENCY = {1: 0.6, 2: 0.96, 4: 1.0}  # the fewer vectors, the more loads for each product


@dataclass(frozen=True)
class Tile:
    """``height`` rows of ``vectors`` vectors, ``lanes`` numbers together."""

    height: int
    vectors: int
    lanes: int

    def rows(self, count: int) -> int:
        """``count`` rounded up to whole tiles."""
        return -(-count // self.height) * self.height


def heights() -> dict[int, int]:
    return WIDE_HEIGHTS if vector_bytes() == 64 else NARROW_HEIGHTS


def tile_of(dtype: DType, vectors: int) -> Tile:
    return Tile(heights()[vectors], vectors, vectors * vector_bytes() // dtype.itemsize)


def query_tile(dtype: DType, length: int, *, wasted: float = 0.0) -> Tile:
    """The tile whose rows hold one block of ``length`` queries.

    wasted: the part of the work that is done in vain, for each query in a block.
    """
    native = vector_bytes() // dtype.itemsize

    def cost(vectors: int) -> float:
        lanes = vectors * native
        return -(-length // lanes) * lanes / EFFICIENCY[vectors] * (1 + wasted * lanes)

    return tile_of(dtype, min(sorted(heights(), reverse=True), key=cost))


def width_tile(dtype: DType, width: int) -> tuple[Tile, int]:
    """(tile, how many side by side) whose rows hold one row of ``width`` numbers."""
    native = vector_bytes() // dtype.itemsize
    whole = max(1, -(-width // native))

    def cost(vectors: int) -> float:
        return -(-whole // vectors) * vectors / EFFICIENCY[vectors]

    best = min(sorted(heights(), reverse=True), key=cost)
    return tile_of(dtype, best), -(-whole // best)


def product(
    k: KernelBuilder,
    out: Operand,
    tile: Tile,
    tiles: Value | int,
    length: Value | int,
    left: Callable[[Value, Value], Value],
    right: Callable[[Value, Value], Value],
    start: Callable[[Value, Value], Value] | None = None,
    *,
    pieces: int = 1,
    base: tuple[Value, ...] = (),
) -> None:
    """out[r, v] = start(r, v) + the sum over c < length of left(r, c) * right(c, v).

    ``left`` gives a number, ``right`` a vector. All rows of all ``tiles`` are written, those of
    all ``pieces`` side by side. ``base`` goes before r in the index of ``out``.
    """
    with k.loop(pieces) as piece, k.loop(tiles) as t, k.vector(tile.lanes, tile.vectors) as lane:
        rows = [t * tile.height + i for i in range(tile.height)]
        v = piece * tile.lanes + lane
        zero = const(0.0, out.dtype)
        sums = [k.register(zero if start is None else start(r, v)) for r in rows]
        with k.loop(length) as c:
            vector = right(c, v)
            for total, r in zip(sums, rows, strict=True):
                k.assign(total, fma(left(r, c), vector, read(total)))
        for total, r in zip(sums, rows, strict=True):
            k.store(out, (*base, r, v), read(total))


@dataclass(frozen=True)
class Source:
    """(batch, rows, columns) in memory: its strides over the batch, between rows and columns."""

    operand: Operand
    batch: tuple[Value, ...]
    row: Value
    column: Value
    rows_adjoin: bool  # neighbouring rows, not columns, lie side by side

    def at(self, index: tuple[Value, ...]) -> Value:
        """The offset of the first element of an entry of the batch."""
        offset = const(0)
        for i, stride in zip(index, self.batch, strict=True):
            offset = offset + i * stride
        return offset

    def load(self, offset: Value) -> Value:
        return values.load(self.operand.buffer, offset)

    def turnable(self, scratch: Operand) -> bool:
        """Whether `KernelBuilder.transpose` can copy from or to ``scratch``."""
        return self.operand.dtype is scratch.dtype and scratch.dtype.itemsize >= 4


def source(k: KernelBuilder, role: Role, position: int, type_: TensorType, batch: Shape) -> Source:
    """The operand of this type; ``batch``: its strides over the dimensions of the batch."""
    operand = k.tensor(role, position, tensor_type(type_.dtype, (2,), (1,)))
    sizes, steps = type_.shape[-2:], type_.strides[-2:]
    row, column = (k.stride(0 if n == 1 else s) for n, s in zip(sizes, steps, strict=True))
    if (
        steps[0] == sizes[1] and sizes[0] > 1
    ):  # rows side by side: their distance stands in the text
        row = const(sizes[1])
    adjoin = steps[0] == 1 and sizes[1] > 1 and steps[1] != 1
    return Source(operand, tuple(k.stride(s) for s in batch), row, column, adjoin)


def flat(operand: Operand) -> Operand:
    """The same memory addressed by one offset."""
    return Operand(operand.buffer, (1,), (const(1),))


def take(
    k: KernelBuilder, given: Source, offset: Value, rows: Value, target: Operand,
    scale: float = 1.0, base: Value | None = None,
) -> None:  # fmt: skip
    """``target`` from ``base`` on = the rows from ``offset`` on, times ``scale``."""
    width = target.shape[1]
    first = const(0) if base is None else base
    out, step = flat(target), target.strides[0]
    if given.rows_adjoin and given.turnable(target):
        k.transpose(
            const(width), rows, Matrix(given.operand.buffer, offset, given.column),
            Matrix(target.buffer, first, step),
        )  # fmt: skip
        if scale != 1.0:
            with k.loop(rows) as r, k.vector(width) as v:
                place = first + r * step + v
                k.store(out, (place,), out[place] * const(scale, target.dtype))
        return
    with k.loop(rows) as r, k.vector(width) as v:
        found = cast(given.load(offset + r * given.row + v * given.column), target.dtype)
        made = found if scale == 1.0 else found * const(scale, target.dtype)
        k.store(out, (first + r * step + v,), made)


@dataclass(frozen=True)
class Rows:
    """Keys or values as kernels read them: rows side by side, of the dtype computed in.

    ``ref`` and ``type`` are the operand's or those of a temporary; ``capacity``: so many rows of
    scratch memory hold a copy of the batch's entry at hand, where not 0.
    """

    ref: Ref
    type: TensorType
    dtype: DType
    capacity: int = 0


class BoundRows:
    """Rows in a kernel, of the entry of the batch for which `prepare` was called last."""

    def __init__(self, k: KernelBuilder, rows: Rows, batch: Shape) -> None:
        self.k, self.width = k, rows.type.shape[-1]
        self.count = k.size(rows.type.shape[-2])
        self.given = source(k, rows.ref.role, rows.ref.position, rows.type, batch)
        self.buffer, self.begin = self.given.operand.buffer, const(0)
        self.copy: Operand | None = None
        if rows.capacity:
            self.copy = k.scratch(rows.dtype, (rows.capacity, self.width))
            self.buffer = self.copy.buffer

    def prepare(self, index: tuple[Value, ...]) -> None:
        begin = self.given.at(index)
        if self.copy is None:
            self.begin = begin
        else:
            take(self.k, self.given, begin, self.count, self.copy)

    def load(self, row: Value, column: Value) -> Value:
        return values.load(self.buffer, self.begin + row * self.width + column)


class Packing:
    """Where kernels find keys and values, and the kernels that put them there.

    Rows may be far apart in memory, as in heads that are a view of (B, T, H, E); then each block
    of queries would meet them at the same few places of the cache. So they are copied once, to
    scratch memory if they stay in the cache there and one iteration alone needs them (``whole``).
    """

    def __init__(self, dtype: DType, tile: Tile, *, whole: bool) -> None:
        self.dtype, self.tile, self.whole = dtype, tile, whole
        self.kernels: list[BoundKernel] = []
        self.temporaries: list[int] = []

    def rows(self, position: int, type_: TensorType) -> Rows:
        """Of the operand at ``position``. Tiles may read a little beyond its end."""
        height, (count, width) = self.tile.height, type_.shape[-2:]
        whole = count % height == 0 and width % height == 0
        given = Ref("input", position)
        if whole and type_.dtype is self.dtype and type_.strides[-2:] == (width, 1):
            return Rows(given, type_, self.dtype)
        spare = height * (width + 1)
        # by powers of two, as the capacity stands in the kernel's text
        capacity = 1 << (count + height * (1 + height) - 1).bit_length()
        if self.whole and capacity * width * self.dtype.itemsize <= SCRATCH_BYTES:
            return Rows(given, type_, self.dtype, capacity)
        packed = tensor_type(self.dtype, type_.shape)
        found = Rows(Ref("temporary", len(self.temporaries)), packed, self.dtype)
        self.temporaries.append((packed.numel + spare) * self.dtype.itemsize)
        if packed.numel:
            self.kernels.append(self._copy(position, type_, found))
        return found

    def _copy(self, position: int, type_: TensorType, found: Rows) -> BoundKernel:
        k = KernelBuilder("attention_rows")
        *batch, count, width = type_.shape
        nest = coalesce(tuple(batch), [t.strides[:-2] for t in (type_, found.type)])
        given = source(k, "input", position, type_, nest.strides[0])
        made = source(k, found.ref.role, found.ref.position, found.type, nest.strides[1])
        target = Operand(made.operand.buffer, (KEYS, width), (made.row, const(1)))
        work = max(1, KEYS * width // 8)
        with k.parallel(*nest.sizes, -(-count // KEYS), work=work) as (*index, block):
            first = block * KEYS
            rows = values.binary("min", k.size(count) - first, const(KEYS))
            place = made.at(tuple(index)) + first * made.row
            take(k, given, given.at(tuple(index)) + first * given.row, rows, target, base=place)
        return k.bind()


def turn(k: KernelBuilder, source: Operand, rows: Value | int, target: Operand) -> None:
    """target[j, i] = source[i, j], both in scratch memory, for i < rows."""
    count = const(rows) if isinstance(rows, int) else rows
    k.transpose(
        count, const(source.shape[1]), Matrix(source.buffer, const(0), source.strides[0]),
        Matrix(target.buffer, const(0), target.strides[0]),
    )  # fmt: skip


def give(
    k: KernelBuilder, turned: Operand, width: int, count: Value, target: Source, offset: Value,
    spare: Operand,
) -> None:  # fmt: skip
    """target[q, d] = turned[d, q] for q < count, d < width; ``spare`` (queries, width) is scratch.

    In whichever way writes neighbouring elements together.
    """
    lanes = turned.shape[1]
    buffer = target.operand
    if target.rows_adjoin:
        with k.loop(width) as d, k.vector(count) as v:
            place = offset + d * target.column + v * target.row
            k.store(flat(buffer), (place,), turned[d, v])
        return
    whole = Matrix(turned.buffer, const(0), const(lanes))
    if target.turnable(turned) and values.is_const(target.column, 1):
        out = Matrix(buffer.buffer, offset, target.row)
        k.transpose(const(width), count, whole, out)
        return
    k.transpose(const(width), count, whole, Matrix(spare.buffer, const(0), spare.strides[0]))
    with k.loop(count) as q, k.vector(width) as v:
        place = offset + q * target.row + v * target.column
        k.store(flat(buffer), (place,), spare[q, v])


def clear(k: KernelBuilder, target: Operand, begin: Value | int, end: int) -> None:
    """Rows of scratch memory at 0."""
    first = const(begin) if isinstance(begin, int) else begin
    with k.loop(const(end) - first) as r, k.vector(target.shape[1]) as v:
        k.store(target, (first + r, v), const(0.0, target.dtype))


class Mask:
    """What keeps queries from keys: a mask, the order of time, both or nothing."""

    def __init__(
        self, k: KernelBuilder, position: int, tile: Tile, dtype: DType, type_: TensorType | None,
        batch: Shape, *, causal: bool,
    ) -> None:  # fmt: skip
        self.k, self.tile, self.dtype, self.causal = k, tile, dtype, causal
        self.given = None if type_ is None else source(k, "input", position, type_, batch)
        self.staged = False
        if self.given is not None:
            self.staged = not (self.given.rows_adjoin or values.is_const(self.given.row, 0))
        if self.staged:
            self.rows = k.scratch(dtype, (tile.lanes, KEYS))
            self.turned = k.scratch(dtype, (KEYS, tile.lanes))
        if causal:
            self.places = k.scratch(dtype, (tile.lanes,))

    def begin(self) -> None:
        """Once in an iteration of the parallel loop."""
        if self.causal:
            with self.k.vector(self.tile.lanes, self.tile.vectors) as v:
                self.k.store(self.places, (v,), cast(v, self.dtype))

    def limit(self, keys: Value, query: Value) -> Value:
        """Of the first ``keys`` keys, those that the block of queries from ``query`` on may see."""
        if not self.causal:
            return keys
        whole = max(heights().values())  # a tile of keys that all may not see brings zeros only
        end = query + self.tile.lanes
        if self.tile.lanes % whole:
            end = values.binary("udiv", end + (whole - 1), const(whole)) * whole
        return values.binary("min", keys, end)

    def apply(
        self, scores: Operand, index: tuple[Value, ...], query: Value, queries: Value, key: Value,
        keys: Value,
    ) -> None:  # fmt: skip
        """scores (keys, queries), in units of log 2, are -inf where masked."""
        k, nothing = self.k, const(-math.inf, self.dtype)
        if self.given is not None:
            self._given(self.given, scores, index, query, queries, key, keys)
        if self.causal:
            with k.when(key + keys > query + 1), k.loop(keys) as j:
                first = k.register(cast(key + j - query, self.dtype))  # the first that sees the key
                with k.vector(self.tile.lanes, self.tile.vectors) as v:
                    seen = values.compare("ge", self.places[v], read(first))
                    k.store(scores, (j, v), values.select(seen, scores[j, v], nothing))

    def _given(
        self, given: Source, scores: Operand, index: tuple[Value, ...], query: Value,
        queries: Value, key: Value, keys: Value,
    ) -> None:  # fmt: skip
        k, vectors = self.k, self.tile.vectors
        base = given.at(index) + query * given.row + key * given.column
        if not self.staged:
            with k.loop(keys) as j, k.vector(queries, vectors) as v:
                found = given.load(base + j * given.column + v * given.row)
                k.store(scores, (j, v), self._masked(scores[j, v], self._number(found)))
            return
        with k.loop(queries) as q, k.vector(keys, 1) as v:
            found = given.load(base + q * given.row + v * given.column)
            k.store(self.rows, (q, v), self._number(found))
        k.transpose(
            queries, keys, Matrix(self.rows.buffer, const(0), self.rows.strides[0]),
            Matrix(self.turned.buffer, const(0), self.turned.strides[0]),
        )  # fmt: skip
        with k.loop(keys) as j, k.vector(queries, vectors) as v:
            k.store(scores, (j, v), self._masked(scores[j, v], self.turned[j, v]))

    def _number(self, found: Value) -> Value:
        """What is added to a score."""
        if found.dtype is dtypes.bool_:
            zero, nothing = const(0.0, self.dtype), const(-math.inf, self.dtype)
            return values.select(found, zero, nothing)
        return cast(found, self.dtype) * const(LOG2_E, self.dtype)

    def _masked(self, score: Value, number: Value) -> Value:
        """A masked score is -inf even where it was NaN or infinite."""
        nothing = const(-math.inf, self.dtype)
        return values.select(values.compare("eq", number, nothing), nothing, score + number)
