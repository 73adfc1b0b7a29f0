"""Which modules of ops make up the public functions, and how they become methods of Tensor.

Each module says of itself what it exports: ``__all__`` for ``flame.*``, ``METHODS`` for Tensor,
``IN_PLACE`` for methods with a trailing underscore that write the result back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, Final

from flame.core.autocast import plain
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, DTypeError, FlameError
from flame.ops import (
    activations,
    arithmetic,
    attention,
    bitwise,
    bivariate,
    combining,
    comparison,
    composites,
    contractions,
    conversion,
    convolution,
    copies,
    creation,
    dimensions,
    division,
    dropouts,
    embedding,
    embedding_losses,
    extrema,
    gamma,
    indexing,
    inspection,
    interpolation,
    joining,
    losses,
    masking,
    mathematics,
    normalization,
    norms,
    padding,
    pooling,
    powers,
    products,
    random,
    rearranging,
    reductions,
    retyping,
    scans,
    scattering,
    shapes,
    slicing,
    softmax,
    sorting,
    statistics,
    subscript,
    transfer,
    trigonometry,
)
from flame.tensor import Tensor

MODULES: Final[tuple[ModuleType, ...]] = (
    inspection,
    retyping,
    embedding_losses,
    norms,
    dropouts,
    attention,
    trigonometry,
    statistics,
    extrema,
    gamma,
    random,
    losses,
    activations,
    bivariate,
    bitwise,
    dimensions,
    division,
    embedding,
    normalization,
    powers,
    mathematics,
    comparison,
    composites,
    softmax,
    arithmetic,
    contractions,
    combining,
    conversion,
    copies,
    convolution,
    creation,
    indexing,
    interpolation,
    joining,
    masking,
    padding,
    pooling,
    products,
    rearranging,
    reductions,
    scans,
    scattering,
    shapes,
    slicing,
    sorting,
    subscript,
    transfer,
)


def exports() -> dict[str, Any]:
    """Every public function of the ops, by name."""
    return {name: getattr(module, name) for module in MODULES for name in module.__all__}


def _check_kind(name: str, made: DType, held: DType) -> None:
    order = {"b": 0, "u": 1, "i": 1, "f": 2}
    if order[made.kind] > order[held.kind]:
        raise DTypeError(
            f"{name}: a {made.name} result cannot be stored in a {held.name} tensor in place; "
            "convert the tensor first"
        )


def _writing_back(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = plain(function, self, *args, **kwargs)  # autocast leaves what is in place alone
        _check_kind(name, made.dtype, self.dtype)
        return self.copy_(made)

    method.__name__ = name
    method.__doc__ = f"In place: {function.__doc__ or function.__name__}"
    return method


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which tells of arguments of wrong types or values by a FlameError.

    Nothing is looked at before an error; one of Python's or NumPy's is then explained.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except FlameError:
            raise
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            complaint = _complaint(function, args, kwargs, error)
            if complaint is None:
                raise
            raise complaint from error

    return call


def _complaint(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> FlameError | None:
    """What is wrong with the arguments of a call; None where their number or names are."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    for name, value in bound.arguments.items():
        if signature.parameters[name].annotation == "Tensor" and not isinstance(value, Tensor):
            return DTypeError(
                f"{function.__name__}: {name} must be a tensor, got {type(value).__name__}; "
                "convert it by flame.tensor"
            )
    given = ", ".join(f"{name}={_short(value)}" for name, value in bound.arguments.items())
    kind = ArgumentError if isinstance(error, ValueError | OverflowError) else DTypeError
    return kind(f"{function.__name__} cannot take {given}: {error}")


def _short(value: Any) -> str:
    text = repr(value.type) if isinstance(value, Tensor) else repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


OURS: Final = ("flame.ops.", "flame.nn.")


def guard_functions(namespace: dict[str, Any]) -> None:
    """Put `guarded` functions of the ops in place of the plain ones in a module's namespace."""
    for name, member in list(namespace.items()):
        if isinstance(member, FunctionType) and member.__module__.startswith(
            ("flame.ops.", "flame.nn.")
        ):
            namespace[name] = guarded(member)


def attach(namespace: dict[str, Any]) -> None:
    """Give Tensor its methods, and guard the functions of FLAME's own namespace.

    Called once, by ``import flame``.
    """
    guard_functions(namespace)
    for module in MODULES:
        for name in getattr(module, "METHODS", ()):
            member = getattr(module, name)
            setattr(Tensor, name, guarded(member) if isinstance(member, FunctionType) else member)
        for name in getattr(module, "IN_PLACE", ()):
            if not hasattr(Tensor, f"{name}_"):
                method = _writing_back(getattr(module, name), f"{name}_")
                setattr(Tensor, f"{name}_", guarded(method))
        for name, method in getattr(module, "OPERATORS", {}).items():
            setattr(Tensor, name, method)
