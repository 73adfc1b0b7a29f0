"""Convolutions and attention as cuDNN graphs: sizes, strides, places of operands, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flame.core.dtypes import DType, bfloat16, bool_, float16, float32, float64, int32, int64
from flame.core.types import Shape, TensorType, tensor_type
from flame.kernel.library import AttentionProblem, ConvolutionProblem
from flame.runtime.cuda.libraries.cudnn_graphs import (
    AttentionGraph,
    ConvolutionGraph,
    Tensor,
    attention_graph,
    channels_last,
    convolution_graph,
    row_major,
)

DIRECTIONS = ("forward", "input_gradient", "weight_gradient")


def convolution(
    direction: str = "forward",
    x: Shape = (2, 16, 12, 11),
    channels: int = 32,
    kernel: Shape = (3, 3),
    layout: Any = channels_last,
    dtype: DType = bfloat16,
    **changes: Any,
) -> ConvolutionProblem:
    space = len(kernel)
    weight = (channels, x[1] // changes.get("groups", 1), *kernel)
    padding, stride = changes.get("padding", (1,) * space), changes.get("stride", (1,) * space)
    dilation = changes.get("dilation", (1,) * space)
    y = [x[0], channels]
    for index in range(space):
        extent = (kernel[index] - 1) * dilation[index] + 1
        y.append((x[index + 2] + 2 * padding[index] - extent) // stride[index] + 1)
    types = [tensor_type(dtype, shape, layout(shape)) for shape in (x, weight, tuple(y))]
    return ConvolutionProblem(
        direction, *types, stride, padding, dilation, changes.get("groups", 1),
        changes.get("bias", False),
    )  # fmt: skip


def graph_of(problem: ConvolutionProblem, precision: str = "highest") -> ConvolutionGraph | None:
    return convolution_graph(problem, precision=precision, deterministic=False)


def known(problem: ConvolutionProblem) -> ConvolutionGraph:
    graph = graph_of(problem)
    assert graph is not None
    return graph


def test_operands_are_numbered_in_their_order() -> None:
    x = Tensor(1, (2, 16, 12, 11), (2112, 1, 176, 16), bfloat16)
    weight = Tensor(2, (32, 16, 3, 3), (144, 1, 48, 16), bfloat16)
    y = Tensor(3, (2, 32, 12, 11), (4224, 1, 352, 32), bfloat16)
    forward = known(convolution())
    assert (forward.first, forward.second, forward.result) == (x, weight, y)
    back = known(convolution("input_gradient"))
    assert (back.first, back.second, back.result) == (
        replace(y, uid=1),
        weight,
        replace(x, uid=3),
    )
    to_weight = known(convolution("weight_gradient"))
    assert (to_weight.first, to_weight.second, to_weight.result) == (
        replace(y, uid=1),
        replace(x, uid=2),
        replace(weight, uid=3),
    )


@pytest.mark.parametrize("layout", [channels_last, row_major])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("x", "kernel"), [((2, 8, 30), (5,)), ((2, 8, 9, 10), (3, 2)), ((2, 8, 4, 5, 6), (3, 3, 3))]
)
def test_memory_is_that_of_the_types(direction: str, layout: Any, x: Shape, kernel: Shape) -> None:
    """A stride of the graph leads to the element that the type's stride leads to."""
    problem = convolution(direction, x, 16, kernel, layout)
    graph = known(problem)
    order = {
        "forward": (problem.x, problem.weight, problem.y),
        "input_gradient": (problem.y, problem.weight, problem.x),
        "weight_gradient": (problem.y, problem.x, problem.weight),
    }[direction]
    for tensor, type_ in zip(graph.tensors, order, strict=True):
        drop = slice(3, None) if len(kernel) == 1 else slice(2, None)
        assert (*tensor.dims[:2], *tensor.dims[drop]) == type_.shape
        assert (*tensor.strides[:2], *tensor.strides[drop]) == type_.strides
    space = max(len(kernel), 2)
    assert len(graph.padding) == len(graph.stride) == len(graph.dilation) == space


def test_one_dimension_is_a_plane_of_one_row() -> None:
    graph = known(convolution(x=(2, 8, 30), kernel=(5,), stride=(2,), padding=(2,), dilation=(1,)))
    assert graph.first.dims == (2, 8, 1, 30)
    assert graph.first.strides == (240, 1, 240, 8)
    assert (graph.padding, graph.stride, graph.dilation) == ((0, 2), (1, 2), (1, 1))


def test_layout_that_sizes_leave_open_is_that_of_the_others() -> None:
    """A 1x1 weight is both row-major and channels-last."""
    window = {"kernel": (1, 1), "padding": (0, 0)}
    assert known(convolution(**window)).second.strides == (16, 1, 16, 16)
    rows = known(convolution(layout=row_major, **window))
    assert rows.second.strides == (16, 1, 1, 1)
    assert known(convolution(x=(2, 16, 1, 1), **window)).first.strides == (16, 1, 16, 16)


def test_bias_runs_along_the_channels_of_the_result() -> None:
    forward = known(convolution(bias=True))
    assert forward.bias == Tensor(4, (1, 32, 1, 1), (32, 1, 32, 32), bfloat16)
    assert [tensor.uid for tensor in forward.tensors] == [1, 2, 3, 4]
    back = known(convolution("input_gradient", bias=True))
    assert back.bias is not None
    assert back.bias.dims == (1, 16, 1, 1)
    assert graph_of(convolution("weight_gradient", bias=True)) is None


def test_exact_products_are_asked_for_where_float32_is() -> None:
    problem = convolution(dtype=float32)
    exact = {precision: graph_of(problem, precision) for precision in ("highest", "high", "medium")}
    assert {p: graph.exact for p, graph in exact.items() if graph is not None} == {
        "highest": True,
        "high": False,
        "medium": False,
    }
    assert not known(convolution()).exact
    assert not known(convolution(dtype=float64)).exact


def test_convolutions_that_are_refused() -> None:
    problem = convolution()
    wide = tensor_type(float32, problem.weight.shape, problem.weight.strides)
    assert graph_of(replace(problem, weight=wide)) is None
    assert graph_of(replace(convolution("weight_gradient"), weight=wide)) is not None
    assert graph_of(convolution(dtype=int32)) is None
    assert graph_of(convolution(x=(0, 16, 12, 11))) is None
    neither = tensor_type(bfloat16, problem.x.shape, (4 * 2112, 4, 4 * 176, 64))
    assert graph_of(replace(problem, x=neither)) is None
    assert graph_of(replace(problem, padding=(2, 1))) is None  # y is not what comes of it
    assert graph_of(replace(problem, groups=2)) is None


def test_groups_and_strides() -> None:
    graph = known(convolution(groups=4, stride=(2, 1)))
    assert graph.second.dims == (32, 4, 3, 3)
    assert graph.result.dims == (2, 32, 6, 11)
    # A transposed convolution with rows that no window reaches.
    assert known(convolution("input_gradient", stride=(2, 3))).result.dims == (2, 16, 12, 11)


# --- attention ------------------------------------------------------------------------------------
def inside(shape: Shape, dtype: DType = bfloat16) -> TensorType:
    """(B, H, L, E) that lies as (B, L, H, E)."""
    _, heads, length, width = shape
    return tensor_type(dtype, shape, (length * heads * width, width, heads * width, 1))


def attention(**changes: Any) -> AttentionProblem:
    problem = AttentionProblem(
        False,
        inside((2, 8, 16, 64)),
        inside((2, 2, 24, 64)),
        inside((2, 2, 24, 32)),
        inside((2, 8, 16, 32)),
        None,
        causal=True,
        scale=0.125,
    )
    return replace(problem, **changes)


def attend(problem: AttentionProblem, *, deterministic: bool = False) -> AttentionGraph | None:
    return attention_graph(problem, deterministic=deterministic)


def test_forward_operands() -> None:
    mask = tensor_type(bfloat16, (16, 24))
    graph = attend(attention(mask=mask, dropout=0.5))
    assert graph is not None
    assert graph.query == Tensor(1, (2, 8, 16, 64), (8192, 64, 512, 1), bfloat16)
    assert graph.key.dims == (2, 2, 24, 64)
    assert graph.value == Tensor(3, (2, 2, 24, 32), (1536, 32, 64, 1), bfloat16)
    assert graph.mask == Tensor(4, (1, 1, 16, 24), (384, 384, 24, 1), bfloat16)
    assert graph.result.uid == 5
    assert graph.log_sum == Tensor(6, (2, 8, 16, 1), (128, 16, 1, 1), float32)
    assert graph.random == (
        Tensor(7, (1,) * 4, (1,) * 4, int64),
        Tensor(8, (1,) * 4, (1,) * 4, int64),
    )
    assert sorted(tensor.uid for tensor in graph.tensors) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_backward_operands() -> None:
    graph = attend(attention(backward=True), deterministic=True)
    assert graph is not None
    assert graph.result_gradient is not None
    assert graph.result_gradient == replace(graph.result, uid=1)
    assert [t.uid for t in (graph.query, graph.key, graph.value, graph.result)] == [3, 4, 5, 7]
    assert graph.log_sum.uid == 8
    for gradient, operand in zip(
        graph.gradients, (graph.query, graph.key, graph.value), strict=True
    ):
        assert replace(gradient, uid=operand.uid) == operand
    assert sorted(tensor.uid for tensor in graph.tensors) == [1, 3, 4, 5, 7, 8, 9, 10, 11]
    assert graph.deterministic
    masked = attention(backward=True, dropout=0.1, mask=tensor_type(bfloat16, (16, 24)))
    random = attend(masked)
    assert random is not None
    assert sorted(t.uid for t in random.tensors) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_determinism_is_of_the_backward_direction() -> None:
    assert attend(attention(), deterministic=True) == attend(attention(), deterministic=False)


def test_strides_of_single_dimensions_do_not_matter() -> None:
    odd = tensor_type(bfloat16, (1, 8, 16, 64), (7, 64, 512, 1))
    key, value, result = inside((1, 2, 24, 64)), inside((1, 2, 24, 32)), inside((1, 8, 16, 32))
    graph = attend(attention(query=odd, key=key, value=value, result=result))
    assert graph is not None
    assert graph.query.strides == (8192, 64, 512, 1)


@pytest.mark.parametrize(
    ("mask", "dims", "strides"),
    [
        (tensor_type(bfloat16, (24,)), (1, 1, 1, 24), (24, 24, 24, 1)),
        (tensor_type(bfloat16, (2, 1, 1, 24)), (2, 1, 1, 24), (24, 48, 48, 1)),
        (tensor_type(bfloat16, (2, 8, 16, 24)), (2, 8, 16, 24), (3072, 384, 24, 1)),
        (
            tensor_type(bfloat16, (2, 8, 16, 24), (384, 0, 24, 1)),
            (2, 1, 16, 24),
            (384, 768, 24, 1),
        ),
    ],
)
def test_masks(mask: TensorType, dims: Shape, strides: Shape) -> None:
    graph = attend(attention(mask=mask))
    assert graph is not None
    assert graph.mask == Tensor(4, dims, strides, bfloat16)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": tensor_type(bool_, (16, 24))},
        {"mask": tensor_type(float32, (16, 24))},
        {"mask": tensor_type(bfloat16, (16, 1))},
        {"mask": tensor_type(bfloat16, (16, 24), (1, 16))},
        {"mask": tensor_type(bfloat16, (16, 24), (48, 2))},
        {"mask": tensor_type(bfloat16, (3, 1, 16, 24))},
        {"backward": True, "shift": True},
        {"query": inside((2, 8, 16, 64), float16)},
        {"query": inside((2, 7, 16, 64))},
        {"query": tensor_type(bfloat16, (2, 8, 16, 64), (8192, 1, 512, 8))},
        {"key": tensor_type(bfloat16, (2, 2, 24, 64), (1536, 0, 64, 1))},
        {"key": tensor_type(bfloat16, (2, 2, 24, 64), (3072, 64, 129, 1))},
        {"result": inside((2, 8, 16, 64))},
    ],
)
def test_attention_that_is_refused(changes: dict[str, Any]) -> None:
    assert attend(attention()) is not None
    assert attend(attention(**changes)) is None


def test_head_dimensions_are_multiples_of_eight() -> None:
    for width, taken in ((64, True), (60, False)):
        problem = attention(query=inside((2, 8, 16, width)), key=inside((2, 2, 24, width)))
        assert (attend(problem) is not None) is taken


def test_float32_is_refused() -> None:
    problem = attention()
    types = (problem.query, problem.key, problem.value, problem.result)
    wide = [inside(type_.shape, float32) for type_ in types]
    names = ("query", "key", "value", "result")
    assert attend(attention(**dict(zip(names, wide, strict=True)))) is None
