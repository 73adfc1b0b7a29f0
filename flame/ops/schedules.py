"""How the work of a kernel is cut up on a GPU, where a step of the parallel loop is a few threads.

A CPU wants few long steps, as many as it has cores or a little more; their numbers stand with the
kernels. A GPU wants as many loads on their way as its memory is deep: some ten thousand threads,
each with packs of 16 bytes (`flame.render.cuda_packs`). What is cut up depends on shapes alone, so
the order of sums does too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder
from flame.kernel.values import Value, const
from flame.ops.loops import BLOCK

PROCESSORS: Final = 132  # of an H100
THREADS: Final = PROCESSORS * 384  # that hide the latency of memory, with eight packs each
COLUMNS: Final = 64  # columns side by side that a step takes: packs that fill a line of memory
PACK: Final = 8  # elements that a thread takes side by side, of bfloat16
STORING: Final = 2  # times as many threads where they store too, as each has half the loads
FEWEST_ROWS: Final = 8  # rows of a run, for which its sums are worth their memory
SHORTEST: Final = 16  # steps of a thread below which a cut costs more than it gives
ROW_STEP: Final = 4096  # elements along memory that a team takes, at least
LINE: Final = 256  # elements
FLAT: Final = (BLOCK, 2048, 512)  # elements of a flat range that a step takes
HELD: Final = 16384  # elements of the longest row that a block keeps in registers as float32


def on_gpu(type_: TensorType) -> bool:
    return type_.device != "cpu"


def block_of(count: int, device: str) -> int:
    """Elements of a flat range that a step takes: fewer where there would be few steps."""
    if device == "cpu":
        return BLOCK
    return next((size for size in FLAT if count >= size * PROCESSORS * 4), FLAT[-1])


def column_parts(rows: int, columns: int, *, storing: bool = False) -> int:
    """Parts of the rows of a sum over rows; a thread adds one up for a pack of columns."""
    across, threads = max(1, columns // PACK), THREADS * (STORING if storing else 1)
    return max(1, min(threads // across, rows // SHORTEST))


def row_parts(length: int, count: int) -> int:
    """Parts of each of ``count`` rows that are summed along memory."""
    return max(1, min(PROCESSORS * 8 // max(count, 1), length // ROW_STEP))


def part_step(size: int, parts: int) -> int:
    """Steps of a dimension in each of about so many parts; long parts begin on whole lines."""
    step = -(-size // parts)
    return step if step < ROW_STEP else -(-step // LINE) * LINE


def across_parts(parts: int, kept: Shape) -> Shape:
    """Strides of partial results (parts, *kept): a GPU sums parts that lie side by side."""
    return (1, *(parts * s for s in contiguous_strides(kept)))


def power_of_two(number: int) -> int:
    """The smallest one that is not less than ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def row_runs(count: int, nbytes: int) -> int:
    """Runs of rows, each of which a team takes one after the other, summing over them.

    nbytes: of a row, of which a thread has about three packs. The runs all fit on the device at
    once, as one more would take as long as all others.
    """
    team = min(1024, max(8, power_of_two(nbytes // 48)))
    return max(1, min(-(-count // FEWEST_ROWS), PROCESSORS * 512 // team))


def sum_runs(
    sums: Sequence[tuple[int, TensorType]],
    outputs: Sequence[tuple[int, TensorType]],
    free: int,
    finish: Callable[[KernelBuilder, Value], Value] = lambda _, total: total,
) -> tuple[list[BoundKernel], list[int]]:
    """Kernels that sum row-major temporaries (runs, length) over the runs, in order.

    sums: temporaries by position; outputs: (number, type) of the results, one for each. free: the
    first position of more temporaries, of which the second result gives the bytes. finish: makes
    a result of a total.
    """
    runs, length = sums[0][1].shape
    dtype = sums[0][1].dtype
    step = -(-max(runs, 1) // max(column_parts(runs, length), 1))
    parts = -(-max(runs, 1) // step)
    between = tensor_type(dtype, (parts, length), across_parts(parts, (length,)))
    k = KernelBuilder("sum_runs")
    sources = [k.tensor("temporary", position, type_) for position, type_ in sums]
    targets = [k.tensor("temporary", free + i, between) for i, _ in enumerate(sums)]
    total, width, size = k.size(runs), k.size(step), k.size(length)
    with k.parallel(parts, -(-length // COLUMNS), work=step * COLUMNS) as (part, block):
        begin, start = part * width, block * COLUMNS
        with k.vector(values.binary("min", size - start, const(COLUMNS))) as lane:
            found = [k.register(0, dtype) for _ in sources]
            with k.loop(values.binary("min", total - begin, width)) as i:
                for register, source in zip(found, sources, strict=True):
                    k.accumulate(register, "add", source[begin + i, start + lane])
            k.store_all([
                (t, (part, start + lane), values.read(r))
                for t, r in zip(targets, found, strict=True)
            ])  # fmt: skip
    last = KernelBuilder("sum_parts")
    sources = [last.tensor("temporary", free + i, between) for i, _ in enumerate(sums)]
    made = [
        last.tensor("output", number, tensor_type(out.dtype, (length,), _flat(out)))
        for number, out in outputs
    ]
    count = last.size(parts)
    with last.parallel(length, work=parts) as (column,):
        found = [last.register(0, dtype) for _ in sources]
        with last.vector(count) as part:
            for register, source in zip(found, sources, strict=True):
                last.accumulate(register, "add", source[part, column])
        for target, register in zip(made, found, strict=True):
            last.store(target, (column,), finish(last, values.read(register)))
    nbytes = [max(between.numel, 1) * dtype.itemsize for _ in sums]
    return [k.bind(), last.bind()], nbytes


def _flat(type_: TensorType) -> Shape | None:
    """Strides of a result as one dimension; row-major if it has several."""
    return type_.strides if type_.ndim == 1 else None
