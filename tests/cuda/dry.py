"""Kernels found before they are needed, so that they are compiled together.

A compiler begins for as long as it works on a few kernels, so tests that need many run once on a
device that computes nothing: what they ask for there is then compiled at once for the device that
they are about.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from flame.compiler.foreach import ForeachPlans
from flame.eager import Eager
from flame.ops.op import interpreter
from flame.runtime.cuda import modules
from flame.runtime.cuda.driver import Dim, install_driver

from .emulation import EmulatedDriver

Request = tuple[str, str, int]


class DryDriver(EmulatedDriver):
    """Compiles and launches nothing; memory is there, and what kernels would write is not."""

    def __init__(self) -> None:
        super().__init__(memory=1 << 34)
        self.wanted: dict[Request, None] = {}
        self._count = itertools.count(1)

    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        return next(self._count).to_bytes(8, "little")

    def compiler_identity(self) -> str:
        return f"none {id(self)}"

    def load_module(self, device: int, image: bytes) -> int:
        return next(self._count)

    def function(self, module: int, symbol: str, shared: int) -> int:
        return next(self._count)

    def launch(
        self, function: int, grid: Dim, block: Dim, shared: int, stream: int, arguments: int
    ) -> None:
        """Nothing."""


def kernels_of(works: Iterable[Callable[[], Any]]) -> list[Request]:
    """The kernels that calls ask for: text, symbol, bytes of shared memory of each.

    What goes wrong in a call ends it: without numbers nothing that looks at them can go on.
    """
    eager = interpreter()
    assert isinstance(eager, Eager)
    before = install_driver(DryDriver())
    # they hold kernels of the driver that they were made with
    plans, lists, eager.plans, eager.lists = eager.plans, eager.lists, {}, ForeachPlans()
    try:
        comparisons = {"assert_allclose": _agree, "assert_array_equal": _agree}
        with (
            warnings.catch_warnings(),
            np.errstate(all="ignore"),
            mock.patch.multiple(np.testing, **comparisons),
        ):
            warnings.simplefilter("ignore")
            for work in works:
                with contextlib.suppress(Exception):
                    work()
        return [(text, symbol, shared) for _, text, symbol, shared in modules.modules()._functions]
    finally:
        eager.plans, eager.lists = plans, lists
        install_driver(before)


def _agree(*_: Any, **__: Any) -> None:
    """Comparisons of numbers that were never computed."""


def get_ready(works: Sequence[Callable[[], Any]]) -> None:
    """Compile what calls will need on the current driver's first device."""
    modules.load_many(0, kernels_of(works))
