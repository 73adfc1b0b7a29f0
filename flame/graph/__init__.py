"""A recorded computation: typed nodes in order, verified, printed, and run by NumPy as an
oracle.
"""

from flame.graph.graph import Graph, Node, Symbol, one_op
from flame.graph.interpreter import interpret

__all__ = ["Graph", "Node", "Symbol", "interpret", "one_op"]
