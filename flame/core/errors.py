"""Every error that FLAME raises on purpose derives from FlameError and from the builtin that a
Python user would catch.
"""


class FlameError(Exception):
    """Root of all errors raised by FLAME."""


class ShapeError(FlameError, ValueError):
    """Shapes or dimensions that an operation cannot take."""


class ArgumentError(FlameError, ValueError):
    """An argument whose value is outside what the function accepts."""


class DTypeError(FlameError, TypeError):
    """A dtype, or a type of argument, that an operation cannot take."""


class IndexRangeError(FlameError, IndexError):
    """An index outside the dimension that it addresses."""


class DataError(FlameError, ValueError):
    """A data set, an image or a label that cannot be used."""


class StateError(FlameError, RuntimeError):
    """An object that is not in the state that the call needs, or a state_dict that does not fit."""


class DeviceError(FlameError, RuntimeError):
    """A device that is missing, or tensors on devices that do not go together."""


class OutOfMemoryError(FlameError, MemoryError):
    """Memory that could not be had."""


class GradientError(FlameError, RuntimeError):
    """A backward pass that cannot be done, or whose saved tensors have changed."""


class TraceError(FlameError, RuntimeError):
    """Something that cannot be recorded into a graph."""


class CompileError(FlameError, RuntimeError):
    """A kernel that could not be generated, verified, or turned into machine code."""


class CudaError(FlameError, RuntimeError):
    """A call of the CUDA driver that failed; names the call and the status."""


class CublasError(CudaError):
    """A call of cuBLASLt that failed."""


class CudnnError(CudaError):
    """A call of cuDNN that failed."""


class CheckpointError(FlameError, OSError):
    """A checkpoint that cannot be written, found, or trusted."""


class UnsupportedError(FlameError, NotImplementedError):
    """Something that FLAME does not do, said plainly."""


class FlameWarning(FlameError, UserWarning):
    """Something that works, but not as well as the user may expect. A FlameError under -W error."""
