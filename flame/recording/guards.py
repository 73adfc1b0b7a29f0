"""Guards: what outside of the arguments a recording depends on, and whether it is still so.

Invariant: a guard that holds costs no more than a few comparisons; one that fails means that the
step is recorded again, never that something stale runs.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Sequence
from typing import Any

from flame.core.changes import changes
from flame.core.errors import TraceError
from flame.tensor import Tensor

_PLAIN = (int, float, bool, str, bytes, type(None))
_FEW = 64  # entries of a container that are compared one by one


class Holders:
    """Where the tensors that a step reached from outside are held: dicts, lists and cells."""

    def __init__(self, captured: Sequence[Tensor], internal: Iterable[int]) -> None:
        wanted = {id(t): t for t in captured}
        skipped = {*internal, id(wanted), id(captured)}
        self.places: list[tuple[Any, Any, Any]] = []
        self.cells: list[tuple[Any, Any]] = []
        if not wanted:
            return
        for holder in gc.get_referrers(*captured):
            if id(holder) in skipped:
                continue
            if isinstance(holder, Tensor):
                continue
            if not isinstance(holder, (dict, list, types.CellType)):
                holder = getattr(holder, "__dict__", None)
            if isinstance(holder, dict) and "__name__" not in holder:  # a module's: see below
                self._add(holder, holder.items(), wanted)
            elif isinstance(holder, list):
                self._add(holder, enumerate(holder), wanted)
            elif isinstance(holder, types.CellType):
                self.cells.append((holder, holder.cell_contents))

    def _add(self, holder: Any, items: Iterable[tuple[Any, Any]], wanted: dict[int, Any]) -> None:
        self.places += [(holder, key, x) for key, x in list(items) if id(x) in wanted]

    def hold(self) -> bool:
        """Whether every place holds the tensor that it held."""
        try:
            for holder, key, tensor in self.places:
                if holder[key] is not tensor:
                    return False
        except (KeyError, IndexError):
            return False
        return all(cell.cell_contents is tensor for cell, tensor in self.cells)


class Modes:
    """The plain attributes of the modules that a step called, training mode first of all."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.children: list[tuple[Any, tuple[Any, ...]]] = []
        self.count = -1

    def meet(self, module: Any) -> None:
        if id(module) not in self.known:
            self.known[id(module)] = (module, attributes_of(module))
            self.children.append((module, _children(module)))

    def check_unchanged(self, line: str, allowed: set[int]) -> None:
        for module, before in self.known.values():
            now = attributes_of(module)
            for name in now.keys() | before.keys():
                if name == "training" and id(module) in allowed:
                    continue
                if not same(now.get(name), before.get(name)):
                    raise TraceError(
                        f"{line}: the step sets {type(module).__name__}.{name}; a compiled step "
                        "runs Python only when it is recorded, so later calls would not. Use a "
                        "buffer that is changed in place"
                    )

        parent = self._changed_parent()
        if parent is not None:
            raise TraceError(
                f"{line}: the step gives a {type(parent).__name__} other modules; a compiled step "
                "runs Python only when it is recorded. Make them before the first call"
            )

    def _changed_parent(self) -> Any:
        """A module that has other modules inside than when it was met, or None."""
        for module, children in self.children:
            now = _children(module)
            pairs = zip(now, children, strict=False)
            if len(now) != len(children) or any(a is not b for a, b in pairs):
                return module
        return None

    def ignore(self, allowed: set[int]) -> None:
        """The mode of these modules is set by the step itself."""
        for key in allowed & self.known.keys():
            self.known[key][1].pop("training", None)

    def hold(self) -> bool:
        if changes.count == self.count:
            return True
        for module, before in self.known.values():
            namespace = vars(module)
            if any(not same(namespace.get(n, _MISSING), v) for n, v in before.items()):
                return False
        if self._changed_parent() is not None:
            return False
        self.count = changes.count
        return True


_MISSING = object()


def _children(module: Any) -> tuple[Any, ...]:
    return tuple(vars(module).get("_modules", {}).values())


def attributes_of(module: Any) -> dict[str, Any]:
    """Attributes that are no state: numbers, strings, and tuples of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
        or (isinstance(value, tuple) and all(isinstance(x, _PLAIN) for x in value))
    }


def same(a: Any, b: Any) -> bool:
    """One object, or equal plain values of one type."""
    return a is b or (type(a) is type(b) and isinstance(a, (*_PLAIN, tuple)) and a == b)
