"""The CUDA renderer: geometry, widths of indices, packs, barriers, scalar instructions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flame.compiler.pipeline import lower, results
from flame.core import dtypes
from flame.core.errors import CompileError
from flame.core.types import tensor_type
from flame.graph import one_op
from flame.kernel import values
from flame.kernel.builder import BoundKernel, KernelBuilder
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.kernel.identity import Alike, kernel_identity
from flame.kernel.values import Value, const
from flame.ops.op import OPS
from flame.render.cuda import _text, render
from flame.render.cuda_geometry import geometry_of
from flame.render.cuda_items import ARGUMENT_BYTES, columns_of, most_items

from .host_compiler import HostLibrary
from .op_cases import run_bound as run

F32 = dtypes.float32


def lowered(op: str, *shapes: tuple[int, ...], **attributes: Any) -> BoundKernel:
    types = tuple(tensor_type(F32, shape) for shape in shapes)
    graph = one_op(OPS[op], types, attributes)
    return lower(graph, results(graph, None)).kernels[0]


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "team"),
    [
        ((4096, 10), 4), ((4096, 3), 1), ((100000, 512), 32), ((8192, 1024), 64),
        ((4096, 4096), 256), ((64, 65536), 1024), ((2, 1000), 256),
    ],
)  # fmt: skip
def test_teams_fit_rows(shape: tuple[int, ...], team: int) -> None:
    assert geometry_of(lowered("softmax", shape, dim=1)).team == team


def test_elementwise_blocks_have_256_threads() -> None:
    assert geometry_of(lowered("add", (4096, 4096), (4096, 4096))).team == 256


def test_few_rows_get_large_teams() -> None:
    few, many = (geometry_of(lowered("softmax", (n, 8192), dim=1)).team for n in (4, 4096))
    assert few > many


@pytest.mark.parametrize(
    ("shape", "team"),
    [
        ((100000, 1024), 32), ((32768, 3072), 64), ((8192, 12288), 256), ((1024, 98304), 1024),
        ((4, 98304), 1024),
    ],
)  # fmt: skip
def test_rows_that_are_read_once_have_teams_that_read_much(
    shape: tuple[int, int], team: int
) -> None:
    """Of four float32 numbers a pack: eight packs for a thread, where there are rows enough."""
    assert geometry_of(lowered("sum", shape, dims=(1,), keepdim=False)).team == team


@pytest.mark.parametrize("count", [1 << 12, (1 << 18) + 5, 1 << 24, (1 << 24) + 5])
def test_no_thread_of_a_dropout_is_idle(count: int) -> None:
    types = (tensor_type(F32, (count,), device="cuda:0"), float, float, int, int)
    graph = one_op(OPS["dropout"], types, {})
    (bound,) = lower(graph, results(graph, None)).kernels
    assert geometry_of(bound).team == 4  # packs of the sixteen elements that share words


def test_the_identity_of_kernels_goes_with_their_texts() -> None:
    """Over kernels of several ops and sizes: what is equal to the caches has equal texts."""
    calls: list[tuple[str, int, dict[str, Any]]] = [
        ("sum", 1, {"dims": (1,), "keepdim": False}), ("sum", 1, {"dims": (0,), "keepdim": True}),
        ("softmax", 1, {"dim": 1}), ("exp", 1, {}), ("add", 2, {}), ("maximum", 2, {}),
        ("cumsum", 1, {"dim": 1}),
    ]  # fmt: skip
    texts: dict[Any, str] = {}
    kernels = 0
    for shape in ((900, 300), (1700, 300), (3, 5), (64, 1), (5000, 7000)):
        for op, operands, attributes in calls:
            bound = lowered(op, *[shape] * operands, **attributes)
            kernels += 1
            geometry = geometry_of(bound)
            _, made, _ = _text.__wrapped__(Alike(bound.kernel), geometry)
            assert texts.setdefault((kernel_identity(bound.kernel), geometry), made) == made
    assert len(set(texts.values())) == len(texts) < kernels


def test_equal_kernels_of_other_sizes_are_one_text() -> None:
    made = {render(lowered("sum", (n, 300), dims=(1,), keepdim=False)).symbol for n in (900, 1700)}
    assert len(made) == 1


def test_a_table_holds_what_arguments_can() -> None:
    bound = lowered("add", (4096, 4096), (4096, 4096))
    assert columns_of(bound.kernel) == 5  # three buffers, a size, the extent
    most = most_items(bound.kernel)
    assert 8 * (6 * most + 1) <= ARGUMENT_BYTES < 8 * (6 * (most + 1) + 1)
    geometry = geometry_of(bound)
    alone, one, many = (render(bound, replace(geometry, items=n)).text for n in (0, 1, most))
    assert "Items" not in alone
    assert "step" not in one  # there is nothing to search
    assert f"inp0[{most}]" in many
    with pytest.raises(CompileError, match="takes numbers as they are"):
        replace(geometry, items=2, by_pointer=True)


def test_a_geometry_must_be_possible() -> None:
    for team, block in ((3, 96), (64, 128), (32, 40), (2048, 2048)):
        with pytest.raises(CompileError, match=f"teams of {team} threads in blocks of {block}"):
            Geometry(team, block)


def test_grid_is_right_for_any_number_of_teams() -> None:
    """More iterations than a grid has teams: each takes several."""
    bound = lowered("softmax", (40, 6), dim=1)
    x, y = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), np.zeros((40, 6), "f")
    launch = render(bound, Geometry(8, 32))
    few = KernelLaunch(launch.text, launch.symbol, (2, 1, 1), launch.block, 0, 0)
    run(few, bound, x, y)
    np.testing.assert_allclose(y, np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-5)


# --- widths of indices ----------------------------------------------------------------------------


def test_large_tensors_have_wide_offsets() -> None:
    assert not geometry_of(lowered("add", (30000, 30000), (30000, 30000))).wide
    assert geometry_of(lowered("add", (70000, 70000), (70000, 70000))).wide
    # the product of row and stride leaves 32 bits, though each size is small
    assert geometry_of(lowered("sum", (70000, 70000), dims=(1,), keepdim=False)).wide


def test_narrow_indices_meet_wide_data() -> None:
    """A counter stays exact where it is added to 64-bit data."""
    k = KernelBuilder("count")
    x = k.tensor("input", 0, tensor_type(dtypes.int64, (8,)))
    y = k.tensor("output", 0, tensor_type(dtypes.int64, (8,)))
    with k.parallel(2) as (p,), k.vector(k.size(4)) as v:
        at = p * 4 + v
        big = const(3_000_000_000)
        k.store(y, (at,), x[at] + at * 1000 + at * big)
    bound = k.bind()
    given, made = np.arange(8) * 5_000_000_000, np.zeros(8, np.int64)
    run(render(bound), bound, given, made)
    np.testing.assert_array_equal(made, given + np.arange(8) * 3_000_001_000)


# --- packs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_packs_and_rests(offset: int, dtype: str) -> None:
    """Every element is computed once, whatever the alignment of each operand."""
    kind = getattr(dtypes, dtype)
    t = tensor_type(kind, (2083,))
    graph = one_op(OPS["add"], (t, t), {})
    (bound,) = lower(graph, results(graph, None)).kernels
    launch = render(bound, Geometry(64, 64))
    assert "Pack<" in launch.text
    a, b = (np.arange(2083 + offset).astype(kind.numpy)[offset:] for _ in range(2))
    padded = np.full(2083 + 16, 7).astype(kind.numpy)
    run(launch, bound, a, b, padded[8:])
    np.testing.assert_array_equal(padded[8:-8], (a.astype("d") + b.astype("d")).astype(kind.numpy))
    assert (padded[:8] == 7).all()
    assert (padded[-8:] == 7).all()


def test_masked_loads_touch_nothing() -> None:
    k = KernelBuilder("masked")
    x = k.tensor("input", 0, tensor_type(F32, (64,)))
    y = k.tensor("output", 0, tensor_type(F32, (64,)))
    with k.parallel(1), k.vector(k.size(64)) as v:
        inside = v < 3
        far = values.select(inside, v, v + (1 << 28))  # not memory of this process
        k.store(y, (v,), x.load(far, where=inside, otherwise=const(-1.0, F32)))
    bound = k.bind()
    x0, y0 = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    run(render(bound), bound, x0, y0)
    np.testing.assert_array_equal(y0, np.where(np.arange(64) < 3, x0, -1))


def test_in_place_shifts_are_not_packed() -> None:
    """x[v] = x[v + 1] reads what a neighbour writes: the order of a pack would matter."""
    k = KernelBuilder("shift")
    x = k.tensor("output", 0, tensor_type(F32, (2, 65)))
    with k.parallel(2) as (p,), k.vector(k.size(64)) as v:
        k.store(x, (p, v), x[p, v + 1])
    assert "Pack<" not in render(k.bind(), Geometry(32, 32)).text


@pytest.mark.parametrize("geometry", [Geometry(32, 64), Geometry(64, 64), Geometry(4, 32)])
def test_results_may_replace_operands(geometry: Geometry) -> None:
    bound = lowered("softmax", (5, 130), dim=1)
    x = np.random.default_rng(0).normal(size=(5, 130)).astype(np.float32)
    want = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    run(render(bound, geometry), bound, x, x)
    np.testing.assert_allclose(x, want, rtol=1e-5)


# --- order of reads and writes --------------------------------------------------------------------

TEAMS = [Geometry(1, 32), Geometry(8, 32), Geometry(32, 64), Geometry(128, 128)]
Write = Callable[[KernelBuilder], tuple[BoundKernel, Any]]


def turned_rows(k: KernelBuilder) -> tuple[BoundKernel, Any]:
    """Rows through scratch, read in the opposite order; the scratch is used again by each row."""
    x = k.tensor("input", 0, tensor_type(F32, (9, 100)))
    y = k.tensor("output", 0, tensor_type(F32, (9, 100)))
    kept = k.scratch(F32, (100,))
    n = k.size(100)
    with k.parallel(9) as (row,):
        with k.vector(n) as v:
            k.store(kept, (v,), x[row, v])
        with k.vector(n) as v:
            k.store(y, (row, v), kept[n - 1 - v])
    return k.bind(), lambda x: x[:, ::-1]


def one_writes_all_read(k: KernelBuilder) -> tuple[BoundKernel, Any]:
    """Numbers that thread 0 stores, and all read: before and after each is changed."""
    x = k.tensor("input", 0, tensor_type(F32, (9, 100)))
    y = k.tensor("output", 0, tensor_type(F32, (9, 100)))
    kept = k.local(F32, (2,))
    n = k.size(100)
    with k.parallel(9) as (row,):
        k.store(kept, (const(0),), const(0.0, F32))
        with k.loop(k.size(3)) as turn:
            k.store(kept, (const(1),), kept[const(0)] + x[row, turn])
            k.store(kept, (const(0),), kept[const(1)] * 2.0)
        with k.vector(n) as v:
            k.store(y, (row, v), kept[const(0)] + x[row, v])

    def want(x: Any) -> Any:
        total = np.zeros(9, np.float32)
        for turn in range(3):
            total = (total + x[:, turn]) * np.float32(2)
        return total[:, None] + x

    return k.bind(), want


def running_sums(k: KernelBuilder) -> tuple[BoundKernel, Any]:
    """A serial loop of vector loops, each reading what its neighbours wrote the turn before."""
    x = k.tensor("input", 0, tensor_type(F32, (9, 100)))
    y = k.tensor("output", 0, tensor_type(F32, (9, 100)))
    here, there = k.scratch(F32, (100,)), k.scratch(F32, (100,))
    n = k.size(100)
    with k.parallel(9) as (row,):
        with k.vector(n) as v:
            k.store(here, (v,), x[row, v])
        with k.loop(k.size(5)):
            with k.vector(n) as v:
                k.store(there, (v,), here[values.binary("urem", v + 37, n)])
            with k.vector(n) as v:
                k.store(here, (v,), there[v] + here[v])
        with k.vector(n) as v:
            k.store(y, (row, v), here[v])

    def want(x: Any) -> Any:
        for _ in range(5):
            x = np.roll(x, -37, 1) + x
        return x

    return k.bind(), want


def under_a_condition(k: KernelBuilder) -> tuple[BoundKernel, Any]:
    """A vector loop with a sum, in half of the rows."""
    x = k.tensor("input", 0, tensor_type(F32, (9, 100)))
    y = k.tensor("output", 0, tensor_type(F32, (9, 100)))
    n = k.size(100)
    with k.parallel(9) as (row,):
        total = k.register(1.0, F32)
        with k.when(x[row, const(0)] > 0.0):
            with k.vector(n) as v:
                k.accumulate(total, "max", x[row, v])
            k.assign(total, values.read(total) * 2.0)
        with k.vector(n) as v:
            k.store(y, (row, v), values.read(total))

    def want(x: Any) -> Any:
        most = np.maximum(x.max(1), 1) * 2
        return np.broadcast_to(np.where(x[:, 0] > 0, most, 1)[:, None], x.shape)

    return k.bind(), want


def transposed(k: KernelBuilder) -> tuple[BoundKernel, Any]:
    x = k.tensor("input", 0, tensor_type(F32, (9, 100)))
    y = k.tensor("output", 0, tensor_type(F32, (9, 100)))
    turned = k.scratch(F32, (20, 5))
    with k.parallel(9) as (row,):
        k.transpose(k.size(5), k.size(20), _matrix(x, row * 100, 20), _matrix(turned, const(0), 5))
        with k.vector(k.size(100)) as v:
            k.store(y, (row, v), turned.load(const(0), v))
    return k.bind(), lambda x: x.reshape(9, 5, 20).swapaxes(1, 2).reshape(9, 100)


def _matrix(operand: Any, offset: Value, stride: int) -> Any:
    from flame.kernel.program import Matrix

    return Matrix(operand.buffer, offset, const(stride))


KERNELS = (turned_rows, one_writes_all_read, running_sums, under_a_condition, transposed)


@pytest.fixture(scope="module")
def ordered() -> dict[Any, tuple[BoundKernel, Any, KernelLaunch, HostLibrary]]:
    made: dict[Any, Any] = {}
    for write, geometry in itertools.product(KERNELS, TEAMS):
        bound, want = write(KernelBuilder(write.__name__))
        made[write, geometry] = (bound, want, render(bound, geometry))
    library = HostLibrary.of([launch.text for *_, launch in made.values()])
    return {key: (*value, library) for key, value in made.items()}


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("geometry", TEAMS, ids=lambda g: f"team{g.team}")
@pytest.mark.parametrize("write", KERNELS, ids=lambda w: w.__name__)
def test_reads_and_writes_keep_their_order(
    write: Write, geometry: Geometry, descending: bool, ordered: Any
) -> None:
    bound, want, launch, library = ordered[write, geometry]
    x = np.random.default_rng(1).normal(size=(9, 100)).astype(np.float32)
    y = np.zeros_like(x)
    run(launch, bound, x, y, library=library, descending=descending)
    np.testing.assert_allclose(y, want(x), rtol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_scratch_is_private_to_a_team(shared: bool) -> None:
    bound, want = turned_rows(KernelBuilder("scratch"))
    launch = render(bound, Geometry(16, 64, shared=shared))
    assert (launch.scratch == 0) == shared
    assert ("__shared__" in launch.text) == shared
    x = np.random.default_rng(1).normal(size=(9, 100)).astype(np.float32)
    y = np.zeros_like(x)
    run(launch, bound, x, y)
    np.testing.assert_array_equal(y, want(x))


def test_large_scratch_is_device_memory() -> None:
    k = KernelBuilder("large")
    kept = k.scratch(F32, (100_000,))
    with k.parallel(1000), k.vector(k.size(100_000)) as v:
        k.store(kept, (v,), const(0.0, F32))
    launch = render(k.bind())
    assert launch.scratch == 400_000 * launch.grid[0]
    assert launch.grid[0] < 2000


def test_elementwise_kernels_need_no_barrier() -> None:
    assert "__sync" not in render(lowered("add", (4096, 4096), (4096, 4096))).text


def test_calls_of_cpu_libraries_are_refused() -> None:
    k = KernelBuilder("product")
    a, c = (k.tensor(r, 0, tensor_type(F32, (8, 8))) for r in ("input", "output"))
    with k.parallel(1):
        n = k.size(8)
        k.gemm(n, n, n, a.matrix(const(0), const(0)), a.matrix(const(0), const(0)),
               c.matrix(const(0), const(0)))  # fmt: skip
    with pytest.raises(CompileError, match="Gemm"):
        render(k.bind())


def quotient(dtype: Any, *, result: Any = None, cut: bool = False) -> str:
    """The text of x / (x + 1), or of its floor."""
    k = KernelBuilder("quotient")
    x = k.tensor("input", 0, tensor_type(dtype, (64,)))
    y = k.tensor("output", 0, tensor_type(result or dtype, (64,)))
    with k.parallel(64) as (p,):
        value = values.cast(x[p], F32)
        made = value / (value + 1.0)
        k.store(y, (p,), values.unary("floor", made) if cut else made)
    return render(k.bind()).text


def far_from(kind: str) -> str:
    """The text of a half-width result in which the last bit of a quotient may be much."""
    k = KernelBuilder("far")
    x = k.tensor("input", 0, tensor_type(dtypes.bfloat16, (64,)))
    y = k.tensor("output", 0, tensor_type(dtypes.bfloat16, (64,)))
    with k.parallel(64) as (p,):
        value = values.cast(x[p], F32)
        made = value / (value + 1.0)
        if kind == "register":
            made = values.read(k.register(made))
        k.store(y, (p,), values.unary("acos", made) if kind == "function" else made - 1.0)
    return render(k.bind()).text


@pytest.mark.parametrize("kind", ["difference", "register", "function"])
def test_what_makes_much_of_a_last_bit_divides_exactly(kind: str) -> None:
    assert "--prec-div=false" not in far_from(kind)


def test_what_is_rounded_further_divides_quickly() -> None:
    option = "--prec-div=false"
    assert option in quotient(dtypes.bfloat16).splitlines()[0]
    assert option in quotient(dtypes.float16)
    assert option not in quotient(F32)
    assert option not in quotient(dtypes.bfloat16, result=F32)
    assert option not in quotient(dtypes.bfloat16, cut=True)
    assert option not in quotient(dtypes.bfloat16, result=dtypes.int32)


def test_products_are_kept_apart_from_sums() -> None:
    """Else a compiler may join them, and a value would depend on what it stands beside."""
    k = KernelBuilder("apart")
    x = k.tensor("input", 0, tensor_type(F32, (64,)))
    y = k.tensor("output", 0, tensor_type(F32, (64,)))
    with k.parallel(64) as (p,):
        product = k.register(x[p] * 3.0)
        k.store(y, (p,), values.read(product) + (x[p] * 5.0) + values.fma(x[p], x[p], x[p]))
    text = render(k.bind()).text
    assert text.count("__fmul_rn(") == 2
    assert text.count("fmaf(") == 1
