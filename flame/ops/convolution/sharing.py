"""One kernel for all calls whose kernels are equal.

The kernels of this package are long, and a network calls them with many sizes, their parameters.
What comes after a kernel is written, its text in LLVM IR, is made once for each kernel object.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from flame.kernel.builder import BoundKernel
from flame.kernel.program import If, Kernel, Loop, Statement

MOST = 256
_Key = tuple[str, tuple[int, ...]]
_kernels: OrderedDict[_Key, Kernel] = OrderedDict()


def shared(bound: BoundKernel) -> BoundKernel:
    """The same call of the first kernel that was equal. All numbers in it are of the dtypes that
    its operands have, so its text says all but how far loops are unrolled.
    """
    key = str(bound.kernel), tuple(_unrolls(bound.kernel.body))
    known = _kernels.setdefault(key, bound.kernel)
    _kernels.move_to_end(key)
    if len(_kernels) > MOST:
        _kernels.popitem(last=False)
    return replace(bound, kernel=known)


def _unrolls(statement: Statement) -> list[int]:
    found = [statement.unroll] if isinstance(statement, Loop) else []
    if isinstance(statement, (Loop, If)):
        for inner in statement.body:
            found += _unrolls(inner)
    return found
