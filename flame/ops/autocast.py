"""What autocast does before an operation: casts of its operands, by the policy that it declares.

Invariant: casts are ordinary conversions, so gradients are cast back; they are made once, at the
outermost function with a policy, and nothing inside of it is cast again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from flame.core import dtypes
from flame.core.autocast import Policy, autocast, plain
from flame.core.dtypes import DType
from flame.core.errors import UnsupportedError
from flame.core.handle import is_tensor
from flame.ops.op import interpreter

F = TypeVar("F", bound=Callable[..., Any])

_CAST = (dtypes.float32, dtypes.float16, dtypes.bfloat16)


def cast_operands(policy: Policy, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of an op, cast as its policy says. Numbers and others pass as they are."""
    found = _target(policy, operands)
    if found is None:
        return operands
    return tuple([_cast(x, found) if is_tensor(x) else x for x in operands])


def autocasts(policy: Policy) -> Callable[[F], F]:
    """Declares the policy of a function: all tensors among its arguments are its operands.

    For functions that are composed of several operations but are one to autocast.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not autocast.on:
                return function(*args, **kwargs)
            operands = list(_tensors((args, kwargs)))
            if policy == "unsafe":
                _check_safe(function.__name__, operands)
            target = _target(policy, operands)
            if target is not None:
                args, kwargs = _nested(args, target), _nested(kwargs, target)
            return plain(function, *args, **kwargs)

        call.autocast = policy  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]  # functools.wraps keeps the signature

    return decorate


Target = Callable[[Any], DType]  # the dtype that a tensor is cast to


def _target(policy: Policy, operands: Iterable[Any]) -> Target | None:
    if policy == "plain":
        return None
    if policy == "lower":
        return lambda x: autocast.settings.dtype(_device_type(x))
    if policy in ("float32", "unsafe"):
        return lambda x: dtypes.float32
    known = {x.dtype for x in operands if is_tensor(x) and _takes_part(x)}
    return (lambda x: dtypes.float32) if len(known) > 1 else None


def _check_safe(name: str, operands: Iterable[Any]) -> None:
    if any(_device_type(x) == "cuda" and _takes_part(x) for x in operands):
        raise UnsupportedError(
            f"{name} is unsafe to autocast: a probability in lower precision has lost what its "
            "logarithm needs. Use binary_cross_entropy_with_logits (BCEWithLogitsLoss) on what "
            "goes into the sigmoid, or an inner region autocast(device, enabled=False)"
        )


def _device_type(x: Any) -> str:
    device: str = x.type.device
    return "cuda" if device.startswith("cuda") else "cpu"


def _takes_part(x: Any) -> bool:
    return x.type.dtype in _CAST and autocast.settings.enabled(_device_type(x))


def _cast(x: Any, target: Target) -> Any:
    if not _takes_part(x):
        return x
    dtype = target(x)
    return x if x.type.dtype is dtype else interpreter().cast(x, dtype)


def _tensors(x: Any) -> Iterator[Any]:
    if is_tensor(x):
        yield x
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from _tensors(each)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _nested(x: Any, target: Target) -> Any:
    if is_tensor(x):
        return _cast(x, target)
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return type(x)([_nested(each, target) for each in x])
    if isinstance(x, dict):
        return {key: _nested(each, target) for key, each in x.items()}
    return x
