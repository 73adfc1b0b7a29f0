"""Transcendental instructions in terms of basic ones, so that a renderer can emit whole vectors.

Invariant: an expansion holds over the entire range of its dtype, with NaN, infinities, zeros of
both signs and subnormal numbers, within the error that its docstring states, in units in the last
place (ulp) of the exact result. Only sin, cos and tan of huge arguments are left to the C library,
behind a rarely taken branch. Floating arithmetic must not be reassociated or flushed to zero, and
integer arithmetic must wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from flame.core.errors import CompileError
from flame.kernel.values import Value
from flame.render.math import error_function, exponential, logarithm, power, trigonometric
from flame.render.math._blocks import FORMATS

_UNARY: Final[Mapping[str, Callable[[Value], Value]]] = {
    "exp": exponential.exp,
    "exp2": exponential.exp2,
    "expm1": exponential.expm1,
    "sinh": exponential.sinh,
    "cosh": exponential.cosh,
    "tanh": exponential.tanh,
    "log": logarithm.log,
    "log2": logarithm.log2,
    "log10": logarithm.log10,
    "log1p": logarithm.log1p,
    "sin": trigonometric.sin,
    "cos": trigonometric.cos,
    "tan": trigonometric.tan,
    "asin": trigonometric.asin,
    "acos": trigonometric.acos,
    "atan": trigonometric.atan,
    "erf": error_function.erf,
    "reciprocal": power.reciprocal,
    "rsqrt": power.rsqrt,
}
_BINARY: Final[Mapping[str, Callable[[Value, Value], Value]]] = {
    "pow": power.power,
    "atan2": trigonometric.atan2,
}


def expand(op: str, args: tuple[Value, ...]) -> Value:
    """The instruction ``op`` on ``args`` in basic instructions.

    args: of one dtype, float32 or float64; for pow also integers. Raises CompileError for an
    instruction or a dtype that has no expansion.
    """
    dtype = args[0].dtype
    if dtype in FORMATS or (op == "pow" and dtype.kind in "iu"):
        if op in _UNARY and len(args) == 1:
            return _UNARY[op](args[0])
        if op in _BINARY and len(args) == 2:
            return _BINARY[op](args[0], args[1])
    raise CompileError(
        f"{op} of ({', '.join(a.dtype.name for a in args)}) has no expansion into basic "
        "instructions; cast to float32 or float64 first"
    )
