"""One operation of eager execution on a GPU.

Invariant: everything is queued on the current stream of the operands' device; nothing waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from flame.compiler.gpu.blueprint import bits_of
from flame.compiler.gpu.steps import load, placed, specs_of
from flame.core.device import device_index
from flame.core.errors import FlameError, UnsupportedError
from flame.kernel.builder import Lowering
from flame.runtime.cuda import errors, streams
from flame.runtime.cuda.driver import driver
from flame.runtime.cuda.transfer import copy
from flame.runtime.storage import Storage


class GpuCall:
    """A lowering on one device. ``failure(code)``: the error for a number in the error slot."""

    def __init__(
        self,
        name: str,
        lowering: Lowering,
        device: str,
        failure: Callable[[int], FlameError] | None,
    ) -> None:
        if lowering.host is not None:
            raise UnsupportedError(
                f"{name} has no kernel for a GPU; compute it on the CPU: x.cpu()"
            )
        self.device, self.index = device, device_index(device)
        driver().use(self.index)
        self.specs = specs_of(lowering.steps, by_pointer=False)
        self.steps = load(self.specs, self.index)
        self.temporaries = lowering.temporaries
        self.constants = [on_device(array, device) for array in lowering.constants]
        operands = [r for spec in self.specs for r in spec.operands if r is not None]
        checked = any(r.role == "error" for r in operands)
        self.slot = None
        if checked:
            assert failure is not None, name
            self.slot = errors.error_slot(self.index, failure)

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any], *, skip: int = 0) -> None:
        """Queue the steps from number ``skip`` on, over tensors and numbers."""
        device = driver()
        device.use(self.index)
        stream = streams.current_handle(self.index)
        temporaries = [Storage.allocate(n, self.device) for n in self.temporaries]
        kept: list[Storage] = []

        def word(role: str, position: int, *, by_pointer: bool) -> int:
            if role == "input":
                x = inputs[position]
                if x is None:
                    return 0
                if hasattr(x, "pointer"):
                    return int(x.pointer)
                return self._number(x, kept, stream) if by_pointer else bits_of(x)
            if role == "output":
                return int(outputs[position].pointer)
            if role == "temporary":
                return int(temporaries[position].pointer)
            if role == "constant":
                return int(self.constants[position].pointer)
            assert self.slot is not None
            return int(self.slot.pointer)

        for spec, step in zip(self.specs[skip:], self.steps[skip:], strict=True):
            words = [
                0 if r is None else word(r.role, r.position, by_pointer=spec.by_pointer)
                for r in spec.operands
            ]
            scratch = Storage.allocate(step.scratch, self.device) if step.scratch else None
            placed(step, words, self.device).enqueue(
                words, 0 if scratch is None else scratch.pointer, stream
            )

    def _number(self, x: Any, kept: list[Storage], stream: int) -> int:
        """The address of a word on the device that holds a number."""
        made = Storage.allocate(8, self.device)
        kept.append(made)
        word = ctypes.c_int64(bits_of(x))
        driver().copy_to_device(made.pointer, ctypes.addressof(word), 8, stream)
        return made.pointer


def on_device(array: Any, device: str) -> Storage:
    """A copy of a contiguous array in a device's memory."""
    made = Storage.allocate(array.nbytes, device)
    if array.nbytes:
        source = Storage.borrow(array.ctypes.data, array.nbytes, array)
        copy(made, made.pointer, source, source.pointer, array.nbytes)
    return made
