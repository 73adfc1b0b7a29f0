"""Fused schedules against the graph's references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame.nn.functional  # noqa: F401 - declares every op
from flame.compiler.schedule.fusion import fuse
from flame.compiler.schedule.unfused import one_task_a_node
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.errors import IndexRangeError
from flame.core.types import TensorType
from flame.graph import Graph, Symbol, interpret
from flame.testing.schedules import GraphBuilder, run_program, run_schedule

pytestmark = pytest.mark.unit


def values_of(graph: Graph, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    found: list[Any] = []
    for symbol in graph.inputs:
        if symbol.type is float:
            found.append(float(rng.uniform(0.5, 1.5)))
        elif not isinstance(symbol.type, TensorType):
            found.append(int(rng.integers(1, 4)))
        else:
            drawn = rng.uniform(-2, 2, symbol.type.shape)
            if symbol.type.dtype.kind in "iu":
                drawn = rng.integers(-3, 4, symbol.type.shape)
            elif symbol.type.dtype.kind == "b":
                drawn = drawn > 0
            found.append(np.asarray(drawn).astype(symbol.type.dtype.numpy))
    return found


def check(graph: Graph, tasks: int | None, *, exact: bool = False) -> None:
    """The fused schedule has so many tasks, and the references' results."""
    schedule = fuse(graph)
    assert tasks in (None, len(schedule.tasks)), f"\n{schedule}"
    values = values_of(graph)
    made = run_schedule(schedule, values)
    wanted = run_schedule(one_task_a_node(graph), values)
    half = any(
        isinstance(s.type, TensorType) and s.type.dtype.bits == 16
        for node in graph.nodes
        for s in (*node.symbols, *node.outputs)
    )
    for symbol, mine, other, oracle in zip(
        graph.results, made, wanted, interpret(graph, values), strict=True
    ):
        assert isinstance(symbol.type, TensorType)
        loose = half or symbol.type.dtype is dtypes.bfloat16
        tolerance = 3e-2 if loose else 1e-12 if symbol.type.dtype is dtypes.float64 else 3e-5
        np.testing.assert_allclose(
            mine.astype(np.float64), oracle.astype(np.float64), rtol=tolerance, atol=tolerance
        )
        if exact:
            np.testing.assert_array_equal(mine, other)


def softmax(g: GraphBuilder, x: Symbol, dim: int) -> Symbol:
    top = g("amax", x, dims=(dim,), keepdim=True)
    e = g("exp", g("sub", x, top))
    made: Symbol = g("div", e, g("sum", e, dims=(dim,), keepdim=True))
    return made


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float64, dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (1, 1), (), (40, 300), (2, 3, 4)])
def test_a_chain_is_one_kernel(dtype: DType, shape: tuple[int, ...]) -> None:
    g = GraphBuilder()
    x, y, s = g.input(shape, dtype), g.input(shape, dtype), g.number(float)
    z = g("mul", g("add", x, y), s)
    w = g("tanh", g("add", z, 0.5))
    check(g.graph(w, z), 1, exact=dtype is not dtypes.bfloat16)


def test_broadcasts_casts_and_bool() -> None:
    g = GraphBuilder()
    x, row, column = g.input((6, 9)), g.input((9,), dtypes.bfloat16), g.input((6, 1), dtypes.int64)
    y = g("add", g("mul", x, row), column)
    mask = g("gt", y, 0)
    z = g("where", mask, y, 0.0)
    half = g("copy", z, dtype=dtypes.bfloat16)
    check(g.graph(mask, z, half), 1)


def test_views_are_seen_through() -> None:
    g = GraphBuilder()
    x = g.input((6, 8, 5))
    a = g("exp", x)
    b = g("view", a, shape=(48, 5))
    c = g("add", b, g.input((48, 1)))
    d = g("permute", g("view", c, shape=(2, 3, 8, 5)), dims=(1, 0, 2, 3))
    e = g("mul", d, g.input((3, 1, 8, 1)))
    check(g.graph(e, b), 1, exact=True)


def test_a_view_that_is_a_part_reads_memory() -> None:
    g = GraphBuilder()
    a = g("exp", g.input((6, 8)))
    part = g("slice", a, dim=1, start=2, stop=5, step=1)
    check(g.graph(g("neg", part)), 2, exact=True)


def test_transposed_use_of_one_value_is_no_group() -> None:
    g = GraphBuilder()
    a = g("exp", g.input((6, 6)))
    check(g.graph(g("add", a, g("permute", a, dims=(1, 0)))), 2, exact=True)


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float64, dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (40, 300), (1, 1), (3, 1), (2, 3, 65), (12, 1000)])
@pytest.mark.parametrize("dim", [0, -1])
def test_softmax_is_one_kernel(dtype: DType, shape: tuple[int, ...], dim: int) -> None:
    g = GraphBuilder()
    tasks = None if shape[dim] == 1 else 1
    check(g.graph(softmax(g, g.input(shape, dtype), dim % len(shape))), tasks)


def layer_norm(g: GraphBuilder, x: Symbol, weight: Symbol, bias: Symbol) -> Symbol:
    centred = g("sub", x, g("mean", x, dims=(1,), keepdim=True))
    variance = g("mean", g("mul", centred, centred), dims=(1,), keepdim=True)
    scale = g("rsqrt", g("add", variance, 1e-5))
    made: Symbol = g("add", g("mul", g("mul", centred, scale), weight), bias)
    return made


def test_layer_norm_with_its_residual_is_one_kernel() -> None:
    g = GraphBuilder()
    x, r, w, b = g.input((30, 40)), g.input((30, 40)), g.input((40,)), g.input((40,))
    total = g("add", x, r)
    check(g.graph(layer_norm(g, total, w, b), total), 1)


def test_a_long_sum_is_parts_and_a_total_with_its_prologue() -> None:
    g = GraphBuilder()
    x, y = g.input((300, 700)), g.input((300, 700))
    d = g("sub", x, y)
    loss = g("mean", g("mul", d, d), dims=(0, 1), keepdim=False)
    check(g.graph(g("sqrt", loss), d), 1)


def test_column_sums_of_one_operand_are_one_task() -> None:
    g = GraphBuilder()
    x, y = g.input((3000, 70)), g.input((3000, 70))
    product = g("mul", x, y)
    check(
        g.graph(g("sum", x, dims=(0,), keepdim=False), g("sum", product, dims=(0,), keepdim=False)),
        1,
    )


def test_what_a_reader_needs_does_not_wait_for_a_late_node_of_its_task() -> None:
    g = GraphBuilder()
    x, w = g.input((300, 64)), g.input((64, 64))
    negative = g("neg", x)
    product = g("matmul", negative, w)
    others = [g("matmul", x, g("exp", g.input((64, 64)))) for _ in range(3)]
    update = g("sum", negative, dims=(0,), keepdim=False)  # in the task of neg
    graph = g.graph(product, *others, update)
    check(graph, 8)
    assert [task.outputs[-1] for task in fuse(graph).tasks][:2] == [update, product]


def test_bias_activation_and_residual_follow_a_product() -> None:
    g = GraphBuilder()
    x, w, bias, residual = g.input((40, 30)), g.input((30, 50)), g.input((50,)), g.input((40, 50))
    before = g("add", g("matmul", x, w), bias)
    check(g.graph(g("add", g("tanh", before), residual), before), 1)


def test_a_product_of_flattened_rows_takes_an_epilogue_of_three_dimensions() -> None:
    g = GraphBuilder()
    x, w, bias = g.input((24, 30)), g.input((50, 30)), g.input((50,))
    made = g("view", g("linear", x, w, bias), shape=(4, 6, 50))
    check(g.graph(g("add", g("tanh", made), g.input((4, 6, 50)))), 1)


def test_what_follows_a_hand_written_kernel_is_stored_by_it() -> None:
    g = GraphBuilder()
    x, w, b, residual = g.input((40, 30)), g.input((30,)), g.input((30,)), g.input((40, 30))
    normal = g("layer_norm", x, w, b, 1e-5, rows=1)
    check(g.graph(g("add", g("sigmoid", normal), residual), normal), 1)


def test_what_kernels_of_one_op_hand_on_in_its_result_stays_there() -> None:
    """The second kernel of this product reads what the first has stored, and stores it anew."""
    g = GraphBuilder()
    x, w, z = g.input((8, 30)), g.input((30, 40)), g.input((8, 40))
    made = g("matmul_gelu_backward", x, w, z)
    check(g.graph(g("add", g("sigmoid", made), z)), 2)


def test_batch_norm_takes_relu_and_the_residual() -> None:
    for shape in ((8, 6, 40, 40), (2, 3, 4, 4)):
        g = GraphBuilder()
        _, c, h, w = shape
        strides = (h * w * c, 1, w * c, c)
        x, residual = g.input(shape, strides=strides), g.input(shape, strides=strides)
        y, mean, variance = g("batch_norm", x, g.input((c,)), g.input((c,)), 1e-5)
        made = g("relu", g("add", y, residual))
        check(g.graph(made, mean, variance), 1)


def test_a_dear_value_waits_in_scratch_beside_results_of_rows() -> None:
    g = GraphBuilder()
    x = g.input((17, 2, 2), dtypes.float64, (1, 34, 17))
    dear = g("sigmoid", x)
    total = g("tanh", g("sum", x, dims=(1, 2), keepdim=True))
    check(g.graph(g("mul", dear, total), total), 1)


def test_a_square_in_front_of_a_mean_waits_for_it() -> None:
    """RMSNorm behind a product and a residual: the product does not store the squares."""
    g = GraphBuilder()
    x, w, r, scale = g.input((64, 30)), g.input((30, 50)), g.input((64, 50)), g.input((50,))
    total = g("add", g("matmul", x, w), r)
    mean = g("mean", g("mul", total, total), dims=(1,), keepdim=True)
    made = g("mul", g("mul", total, g("rsqrt", g("add", mean, 1e-6))), scale)
    check(g.graph(made, total), 2)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(dtypes.float32, (300, 70)), (dtypes.float64, (300, 70)), (dtypes.float64, (2, 1000)),
     (dtypes.float32, (8, 9)), (dtypes.bfloat16, (8, 9))],
)  # fmt: skip
def test_sums_over_rows_stand_beside_sums_along_them(dtype: DType, shape: tuple[int, int]) -> None:
    """A normalization's backward: dx, and the gradients of scale and shift, in one task."""
    g = GraphBuilder()
    grad, x, weight = g.input(shape, dtype), g.input(shape, dtype), g.input(shape[1:], dtype)
    through = g("mul", grad, weight)
    slope = g("mean", g("mul", through, x), dims=(1,), keepdim=True)
    dx = g("sub", through, g("mul", x, slope))
    d_weight = g("mean", g("mul", grad, x), dims=(0,), keepdim=False)
    d_bias = g("sum", grad, dims=(0,), keepdim=True)
    check(g.graph(dx, d_weight, d_bias), 1)


@pytest.mark.parametrize("run", [run_schedule, run_program])
def test_a_task_with_a_head_refuses_its_data_as_the_head_does(run: Any) -> None:
    g = GraphBuilder()
    table, index = g.input((10, 8)), g.input((4,), dtypes.int64)
    made = g("tanh", g("embedding", table, index, padding=None, by_frequency=False))
    schedule = fuse(g.graph(made))
    assert len(schedule.tasks) == 1
    with pytest.raises(IndexRangeError, match="index 10"):
        run(schedule, [np.zeros((10, 8), np.float32), np.array([0, 3, 10, 1])])


def test_nothing_is_fused_across_a_cycle() -> None:
    """The second sum needs the product of the first: they are no siblings."""
    g = GraphBuilder()
    x, w = g.input((40, 30)), g.input((30, 30))
    first = g("tanh", x)
    through = g("matmul", first, w)
    check(g.graph(g("add", g("exp", first), through), g("mul", first, 2.0)), 2)


def test_updates_happen_in_place() -> None:
    g = GraphBuilder()
    p, grad = g.input((300, 50)), g.input((300, 50))
    made = g("sub", p, g("mul", grad, 0.1))
    (task,) = fuse(g.graph(updates=[(p, made)])).tasks
    position = [x is p for x in task.inputs].index(True)
    assert (0, position) in task.in_place


def test_an_input_that_another_view_reads_is_not_overwritten() -> None:
    g = GraphBuilder()
    x = g.input((6, 6))
    made = g("add", g("neg", x), g("permute", x, dims=(1, 0)))
    (task,) = fuse(g.graph(made)).tasks
    assert not task.in_place
