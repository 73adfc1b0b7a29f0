"""Running a function with stand-ins for tensors, so that what it does becomes one program."""

from flame.recording.function import CompiledFunction, compile

__all__ = ["CompiledFunction", "compile"]
