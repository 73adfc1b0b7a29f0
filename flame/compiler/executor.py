"""A blueprint at addresses: tables that native code runs.

Invariants: tables, arena, scratch and constants live as long as the executor; words that depend on
the call are patched by native code while the program's `busy` word is held, all others are written
here, while it is held by this thread.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from flame.compiler.blueprint import (
    ARENA,
    COPY,
    ERROR,
    ERROR_SLOT_BYTES,
    FIRST_CONSTANT,
    HOST,
    SCRATCH,
    Blueprint,
    Host,
    HostCall,
    HostOperand,
)
from flame.compiler.regions import Piece, arrange
from flame.core.errors import FlameError
from flame.core.types import TensorType
from flame.runtime.cpu import executor_text as native
from flame.runtime.cpu.executor import executor
from flame.runtime.cpu.pool import get_num_threads
from flame.runtime.storage import Storage

_POLL_SECONDS = 20e-6


class Executor:
    """Runs a blueprint. ``addresses``: of its kernels; ``state``: input number -> address.

    ``hosts``: step -> function; ``failure``: the error for (task, code).
    """

    def __init__(
        self,
        blueprint: Blueprint,
        addresses: Sequence[int],
        state: Mapping[int, int],
        hosts: Mapping[int, Host],
        failure: Callable[[int, int], FlameError],
    ) -> None:
        self.blueprint, self.addresses, self.failure = blueprint, addresses, failure
        self.native = executor()
        self.state = dict(state)
        self.hosts = hosts
        self.host_calls = {call.step: call for call in blueprint.host_calls}
        self.arena = Storage.allocate(blueprint.arena)
        self.errors = np.zeros(max(blueprint.error_slots, 1) * ERROR_SLOT_BYTES // 8, np.int64)
        self.scratch = Storage.allocate(0)
        self.table = np.zeros(max(len(blueprint.codes), 1), np.int64)
        self.header = np.zeros(native.PROGRAM_WORDS, np.int64)
        self.address = self.header.ctypes.data
        self.regions: list[Any] = []
        self.given = [i for i in range(len(blueprint.input_types)) if i not in self.state]
        count = len(self.given) + len(blueprint.results)
        self.words = np.zeros(max(count, 1), np.int64)
        self.kinds = np.zeros(max(count, 1), np.int8)
        for word, i in enumerate(self.given):
            self.kinds[word] = blueprint.input_types[i] is float
        self.header[native.COUNT] = count
        self.header[native.KINDS] = self.kinds.ctypes.data
        self.header[native.WORDS] = self.words.ctypes.data
        self._patch_list()
        self._prepare()

    # --- tables -----------------------------------------------------------------------------------

    def _patch_list(self) -> None:
        """Which words of the table are those of the call."""
        blueprint = self.blueprint
        word_of = {blueprint.first_input + i: w for w, i in enumerate(self.given)}
        for k in range(len(blueprint.results)):
            word_of[blueprint.first_result + k] = len(self.given) + k
        codes = blueprint.codes
        at = np.nonzero(np.isin(codes, np.fromiter(word_of, np.int32, len(word_of))))[0]
        patches = np.empty((len(at), 3), np.int64)
        patches[:, 0] = self.table.ctypes.data + at * 8
        patches[:, 1] = [word_of[int(c)] for c in codes[at]]
        patches[:, 2] = blueprint.offsets[at]
        self.patches = patches
        self.header[native.PATCHES] = patches.ctypes.data
        self.header[native.PATCH_COUNT] = len(at)

    def _prepare(self) -> None:
        """Write all that depends on the number of threads, or on addresses."""
        self.threads = threads = get_num_threads()
        blueprint = self.blueprint
        layout = arrange(blueprint.steps, threads)
        if layout.scratch > self.scratch.nbytes:
            self.scratch = Storage.allocate(layout.scratch)
        self._fill(layout.scratch_offsets)
        rows = np.zeros((max(len(layout.steps), 1), native.STEP_WORDS), np.int64)
        self.regions = []
        self.first_plans = [step.members[0] for step in layout.steps]
        for row, step in zip(rows, layout.steps, strict=False):
            plan = blueprint.steps[step.members[0]]
            row[0] = step.kind
            row[1] = self._kernel(plan.kernel)
            row[2] = self._arguments(step.members[0])
            row[3], row[4] = plan.n, plan.grain
            if step.kind == native.REGION:
                row[2], row[3] = self._region(step.chunks), len(step.chunks)
            if plan.error >= 0:
                row[5] = self.errors.ctypes.data + plan.error * ERROR_SLOT_BYTES
        self.steps, self.layout = rows, layout
        self.row_of_plan = {m: i for i, step in enumerate(layout.steps) for m in step.members}
        self.header[native.STEPS] = rows.ctypes.data
        self.header[native.STEP_COUNT] = len(layout.steps)
        self.header[native.BUILT_FOR] = threads
        # One thread now may be more at the next run.
        asked = layout if threads > 1 else arrange(blueprint.steps, 2)
        self.header[native.WIDE] = any(
            s.kind in (native.PARALLEL, native.REGION) for s in asked.steps
        )

    def _fill(self, scratch_offsets: Mapping[int, int]) -> None:
        blueprint = self.blueprint
        if not len(blueprint.codes):
            return
        bases = np.zeros(blueprint.first_result + len(blueprint.results), np.int64)
        bases[ARENA] = self.arena.pointer
        bases[ERROR] = self.errors.ctypes.data
        bases[SCRATCH] = self.scratch.pointer
        for i, array in enumerate(blueprint.constants):
            bases[FIRST_CONSTANT + i] = array.ctypes.data
        for i, pointer in self.state.items():
            bases[blueprint.first_input + i] = pointer
        self.table[:] = bases[blueprint.codes] + blueprint.offsets
        for word, offset in scratch_offsets.items():
            self.table[word] += offset

    def _kernel(self, kernel: int) -> int:
        if kernel == COPY:
            return self.native.copy
        return 0 if kernel == HOST else self.addresses[kernel]

    def _arguments(self, plan: int) -> int:
        return int(self.table.ctypes.data) + 8 * self.blueprint.steps[plan].words[0]

    def _region(self, chunks: Sequence[Sequence[Piece]]) -> int:
        """The table of a region: see `executor_text`."""
        pieces = np.array(
            [
                (
                    self._kernel(self.blueprint.steps[p.plan].kernel),
                    self._arguments(p.plan),
                    p.begin,
                    p.end,
                )
                for chunk in chunks
                for p in chunk
            ],
            np.int64,
        )
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks)]).astype(np.int64)
        head = np.array([starts.ctypes.data, pieces.ctypes.data], np.int64)
        self.regions.append((head, starts, pieces))
        return int(head.ctypes.data)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No run goes on inside."""
        while not self.native.hold(self.address):
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            self.header[native.BUSY] = 0

    def rebind(self, state: Mapping[int, int]) -> None:
        """Use other addresses for (some of) the state."""
        with self._held():
            self.state.update(state)
            self._fill(self.layout.scratch_offsets)

    # --- running ----------------------------------------------------------------------------------

    def go_on(self, status: int, words: Sequence[Any]) -> None:
        """What a run that did not simply end asks for."""
        while status:
            reason, row = status & 7, status >> 3
            if reason == native.FAILED:
                plan = self.blueprint.steps[self.first_plans[row]]
                at = plan.error * ERROR_SLOT_BYTES // 8
                code = int(self.errors[at + 1])
                self.errors[at : at + 2] = 0
                raise self.failure(plan.task, code)
            if reason == native.AT_HOST:
                status = self._host(row)
            else:
                if reason == native.MORE_THREADS:
                    with self._held():
                        self._prepare()
                else:
                    time.sleep(_POLL_SECONDS)
                status = self.native.run(self.address, *words)

    def _host(self, row: int) -> int:
        step = self.first_plans[row]
        done = False
        started = time.perf_counter_ns()
        try:
            self._call(self.host_calls[step], self.hosts[step])
            done = True
        finally:
            if not done:
                self.header[native.BUSY] = 0
        self._clock(row, started)
        return self.native.resume(self.address, row + 1)

    def _clock(self, row: int, started: int) -> None:
        if self.header[native.CLOCKS]:
            pair = (ctypes.c_int64 * 2).from_address(int(self.header[native.CLOCKS]) + 16 * row)
            pair[0], pair[1] = started, time.perf_counter_ns()

    def _call(self, call: HostCall, function: Host) -> None:
        function(
            [self._value(x) for x in call.inputs],
            [self._value(x) for x in call.outputs],
        )

    def _value(self, operand: HostOperand) -> Any:
        word = int(self.table[operand.word])
        kind = operand.type
        if kind is None:
            return None
        if isinstance(kind, TensorType):
            return array_at(word, kind)
        if kind is float:
            return float(self.table[operand.word : operand.word + 1].view(np.float64)[0])
        return kind(word)

    def timed(self, run: Callable[[], None]) -> Any:
        """Nanoseconds of each native step in one run, shape (steps, 2): begin, end."""
        clocks = np.zeros((max(len(self.layout.steps), 1), 2), np.int64)
        self.header[native.CLOCKS] = clocks.ctypes.data
        try:
            run()
        finally:
            self.header[native.CLOCKS] = 0
        return clocks[: len(self.layout.steps)]


def array_at(pointer: int, type_: TensorType) -> Any:
    """The tensor at an address as a NumPy array, without a copy."""
    nbytes = type_.span * type_.dtype.itemsize
    if nbytes == 0:
        return np.empty(type_.shape, type_.dtype.numpy)
    return Storage.borrow(pointer, nbytes, type_).as_numpy(
        type_.dtype.numpy, type_.shape, type_.strides
    )
