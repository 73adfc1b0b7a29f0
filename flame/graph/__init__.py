"""A recorded computation: typed nodes in order, verified, printed, rewritten, and run by NumPy as
an oracle.
"""

from flame.graph.graph import (
    Graph,
    Node,
    Number,
    Operand,
    Symbol,
    infer,
    one_op,
    tensor_of,
    type_of,
)
from flame.graph.interpreter import interpret
from flame.graph.rewriter import Rewriter, Uses

__all__ = [
    "Graph",
    "Node",
    "Number",
    "Operand",
    "Rewriter",
    "Symbol",
    "Uses",
    "infer",
    "interpret",
    "one_op",
    "tensor_of",
    "type_of",
]
