"""Whether operations are recorded for a backward pass, and how; a property of the thread."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Mode(threading.local):
    enabled = True
    inference = False
    anomaly = False
    saver: Any = None  # what keeps tensors for backward in place of the tape itself
    recorder: Any = None  # what is told of every look at a ``grad``


mode = _Mode()


class _Switch:
    """A context manager and decorator that sets some fields of the mode."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._before: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._before.append({name: getattr(mode, name) for name in self._fields})
        for name, value in self._fields.items():
            setattr(mode, name, value)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, value in self._before.pop().items():
            setattr(mode, name, value)

    def __call__(self, function: F) -> F:
        fields = self._fields
        if inspect.isgeneratorfunction(function):
            return _around_each_step(function, fields)  # type: ignore[return-value]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _Switch(**fields):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature


def _around_each_step(function: Callable[..., Any], fields: dict[str, Any]) -> Callable[..., Any]:
    """A generator function whose body alone runs under the switch, not what uses its values."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        steps = function(*args, **kwargs)
        resume: Callable[[], Any] = functools.partial(next, steps)
        while True:
            try:
                with _Switch(**fields):
                    value = resume()
            except StopIteration as end:
                return end.value
            try:
                sent = yield value
            except GeneratorExit:
                with _Switch(**fields):
                    steps.close()
                raise
            except BaseException as error:  # noqa: BLE001 - handed into the generator as it is
                resume = functools.partial(steps.throw, error)
            else:
                resume = functools.partial(steps.send, sent)

    return wrapper


class _PlainSwitch(_Switch):
    """A switch without arguments, which also decorates without parentheses."""

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        made = super().__new__(cls)
        if function is None:
            return made
        made.__init__()  # type: ignore[misc]
        return made(function)


class no_grad(_PlainSwitch):
    """Inside, operations are not recorded. Context manager and decorator."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        super().__init__(enabled=False)


class enable_grad(_PlainSwitch):
    """Inside, operations are recorded again."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        super().__init__(enabled=True)


class set_grad_enabled(_Switch):
    """Record operations inside, or not. Takes effect at once, also without ``with``."""

    def __init__(self, mode: bool) -> None:
        super().__init__(enabled=bool(mode))
        super().__enter__()
        self._entered = True

    def __enter__(self) -> Self:
        if self._entered:
            self._entered = False
            return self
        return super().__enter__()

    def __call__(self, function: F) -> F:
        if self._entered:  # as a decorator it changes nothing outside of the function
            self._entered = False
            self.__exit__(None, None, None)
        return super().__call__(function)


class inference_mode(_Switch):
    """As `no_grad`: nothing is recorded inside."""

    def __new__(cls, mode: Any = True) -> Any:
        made = super().__new__(cls)
        if not callable(mode):
            return made
        made.__init__()  # type: ignore[misc]
        return made(mode)

    def __init__(self, mode: Any = True) -> None:
        super().__init__(enabled=not mode, inference=bool(mode))


class detect_anomaly(_Switch):
    """Inside, a backward pass that gives NaN raises, and names the line of the forward call."""

    def __init__(self, check_nan: bool = True) -> None:
        super().__init__(anomaly=bool(check_nan))


class set_detect_anomaly(detect_anomaly):
    """`detect_anomaly` on or off. Takes effect at once, also without ``with``."""

    def __init__(self, mode: bool, check_nan: bool = True) -> None:
        super().__init__(bool(mode) and check_nan)
        super().__enter__()
        self._entered = True

    def __enter__(self) -> Self:
        if self._entered:
            self._entered = False
            return self
        return super().__enter__()


def is_grad_enabled() -> bool:
    """Whether operations are recorded in this thread."""
    return mode.enabled


def is_inference_mode_enabled() -> bool:
    """Whether this thread is inside `inference_mode`."""
    return mode.inference
