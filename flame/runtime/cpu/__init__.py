"""The CPU as a device: memory, text to machine code, launch.

`launch` is made from machine code at its first use (`flame.runtime.cpu.launch`), as it needs llvmlite,
which `import flame` must not load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    launch: Callable[..., None]


def __getattr__(name: str) -> object:
    if name == "launch":
        from flame.runtime.cpu.launcher import launcher

        globals()["launch"] = launcher()
        return globals()["launch"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
