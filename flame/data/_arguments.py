"""A check that several parts of `data` share."""

from __future__ import annotations

import operator

from flame.core.errors import ArgumentError

__all__ = ["whole_number"]


def whole_number(owner: str, name: str, value: object, *, least: int) -> int:
    """The value as an int; ArgumentError if it is none, or below `least`."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ArgumentError(f"{owner}: {name} must be an int of at least {least}, got {value!r}")
    return number
