"""The names that a function reaches from outside, and whether they still mean what they meant.

Invariant: what a step reads of Python's own data by the names in its source (free variables,
globals, attributes of the objects behind them, also in the functions that it calls) is compared at
each call; what lies deeper is not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flame.core.errors import TraceError
from flame.recording.guards import same
from flame.tensor import Tensor

_FEW = 64  # entries of a container that are compared one by one
_MANY = 256  # containers, beyond which none is looked into
_DEEPEST = 3  # functions and objects behind one another
_MISSING = object()


class Surroundings:
    """What a function reaches. ``modules``: those among it, whose attributes `Modes` compares."""

    def __init__(self, function: Callable[..., Any], arguments: Iterable[Any] = ()) -> None:
        self.function = function
        self.cells: list[tuple[str, Any, Any]] = []
        self.globals: list[tuple[dict[str, Any], str, Any]] = []
        self.containers: list[tuple[str, Any, Any]] = []
        self.objects: list[tuple[str, Any, dict[str, Any]]] = []
        self.modules: list[Any] = []
        self._seen: set[int] = set()
        self._names: set[str] = set()
        found: list[tuple[str, Any]] = []
        self._scan(function, 0, found)
        for argument in arguments:
            self._value("an argument", argument, 0, found)
        for name, value in found:
            self.objects.append((name, value, self._attributes(value)))

    def hold(self) -> bool:
        """Whether the names mean what they meant, and containers hold what they held."""
        for _, cell, value in self.cells:
            if cell.cell_contents is not value and not same(cell.cell_contents, value):
                return False
        for namespace, name, value in self.globals:
            found = namespace.get(name)
            if found is not value and not same(found, value):
                return False
        for _, object_, before in self.objects:
            attributes = vars(object_)
            for name, value in before.items():
                found = attributes.get(name, _MISSING)
                if found is not value and not same(found, value):
                    return False
        return all(_holds(container, held) for _, container, held in self.containers)

    def check_unchanged(self) -> None:
        """Raise TraceError where the function changed Python data: it would do so only once."""
        for name, container, held in self.containers:
            if not _holds(container, held):
                raise self._changed(name, f"{name!r}, a {type(container).__name__}")
        for name, object_, before in self.objects:
            now = self._attributes(object_)
            for key in now.keys() | before.keys():
                if not same(now.get(key, _MISSING), before.get(key, _MISSING)):
                    kind = type(object_).__name__
                    raise self._changed(f"{name}.{key}", f"{key!r} of {name!r}, a {kind}")

    def _changed(self, name: str, words: str) -> TraceError:
        line = _line_of_change(self.function, name)
        return TraceError(
            f"{line}: the step changes {words} from outside; a compiled step runs Python only when "
            "it is recorded, so later calls would not. Return the value, or keep it in a tensor "
            "that is changed in place"
        )

    # --- looking around ---------------------------------------------------------------------------

    def _scan(self, function: Any, depth: int, found: list[tuple[str, Any]]) -> None:
        """Free variables and globals of a function, and of those that it names."""
        if isinstance(function, functools.partial):
            for value in (*function.args, *function.keywords.values()):
                self._value("partial", value, depth, found)
            function = function.func
        elif not isinstance(function, (types.FunctionType, types.MethodType)):
            function = getattr(function, "__call__", None)  # noqa: B004 - of an object
        plain = getattr(function, "__func__", function)
        if not isinstance(plain, types.FunctionType):
            return
        if id(plain) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(plain))
        known: list[tuple[str, Any]] = []
        for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
            try:
                self.cells.append((name, cell, cell.cell_contents))
            except ValueError:  # not yet set
                continue
            known.append((name, cell.cell_contents))
        names = set(_names_of(plain.__code__))
        self._names |= names
        space = plain.__globals__
        for name in sorted(names & space.keys()):
            if not isinstance(space[name], types.ModuleType):
                self.globals.append((space, name, space[name]))
                known.append((name, space[name]))
        owner = getattr(function, "__self__", None)
        if owner is not None:
            self._methods(owner, depth, found)
            self._value("self", owner, depth, found)
        for name, value in known:
            self._value(name, value, depth, found)

    def _value(self, name: str, value: Any, depth: int, found: list[tuple[str, Any]]) -> None:
        """Something that a name means."""
        if name.startswith("__") or id(value) in self._seen or isinstance(value, (type, Tensor)):
            return
        if isinstance(value, (list, dict, set)):
            self._container(name, value, depth, found)
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            if not _is_ours(value):
                self._scan(value, depth + 1, found)
        elif not hasattr(value, "__dict__") or isinstance(value, types.ModuleType):
            return
        elif hasattr(value, "forward") and hasattr(value, "parameters"):
            self._seen.add(id(value))
            self.modules.append(value)
            self._inside(name, value, depth, found)
            if not _is_ours(type(value)):
                self._scan(value.forward, depth + 1, found)
        elif _is_ours(type(value)):
            self._optimizer(name, value)
        elif not hasattr(value, "get_last_lr"):  # no schedule
            self._seen.add(id(value))
            found.append((name, value))
            self._methods(value, depth, found)
            if any(_is_ours(kind) for kind in type(value).__mro__):
                self._optimizer(name, value)
            else:
                self._inside(name, value, depth, found)

    def _container(self, name: str, value: Any, depth: int, found: list[tuple[str, Any]]) -> None:
        """A container, and what is inside of a small one."""
        self._seen.add(id(value))
        self.containers.append((name, value, contents(value)))
        if depth >= _DEEPEST or len(value) > _FEW or len(self.containers) > _MANY:
            return
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in list(entries):
            if isinstance(each, (list, dict, set)) or hasattr(each, "__dict__"):
                self._value(f"{name}[{key!r}]", each, depth + 1, found)

    def _optimizer(self, name: str, value: Any) -> None:
        """One whose options the user's Python reads, which runs once: they must not change."""
        if not hasattr(value, "param_groups"):
            return
        if "param_groups" in self._names or not _is_ours(type(value).step):
            for i, group in enumerate(value.param_groups):
                self.containers.append((f"{name}.param_groups[{i}]", group, contents(group)))

    def _methods(self, owner: Any, depth: int, found: list[tuple[str, Any]]) -> None:
        """The methods of an object that the source so far names."""
        for name in sorted(self._names):
            method = getattr(type(owner), name, None)
            if isinstance(method, types.FunctionType) and not _is_ours(method):
                self._scan(method, depth + 1, found)

    def _inside(self, name: str, value: Any, depth: int, found: list[tuple[str, Any]]) -> None:
        """The attributes of an object that the source so far names."""
        if depth >= _DEEPEST:
            return
        for key, each in list(vars(value).items()):
            if key in self._names and not isinstance(each, (types.FunctionType, types.MethodType)):
                self._value(f"{name}.{key}", each, depth + 1, found)

    def _attributes(self, object_: Any) -> dict[str, Any]:
        """Those that the source names, but for containers, which are compared by their entries."""
        return {name: x for name, x in vars(object_).items() if name in self._names}


def contents(container: Any) -> Any:
    """What can be compared later: the entries of a small container, or the size of a large one."""
    if len(container) > _FEW:
        return len(container)
    return list(container.items() if isinstance(container, dict) else container)


def _holds(container: Any, held: Any) -> bool:
    """Whether a container has the same entries, or the same size, as when it was looked at."""
    if held.__class__ is int:
        return len(container) == held
    if len(container) != len(held):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), held, strict=True)
        return all(a == c and (b is d or same(b, d)) for (a, b), (c, d) in pairs)
    if isinstance(container, set):
        return all(x in container for x in held)
    return all(a is b or same(a, b) for a, b in zip(container, held, strict=True))


def _names_of(code: types.CodeType) -> Iterator[str]:
    """The names in a function's code, and in that of the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _is_ours(x: Any) -> bool:
    """Whether a class or function belongs to FLAME, which keeps to its own rules."""
    return str(getattr(x, "__module__", "")).partition(".")[0] == "flame"


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
