"""Reading and writing the state of a module tree: parameters and persistent buffers by dotted name.

`load` checks every name and shape before it copies the first value, so a refused state changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import flame
from flame.core.errors import ArgumentError, StateError
from flame.nn.parameter import Parameter
from flame.tensor import Tensor

if TYPE_CHECKING:
    from flame.nn.module import Module

__all__ = ["IncompatibleKeys", "load", "save"]


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` left out on either side."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        missing, unexpected = self.missing_keys, self.unexpected_keys
        return f"IncompatibleKeys(missing_keys={missing}, unexpected_keys={unexpected})"

    def __str__(self) -> str:
        return repr(self)


class _Slot(NamedTuple):
    """One tensor of the state: where it lives, and what it is now."""

    owner: Module
    name: str
    tensor: Tensor
    is_parameter: bool


def _slots(module: Module, prefix: str) -> Iterator[tuple[str, _Slot]]:
    """Every parameter and persistent buffer by its key; shared ones under each of their names."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, _Slot(module, name, parameter, is_parameter=True)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, _Slot(module, name, buffer, is_parameter=False)
    for name, child in module._modules.items():
        if child is not None:
            yield from _slots(child, f"{prefix}{name}.")


def save(
    module: Module, destination: dict[str, Any], *, prefix: str, keep_vars: bool
) -> dict[str, Any]:
    """Write the state into `destination`: detached tensors that share storage, or the
    parameters themselves.
    """
    for key, slot in _slots(module, prefix):
        destination[key] = slot.tensor if keep_vars else slot.tensor.detach()
    return destination


def load(
    module: Module, state: Mapping[str, Any], *, strict: bool, assign: bool
) -> IncompatibleKeys:
    """Copy the values of `state` into the tensors of `module` (or with `assign` put them in
    their place).
    """
    if not isinstance(state, Mapping):
        raise ArgumentError(
            f"load_state_dict: takes a mapping from names to tensors, got {type(state).__name__}"
        )
    slots = dict(_slots(module, ""))
    missing = [key for key in slots if key not in state]
    unexpected = [key for key in state if key not in slots]
    values = {key: _as_tensor(key, state[key]) for key in slots if key in state}
    mismatched = [
        f"{key}: the module has {tuple(slots[key].tensor.shape)}, the state has "
        f"{tuple(value.shape)}"
        for key, value in values.items()
        if tuple(value.shape) != tuple(slots[key].tensor.shape)
    ]
    problems = [("shape mismatch", mismatched)]
    if strict:
        problems = [("missing", missing), ("unexpected", unexpected), *problems]
    _raise_if_any(type(module).__name__, problems)
    with flame.no_grad():
        for key, value in values.items():
            _put(slots[key], value, assign=assign)
    return IncompatibleKeys(missing, unexpected)


def _as_tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        # One copy, as the caller keeps the array and read-only arrays are welcome.
        return flame.tensor(np.asarray(value))
    raise ArgumentError(
        f"load_state_dict: {key!r} is a {type(value).__name__}; give a flame.Tensor or a NumPy "
        "array"
    )


def _raise_if_any(module_name: str, problems: list[tuple[str, list[str]]]) -> None:
    lines = [f"  {kind} ({len(keys)}): " + ", ".join(keys) for kind, keys in problems if keys]
    if lines:
        raise StateError(
            f"load_state_dict: the state does not fit {module_name}; nothing was loaded\n"
            + "\n".join(lines)
            + "\n  strict=False skips missing and unexpected names, but no shape mismatch"
        )


def _put(slot: _Slot, value: Tensor, *, assign: bool) -> None:
    if not assign:
        slot.tensor.copy_(value)
    elif slot.is_parameter:
        if not isinstance(value, Parameter):
            value = Parameter(value, requires_grad=slot.tensor.requires_grad)
        slot.owner._parameters[slot.name] = value
    else:
        slot.owner._buffers[slot.name] = value
