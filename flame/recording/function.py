"""flame.compile: a function that is recorded once for each signature and then runs as one program.

Invariant: a call either runs a program whose guards hold, or records anew; nothing stale runs.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flame.autograd.mode import mode
from flame.core import dtypes
from flame.core.autocast import autocast
from flame.core.errors import ArgumentError, FlameWarning, StateError
from flame.core.log import log
from flame.core.precision import get_float32_matmul_precision
from flame.ops.op import Stale, interpreter
from flame.recording.inspecting import profiled, replayed
from flame.recording.running import Step
from flame.recording.step import record, undo
from flame.recording.structure import signature
from flame.tensor import Tensor

MAX_SIGNATURES = 64  # programs that one function keeps; the one that was used longest ago goes
_recording = threading.Lock()


class CompiledFunction:
    """What `flame.compile` returns: call it as the function itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.steps: OrderedDict[Any, list[Step]] = OrderedDict()
        self.recordings = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return self.function(*args, **kwargs)
        # anomaly mode looks at every gradient, and checkpoints keep what they will of the tape
        if mode.anomaly or mode.saver is not None:
            log("compile", f"{self!r} runs uncompiled, in anomaly mode or inside of a checkpoint")
            return self.function(*args, **kwargs)
        key, tensors = self._key(args, kwargs)
        for step in tuple(self.steps.get(key, ())):
            if step.holds():
                if len(self.steps) > 1:
                    self._use(key)
                try:
                    return step.again(tensors)
                except Stale:
                    self._drop(key, step)
                    break
        step = self._record(key, args, kwargs, tensors)
        return step.first(tensors)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A method: each instance has programs of its own."""
        if instance is None:
            return self
        name = f"_compiled_{self.function.__name__}"
        bound = vars(instance).get(name)
        if bound is None:
            bound = CompiledFunction(self.function.__get__(instance, owner))
            object.__setattr__(instance, name, bound)
        return bound

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        return f"<compiled {name}, {self.recordings} recordings>"

    @property
    def program(self) -> Any:
        """The program of the latest signature. Raises StateError before the first call."""
        return self._latest().program

    @property
    def programs(self) -> list[Any]:
        """All programs, the latest last."""
        return [step.program for steps in self.steps.values() for step in steps]

    def report(self) -> str:
        """What the latest program does; see `Program.report`."""
        text: str = self.program.report()
        return text

    @property
    def graph(self) -> Any:
        """What was recorded for the latest signature, before any pass."""
        return self._latest().recording.graph

    def profile(self, *args: Any, runs: int = 10, **kwargs: Any) -> Any:
        """Where the time of a call with these arguments goes: `str` of the result is a table.

        The function was called with such arguments before. State is as before afterwards.
        """
        step, tensors = self._found(args, kwargs)
        return profiled(step, tensors, runs)

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call task by task and compare each with what its operations mean.

        Names the first operation that differs, or that makes a NaN or an infinity, with the line
        that called it. The function was called with such arguments before; nothing is changed.
        """
        step, tensors = self._found(args, kwargs)
        return replayed(step, tensors)

    def _latest(self) -> Step:
        if not self.steps:
            raise StateError("a compiled function has no program before its first call")
        return next(reversed(self.steps.values()))[-1]

    def _found(self, args: Any, kwargs: Any) -> tuple[Step, list[Tensor]]:
        key, tensors = self._key(args, kwargs)
        for step in self.steps.get(key, ()):
            if step.holds():
                return step, tensors
        raise StateError(
            "no program has been recorded for these arguments; call the function first"
        )

    def _key(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        """What selects a program, and the tensors among the arguments."""
        tensors: list[Tensor] = []
        key = (
            signature(args, tensors),
            signature(kwargs, tensors) if kwargs else None,
            mode.enabled,
            dtypes.get_default_dtype(),
            get_float32_matmul_precision(),
            autocast.settings,
            autocast.on,
        )
        return key, tensors

    def _record(self, key: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Step:
        started = time.perf_counter()
        with _recording:
            recording = record(self.function, args, kwargs, tensors)
            recorded = time.perf_counter()
            try:
                step = Step(recording)
            except BaseException:
                undo(recording.repeated)
                raise
            self.recordings += 1
            self.steps.setdefault(key, []).append(step)
            self.steps.move_to_end(key)
        log(
            "compile",
            f"{self!r}: {len(recording.graph.nodes)} operations recorded in "
            f"{recorded - started:.3f} s, compiled in {time.perf_counter() - recorded:.3f} s",
        )
        self._bound()
        return step

    def _use(self, key: Any) -> None:
        """This signature is the latest that was used."""
        with suppress(KeyError):  # another thread has dropped it
            self.steps.move_to_end(key)

    def _drop(self, key: Any, step: Step) -> None:
        with suppress(KeyError, ValueError):  # another thread has
            self.steps[key].remove(step)

    def _bound(self) -> None:
        """Keep at most `MAX_SIGNATURES` programs."""
        while sum(map(len, self.steps.values())) > MAX_SIGNATURES:
            oldest = next(iter(self.steps))
            self.steps[oldest].pop(0)
            if not self.steps[oldest]:
                del self.steps[oldest]
            warnings.warn(
                f"{self!r} was called with more than {MAX_SIGNATURES} signatures; the program that "
                "was made first is dropped. Shapes and Python numbers among the arguments select "
                "programs: pad to few shapes, and pass changing numbers as tensors",
                FlameWarning,
                stacklevel=4,
            )


def is_recording() -> bool:
    """Whether this thread records a step at present."""
    current: Any = interpreter()
    return bool(current.recording and current.thread == threading.get_ident())


def compile(function: Any = None) -> Any:
    """A function or module that runs as one compiled program, recorded at its first call.

    function: a training step, an inference function, a method, or an `nn.Module`; it may be used
    as a decorator. Everything is recorded: forward, backward, gradient clipping, optimizer and
    schedule, random numbers, running statistics. Tensors that it reaches from outside are state,
    read and written where they are. Arguments: nested tuples, lists and dicts of tensors; a new
    shape, dtype or Python value among them is a new signature, and is recorded again.

    Raises TraceError, with the line of your code, for what cannot be recorded: the value of a
    tensor, a branch or a shape that depends on it, a change of Python's own data. A call that
    raises leaves step counts, schedules and the random state as they were.

    Numbers that Python itself makes in the step (random.random(), time.time()) are those of the
    recording, and so are arrays that NumPy makes there; draw by flame.rand, or hand them in.
    """
    if isinstance(function, CompiledFunction):
        return function
    if not callable(function):
        raise ArgumentError(f"flame.compile takes a function or a module, got {function!r}")
    if hasattr(function, "forward") and hasattr(function, "parameters"):
        return _compiled_module(function)
    return CompiledFunction(function)


def _compiled_module(module: Any) -> Any:
    from flame.recording.module import compiled_module

    return compiled_module(module)
