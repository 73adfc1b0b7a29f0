"""Calls of one kernel on a GPU that few launches serve ("multi-tensor apply").

A model has hundreds of small parameters, and an update of each alone costs the host more than the
device. What a block does is the same as in a launch of its call alone, see
`flame.render.cuda_items`; where nothing is added up, calls of different sizes also share the way in
which the work is cut up, for no number depends on it.

Invariant: the words of a launch are written and read under one lock; the driver has read them when
it returns, so that nothing on the device has to outlive the call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from flame.compiler.kernel_identity import kernel_identity
from flame.core.device import device_index
from flame.kernel.builder import BoundKernel
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.kernel.program import Accumulate, Kernel
from flame.kernel.values import Buffer
from flame.render.cuda import render
from flame.render.cuda_geometry import geometry_of, grid_of
from flame.render.cuda_index import walk
from flame.render.cuda_items import most_items
from flame.runtime.cuda import modules, streams
from flame.runtime.cuda.driver import driver


@dataclass(frozen=True)
class Call:
    """One of many calls: its number among them, its kernel with sizes, elements that it writes."""

    number: int
    bound: BoundKernel
    elements: int


class GroupedLaunch:
    """One launch for several calls on one device.

    Its operands are columns: the n-th has the n-th tensor's pointer, or the number, of all calls
    that were given, also of those that other launches serve.
    """

    def __init__(
        self, calls: Sequence[Call], geometry: Geometry, launch: KernelLaunch, device: int
    ) -> None:
        self.device, self.symbol, self.block = device, launch.symbol, launch.block
        self.numbers = tuple(call.number for call in calls)
        kernel, count, items = calls[0].bound.kernel, len(calls), geometry.items
        self._pick = itemgetter(*self.numbers)
        operands = list(zip(kernel.operands, calls[0].bound.operands, strict=True))
        self._tensors = [i for i, (x, _) in enumerate(operands) if isinstance(x, Buffer)]
        self._scalars = [i for i, (x, _) in enumerate(operands) if not isinstance(x, Buffer)]
        rows = [(*call.bound.sizes, call.bound.extent) for call in calls]
        first = [0]
        for call in calls:
            first.append(first[-1] + grid_of(geometry, kernel, call.bound.extent))
        self.blocks = first[-1]
        columns = [*([0] * count for _ in self._tensors), *zip(*rows, strict=True)]
        words = [w for column in columns for w in (*column, *[0] * (items - count))]
        words += [*first, *[self.blocks] * (items - count)]
        self._items, self._count = items, count
        self._table = (ctypes.c_int64 * len(words))(*words)
        self._numbers = (ctypes.c_int64 * max(len(self._scalars), 1))()
        self._floats = (ctypes.c_double * len(self._numbers)).from_buffer(self._numbers)
        base = ctypes.addressof(self._numbers)
        places = [base + 8 * i for i in range(len(self._scalars))]
        self._addresses: Any = (ctypes.c_void_p * (1 + len(places)))(
            ctypes.addressof(self._table), *places
        )
        self._arguments = ctypes.addressof(self._addresses)
        self._function = modules.load(device, launch.text, launch.symbol, launch.shared)
        self._launch = driver().launch
        self._lock = threading.Lock()

    def enqueue(self, columns: Sequence[Any]) -> None:
        """Queue it on the device's current stream. columns: for each operand of the kernel the
        pointers of all calls, or the number that is theirs."""
        driver().use(self.device)
        stream = streams.current_handle(self.device)
        table, count = self._table, self._count
        with self._lock:
            for place, position in enumerate(self._tensors):
                start = place * self._items
                table[start : start + count] = self._pick(columns[position])
            for place, position in enumerate(self._scalars):
                number = columns[position]
                if number.__class__ is float:
                    self._floats[place] = number
                else:
                    self._numbers[place] = number
            grid = (self.blocks, 1, 1)
            self._launch(self._function, grid, self.block, 0, stream, self._arguments)


def can_group(bound: BoundKernel) -> bool:
    """Whether a launch can serve several calls of the kernel: it has no scratch memory outside of
    the multiprocessors."""
    return geometry_of(bound).shared


def grouped(calls: Sequence[Call], device: str) -> tuple[list[GroupedLaunch], list[int]]:
    """Launches of calls on a device, and the numbers of those that are like no other."""
    alike: dict[Any, list[Call]] = {}
    keys: dict[int, Any] = {}
    for call in calls:  # calls of equal types have one bound kernel
        key = keys.get(id(call.bound))
        if key is None:
            key = keys[id(call.bound)] = _key(call.bound)
        alike.setdefault(key, []).append(call)
    alone = [each[0].number for each in alike.values() if len(each) == 1]
    parts = []
    for each in alike.values():
        if len(each) > 1:
            parts += [(part, _geometry(each, part)) for part in _parts(each)]
    rendered = [render(part[0].bound, geometry) for part, geometry in parts]
    index = device_index(device)
    modules.load_many(index, [(r.text, r.symbol, r.shared) for r in rendered])
    launches = [
        GroupedLaunch(part, geometry, launch, index)
        for (part, geometry), launch in zip(parts, rendered, strict=True)
    ]
    return launches, alone


def _key(bound: BoundKernel) -> Any:
    """Equal for calls that one launch can serve."""
    geometry = None if _is_free(bound.kernel) else geometry_of(bound)
    return kernel_identity(bound.kernel), geometry


def _is_free(kernel: Kernel) -> bool:
    """Whether results do not depend on the threads that share the work."""
    if kernel.scratch or kernel.local:
        return False
    return not any(isinstance(s, Accumulate) for s in walk(kernel.body.body))


def _parts(calls: list[Call]) -> list[list[Call]]:
    """As many calls in each as the arguments of a launch can name, and never one alone."""
    count = -(-len(calls) // most_items(calls[0].bound.kernel))
    size = -(-len(calls) // count)
    return [calls[start : start + size] for start in range(0, len(calls), size)]


def _geometry(alike: Sequence[Call], part: Sequence[Call]) -> Geometry:
    """The largest call decides how the work of all is cut up. The table is rounded up, so that
    models with other numbers of parameters find the text in the caches."""
    geometries = {id(call.bound): geometry_of(call.bound) for call in alike}
    largest = max(alike, key=lambda call: call.elements)
    wide = any(geometry.wide for geometry in geometries.values())
    items = min(1 << (len(part) - 1).bit_length(), most_items(part[0].bound.kernel))
    return replace(geometries[id(largest.bound)], wide=wide, items=items)
