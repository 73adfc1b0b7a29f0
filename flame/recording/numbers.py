"""Stand-ins for numbers that each step computes anew: rates, bias corrections, random offsets.

Invariant: a stand-in can be handed to ops and to nothing else; arithmetic on it would bake today's
number into the graph, so it raises.
"""

from __future__ import annotations

from typing import Any, NoReturn

from flame.core.errors import TraceError
from flame.graph import Symbol
from flame.recording.lines import user_line


def _refuse(self: Any, *_: Any) -> NoReturn:
    raise TraceError(
        f"{user_line()}: arithmetic on a number that changes from step to step; a compiled step "
        "can only hand it to operations"
    )


class RecordedFloat(float):
    """A float whose value is known at each call."""

    symbol: Symbol


class RecordedInt(int):
    """An int whose value is known at each call."""

    symbol: Symbol


_ARITHMETIC = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv",
    "mod", "rmod", "pow", "rpow", "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne", "bool", "int",
    "float", "index", "trunc", "floor", "ceil", "round",
)  # fmt: skip
for _name in _ARITHMETIC:
    for _kind in (RecordedFloat, RecordedInt):
        setattr(_kind, f"__{_name}__", _refuse)
for _kind in (RecordedFloat, RecordedInt):
    _kind.__hash__ = object.__hash__  # type: ignore[method-assign]


def stand_in(symbol: Symbol, number: float | int) -> RecordedFloat | RecordedInt:
    """A stand-in for ``number``, which is ``symbol`` in the graph."""
    made = RecordedFloat(number) if isinstance(number, float) else RecordedInt(number)
    made.symbol = symbol
    return made
