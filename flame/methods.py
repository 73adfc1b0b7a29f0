"""Attaches the functions of `flame.ops` to Tensor as methods and operators.

A function is a method if its first parameter is the tensor; each name stands once in the table below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flame.ops import arithmetic, conversion, reductions, shapes
from flame.tensor import Tensor

METHODS = {
    arithmetic: "add sub mul neg",
    conversion: "clone contiguous",
    reductions: "sum mean",
    shapes: "expand broadcast_to permute transpose view reshape narrow squeeze unsqueeze",
}


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: function(other, self)


def _in_place(op: Any) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any) -> Tensor:
        op.into((self,), self, *args)
        return self

    return method


def attach() -> None:
    """Install every method. Called once, by ``import flame``."""
    for module, names in METHODS.items():
        for name in names.split():
            setattr(Tensor, name, getattr(module, name))
    cls: Any = Tensor
    cls.__add__ = arithmetic._add
    cls.__add__ = lambda self, other: arithmetic._add(self, other)
    cls.__radd__ = lambda self, other: arithmetic._add(other, self)
    cls.__sub__ = lambda self, other: arithmetic._sub(self, other)
    cls.__rsub__ = lambda self, other: arithmetic._sub(other, self)
    cls.__mul__ = lambda self, other: arithmetic._mul(self, other)
    cls.__rmul__ = lambda self, other: arithmetic._mul(other, self)
    cls.__truediv__ = lambda self, other: arithmetic._div(self, other)
    cls.__rtruediv__ = lambda self, other: arithmetic._div(other, self)
    cls.__neg__ = lambda self: arithmetic.neg(self)
    cls.add_ = _in_place(arithmetic._add)
    cls.sub_ = _in_place(arithmetic._sub)
    cls.mul_ = _in_place(arithmetic._mul)
    cls.div_ = _in_place(arithmetic._div)
