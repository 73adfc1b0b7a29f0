"""A recorded computation: typed nodes in order, verified, printed, and run by NumPy as an
oracle.
"""

from flame.graph.graph import Graph, Node, Number, Operand, Symbol, infer, one_op
from flame.graph.interpreter import interpret

__all__ = [
    "Graph",
    "Node",
    "Number",
    "Operand",
    "Symbol",
    "infer",
    "interpret",
    "one_op",
]
