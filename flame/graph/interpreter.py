"""Runs a graph by the NumPy references of its ops: slow, and right by definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flame.core.errors import ShapeError
from flame.core.types import TensorType
from flame.graph.graph import Graph, Symbol


def interpret(graph: Graph, values: Sequence[Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """The graph's results for ``values``: arrays and Python numbers, one for each input.

    They are its outputs, then the new values of what it updates.
    """
    if len(values) != len(graph.inputs):
        raise ShapeError(f"the graph has {len(graph.inputs)} inputs, {len(values)} were given")
    known: dict[Symbol, Any] = dict(graph.constants)
    for symbol, value in zip(graph.inputs, values, strict=True):
        if isinstance(symbol.type, TensorType) and np.shape(value) != symbol.type.shape:
            raise ShapeError(f"{symbol} was given an array of shape {np.shape(value)}")
        known[symbol] = value
    for node in graph.nodes:
        operands = [known[x] if isinstance(x, Symbol) else x for x in node.inputs]
        made = node.op.reference(*operands, **node.attributes)
        results = made if isinstance(made, tuple) else (made,)
        for symbol, result in zip(node.outputs, results, strict=True):
            assert isinstance(symbol.type, TensorType)
            known[symbol] = np.asarray(result).astype(symbol.type.dtype.numpy)
    return tuple(known[s] for s in graph.results)
