"""What a recipe is: settings with defaults, and a function that builds a task from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from flame.core import device as devices
from flame.core.errors import ArgumentError, DeviceError
from flame.train.task import PRECISIONS, Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every recipe can be told. A recipe's own class gives the defaults and may add fields.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``; ``precision`` is one of
    `flame.train.task.PRECISIONS`. ``eager`` runs the training step operation by operation instead
    of compiled.
    ``data`` is an image folder, or None for the data that the recipe brings along; ``limit`` is the
    largest number of training images, and of test images, or None for all.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    data: str | None = None
    limit: int | None = None
    eager: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("limit", 2)):
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ArgumentError(
                    f"--{_option(name)} must be an integer >= {least}, got {value!r}"
                )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError(f"--lr must be a positive number, got {self.lr!r}")
        if self.precision not in PRECISIONS:
            raise ArgumentError(
                f"--precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """These settings with the given ones in their place; None leaves a setting as it is."""
        return replace(
            self, **{name: value for name, value in options.items() if value is not None}
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The settings in a run's config. Raises ArgumentError where they are another recipe's."""
        names = {field.name for field in fields(cls)}
        if names != config.keys():
            odd = ", ".join(sorted(names ^ config.keys()))
            raise ArgumentError(
                f"the run's settings are not those of this version of the recipe ({odd} differ); "
                "start a new run"
            )
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)


def _option(name: str) -> str:
    return name.replace("_", "-")


def check_device(name: str) -> str:
    """The full name of a device, ``cpu`` or ``cuda:N``. Raises DeviceError, with what is missing
    and the way out, for one that this machine cannot train on."""
    try:
        return devices.check_device(name)
    except DeviceError as error:
        raise DeviceError(
            f"cannot use --device {name}: {error} The command doctor shows what this machine has; "
            "--device cpu trains without a GPU"
        ) from error


@dataclass(frozen=True)
class Recipe:
    """A ready-made training run. ``build`` draws all its randomness from ``settings.seed``."""

    name: str
    summary: str
    defaults: Settings
    build: Callable[[Any], Task]
