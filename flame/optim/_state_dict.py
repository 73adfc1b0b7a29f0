"""The state of optimizers as dicts in PyTorch's layout, and back.

Loading validates everything before it returns anything, so a state_dict that does not fit leaves
the optimizer as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.core.errors import StateError
from flame.optim._tensors import Tensor, float32, no_grad, tensor

__all__ = ["load", "save"]

State = dict[Tensor, dict[str, Any]]
Groups = list[dict[str, Any]]


def save(state: Mapping[Tensor, dict[str, Any]], groups: Groups) -> dict[str, Any]:
    """The state_dict of an optimizer with this state and these groups."""
    numbers: dict[Tensor, int] = {}
    for group in groups:
        for parameter in group["params"]:
            numbers[parameter] = len(numbers)
    saved_state = {
        numbers[parameter]: {
            name: _saved_step(value) if name == "step" else value for name, value in values.items()
        }
        for parameter, values in state.items()
        if parameter in numbers and values
    }
    saved_groups = [
        {**_without(group, "params"), "params": [numbers[p] for p in group["params"]]}
        for group in groups
    ]
    return {"state": saved_state, "param_groups": saved_groups}


def _saved_step(count: int | Tensor) -> Tensor:
    """A count as a tensor of its own; one on the device may be shared."""
    if isinstance(count, Tensor):
        return count.to(float32)
    return tensor(float(count), dtype=float32)


def load(
    owner: str,
    state_dict: Mapping[str, Any],
    groups: Groups,
    defaults: Mapping[str, Any],
    buffers: tuple[str, ...],
) -> tuple[State, Groups]:
    """The state and the groups that `state_dict` holds, for the parameters of `groups`.

    State named in `buffers` must have the shape of its parameter.
    Options that the state_dict lacks, as one of an older version may, keep their present value, or
    else the default.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise StateError(
                f'{owner}.load_state_dict: the key "{key}" is missing, got '
                f"{sorted(map(str, state_dict))}"
            )
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise StateError(
            f"{owner}.load_state_dict: {len(saved_groups)} parameter groups saved, {len(groups)} "
            "here"
        )
    parameters: dict[int, Tensor] = {}
    loaded_groups: Groups = []
    for position, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        numbers = [int(number) for number in saved["params"]]
        if len(numbers) != len(group["params"]):
            raise StateError(
                f"{owner}.load_state_dict: group {position} has {len(numbers)} parameters saved, "
                f"{len(group['params'])} here"
            )
        parameters.update(zip(numbers, group["params"], strict=True))
        options = {key: _copied(value) for key, value in saved.items() if key != "params"}
        loaded_groups.append({**defaults, **group, **options, "params": group["params"]})
    state: State = {}
    for number, values in state_dict["state"].items():
        if int(number) not in parameters:
            raise StateError(
                f"{owner}.load_state_dict: state for parameter {number}, which is in no group"
            )
        parameter = parameters[int(number)]
        state[parameter] = {
            name: _value(
                f"{owner}.load_state_dict: parameter {number}, {name}",
                value,
                parameter,
                counts=name == "step",
                same_shape=name in buffers,
            )
            for name, value in values.items()
        }
    return state, loaded_groups


def _value(where: str, value: Any, parameter: Tensor, *, counts: bool, same_shape: bool) -> Any:
    if counts:
        return _step(where, value)
    if isinstance(value, np.ndarray):
        value = tensor(value)
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if same_shape and tuple(value.shape) != tuple(parameter.shape):
        raise StateError(
            f"{where}: shape {tuple(value.shape)} saved, but the parameter has "
            f"{tuple(parameter.shape)}; "
            "are the parameters in the same order?"
        )
    with no_grad():
        return value.detach().to(dtype=parameter.dtype, device=parameter.device).clone()


def _step(where: str, value: Any) -> int:
    """A step count as an int, be it saved as a tensor, an array or a number."""
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError):
        raise StateError(f"{where}: a step count must be one number, got {value!r}") from None
    if number < 0 or number != int(number):
        raise StateError(f"{where}: a step count must be a whole number, got {number}")
    return int(number)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _without(group: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}
