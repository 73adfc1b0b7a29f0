"""One launch for many calls of a kernel: each block serves one of them, which it finds in a table.

The table is an argument of the kernel, in 64-bit words:

    table  ::= column* first
    column ::= a word of each call: of a buffer, in the operands' order, of a size, of the extent
    first  ::= the first block of each call, then the number of all blocks up to the table's end

Invariants: a block does for its call just what it does where the call is launched alone, so results
are the same bits. Numbers of the calls are alike, and stand behind the table as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from flame.kernel.program import Kernel
from flame.kernel.values import Buffer

ARGUMENT_BYTES: Final = 32764  # of all arguments of a kernel, from compute capability 7.0 on
WORD: Final = 8

Column = tuple[str, str]  # type and name of a call's word


def columns_of(kernel: Kernel) -> int:
    """Words that the table has of each call, beside its first block."""
    buffers = sum(isinstance(operand, Buffer) for operand in kernel.operands)
    return buffers + len(kernel.sizes) + 1


def most_items(kernel: Kernel) -> int:
    """Calls that one launch can serve."""
    numbers = sum(not isinstance(operand, Buffer) for operand in kernel.operands)
    words = ARGUMENT_BYTES // WORD - numbers - 1
    return words // (columns_of(kernel) + 1)


def table_type(columns: Sequence[Column], items: int) -> str:
    """The table as a type of C++."""
    lines = [f"  {type_} {name}[{items}];" for type_, name in columns]
    return "\n".join(("struct Items {", *lines, f"  long long first[{items + 1}];", "};"))


def find_item(items: int) -> Iterator[str]:
    """Lines that find the call of a block, and the block's number among those of the call."""
    step = 1 << (items - 1).bit_length() >> 1
    yield "int item = 0;"
    if step:
        inside = f"item + step < {items} && " if items & (items - 1) else ""
        yield "#pragma unroll"
        yield f"for (int step = {step}; step > 0; step /= 2)"
        yield f"  if ({inside}items.first[item + step] <= blockIdx.x) item += step;"
    yield "const int block = (int)(blockIdx.x - items.first[item]);"
    yield "const int blocks = (int)(items.first[item + 1] - items.first[item]);"
