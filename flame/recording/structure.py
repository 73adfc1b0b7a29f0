"""Nested arguments and results: tensors at the leaves of tuples, lists and dicts, else constants.

Invariant: two values of equal signature differ in their tensors' contents alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flame.core.errors import DTypeError
from flame.tensor import Tensor

_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})


def signature(value: Any, tensors: list[Tensor]) -> Any:
    """A hashable description of ``value``; its tensors are appended to ``tensors``."""
    kind = value.__class__
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.type, True) if value.requires_grad else value.type
    if kind in _PLAIN:
        if kind is float and (value == 0.0 or value != value):
            return kind, repr(value)  # 0.0 and -0.0 are equal, and nan is not even itself
        return kind, value
    if kind is tuple or kind is list or isinstance(value, (tuple, list)):
        return kind, tuple([signature(x, tensors) for x in value])
    if isinstance(value, dict):
        return kind, tuple([(key, signature(x, tensors)) for key, x in value.items()])
    try:
        hash(value)
    except TypeError:
        raise DTypeError(
            f"a compiled function takes tensors, numbers, strings and nested tuples, lists and "
            f"dicts of them; got {kind.__name__}, which cannot be compared with that of the next "
            "call. Convert arrays by flame.from_numpy"
        ) from None
    return kind, value


def replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[replaced(x, change) for x in value])
    if isinstance(value, (tuple, list)):
        return type(value)([replaced(x, change) for x in value])
    if isinstance(value, dict):
        made = [(key, replaced(x, change)) for key, x in value.items()]
        return type(value)(made) if type(value) is not dict else dict(made)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a structure, in order."""
    found: list[Tensor] = []
    replaced(value, found.append)
    return found


def outline(value: Any) -> Any:
    """The lengths and keys of nested containers."""
    if isinstance(value, (tuple, list)):
        return [outline(x) for x in value]
    if isinstance(value, dict):
        return [(key, outline(x)) for key, x in value.items()]
    return None


def objects_in(value: Any) -> Iterator[Any]:
    """What a structure holds that is neither a tensor nor plain."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from objects_in(each)
    elif isinstance(value, dict):
        yield from objects_in(list(value.values()))
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        yield value


class Place:
    """Stands for a tensor in a kept structure: number ``index`` of those to be put in."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def filled(value: Any, tensors: list[Any]) -> Any:
    """The structure with every `Place` replaced by its tensor."""
    if value.__class__ is Place:
        return tensors[value.index]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[filled(x, tensors) for x in value])
    if isinstance(value, (tuple, list)):
        return type(value)([filled(x, tensors) for x in value])
    if isinstance(value, dict):
        return type(value)([(key, filled(x, tensors)) for key, x in value.items()])
    return value
