"""Guards: what outside of the arguments a recording depends on, and whether it is still so.

Invariant: a guard that holds costs no more than a few comparisons; one that fails means that the
step is recorded again, never that something stale runs.
"""

from __future__ import annotations

import ast
import gc
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
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


class Surroundings:
    """The names that a function reaches from outside: its free variables and globals."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.cells: list[tuple[str, Any, Any]] = []
        self.globals: list[tuple[str, Any]] = []
        self.namespace: dict[str, Any] = {}
        self.containers: list[tuple[str, Any, Any]] = []
        plain = _plain_function(function)
        if plain is None:
            return
        code = plain.__code__
        for name, cell in zip(code.co_freevars, plain.__closure__ or (), strict=True):
            try:
                self.cells.append((name, cell, cell.cell_contents))
            except ValueError:  # not yet set
                continue
        self.namespace = plain.__globals__
        self.globals = [(n, self.namespace[n]) for n in code.co_names if n in self.namespace]
        known = [(name, value) for name, _, value in self.cells] + self.globals
        if (owner := getattr(function, "__self__", None)) is not None:
            known += [(f"self.{n}", v) for n, v in getattr(owner, "__dict__", {}).items()]
        for name, value in known:
            if isinstance(value, (list, dict, set)) and not name.startswith("__"):
                self.containers.append((name, value, contents(value)))

    def hold(self) -> bool:
        """Whether the names mean what they meant, and containers hold what they held."""
        for _, cell, value in self.cells:
            if not same(cell.cell_contents, value):
                return False
        namespace = self.namespace
        for name, value in self.globals:
            if not same(namespace.get(name), value):
                return False
        return all(contents(c) == held for _, c, held in self.containers)

    def check_unchanged(self) -> None:
        """Raise TraceError where the function changed a container: it would do so only once."""
        for name, container, held in self.containers:
            if contents(container) != held:
                line = _line_of_change(self.function, name)
                raise TraceError(
                    f"{line}: the step changes {name!r}, a {type(container).__name__} from "
                    "outside; a compiled step runs Python only when it is recorded, so later calls "
                    "would not. Return the value, or keep it in a tensor that is changed in place"
                )


class Modes:
    """The plain attributes of the modules that a step called, training mode first of all."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.count = -1

    def meet(self, module: Any) -> None:
        if id(module) not in self.known:
            self.known[id(module)] = (module, attributes_of(module))

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
        self.count = changes.count
        return True


_MISSING = object()


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


def contents(container: Any) -> Any:
    """What can be compared later: the identities of a small container's entries, or its size."""
    if len(container) > _FEW:
        return len(container)
    if isinstance(container, dict):
        return [(id(k), id(v)) for k, v in container.items()]
    return [id(x) for x in container]


def _plain_function(function: Any) -> Any:
    function = getattr(function, "__func__", function)
    function = inspect.unwrap(function) if callable(function) else function
    return function if isinstance(function, types.FunctionType) else None


def _line_of_change(function: Any, name: str) -> str:
    """Where the source changes the container called ``name``, as well as it can be told."""
    plain = _plain_function(function)
    try:
        lines, start = inspect.getsourcelines(plain)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return "the compiled function"
    path = plain.__code__.co_filename
    wanted = name.removeprefix("self.")
    for node in ast.walk(tree):
        target = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = node.func.value
        elif isinstance(node, (ast.Assign, ast.Delete)):
            target = next((t.value for t in node.targets if isinstance(t, ast.Subscript)), None)
        elif isinstance(node, ast.AugAssign):
            target = node.target
            target = target.value if isinstance(target, ast.Subscript) else target
        found = getattr(target, "id", getattr(target, "attr", None))
        if found == wanted and target is not None:
            return f"{path}:{start + target.lineno - 1}"
    return f"{path}:{start}"
