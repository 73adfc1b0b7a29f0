"""The builtins that run programs; `executor_text` says what a program is.

Invariant: what Python reads of them lives as long as the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from flame.runtime.cpu.executor_text import executor_text
from flame.runtime.cpu.jit import load_symbols, register_symbol
from flame.runtime.cpu.launcher import builtin
from flame.runtime.cpu.pool import pool

_RUN = b"""run(address, *words)
--

Run the program at `address`: one number for each of its arguments, one pointer for each of its
results. The GIL is released while it runs. Returns the status of `executor_text`."""
_RESUME = b"""resume(address, step)
--

Go on at a step of a program that stopped at a host step; returns the status."""

_HOLD = b"""hold(address)
--

1 where the program was idle; nobody else runs it until its `busy` word is 0 again. Else 0."""

register_symbol("flame_pool_state", lambda: pool().state_address)


@dataclass(frozen=True)
class Executor:
    """``run``, ``resume``, ``hold``, and the address of the kernel flame_copy."""

    run: Callable[..., int]
    resume: Callable[..., int]
    hold: Callable[[int], int]
    copy: int


@cache
def executor() -> Executor:
    """The process's executor, made from machine code at the first call."""
    names = ("flame_program_run", "flame_program_resume", "flame_program_hold", "flame_copy")
    run, resume, hold, copy = load_symbols(executor_text(), names)
    return Executor(
        builtin(b"run", run, _RUN),
        builtin(b"resume", resume, _RESUME),
        builtin(b"hold", hold, _HOLD),
        copy,
    )
