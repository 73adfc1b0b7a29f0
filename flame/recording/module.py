"""A compiled module: the same attributes, parameters and modes, another way of being called."""

from __future__ import annotations

from typing import Any

from flame.recording.function import CompiledFunction


def compiled_module(module: Any) -> Any:
    """A module that shares everything with ``module``, and runs compiled.

    It is an instance of a subclass with the same ``__dict__``, so a change of either (weights,
    mode, hooks) is a change of both, and a state_dict has the same keys.
    """
    kind = type(module)
    if issubclass(kind, _Compiled):
        return module
    namespace = {
        "_compiled_call": CompiledFunction(module.__call__),
        "_uncompiled": (module,),  # in a tuple, or it would look like a part of the module
        "__doc__": kind.__doc__,
    }
    made: Any = object.__new__(type(f"Compiled{kind.__name__}", (_Compiled, kind), namespace))
    object.__setattr__(made, "__dict__", vars(module))
    return made


class _Compiled:
    """What a compiled module adds to its class."""

    _compiled_call: CompiledFunction
    _uncompiled: tuple[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self)._compiled_call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies, and what is unpickled, are compiled modules of their own."""
        return compiled_module, type(self)._uncompiled

    @property
    def compiled(self) -> CompiledFunction:
        """The compiled function, with its programs."""
        made: CompiledFunction = type(self)._compiled_call
        return made

    @property
    def recordings(self) -> int:
        """How many programs were made so far."""
        made: int = self.compiled.recordings
        return made

    @property
    def program(self) -> Any:
        """The program of the latest signature."""
        return self.compiled.program

    def report(self) -> str:
        """What the latest program does; see `Program.report`."""
        text: str = self.compiled.report()
        return text
