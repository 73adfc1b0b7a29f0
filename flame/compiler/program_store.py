"""Whole programs on disk: a second start lowers, renders and compiles nothing.

Invariant: an entry is complete, checked and of this very FLAME and machine (its key says so), or it
is a miss. Functions are not kept: what a task's error or host call needs is made from its op again.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flame.compiler.blueprint import Blueprint, Host
from flame.compiler.schedule.task import Schedule, Task
from flame.core.errors import FlameError
from flame.core.log import log
from flame.core.types import TensorType
from flame.graph import Node, Symbol
from flame.ops.op import OPS, Types
from flame.runtime.cpu.cache import DiskCache, Entry, default_directory

_COMPRESSION = 1
# What reading an entry of another format may raise.
_UNREADABLE = (
    pickle.UnpicklingError, zlib.error, AttributeError, ImportError, EOFError, ValueError,
    TypeError, KeyError, IndexError,
)  # fmt: skip


@dataclass(frozen=True)
class OpCall:
    """A call of a declared op, from which its error or its host function is made."""

    name: str
    types: Types
    outputs: tuple[TensorType, ...]
    attributes: dict[str, Any]

    def failure(self, code: int) -> FlameError:
        make = OPS[self.name].failure
        assert make is not None
        return make(code, self.types)

    def host(self) -> Host:
        made = OPS[self.name].lower(self.types, self.outputs, **self.attributes).host
        assert made is not None
        return made


@dataclass(frozen=True)
class KeptProgram:
    """All of a program but addresses. results: (symbol's name, type, bytes)."""

    blueprint: Blueprint
    results: tuple[tuple[str, TensorType, int], ...]
    output_types: tuple[TensorType | type, ...]
    failing: dict[int, OpCall]  # by task
    hosts: dict[int, OpCall]  # by step

    def result_types(self) -> tuple[tuple[Symbol, int], ...]:
        return tuple((Symbol(name, type_), nbytes) for name, type_, nbytes in self.results)

    def failures(self) -> Mapping[int, Callable[[int], FlameError]]:
        return {t: partial(OpCall.failure, call) for t, call in self.failing.items()}

    def host_functions(self) -> dict[int, Host]:
        return {step: call.host() for step, call in self.hosts.items()}


def keepable(
    schedule: Schedule, blueprint: Blueprint, results: tuple[tuple[Symbol, int], ...]
) -> KeptProgram | None:
    """The program as the disk keeps it; None where it depends on a function that has no name."""
    failing = failing_calls(schedule)
    if failing is None:
        return None
    hosts: dict[int, OpCall] = {}
    for host in blueprint.host_calls:
        call = _one(list(schedule.tasks[host.task].nodes), failure=False)
        if call is None:
            _refuse(schedule.tasks[host.task])
            return None
        hosts[host.step] = call
    named = []
    for symbol, nbytes in results:
        assert isinstance(symbol.type, TensorType)
        named.append((symbol.name, symbol.type, nbytes))
    outputs = tuple(s.type for s in schedule.graph.outputs)
    return KeptProgram(blueprint, tuple(named), outputs, failing, hosts)


def failing_calls(schedule: Schedule) -> dict[int, OpCall] | None:
    """By task, the calls from which errors are made; None where one has no name."""
    failing: dict[int, OpCall] = {}
    for t, task in enumerate(schedule.tasks):
        if task.failure is not None:
            call = _one([n for n in task.nodes if n.op.failure is not None], failure=True)
            if call is None:
                _refuse(task)
                return None
            failing[t] = call
    return failing


def _refuse(task: Task) -> None:
    log("cache", f"this program is not kept: task {task.name} is made from ops without a name")


def _one(nodes: list[Node], *, failure: bool) -> OpCall | None:
    if len(nodes) != 1:
        return None
    (node,) = nodes
    known = OPS.get(node.op.name)
    same = known is node.op or (failure and getattr(known, "failure", None) is node.op.failure)
    if not same:
        return None
    outputs = tuple(s.type for s in node.outputs if isinstance(s.type, TensorType))
    return OpCall(node.op.name, node.types, outputs, dict(node.attributes))


def _disk() -> DiskCache:
    return DiskCache(default_directory() / "programs")


def write(key: str, kept: Any) -> bool:
    """Keep a program under a key; whether that could be done."""
    try:
        data = pickle.dumps(kept, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as reason:
        log("cache", f"this program is not kept: {reason}")
        return False
    _disk().write(key, Entry(zlib.compress(data, _COMPRESSION), ()))
    log("cache", lambda: f"kept program {key[:12]} of {len(data)} bytes")
    return True


def read(key: str) -> Any:
    """The program under a key, or None."""
    entry = _disk().read(key)
    if entry is None:
        log("cache", f"no program {key[:12]}")
        return None
    try:
        kept = pickle.loads(zlib.decompress(entry.machine_code))
    except _UNREADABLE as reason:
        log("cache", f"program {key[:12]} cannot be read: {reason!r}")
        return None
    return kept
