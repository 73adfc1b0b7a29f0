"""Modules that hold other modules: Sequential, ModuleList, ModuleDict.

Children of the first two are named "0", "1", ... without gaps, so that names follow positions after
every change.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, overload

from flame.core.changes import changes
from flame.core.errors import ArgumentError, IndexRangeError
from flame.nn.module import Module

__all__ = ["ModuleDict", "ModuleList", "Sequential"]


class _Indexed(Module):
    """What Sequential and ModuleList share: children by position."""

    def _position(self, index: int) -> int:
        position, count = operator.index(index), len(self)
        if not -count <= position < count:
            raise IndexRangeError(
                f"{self._get_name()}: index {position} is out of range for {count} modules"
            )
        return position % count

    def _keys(self) -> list[str]:
        return list(self._modules)

    def _replace_all(self, modules: Iterable[tuple[str, Module]]) -> None:
        named = list(modules)
        self._modules.clear()
        for name, module in named:
            self.register_module(name, module)

    def _renumber(self, modules: Iterable[Module]) -> None:
        self._replace_all((str(index), module) for index, module in enumerate(modules))

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Module | Self:
        if isinstance(index, slice):
            return self._slice(index)
        return self._list()[self._position(index)]

    def _slice(self, index: slice) -> Self:
        raise NotImplementedError

    def _list(self) -> list[Module]:
        return list(self._modules.values())  # type: ignore[arg-type]

    def __setitem__(self, index: int, module: Module) -> None:
        self.register_module(self._keys()[self._position(index)], module)

    def __delitem__(self, index: int | slice) -> None:
        keys = self._keys()
        chosen = keys[index] if isinstance(index, slice) else [keys[self._position(index)]]
        named = [
            (name, module)
            for name, module in zip(keys, self._list(), strict=True)
            if name not in chosen
        ]
        numbered = keys == [str(position) for position in range(len(keys))]
        if numbered:
            self._renumber(module for _, module in named)
        else:
            self._replace_all(named)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._list())

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self.register_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Insert a module before position `index`."""
        count = len(self)
        if not -count <= index <= count:
            raise IndexRangeError(
                f"{self._get_name()}.insert: index {index} is out of range for {count} modules"
            )
        modules = self._list()
        modules.insert(index, module)
        self._renumber(modules)
        return self

    def pop(self, index: int = -1) -> Module:
        """Remove the module at `index` and return it."""
        module = self[index]
        del self[index]
        return module


class Sequential(_Indexed):
    """Modules that run one after the other, each on the result of the one before.

    Args:
        args: the modules, named "0", "1", ...; or one dictionary from names to modules.
    """

    def __init__(self, *args: Module | Mapping[str, Module]) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], Mapping):
            self._replace_all(args[0].items())
        else:
            for index, module in enumerate(args):
                self.register_module(str(index), module)  # type: ignore[arg-type]

    def _slice(self, index: slice) -> Self:
        return self.__class__(dict(list(zip(self._keys(), self._list(), strict=True))[index]))

    def forward(self, input: Any) -> Any:
        for module in self._modules.values():
            input = module(input)  # type: ignore[misc]
        return input


class ModuleList(_Indexed):
    """A list of modules whose parameters belong to the module that holds it; it computes
    nothing itself.
    """

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        super().__init__()
        if modules is not None:
            self.extend(modules)

    def _slice(self, index: slice) -> Self:
        return self.__class__(self._list()[index])

    def __iadd__(self, modules: Iterable[Module]) -> Self:
        return self.extend(modules)

    def __add__(self, other: Iterable[Module]) -> ModuleList:
        return ModuleList([*self, *other])

    def __repr__(self) -> str:
        """Like any module's, but equal neighbours share a line: "(0-5): 6 x ..."."""
        lines, position = [], 0
        for text, equal in itertools.groupby(map(repr, self)):
            count = len(list(equal))
            last = position + count - 1
            label = f"({position}): " if count == 1 else f"({position}-{last}): {count} x "
            lines.append((label + text).replace("\n", "\n  "))
            position += count
        body = "\n  " + "\n  ".join(lines) + "\n" if lines else ""
        return f"{self._get_name()}({body})"


class ModuleDict(Module):
    """A dictionary of modules in order of insertion; it computes nothing itself."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        if modules is not None:
            self.update(modules)

    def __getitem__(self, key: str) -> Module:
        return self._modules[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, module: Module) -> None:
        self.register_module(key, module)

    def __delitem__(self, key: str) -> None:
        changes.count += 1
        del self._modules[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, key: object) -> bool:
        return key in self._modules

    def clear(self) -> None:
        """Remove all modules."""
        changes.count += 1
        self._modules.clear()

    def pop(self, key: str) -> Module:
        """Remove the module named `key` and return it."""
        changes.count += 1
        return self._modules.pop(key)  # type: ignore[return-value]

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._modules.keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._modules.values()  # type: ignore[return-value]

    def items(self) -> Iterable[tuple[str, Module]]:
        """Pairs of name and module."""
        return self._modules.items()  # type: ignore[return-value]

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add or replace modules by name."""
        if not isinstance(modules, Iterable):
            raise ArgumentError(
                f"ModuleDict.update: takes a mapping or pairs, got {type(modules).__name__}"
            )
        pairs = modules.items() if isinstance(modules, Mapping | ModuleDict) else modules
        for name, module in pairs:
            self[name] = module
