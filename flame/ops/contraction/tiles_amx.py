"""The kernel of a float32 product by the processor's matrix unit, which multiplies bfloat16.

Both factors are split into bfloat16 parts as they are packed (`splitting`); six products of three
parts are as exact as float32. Panels with infinite or huge numbers, or with NaN, are multiplied by
the vector units from the factors themselves. Invariant: panels are 32 wide and chunks of the depth
depend on the depth alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.precision import get_float32_matmul_precision
from flame.core.types import Shape, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Operand
from flame.kernel.program import SPLIT_PARTS, Matrix
from flame.kernel.values import Value, const, fma, read
from flame.ops.contraction.factors import (
    Factor,
    Reader,
    first_of,
    flat_of,
    open_both,
    panel_bounds,
)
from flame.ops.contraction.fusion import Epilogue
from flame.ops.contraction.splitting import SIDE, TILE, Depth, Packer
from flame.runtime.cpu import amx

CHUNK = 512  # depth that is summed by the matrix unit at once
TALL, BROAD = 16, 32  # panels of rows and of columns that one iteration takes at most
ROWS = 8  # that the vector units take at once
BAND = 4  # panels that an epilogue that is not short takes side by side
NEAR = 192  # steps of panels of rows that stay in the second-level cache, with what passes by
SMALL = 1 << 18  # products that are worth a thread
# Nanoseconds, as measured: of a product of parts in a step of a block of 32 x 32 sums, of a chunk
# of the block, of its epilogue; of packing a number; of a product of numbers by the vector units.
PART_TIME, CHUNK_TIME, LAST_TIME, PACK_TIME, VECTOR_TIME = 25.0, 250.0, 120.0, 0.3, 2 / 150
PRODUCTS = {"highest": 6, "high": 3, "medium": 1}


def products_for(a: Factor, b: Factor, m: int, n: int, depth: int) -> int:
    """Products of parts that make up one; 0 where the vector units are to multiply."""
    kinds = {a.type.dtype, b.type.dtype}
    if not kinds <= {dtypes.float32, dtypes.float16, dtypes.bfloat16}:
        return 0
    if m < SIDE or n < SIDE or depth < SIDE:
        return 0
    products = PRODUCTS[get_float32_matmul_precision()]
    if a.prologue is None and b.prologue is None:
        if kinds == {dtypes.bfloat16}:
            products = 1
        elif kinds == {dtypes.float16}:
            products = min(products, 3)
    return products if pays(widest(m, n, depth), products) and amx.available() else 0


@dataclass(frozen=True)
class Cut:
    """A problem (m, n, depth), and the panels of rows and bands of columns of one iteration.

    A band is up to ``most`` panels, whose sums stand side by side: an epilogue that reads memory of
    its own does so in longer rows.
    """

    m: int
    n: int
    depth: int
    tall: int = 1
    broad: int = 1
    most: int = 1

    @property
    def tiles(self) -> int:
        return -(-self.m // SIDE)

    @property
    def together(self) -> int:
        """Panels of a band: as many as waste little."""
        for count in range(self.most, 1, -1):
            lanes = count * SIDE
            if self.n >= lanes and 15 * count * -(-self.n // lanes) <= 16 * -(-self.n // SIDE):
                return count
        return 1

    @property
    def lanes(self) -> int:
        """Columns of a band."""
        return self.together * SIDE

    @property
    def bands(self) -> int:
        return -(-self.n // self.lanes)

    @property
    def chunks(self) -> int:
        return -(-self.depth // CHUNK)

    @property
    def chunk(self) -> int:
        """Depth of all chunks but the last one, a multiple of a step."""
        return -(-self.depth // (self.chunks * SIDE)) * SIDE

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.tiles // self.tall), -(-self.bands // self.broad)


def pays(cut: Cut, products: int) -> bool:
    """Whether the matrix unit is faster than the vector units."""
    steps = -(-cut.depth // SIDE)
    panels = cut.bands * cut.together
    blocks = cut.tiles * panels
    multiplied = blocks * (steps * products * PART_TIME + cut.chunks * CHUNK_TIME + LAST_TIME)
    copies = cut.tiles * cut.blocks[1] + panels * cut.blocks[0]
    packed = copies * SIDE * cut.depth * PACK_TIME
    return multiplied + packed < cut.m * cut.n * cut.depth * VECTOR_TIME


def widest(m: int, n: int, depth: int, most: int = 1) -> Cut:
    """Blocks as large as caches allow."""
    made = Cut(m, n, depth, most=most)
    limit = min(TALL, NEAR * SIDE // made.chunk)
    tall = -(-made.tiles // -(-made.tiles // limit))
    limit = BROAD // made.together
    broad = -(-made.bands // -(-made.bands // limit))
    return replace(made, tall=tall, broad=broad)


def for_threads(made: Cut, batch: int, threads: int) -> Cut:
    """Smaller blocks, where there are not enough of them for all threads."""
    tall, broad = made.tall, made.broad
    products = made.m * made.n * made.depth * batch
    wanted = min(2 * threads if threads > 1 else 1, max(1, products // SMALL))
    while batch * made.blocks[0] * made.blocks[1] < wanted and tall * broad > 1:
        if tall >= broad:
            tall = -(-tall // 2)
        else:
            broad = -(-broad // 2)
        made = replace(made, tall=tall, broad=broad)
    return made


def contract_split(
    a: Factor, b: Factor, out: Shape, epilogue: Epilogue, products: int, threads: int
) -> Lowering:
    """As `contract`, by the matrix unit, for what `products_for` takes."""
    batch, depth = out[:-2], a.type.shape[-1]
    cut = widest(out[-2], out[-1], depth, 1 if epilogue.repeatable else BAND)
    cut = for_threads(cut, math.prod(batch), threads)
    made = SplitKernel(a, b, batch, cut, epilogue, products)
    if made.packed is None:
        return Lowering((made.kernel(),))
    return Lowering((made.packed.kernel(), made.kernel()), tuple(made.packed.temporaries))


class SplitKernel:
    """Builds the kernel for one problem whose sizes are all at least 32."""

    def __init__(
        self, rows: Factor, columns: Factor, batch: Shape, cut: Cut, epilogue: Epilogue,
        products: int,
    ) -> None:  # fmt: skip
        self.batch, self.cut, self.epilogue, self.products = batch, cut, epilogue, products
        self.dtype: DType = dtypes.float32
        self.k = k = KernelBuilder("split_product")
        self.rows, self.columns = open_both(k, rows, columns, self.dtype)
        epilogue.declare(k)
        parts = SPLIT_PARTS[products]
        self.pack_rows = Packer(k, self.rows, parts, rows=True, depth=cut.depth)
        self.packed: PackedColumns | None = None
        if cut.blocks[0] > 1:
            self.packed = PackedColumns(columns, cut, products)
            self.opened = self.packed.declare(k)
        else:
            self.pack_columns = Packer(k, self.columns, parts, rows=False, depth=cut.depth)
        self.panel_size = _panel_size(cut, products)
        self.tall = _power_of_two(cut.tall)
        broad = _power_of_two(cut.broad) if cut.chunks > 1 else 1
        self.row_panels = k.scratch(dtypes.uint32, (self.tall, self.panel_size))
        if self.packed is None:
            self.band = k.scratch(dtypes.uint32, (cut.together * self.panel_size,))
        self.sums = k.scratch(self.dtype, (broad, self.tall, SIDE, cut.lanes))
        self.skipped = k.local(self.dtype, (self.tall,))
        self.m, self.n, self.depth = k.size(cut.m), k.size(cut.n), k.size(cut.depth)
        self.last_row = panel_bounds(k, cut.m, SIDE)[1]
        self.last_column = panel_bounds(k, cut.n, cut.lanes)[1]

    def kernel(self) -> BoundKernel:
        """The product's kernel."""
        k, cut = self.k, self.cut
        work = cut.tall * cut.broad * cut.depth * SIDE
        with k.parallel(*self.batch, *cut.blocks, work=work) as (*index, row_block, column_block):
            tile, tiles = self._part(row_block, cut.tall, cut.tiles)
            band, bands = self._part(column_block, cut.broad, cut.bands)
            with k.loop(k.size(cut.chunks)) as chunk:
                depth = _depth(k, cut, chunk)
                with k.loop(tiles) as i:
                    first = first_of(tile + i, SIDE, self.last_row)
                    at = self.row_panels.at((i, const(0)))
                    skip = self.pack_rows.pack(index, depth, first, self.row_panels, at)
                    k.store(self.skipped, (i,), skip)
                with k.loop(bands) as j:
                    self._band(index, depth, (tile, tiles), band + j, j)
        return k.bind()

    def _part(self, block: Value, size: int, total: int) -> tuple[Value, Value]:
        """(first, count) of a block's panels."""
        k = self.k
        if size >= total:
            return const(0), k.size(total)
        first = block * k.size(size)
        if total % size == 0:
            return first, k.size(size)
        return first, values.binary("min", k.size(total) - first, k.size(size))

    def _band(
        self, index: Sequence[Value], depth: Depth, tiles: tuple[Value, Value], band: Value,
        j: Value,
    ) -> None:  # fmt: skip
        """A chunk's products of one band of columns with all panels of rows."""
        k, (tile, count), together = self.k, tiles, self.cut.together
        column = first_of(band, self.cut.lanes, self.last_column)
        if self.packed is not None:
            columns, found = self.packed.find(self.opened, index, band, depth.chunk)
        else:
            columns = Matrix(self.band.buffer, const(0), const(self.panel_size))
            found = _pack_band(
                k, self.pack_columns, (index, depth, column), self.band, columns, together
            )
        skip = k.register(found)
        place = j if self.cut.chunks > 1 else const(0)
        with k.loop(count) as i:
            row = first_of(tile + i, SIDE, self.last_row)
            at = self.sums.at((place, i, const(0), const(0)))
            bad = (read(skip) + self.skipped[i]) > 0
            with k.loop(together) as p:
                first, last = i + p, (count - 1 - i) + (together - 1 - p)
                k.split_product(
                    values.select(bad, const(0), depth.steps),
                    Matrix(self.row_panels.buffer, self.row_panels.at((i, const(0))), const(0)),
                    Matrix(columns.buffer, columns.offset + p * self.panel_size, const(0)),
                    Matrix(self.sums.buffer, at + p * SIDE, const(self.cut.lanes)),
                    depth.begin > 0,
                    (values.compare("eq", first, const(0)), values.compare("eq", last, const(0))),
                    self.products,
                )
            with k.when(bad):
                self._by_vectors(index, depth, (row, column), at)
            with self._last(depth):
                self._finish(index, (tile + i, row), (band, column), at)

    def _last(self, depth: Depth) -> AbstractContextManager[None]:
        """What runs with the last chunk of the depth only."""
        if self.cut.chunks == 1:
            return nullcontext()
        return self.k.when(depth.begin + depth.length >= self.depth)

    def _by_vectors(
        self, index: Sequence[Value], depth: Depth, first: tuple[Value, Value], at: Value
    ) -> None:
        """A chunk's products of a panel and a band by vectors, from the factors themselves."""
        k, (row, column) = self.k, first
        flat = flat_of(self.sums)
        with k.loop(SIDE // ROWS) as group, k.vector(self.cut.lanes, 2) as v:
            sums = [k.register(const(0, self.dtype)) for _ in range(ROWS)]
            with k.loop(depth.length) as step:
                b = self.columns.element(index, depth.begin + step, column + v)
                for i, total in enumerate(sums):
                    here = row + group * ROWS + i
                    a = self.rows.element(index, depth.begin + step, here)
                    k.assign(total, fma(a, b, read(total)))
            places = [at + (group * ROWS + i) * self.cut.lanes + v for i in range(ROWS)]
            if self.cut.chunks > 1:
                with k.when(depth.begin > 0):
                    for total, place in zip(sums, places, strict=True):
                        k.assign(total, read(total) + values.load(self.sums.buffer, place))
            for total, place in zip(sums, places, strict=True):
                k.store(flat, (place,), read(total))

    def _finish(
        self, index: Sequence[Value], tile: tuple[Value, Value], band: tuple[Value, Value],
        at: Value,
    ) -> None:  # fmt: skip
        """Hand a block of sums to the epilogue; not those that its neighbour has, too."""
        k, lanes, (row, column) = self.k, self.cut.lanes, (tile[1], band[1])
        known_rows = const(0) if self.last_row is None else tile[0] * SIDE - row
        known_columns = const(0) if self.last_column is None else band[0] * lanes - column
        at = at + known_rows * lanes + known_columns
        row, column = row + known_rows, column + known_columns
        height, width = const(SIDE) - known_rows, const(lanes) - known_columns
        with k.loop(height) as i, k.vector(width, 2) as v:
            value = values.load(self.sums.buffer, at + i * lanes + v)
            self.epilogue.store(k, (*index, row + i, column + v), value)


class PackedColumns:
    """All bands of the second factor in a temporary, where several iterations need them."""

    def __init__(self, columns: Factor, cut: Cut, products: int) -> None:
        self.factor, self.cut, self.products = columns, cut, products
        shape = (*columns.type.shape[:-2], cut.bands, cut.chunks)
        self.size = _panel_size(cut, products)
        self.bands = tensor_type(dtypes.uint32, (*shape, cut.together * self.size))
        self.skipped = tensor_type(dtypes.float32, shape)

    @property
    def temporaries(self) -> list[int]:
        """Their bytes."""
        return [t.span * t.dtype.itemsize for t in (self.bands, self.skipped)]

    def declare(self, k: KernelBuilder) -> tuple[Operand, Operand]:
        """The temporaries in ``k``: bands, whether each is to be skipped."""
        return k.tensor("temporary", 0, self.bands), k.tensor("temporary", 1, self.skipped)

    def find(
        self, opened: tuple[Operand, Operand], index: Sequence[Value], band: Value, chunk: Value
    ) -> tuple[Matrix, Value]:
        """(a band's chunk, whether it is to be skipped), for an index of the whole result."""
        sizes = self.factor.type.shape[:-2]
        given = index[len(index) - len(sizes) :]
        own = [i if s > 1 else const(0) for i, s in zip(given, sizes, strict=True)]
        bands, skipped = opened
        at = bands.at((*own, band, chunk, const(0)))
        return Matrix(bands.buffer, at, const(self.size)), skipped[(*own, band, chunk)]

    def kernel(self) -> BoundKernel:
        """The kernel that packs."""
        k, cut = KernelBuilder("split_panels"), self.cut
        reader = Reader(k, self.factor, dtypes.float32)
        bands, skipped = self.declare(k)
        packer = Packer(k, reader, SPLIT_PARTS[self.products], rows=False, depth=cut.depth)
        last = panel_bounds(k, cut.n, cut.lanes)[1]
        extents = (*self.factor.type.shape[:-2], cut.bands, cut.chunks)
        with k.parallel(*extents, work=cut.lanes * cut.chunk) as (*index, band, chunk):
            first, depth = first_of(band, cut.lanes, last), _depth(k, cut, chunk)
            at = bands.at((*index, band, chunk, const(0)))
            place = Matrix(bands.buffer, at, const(self.size))
            skip = _pack_band(k, packer, (index, depth, first), bands, place, cut.together)
            k.store(skipped, (*index, band, chunk), skip)
        return k.bind()


def _pack_band(
    k: KernelBuilder, packer: Packer, what: tuple[Sequence[Value], Depth, Value], target: Operand,
    place: Matrix, together: int,
) -> Value:  # fmt: skip
    """Pack the panels of a band from a column on, one after the other; above 0: to be skipped."""
    index, depth, column = what
    skip = k.register(const(0, dtypes.float32))
    with k.loop(together) as p:
        at = place.offset + p * place.row_stride
        bad = packer.pack(index, depth, column + p * SIDE, target, at)
        k.assign(skip, read(skip) + bad)
    return read(skip)


def _depth(k: KernelBuilder, cut: Cut, chunk: Value) -> Depth:
    begin, length = chunk * k.size(cut.chunk), k.size(cut.depth)
    if cut.chunks > 1:
        length = values.binary("min", length - begin, k.size(cut.chunk))
    steps = values.binary("udiv", length + (SIDE - 1), const(SIDE))
    return Depth(chunk, begin, length, steps)


def _panel_size(cut: Cut, products: int) -> int:
    """Elements of a chunk of a panel, from few sizes, so that texts are shared."""
    return _power_of_two(cut.chunk // SIDE) * 2 * SPLIT_PARTS[products] * TILE


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
