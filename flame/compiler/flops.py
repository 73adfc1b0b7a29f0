"""How many floating point operations a node does, where that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flame.core.types import TensorType
from flame.graph import Node


def flops_of(nodes: Sequence[Node]) -> int:
    """Multiplications and additions of products and convolutions; 0 where there are none."""
    return sum(_flops(node) for node in nodes)


def _flops(node: Node) -> int:
    shapes = [t.shape for t in node.types if isinstance(t, TensorType)]
    results = [s.type.shape for s in node.outputs if isinstance(s.type, TensorType)]
    name = node.op.name
    if name == "matmul":
        return 2 * math.prod(results[0]) * (shapes[0][-1] if shapes[0] else 1)
    if name == "linear":  # x (..., K), weight (N, K) -> (..., N)
        return 2 * math.prod(results[0]) * shapes[0][-1]
    if name == "convolution":  # x (N, C, ...), weight (O, C / groups, ...) -> (N, O, ...)
        return 2 * math.prod(results[0]) * math.prod(shapes[1][1:])
    if name == "convolution_input_gradient":  # y, weight -> x
        return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if name == "convolution_weight_gradient":  # y, x -> weight
        return 2 * math.prod(shapes[0]) * math.prod(results[0][1:])
    if name in ("attention", "attention_backward"):
        named = dict(zip(node.op.inputs, node.types, strict=False))
        query, key = named.get("query"), named.get("key")
        if isinstance(query, TensorType) and isinstance(key, TensorType):
            products = 2 if name == "attention" else 5  # each (L, E) with (E, S), or as many
            return 2 * products * query.numel * key.shape[-2]
    return 0
