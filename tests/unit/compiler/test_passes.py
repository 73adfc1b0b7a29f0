"""What each pass does to small graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import flame
from flame.autograd.checkpointing import checkpoint
from flame.compiler.passes import optimize
from flame.compiler.passes.assemble import assemble
from flame.compiler.passes.canonicalize import canonicalize
from flame.compiler.passes.cse import cse
from flame.compiler.passes.dead import dead
from flame.compiler.passes.fold import fold
from flame.compiler.passes.modulated import modulated
from flame.compiler.passes.order import order
from flame.compiler.passes.products import products
from flame.compiler.passes.readable import readable
from flame.compiler.passes.recompute import recompute
from flame.compiler.passes.release import release
from flame.core import dtypes
from flame.core.errors import CompileError
from flame.core.types import contiguous_strides
from flame.graph import Graph, Rewriter, Uses, interpret
from flame.graph.liveness import Liveness
from flame.nn import functional as F
from flame.ops.again import again
from flame.ops.op import NOT_DIFFERENTIABLE, OPS, Op
from flame.recording.step import record
from flame.testing.schedules import GraphBuilder

pytestmark = pytest.mark.unit


def ops(graph: Graph) -> list[str]:
    return [node.op.name for node in graph.nodes]


def simplified(graph: Graph, *passes: Any) -> Graph:
    for step in passes:
        graph = step(graph)
        graph.verify()
    return graph


# --- fold -----------------------------------------------------------------------------------------


def test_small_creations_become_constants() -> None:
    g = GraphBuilder()
    x = g.input((4,))
    numbers = g("exp", g("mul", g("arange", 0, 1, count=4, dtype=dtypes.int64), 0.5))
    made = simplified(g.graph(g("mul", x, numbers)), fold, dead)
    assert ops(made) == ["mul"]
    ((symbol, array),) = made.constants.items()
    np.testing.assert_allclose(array, np.exp(np.arange(4) * 0.5), rtol=1e-6)
    assert symbol is made.nodes[0].inputs[1]


def test_large_creations_stay() -> None:
    g = GraphBuilder()
    made = fold(g.graph(g("arange", 0, 1, count=100_000, dtype=dtypes.int64)))
    assert ops(made) == ["arange"]


def test_tensors_of_one_number_become_numbers() -> None:
    g = GraphBuilder()
    x = g.input((2, 3))
    seed = g("full", 1, shape=(), dtype=dtypes.float32)
    spread = g("spread", g("div", seed, 4), shape=(2, 3), dims=(0, 1), keepdim=False)
    made = simplified(g.graph(g("mul", spread, x)), fold, canonicalize, dead)
    assert str(made.nodes[0]) == "%y3: float32[2, 3] = mul(%x0, 0.25)"


def test_a_number_must_not_change_a_dtype() -> None:
    g = GraphBuilder()
    x = g.input((3,), dtypes.bfloat16)
    ones = g("full", 1, shape=(3,), dtype=dtypes.float32)
    product = g("mul", x, ones)
    made = simplified(g.graph(product), fold, canonicalize, dead)
    assert product.type.dtype is dtypes.float32
    assert ops(made) == ["mul"]


# --- canonicalize ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "number"), [("add", 0), ("sub", 0), ("mul", 1), ("div", 1), ("mul", 1.0)]
)
def test_neutral_numbers(op: str, number: float) -> None:
    g = GraphBuilder()
    x = g.input((3,))
    made = canonicalize(g.graph(g("tanh", g(op, x, number))))
    assert ops(made) == ["tanh"]


def test_an_operation_that_broadcasts_or_converts_stays() -> None:
    g = GraphBuilder()
    x, whole = g.input((3,)), g.input((3,), dtypes.int64)
    zeros = g("full", 0.0, shape=(2, 3), dtype=dtypes.float32)
    made = simplified(g.graph(g("add", x, zeros), g("mul", whole, 1.0)), fold, canonicalize)
    assert ops(made).count("add") == 1
    assert ops(made).count("mul") == 1


def test_identity_results_of_a_gradient() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    backward = OPS["add"].backward((True, True), (x.type, x.type))  # type: ignore[attr-defined]
    first, second = g(backward, x)
    made = canonicalize(g.graph(g("tanh", first), g("neg", second)))
    assert ops(made) == ["tanh", "neg"]
    assert all(node.inputs == (x,) for node in made.nodes)


def test_views_that_undo_each_other() -> None:
    g = GraphBuilder()
    x = g.input((2, 6))
    there = g("view", g("permute", x, dims=(1, 0)), shape=(6, 2, 1))
    back = g("permute", g("view", there, shape=(6, 2)), dims=(1, 0))
    made = simplified(g.graph(g("tanh", back)), canonicalize, dead)
    assert ops(made) == ["tanh"]


def test_conversions_that_lose_nothing_are_left_out() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    wide = g("copy", x, dtype=dtypes.float64)
    half = g("copy", x, dtype=dtypes.bfloat16)
    made = simplified(
        g.graph(
            g("neg", g("copy", wide, dtype=dtypes.float32)),
            g("neg", g("copy", half, dtype=dtypes.float32)),
        ),
        canonicalize, dead,
    )  # fmt: skip
    assert ops(made) == ["copy", "neg", "copy", "neg"] or ops(made) == [
        "neg",
        "copy",
        "copy",
        "neg",
    ]


def test_division_by_a_power_of_two() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    made = canonicalize(g.graph(g("div", x, 8), g("div", x, 3)))
    assert [str(n).split(" = ")[1] for n in made.nodes] == ["mul(%x0, 0.125)", "div(%x0, 3)"]


# --- cse, dead ------------------------------------------------------------------------------------


def test_equal_nodes_merge_and_others_do_not() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    number = g.number(float)
    pairs = [
        g("mul", g("add", x, a), g("add", x, b))
        for a, b in [(1.0, 1.0), (1, 1.0), (0.0, -0.0), (number, number)]
    ]
    made = cse(g.graph(*pairs))
    made.verify()
    assert Counter(ops(made))["add"] == 1 + 1 + 2 + 1  # 1.0, then 1, then both zeros


def test_again_keeps_two_computations_apart() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    graph = g.graph(g("tanh", x), g("tanh", g(again, x)))
    made = simplified(graph, cse, release)
    assert ops(made) == ["tanh", "tanh"]


def test_elementwise_ops_lose_results_that_nobody_reads() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    backward = OPS["mul"].backward((True, True), (x.type, x.type))  # type: ignore[attr-defined]
    _, second = g(backward, x, x, x)
    first_graph = dead(g.graph(second))
    first_graph.verify()
    assert first_graph.nodes[0].outputs == (second,)
    values = [np.array([1, 2, 3], np.float32)]
    np.testing.assert_allclose(interpret(first_graph, values)[0], [1, 4, 9])
    assert dead(first_graph) is first_graph


def test_unused_constants_go() -> None:
    g = GraphBuilder()
    x = g.input((3,))
    graph = g.graph(g("tanh", x))
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        rewriter.keep(node)
    rewriter.constant(np.zeros(3, np.float32), x.type, x)
    assert dead(rewriter.done()).constants == {}


# --- assemble -------------------------------------------------------------------------------------


def parts_of(g: GraphBuilder, whole: tuple[int, ...], dim: int, sizes: list[int]) -> Any:
    """Places of tensors side by side, summed."""
    steps = contiguous_strides(whole)
    total, at = None, 0
    for size in sizes:
        piece = g.input((*whole[:dim], size, *whole[dim + 1 :]))
        made = g("place", piece, at * steps[dim], shape=whole, strides=steps)
        total = made if total is None else g("add", total, made)
        at += size
    return total


def same_results(before: Graph, after: Graph) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(s.type.shape).astype(np.float32) for s in before.inputs]  # type: ignore[union-attr]
    for a, b in zip(interpret(after, values), interpret(before, values), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_are_joined() -> None:
    g = GraphBuilder()
    graph = g.graph(parts_of(g, (2, 6, 3), 1, [1, 2, 3]))
    made = simplified(graph, assemble, dead)
    assert ops(made) == ["cat"]
    same_results(graph, made)


def test_gaps_between_parts_are_zeros() -> None:
    g = GraphBuilder()
    graph = g.graph(parts_of(g, (8, 3), 0, [1, 2]))
    made = simplified(graph, assemble, dead, fold, dead)
    assert ops(made) == ["expand", "cat"]
    same_results(graph, made)


def test_a_part_that_is_also_read_alone_stays() -> None:
    g = GraphBuilder()
    x, y = g.input((1, 3)), g.input((1, 3))
    a, b = (g("place", p, at, shape=(2, 3), strides=(3, 1)) for p, at in ((x, 0), (y, 3)))
    graph = g.graph(g("add", a, b), g("tanh", a))
    made = simplified(graph, assemble, dead)
    same_results(graph, made)


def test_parts_are_written_in_the_order_in_which_they_are_read() -> None:
    """As the gradients of q, k and v, cut from one projection by unbind."""
    g = GraphBuilder()
    shape, steps = (3, 2, 4, 5), contiguous_strides((3, 2, 4, 5))
    places = [
        g("place", g.input((2, 4, 5)), i * steps[0], shape=shape, strides=steps[1:])
        for i in range(3)
    ]
    total = g("add", g("add", places[2], places[1]), places[0])
    rows = g("copy", g("permute", total, dims=(1, 2, 0, 3)), contiguous=True)
    graph = g.graph(g("view", rows, shape=(8, 15)))
    made = optimize(graph)
    assert Counter(ops(made)) == {"view": 4, "cat": 1, "permute": 1}
    same_results(graph, made)


def sum_of_products(count: int, depth: int) -> Graph:
    """As the gradient of a weight that each step of a recurrent network uses."""
    g = GraphBuilder()
    total = None
    for _ in range(count):
        left = g("permute", g.input((depth, 16)), dims=(1, 0))
        made = g("matmul", left, g.input((depth, 12)))
        total = made if total is None else g("add", total, made)
    return g.graph(total)


def test_a_sum_of_products_is_one_product() -> None:
    graph = sum_of_products(10, 2)
    made = simplified(graph, products, dead)
    counts = Counter(ops(made))
    assert (counts["matmul"], counts["cat"], counts["add"]) == (1, 2, 0)
    left = next(node for node in made.nodes if node.op.name == "cat").outputs[0]
    assert str(left).endswith("float32[16, 20] strides (1, 16)")  # each piece lies in one run
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(s.type.shape).astype(np.float32) for s in graph.inputs]  # type: ignore[union-attr]
    np.testing.assert_allclose(
        interpret(made, values)[0], interpret(graph, values)[0], rtol=1e-5, atol=1e-5
    )


def test_few_or_deep_products_stay() -> None:
    for graph in (sum_of_products(3, 2), sum_of_products(10, 8)):
        assert products(graph) is graph


# --- readable, recompute, order -------------------------------------------------------------------


def test_operands_that_kernels_cannot_read_are_copied_once() -> None:
    add = OPS["add"]
    picky = Op("picky", inputs=("x", "y"), infer=add.infer, lower=add.lower, vjp=NOT_DIFFERENTIABLE,
               reference=np.add, reads=lambda t: t.contiguous, register=False)  # fmt: skip
    g = GraphBuilder()
    x, y = g.input((4, 4), strides=(1, 4)), g.input((4, 4))
    graph = g.graph(g(picky, x, y), g(picky, y, x), g("add", x, y))
    made = readable(graph)
    made.verify()
    assert ops(made) == ["copy", "picky", "picky", "add"]
    same_results(graph, made)


def network(count: int) -> Graph:
    """Products and gates, and a backward pass that reads the gates again."""
    g = GraphBuilder()
    x, w = g.input((256, 64)), g.input((64, 64))
    kept = []
    for _ in range(count):
        h = g("matmul", x, w)
        x = g("maximum", h, 0.1)
        kept.append((h, x))
    for h, gate in reversed(kept):
        x = g("matmul", g("mul", g("mul", x, gate), h), w)
    return g.graph(x)


def test_cheap_values_are_computed_again() -> None:
    graph = network(4)
    made = simplified(graph, recompute, dead)
    assert Liveness(made).peak() < 0.8 * Liveness(graph).peak()
    same_results(graph, made)


def gelus(device: str, *, products: bool) -> Graph:
    """Layers of a product and gelu, and what reads both again on the way back."""
    g = GraphBuilder()
    x, w = g.input((256, 64), device=device), g.input((64, 64), device=device)
    kept = []
    for _ in range(4):
        if products:
            x, h = g("linear_gelu", x, w, g.input((64,), device=device))
        else:
            h = g("matmul", x, w)
            x = g("gelu_tanh", h)
        kept.append((h, x))
    gradients = []
    for h, made in reversed(kept):
        x = g("mul", g("matmul", x, w), h)
        gradients.append(g("matmul", g("permute", made, dims=(1, 0)), x))
    return g.graph(x, *gradients)


@pytest.mark.parametrize("products", [False, True])
def test_on_a_gpu_gelu_is_computed_again(products: bool) -> None:
    graph = gelus("cuda:0", products=products)
    made = simplified(graph, recompute, dead)
    assert Liveness(made).peak() < 0.8 * Liveness(graph).peak()
    again = [node.outputs[0] for node in made.nodes if node.outputs[0].name.endswith("_again")]
    again = [s for s in again if Uses.of(made).makers[s].op is OPS["gelu_tanh"]]
    assert len(again) >= 2
    for symbol in again:  # right before its reader, though its operand was read before that
        at = [symbol in node.outputs or symbol in node.symbols for node in made.nodes]
        assert any(at[i] and (at[i + 1] or at[i + 2]) for i in range(len(at) - 2))
    values = [
        np.random.default_rng(i).standard_normal(s.type.shape) for i, s in enumerate(graph.inputs)
    ]
    for a, b in zip(interpret(made, values), interpret(graph, values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_gelu_is_kept() -> None:
    graph = gelus("cpu", products=False)
    assert recompute(graph) is graph


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 3, 4, 8)])
def test_modulated_norms_and_their_gradients(shape: tuple[int, ...], swapped: bool) -> None:
    x = flame.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    each = (shape[0], *(1 for _ in shape[2:]), shape[-1])
    scale, shift = (flame.full(each, v) for v in (0.5, 0.1))

    def step(x: Any, scale: Any, shift: Any) -> Any:
        normal = F.layer_norm(x, shape[-1:])
        made = (scale + 1) * normal if swapped else normal * (scale + 1)
        (made + shift).square().sum().backward()
        return x.grad, scale.grad, shift.grad

    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    graph = record(step, tuple(leaves), {}, leaves).graph
    made = optimize(graph)
    made.verify()
    assert {"modulated_norm", "modulated_norm_backward"} <= set(ops(made))
    assert not {"layer_norm", "layer_norm_backward", "sum"} & set(ops(made))
    values = [t.detach().numpy() for t in leaves]
    for found, expected in zip(interpret(made, values), interpret(graph, values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", ["result", "part", "rows"])
def test_norms_that_others_read_are_not_modulated(reader: str) -> None:
    g = GraphBuilder()
    x = g.input((3, 5, 16))
    scale = g.input((3, 5, 1) if reader == "rows" else (3, 1, 16))
    normal = g("layer_norm", x, None, None, 1e-5, rows=1)
    made = [g("add", g("mul", normal, scale), scale)]
    if reader == "result":
        made.append(normal)
    elif reader == "part":
        made.append(g("tanh", normal))
    assert "modulated_norm" not in ops(modulated(g.graph(*made)))


def test_updates_run_when_their_gradient_is_there() -> None:
    g = GraphBuilder()
    x = g.input((64, 64))
    weights = [g.input((64, 64)) for _ in range(4)]
    gradients = []
    for w in weights:
        x = g("matmul", x, w)
        gradients.append(g("tanh", x))
    updates = [(w, g("sub", w, gradient)) for w, gradient in zip(weights, gradients, strict=True)]
    graph = g.graph(x, updates=updates)
    made = order(graph)
    made.verify()
    assert ops(made)[:4] == ["matmul", "tanh", "sub", "matmul"]
    assert Liveness(made).peak() < Liveness(graph).peak()
    same_results(graph, made)


def test_an_update_waits_for_readers_of_the_old_value() -> None:
    g = GraphBuilder()
    x, w = g.input((8, 8)), g.input((8, 8))
    first = g("matmul", x, w)
    second = g("matmul", g("tanh", first), g("permute", w, dims=(1, 0)))
    graph = g.graph(second, updates=[(w, g("sub", w, first))])
    assert ops(order(graph))[-1] == "sub"


# --- the graph's helpers --------------------------------------------------------------------------


def test_a_view_follows_the_layout_of_its_source() -> None:
    g = GraphBuilder()
    x = g.input((2, 3, 4))
    turned = g("permute", x, dims=(2, 0, 1))
    plain = g("copy", turned, contiguous=True)
    views = [
        g("slice", plain, dim=0, start=1, stop=3, step=1),
        g("view", plain, shape=(8, 3)),
        g("view", plain, shape=(2, 12)),
        g("as_strided", plain, shape=(5,), strides=(1,), offset=2),
    ]
    graph = g.graph(*[g("tanh", v) for v in views])
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.outputs[0] is plain:
            rewriter.replace(plain, turned)
        else:
            rewriter.keep(node)
    made = rewriter.done()
    made.verify()
    assert [s.type for s in made.outputs] == [s.type for s in graph.outputs]
    same_results(graph, made)


def test_a_result_keeps_its_layout() -> None:
    g = GraphBuilder()
    x = g.input((2, 3))
    turned = g("permute", x, dims=(1, 0))
    plain = g("copy", turned, contiguous=True)
    graph = g.graph(plain)
    rewriter = Rewriter(graph)
    rewriter.keep(graph.nodes[0])
    rewriter.replace(plain, turned)
    made = rewriter.done()
    assert made.outputs[0].type is plain.type
    broken = Rewriter(g.graph(g("expand", x, shape=(4, 2, 3))))
    broken.keep(graph.nodes[0])
    broken.replace(g.nodes[-1].outputs[0], turned)
    with pytest.raises(CompileError, match="gaps"):
        broken.done()


def test_uses() -> None:
    g = GraphBuilder()
    x = g.input((2,))
    y = g("tanh", x)
    graph = g.graph(g("mul", y, y), g("neg", x))
    uses = Uses.of(graph)
    assert uses.only(y) is graph.nodes[1]
    assert uses.only(x) is None
    assert uses.only(graph.outputs[0]) is None
    assert uses.makers[y] is graph.nodes[0]


# --- whole steps ----------------------------------------------------------------------------------


def recorded(function: Any, *tensors: Any) -> Graph:
    return record(function, tensors, {}, list(tensors)).graph


def test_checkpointing_saves_memory_in_a_compiled_step() -> None:
    layers = [flame.nn.Sequential(flame.nn.Linear(64, 256), flame.nn.GELU(),
                                  flame.nn.Linear(256, 64)) for _ in range(3)]  # fmt: skip

    def step(x: Any, again: bool) -> Any:
        for layer in layers:
            x = checkpoint(layer, x) if again else layer(x)
        loss = x.square().mean()
        loss.backward()
        return loss

    x = flame.randn(128, 64)
    kept, computed_again = (
        optimize(recorded(lambda t, again=again: step(t, again), x)) for again in (False, True)
    )
    assert Counter(ops(computed_again))["gelu"] == 2 * Counter(ops(kept))["gelu"]
    assert Liveness(computed_again).peak() < 0.7 * Liveness(kept).peak()


def test_a_step_of_an_optimizer_needs_no_copies() -> None:
    model = flame.nn.Sequential(flame.nn.Linear(8, 8), flame.nn.ReLU(), flame.nn.Linear(8, 3))
    optimizer = flame.optim.AdamW(model.parameters())

    def step(x: Any, y: Any) -> Any:
        loss = flame.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    graph = recorded(step, flame.randn(4, 8), flame.tensor([0, 1, 2, 0]))
    made = optimize(graph)
    made.verify()
    assert "copy" not in ops(made)
    assert "full" not in ops(made)
    assert len(made.nodes) < len(graph.nodes)
