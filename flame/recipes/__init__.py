"""Ready-made training runs: modules with a ``RECIPE``, each imported when it is asked for."""

from importlib import import_module

from flame.core.errors import ArgumentError
from flame.recipes.recipe import Recipe, Settings

__all__ = ["NAMES", "Recipe", "Settings", "find"]

_MODULES = {"fashion-cnn": "flame.recipes.fashion_cnn"}
NAMES = tuple(_MODULES)


def find(name: str) -> Recipe:
    """The recipe of that name. Raises ArgumentError, with the known names, where there is none."""
    if name not in _MODULES:
        raise ArgumentError(f"there is no recipe {name!r}; the recipes are: {', '.join(NAMES)}")
    recipe = import_module(_MODULES[name]).RECIPE
    assert isinstance(recipe, Recipe)
    return recipe
