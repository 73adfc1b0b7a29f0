"""Modules that hold parameters: ParameterList, ParameterDict. Tensors put in become parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flame.core.errors import ArgumentError, IndexRangeError
from flame.nn.module import Module
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

__all__ = ["ParameterDict", "ParameterList"]


def _as_parameter(owner: Module, value: Any) -> Parameter:
    if isinstance(value, Parameter):
        return value
    if isinstance(value, Tensor):
        return Parameter(value)
    raise ArgumentError(
        f"{owner._get_name()}: takes parameters or tensors, got {type(value).__name__}"
    )


def _describe(parameter: Parameter | None) -> str:
    if parameter is None:
        return "None"
    return (
        f"Parameter containing: [{parameter.dtype} of size {'x'.join(map(str, parameter.shape))}]"
    )


class ParameterList(Module):
    """A list of parameters, named "0", "1", ... in the state."""

    def __init__(self, values: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        if values is not None:
            self.extend(values)

    def _key(self, index: int) -> str:
        position, count = operator.index(index), len(self)
        if not -count <= position < count:
            raise IndexRangeError(
                f"ParameterList: index {position} is out of range for {count} parameters"
            )
        return str(position % count)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return ParameterList(list(self)[index])
        return self._parameters[self._key(index)]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.register_parameter(self._key(index), _as_parameter(self, value))

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(list(self._parameters.values()))  # type: ignore[arg-type]

    def append(self, value: Tensor) -> ParameterList:
        """Add a parameter at the end."""
        self.register_parameter(str(len(self)), _as_parameter(self, value))
        return self

    def extend(self, values: Iterable[Tensor]) -> ParameterList:
        """Add parameters at the end."""
        for value in list(values):
            self.append(value)
        return self

    __iadd__ = extend

    def extra_repr(self) -> str:
        return "\n".join(
            f"  ({name}): {_describe(value)}" for name, value in self._parameters.items()
        )


class ParameterDict(Module):
    """A dictionary of parameters in order of insertion."""

    def __init__(
        self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        super().__init__()
        if parameters is not None:
            self.update(parameters)

    def __getitem__(self, key: str) -> Parameter:
        return self._parameters[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.register_parameter(key, _as_parameter(self, value))

    def __delitem__(self, key: str) -> None:
        del self._parameters[key]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __contains__(self, key: object) -> bool:
        return key in self._parameters

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._parameters.keys()

    def values(self) -> Iterable[Parameter]:
        """The parameters."""
        return self._parameters.values()  # type: ignore[return-value]

    def items(self) -> Iterable[tuple[str, Parameter]]:
        """Pairs of name and parameter."""
        return self._parameters.items()  # type: ignore[return-value]

    def pop(self, key: str) -> Parameter:
        """Remove the parameter named `key` and return it."""
        return self._parameters.pop(key)  # type: ignore[return-value]

    def clear(self) -> None:
        """Remove all parameters."""
        self._parameters.clear()

    def update(
        self, parameters: Mapping[str, Tensor] | ParameterDict | Iterable[tuple[str, Tensor]]
    ) -> None:
        """Add or replace parameters by name."""
        pairs = (
            parameters.items() if isinstance(parameters, Mapping | ParameterDict) else parameters
        )
        for name, value in pairs:
            self[name] = value

    def extra_repr(self) -> str:
        return "\n".join(
            f"  ({name}): {_describe(value)}" for name, value in self._parameters.items()
        )
