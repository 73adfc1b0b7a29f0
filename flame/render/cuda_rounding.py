"""Which kernels may divide quickly, as their results are rounded further than that.

Division that is right to the last bit takes some ten instructions and a branch, in kernels that
otherwise wait for memory alone. What is stored in half precision loses 13 bits and more anyway, so
that its quotients may be wrong in the last two. But only where nothing makes a last bit a large
part of the result: a quotient is stored, multiplied, or divided again, and neither subtracted
from, nor compared, nor cut to an integer, nor an argument of a function.
"""

from __future__ import annotations

from typing import Final

from flame.kernel.program import Kernel, Statement, Store
from flame.kernel.values import Buffer, Value
from flame.render.cuda_barriers import writes_of
from flame.render.cuda_index import every_value, operands, walk
from flame.render.cuda_instructions import HALF_WIDTH

OPTIONS: Final = "// nvrtc: --prec-div=false"
_DIVISIONS: Final = frozenset(("div", "reciprocal"))
# What gives a result no more wrong, in proportion, than what it is given.
_HARMLESS: Final = frozenset((*_DIVISIONS, "mul", "neg", "abs"))


def divides_quickly(kernel: Kernel) -> bool:
    """Whether all results are half-width floats, and quotients come to them unharmed."""
    statements = (kernel.body, *walk(kernel.body.body))
    written = {b for statement in statements for b in writes_of(statement)}
    results = {b for b in kernel.operands if isinstance(b, Buffer) and b in written}
    if not results or any(b.dtype not in HALF_WIDTH for b in results):
        return False
    quotients: set[Value] = set()
    for value in every_value(kernel.body):
        if any(arg in quotients for arg in value.args):
            harmless = value.op in _HARMLESS or (value.op == "cast" and value.dtype.kind == "f")
            if not harmless:
                return False
            quotients.add(value)
        elif value.op in _DIVISIONS:
            quotients.add(value)
    return bool(quotients) and all(
        _goes_on(statement, quotients, results) for statement in statements
    )


def _goes_on(statement: Statement, quotients: set[Value], results: set[Buffer]) -> bool:
    """Whether a statement puts quotients into results alone."""
    if isinstance(statement, Store):
        return all(t.value not in quotients or t.buffer in results for t in statement.targets)
    return all(value not in quotients for value in operands(statement))
