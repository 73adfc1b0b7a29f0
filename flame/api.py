"""Which modules of ops make up the public functions, and how they become methods of Tensor.

Each module says of itself what it exports: ``__all__`` for ``flame.*``, ``METHODS`` for Tensor,
``IN_PLACE`` for methods with a trailing underscore that write the result back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from flame.core.dtypes import DType
from flame.core.errors import DTypeError
from flame.ops import (
    activations,
    arithmetic,
    attention,
    bitwise,
    bivariate,
    combining,
    comparison,
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
        made = function(self, *args, **kwargs)
        _check_kind(name, made.dtype, self.dtype)
        return self.copy_(made)

    method.__name__ = name
    method.__doc__ = f"In place: {function.__doc__ or function.__name__}"
    return method


def attach() -> None:
    """Give Tensor its methods. Called once, by ``import flame``."""
    for module in MODULES:
        for name in getattr(module, "METHODS", ()):
            setattr(Tensor, name, getattr(module, name))
        for name in getattr(module, "IN_PLACE", ()):
            if not hasattr(Tensor, f"{name}_"):
                setattr(Tensor, f"{name}_", _writing_back(getattr(module, name), f"{name}_"))
        for name, method in getattr(module, "OPERATORS", {}).items():
            setattr(Tensor, name, method)
