"""A nested state, taken apart into named arrays and a JSON text, and put together again.

Invariant: ``join(*split(state))`` equals ``state``, with the types of keys, tuples and arrays kept.
The names of arrays are their paths (``model.conv.weight``), so a flat state_dict keeps its keys.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import flame
from flame.core.errors import ArgumentError, CheckpointError
from flame.tensor import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

# One-key JSON objects that stand for what JSON does not have.
TENSOR, ARRAY, TUPLE, PAIRS = "$tensor", "$array", "$tuple", "$pairs"


def split(state: object) -> tuple[dict[str, Array], str]:
    """The arrays of ``state`` by name, and the JSON text of all the rest with references to them.

    ``state`` is built of dict, list, tuple, str, int, float, bool, None, Tensor and ndarray. Raises
    ArgumentError, with its path, for anything else.
    """
    arrays: dict[str, Array] = {}

    def keep(array: Array, path: str) -> str:
        name, copies = path or "value", 1
        while name in arrays:  # {"a": {"b": x}, "a.b": y} would give one name to both
            copies += 1
            name = f"{path}~{copies}"
        arrays[name] = array
        return name

    return arrays, json.dumps(_encode(state, "", keep), separators=(",", ":"))


def _encode(value: object, path: str, keep: Callable[[Array, str], str]) -> object:
    if isinstance(value, Tensor):
        return {TENSOR: keep(value.detach().cpu().numpy(), path)}
    if isinstance(value, np.ndarray):
        return {ARRAY: keep(value, path)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value

    def inner(key: object, item: object) -> object:
        return _encode(item, f"{path}.{key}" if path else str(key), keep)

    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        if plain:
            return {key: inner(key, item) for key, item in value.items()}
        return {PAIRS: [[_key(key, path), inner(key, item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [inner(index, item) for index, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    raise ArgumentError(
        f"save: {path or 'the state'} is a {type(value).__name__}, which a checkpoint cannot hold; "
        "use tensors, NumPy arrays, numbers, strings, None, and dicts, lists and tuples of them"
    )


def _key(key: object, path: str) -> object:
    if isinstance(key, str | int):
        return key
    raise ArgumentError(
        f"save: a key of {path or 'the state'} is a {type(key).__name__}; "
        "the keys of a checkpoint are strings or integers"
    )


def join(arrays: Mapping[str, Array], text: str) -> Any:
    """The state that `split` took apart. Raises CheckpointError where the two do not fit."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((kind, content),) = value.items()
            if kind == TENSOR:
                return flame.from_numpy(take(content))
            if kind == ARRAY:
                return take(content)
            if kind == TUPLE:
                return tuple(decode(item) for item in content)
            if kind == PAIRS:
                return {key: decode(item) for key, item in content}
        return {key: decode(item) for key, item in value.items()}

    def take(name: str) -> Array:
        if name not in arrays:
            raise CheckpointError(f"the checkpoint's state names the tensor {name!r}, not in it")
        return arrays[name]

    return decode(json.loads(text))
