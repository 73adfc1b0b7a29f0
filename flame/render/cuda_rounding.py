"""Which kernels may divide quickly, as their results are rounded further than that.

Division that is right to the last bit takes some ten instructions and a branch, in kernels that
otherwise wait for memory alone. What is stored in half precision loses 13 bits and more anyway, so
that its quotients may be wrong in the last two. But not where a value is compared or cut to an
integer: a last bit there becomes a whole one.
"""

from __future__ import annotations

from typing import Final

from flame.kernel.program import Kernel
from flame.kernel.values import COMPARE, Buffer
from flame.render.cuda_barriers import writes_of
from flame.render.cuda_index import every_value, walk
from flame.render.cuda_instructions import HALF_WIDTH

OPTIONS: Final = "// nvrtc: --prec-div=false"
_DIVISIONS: Final = frozenset(("div", "reciprocal"))
_JUMPS: Final = frozenset((*COMPARE, "floor", "ceil", "trunc", "round"))


def divides_quickly(kernel: Kernel) -> bool:
    """Whether all results are half-width floats, and nothing on the way to them jumps."""
    statements = (kernel.body, *walk(kernel.body.body))
    written = {b for statement in statements for b in writes_of(statement)}
    results = [b for b in kernel.operands if isinstance(b, Buffer) and b in written]
    if not results or any(b.dtype not in HALF_WIDTH for b in results):
        return False
    divides = False
    for value in every_value(kernel.body):
        divides = divides or value.op in _DIVISIONS
        jumps = value.op in _JUMPS or (value.op == "cast" and value.dtype.kind != "f")
        if jumps and any(arg.dtype.kind == "f" for arg in value.args):
            return False
    return divides
