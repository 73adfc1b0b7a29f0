"""From a product of two factors to kernels."""

from __future__ import annotations

import math
from dataclasses import replace

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import Shape, tensor_type
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Ref
from flame.kernel.values import const
from flame.ops.contraction.blocking import Blocking, blocking_for
from flame.ops.contraction.dots import Dots, dot_kernels
from flame.ops.contraction.factors import Factor, pack_panels, packed_type
from flame.ops.contraction.fusion import Epilogue, PlainStore, SplitRows, Turned
from flame.ops.contraction.tiles import TileKernel, Ways
from flame.ops.contraction.tiles_amx import contract_split, products_for
from flame.ops.elementwise import compute_dtype
from flame.runtime.cpu import get_num_threads

DIRECT_TILES = 5  # so few tiles do not pay for a copy of the second factor
FEW_RUNS = (4, 8)  # rows or columns whose sums are dot products; where the depth is long, too
LEAST_RUN, LONG_RUN = 32, 256  # depths
NEAR = 1 << 20  # bytes of a second factor that is near enough to be read in any order
FAR_ROWS = 4  # rows that do not pay for a copy of one that is not
UNCOPIED = 1 << 20  # products that do not pay for copies
SHALLOW = 32  # a depth that does not pay for copies
PACKED_BELOW = 16  # tiles of a block that do not pay for one of its own


def contract(a: Factor, b: Factor, out: Shape, epilogue: Epilogue) -> Lowering:
    """a (batch..., m, k) @ b (batch..., k, n), handed to the epilogue by sums of ``out``'s shape.

    Batch dimensions of the factors broadcast to those of ``out``, aligned at the end.
    """
    dtype = compute_dtype(a.type.dtype)
    if 0 in out or 0 in a.type.shape:
        return Lowering((_zeros(out, dtype, epilogue),))
    a, b, out, epilogue = _merge_batch(a, b, out, epilogue)
    batch, m, n, depth = out[:-2], out[-2], out[-1], a.type.shape[-1]
    few = min(m, n) <= FEW_RUNS[depth >= LONG_RUN] and depth >= LEAST_RUN
    if few and a.side_by_side(-1) and b.side_by_side(-2):
        if m < n:
            dots = Dots(b, a, batch, depth, dtype)
            return _lowering(dot_kernels(dots, Turned(epilogue)))
        return _lowering(dot_kernels(Dots(a, b, batch, depth, dtype), epilogue))
    if n == 1 and m > 1:
        a, b, m, n, epilogue = b.turned(), a.turned(), n, m, Turned(epilogue)
    threads = get_num_threads()
    if dtype is dtypes.float32 and (products := products_for(a, b, m, n, depth)):
        return contract_split(a, b, (*batch, m, n), epilogue, products, threads)
    cut = blocking_for(dtype, m, n, depth, math.prod(batch), threads, deep=a.deep)
    ways = _ways(a, b, dtype, cut)
    kernels: list[BoundKernel] = []
    temporaries: list[int] = []
    if ways.packed:
        packed = packed_type(b, dtype, cut.all_panels, cut.tile.lanes)
        kernels.append(pack_panels(b, packed, 0))
        temporaries.append(packed.span * dtype.itemsize)
        b = Factor(Ref("temporary", 0), packed, -1)
    kernels.append(TileKernel(a, b, batch, dtype, cut, ways, epilogue).kernel())
    return _lowering((kernels, temporaries))


def _lowering(made: tuple[list[BoundKernel], list[int]]) -> Lowering:
    return Lowering(tuple(made[0]), tuple(made[1]))


def _ways(a: Factor, b: Factor, dtype: DType, cut: Blocking) -> Ways:
    small = cut.products <= UNCOPIED or cut.depth <= SHALLOW
    few = cut.all_panels <= 2 and a.side_by_side(-1)
    rows_direct = a.prologue is None and (small or cut.m == 1 or few)
    near = b.type.span * b.type.dtype.itemsize <= NEAR
    reads_few = cut.all_tiles <= DIRECT_TILES if near else cut.m <= FAR_ROWS
    direct = b.plain(dtype) and b.side_by_side(-1) and (small or reads_few)
    packed = not direct and cut.row_blocks > 1 and (b.deep or cut.tiles < PACKED_BELOW)
    copied = not direct and not packed
    at_first = copied and near and not b.deep and cut.tiles > 1
    return Ways(not rows_direct, copied, at_first, packed)


def _merge_batch(
    a: Factor, b: Factor, out: Shape, epilogue: Epilogue
) -> tuple[Factor, Factor, Shape, Epilogue]:
    """One tall product, where the second factor is the same for a whole batch."""
    prologues = a.prologue is not None or b.prologue is not None
    if len(out) == 2 or prologues or math.prod(b.type.shape[:-2]) != 1:
        return a, b, out, epilogue
    if a.type.shape[:-2] != out[:-2]:
        return a, b, out, epilogue
    strides = [t for t, s in zip(a.type.strides[:-1], a.type.shape[:-1], strict=True) if s > 1]
    sizes = [s for s in a.type.shape[:-1] if s > 1]
    for i in range(len(sizes) - 1):
        if strides[i] != strides[i + 1] * sizes[i + 1]:
            return a, b, out, epilogue
    rows = math.prod(out[:-1])
    steps = (strides[-1] if strides else 0, a.type.strides[-1])
    type_ = tensor_type(a.type.dtype, (rows, a.type.shape[-1]), steps, a.type.device)
    if isinstance(epilogue, PlainStore) and epilogue.type.contiguous:
        flat = tensor_type(epilogue.type.dtype, (rows, out[-1]), None, epilogue.type.device)
        made: Epilogue = PlainStore(flat, epilogue.ref)
    else:
        made = SplitRows(epilogue, out[:-1])
    shared = tensor_type(b.type.dtype, b.type.shape[-2:], b.type.strides[-2:], b.type.device)
    return replace(a, type=type_), replace(b, type=shared), (rows, out[-1]), made


def _zeros(out: Shape, dtype: DType, epilogue: Epilogue) -> BoundKernel:
    """Sums of no products, or no sums."""
    k = KernelBuilder("product_of_nothing")
    epilogue.declare(k)
    with k.parallel(*out[:-1], work=out[-1]) as index, k.vector(k.size(out[-1]), 1) as v:
        epilogue.store(k, (*index, v), const(0, dtype))
    return k.bind()
