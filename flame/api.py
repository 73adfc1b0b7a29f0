"""Which modules of ops make up the public functions, and how they become methods of Tensor.

Each module says of itself what it exports: ``__all__`` for ``flame.*``, ``METHODS`` for Tensor,
``IN_PLACE`` for methods with a trailing underscore that write the result back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from flame.ops import (
    attention,
    trigonometry,
    statistics,
    extrema,
    random,
    losses,
    activations,
    bivariate,
    bitwise,
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
from flame.tensor import Tensor

MODULES: Final[tuple[ModuleType, ...]] = (
    attention,
    trigonometry,
    statistics,
    extrema,
    random,
    losses,
    activations,
    bivariate,
    bitwise,
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


def _writing_back(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_(function(self, *args, **kwargs))  # type: ignore[no-any-return]

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
