"""Many calls on a GPU that few launches serve ("multi-tensor apply").

A model has hundreds of small parameters, and a launch for each costs the host more than the device.
What a block does is the same as in a launch of its call alone, see `flame.render.cuda_items`; where
nothing is added up, calls of different sizes also share the way in which the work is cut up, for
then no number depends on it.

Invariant: the words of a launch are written and read under one lock; the driver has read them when
it returns, so that no table on the device has to outlive the call.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from flame.core.device import device_index
from flame.kernel.builder import BoundKernel, Lowering
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.kernel.identity import Alike
from flame.kernel.program import Accumulate, Kernel
from flame.kernel.values import Buffer
from flame.render.cuda import render
from flame.render.cuda_geometry import geometry_of, grid_of
from flame.render.cuda_index import walk
from flame.render.cuda_items import most_items
from flame.runtime.cuda import modules, streams
from flame.runtime.cuda.driver import driver


@dataclass(frozen=True)
class SharedKernel:
    """A kernel of a call. One launch can serve those that are equal: they are of one ``kind``."""

    kind: int
    bound: BoundKernel = field(compare=False)
    geometry: Geometry = field(compare=False)  # of a launch for this call alone


@dataclass(frozen=True)
class Call:
    """One of many calls: its number among them, and its kernels, which run in order.

    elements: that it writes.
    """

    number: int
    kernels: tuple[SharedKernel, ...]
    elements: int


class GroupedLaunch:
    """One launch for a kernel of several calls on one device.

    operands: for each operand of the kernel the number of its column. A column has a pointer for
    each of all calls, those too that other launches serve; or it is the number that they share.
    """

    def __init__(
        self,
        part: Sequence[tuple[int, BoundKernel]],
        operands: Sequence[int],
        geometry: Geometry,
        launch: KernelLaunch,
        device: int,
    ) -> None:
        self.device, self.symbol, self.block = device, launch.symbol, launch.block
        kernel, count, items = part[0][1].kernel, len(part), geometry.items
        self._pick = _picker([number for number, _ in part])
        kinds = list(zip(kernel.operands, operands, strict=True))
        self._pointers = [column for x, column in kinds if isinstance(x, Buffer)]
        self._scalars = [column for x, column in kinds if not isinstance(x, Buffer)]
        first = [0]
        for _, bound in part:
            first.append(first[-1] + grid_of(geometry, kernel, bound.extent))
        self.blocks = first[-1]
        sizes = zip(*[(*bound.sizes, bound.extent) for _, bound in part], strict=True)
        words = [0] * (items * len(self._pointers))
        for column in sizes:
            words += [*column, *[0] * (items - count)]
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
        """Queue it on the device's current stream."""
        driver().use(self.device)
        stream = streams.current_handle(self.device)
        table, count = self._table, self._count
        with self._lock:
            for place, column in enumerate(self._pointers):
                start = place * self._items
                table[start : start + count] = self._pick(columns[column])
            for place, column in enumerate(self._scalars):
                number = columns[column]
                if number.__class__ is float:
                    self._floats[place] = number
                else:
                    self._numbers[place] = number
            grid = (self.blocks, 1, 1)
            self._launch(self._function, grid, self.block, 0, stream, self._arguments)


def _picker(numbers: Sequence[int]) -> Callable[[Sequence[int]], Any]:
    """What takes the words of these calls out of a column, as a tuple."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    (only,) = numbers
    return lambda column: (column[only],)


_kinds: dict[Any, int] = {}  # what makes kernels equal -> a number, as it is slow to compare
_numbers = itertools.count()


def kernels_to_group(lowering: Lowering) -> tuple[SharedKernel, ...] | None:
    """The kernels of a call, if launches can serve it together with others: no table or error slot
    belongs to it, and no scratch memory outside of the multiprocessors."""
    if lowering.host is not None or lowering.constants:
        return None
    found = [bound for bound in lowering.steps if isinstance(bound, BoundKernel) and bound.extent]
    if len(found) < sum(bool(bound.extent) for bound in lowering.steps):
        return None
    roles = {ref.role for bound in found for ref in bound.operands}
    if not roles <= {"input", "output", "temporary"}:
        return None
    shared = tuple(_shared_kernel(bound) for bound in found)
    return shared if all(each.geometry.shared for each in shared) else None


def _shared_kernel(bound: BoundKernel) -> SharedKernel:
    geometry = geometry_of(bound)
    free = _is_free(bound.kernel) and not geometry.held  # rows that registers hold have a length
    key = Alike.to(bound.kernel), bound.operands, None if free else geometry
    return SharedKernel(_kinds.setdefault(key, next(_numbers)), bound, geometry)


def _is_free(kernel: Kernel) -> bool:
    """Whether results do not depend on the threads that share the work."""
    if kernel.scratch or kernel.local:
        return False
    return not any(isinstance(s, Accumulate) for s in walk(kernel.body.body))


def grouped(
    calls: Sequence[Call], device: str, column: Callable[[str, int], int]
) -> list[GroupedLaunch]:
    """The launches of calls on a device, in order. column: of a role and a position."""
    parts: list[tuple[list[tuple[int, BoundKernel]], KernelLaunch, Geometry]] = []
    for stage in range(max(len(call.kernels) for call in calls)):
        alike: dict[SharedKernel, list[Call]] = {}
        for call in calls:
            if stage < len(call.kernels):
                alike.setdefault(call.kernels[stage], []).append(call)
        for kernel, each in alike.items():
            geometry, most = _geometry(each, stage), most_items(kernel.bound.kernel)
            for start in range(0, len(each), most):
                part = [(c.number, c.kernels[stage].bound) for c in each[start : start + most]]
                # rounded up, so that models with other numbers of parameters share the text
                items = min(1 << (len(part) - 1).bit_length(), most)
                sized = replace(geometry, items=items)
                parts.append((part, _rendered(kernel, sized), sized))
    index = device_index(device)
    modules.load_many(index, [(made.text, made.symbol, made.shared) for _, made, _ in parts])
    launches = []
    for part, made, geometry in parts:
        operands = [column(ref.role, ref.position) for ref in part[0][1].operands]
        launches.append(GroupedLaunch(part, operands, geometry, made, index))
    return launches


def _geometry(alike: Sequence[Call], stage: int) -> Geometry:
    """That of the call which writes most, with room for the offsets of all."""
    largest = max(alike, key=lambda call: call.elements).kernels[stage].geometry
    return replace(largest, wide=any(call.kernels[stage].geometry.wide for call in alike))


@functools.lru_cache(maxsize=1024)
def _rendered(kernel: SharedKernel, geometry: Geometry) -> KernelLaunch:
    return render(kernel.bound, geometry)
