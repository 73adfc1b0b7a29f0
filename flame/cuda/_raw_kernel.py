"""RawKernel: a CUDA C++ kernel of the user's own, on tensors."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from flame.autograd.mode import mode
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    GradientError,
    TraceError,
)
from flame.core.handle import is_tensor
from flame.cuda._signature import Parameter, parameters
from flame.ops.op import interpreter
from flame.runtime.cuda import modules
from flame.runtime.cuda.devices import current_device, device_index
from flame.runtime.cuda.driver import Dim, driver
from flame.runtime.cuda.nvrtc import with_options
from flame.runtime.cuda.streams import current_handle

_MOST_THREADS = 1024  # of a block, on all devices
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)


class RawKernel:
    """A kernel written in CUDA C++, compiled at its first use and cached on disk.

        kernel = flame.cuda.RawKernel(r'''
        extern "C" __global__ void axpy(const float* x, float* y, float a, long long n) {
            long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
            if (i < n) y[i] += a * x[i];
        }''', "axpy")
        kernel(((n + 255) // 256,), (256,), (x, y, 2.0, n))

    code: text that defines ``extern "C" __global__ void name(...)``; ``cuda_fp16.h`` and
    ``cuda_bf16.h`` can be included. options: NVRTC's, such as ``-DN=4`` or ``--use_fast_math``
    (products and sums are contracted unless ``--fmad=false``). strided: also take tensors that are
    not contiguous, whose strides the kernel must know.

    Arguments are checked against the parameters in the text. Pointers take tensors on one device,
    and those that are not to ``const`` are written. Numbers take NumPy's scalars of exactly their
    type, or Python's, converted; where the text hides a type, an int is int64 and a float float64.
    The kernel runs on the current stream, and has no derivative: see `raw_op`.
    """

    def __init__(
        self, code: str, name: str, options: Sequence[str] = (), *, strided: bool = False
    ) -> None:
        if isinstance(options, str) or any(str(o).split() != [o] for o in options):
            raise ArgumentError(
                f"RawKernel {name}: options are NVRTC's, each a string without spaces as '-DN=4', "
                f"got {options!r}"
            )
        self.name, self.code, self.options = name, code, tuple(options)
        self.strided = strided
        contraction = () if any("fmad" in o for o in options) else ("--fmad=true",)
        self.text = with_options(code, (*contraction, *options))
        self.parameters = parameters(code, name)
        self._sizes: dict[int, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        return f"<flame.cuda.RawKernel {self.name}>"

    def compile(self, device: Any = None) -> None:
        """Compile and load it for a device (the current one) now. Raises CompileError."""
        self._function(device_index(device), 0)

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], *, shared_mem: int = 0) -> None:
        """Launch it. grid, block: a number or up to three. shared_mem: bytes of dynamic shared
        memory. Raises ArgumentError, DTypeError and DeviceError for arguments that do not fit, and
        GradientError for tensors with a history, which the kernel would cut."""
        self._refuse_recording()
        blocks, threads = self.dims(grid, block)
        tensors = [a for a in args if is_tensor(a)]
        device = self._device(tensors)
        written = self._check(args)
        function = self._function(device, shared_mem)
        packed = self._packed(args, self._sizes[function])
        driver().use(device)
        stream = current_handle(device)
        driver().launch(
            function, blocks, threads, shared_mem, stream, ctypes.addressof(packed.addresses)
        )
        for tensor in tensors:
            tensor.storage.record_stream(stream)  # no-op on the stream that it is of
        for tensor in written:
            tensor.storage.version += 1

    def _function(self, device: int, shared: int) -> int:
        function = modules.load(device, self.text, self.name, shared)
        if function not in self._sizes:
            self._sizes[function] = driver().parameter_sizes(function)
        return function

    def _refuse_recording(self) -> None:
        current: Any = interpreter()
        if current.recording and getattr(current, "thread", None) == threading.get_ident():
            raise TraceError(
                f"RawKernel {self.name} cannot be a part of a function under flame.compile, which "
                "records operations only; make one of it by flame.cuda.raw_op"
            )

    def dims(self, grid: Any, block: Any) -> tuple[Dim, Dim]:
        """Grid and block as three numbers each. Raises ArgumentError."""
        blocks, threads = self._dims("grid", grid), self._dims("block", block)
        if threads[0] * threads[1] * threads[2] > _MOST_THREADS:
            raise ArgumentError(
                f"RawKernel {self.name}: block {threads} has more than {_MOST_THREADS} threads"
            )
        if any(size > most for size, most in zip(blocks, _MOST_BLOCKS, strict=True)):
            raise ArgumentError(f"RawKernel {self.name}: grid {blocks} exceeds {_MOST_BLOCKS}")
        return blocks, threads

    def _dims(self, what: str, given: Any) -> Dim:
        sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        whole = all(isinstance(s, (int, np.integer)) and s > 0 for s in sizes)
        if not whole or not 1 <= len(sizes) <= 3:
            raise ArgumentError(
                f"RawKernel {self.name}: {what} is one to three positive integers, got {given!r}"
            )
        x, y, z = (*map(int, sizes), 1, 1)[:3]
        return x, y, z

    def _device(self, tensors: Sequence[Any]) -> int:
        names = list(dict.fromkeys(t.type.device for t in tensors))
        if not names:
            return current_device()
        if len(names) > 1 or names[0] == "cpu":
            raise DeviceError(
                f"RawKernel {self.name} needs its tensors on one CUDA device, got {names}; move "
                "them by .to('cuda')"
            )
        return device_index(names[0])

    def check_count(self, args: Sequence[Any]) -> None:
        """Raises ArgumentError where the text declares another number of parameters."""
        declared = self.parameters
        if declared is not None and len(args) != len(declared):
            raise ArgumentError(
                f"RawKernel {self.name} takes {len(declared)} arguments "
                f"({', '.join(p.text for p in declared)}), got {len(args)}"
            )

    def _check(self, args: Sequence[Any]) -> list[Any]:
        """The tensors that the kernel may write."""
        declared = self.parameters
        self.check_count(args)
        written = []
        for position, a in enumerate(args):
            parameter = None if declared is None else declared[position]
            if is_tensor(a):
                self._check_tensor(position, a, parameter)
                if parameter is None or parameter.written:
                    written.append(a)
            elif parameter is not None and parameter.pointer and a is not None:
                raise DTypeError(
                    f"RawKernel {self.name}: argument {position} ({parameter.text}) takes a tensor "
                    f"or None, got {type(a).__name__}"
                )
        return written

    def _check_tensor(self, position: int, tensor: Any, parameter: Parameter | None) -> None:
        where = f"RawKernel {self.name}: argument {position}"
        if parameter is not None:
            where += f" ({parameter.text})"
            if not parameter.pointer:
                raise DTypeError(f"{where} takes a number, got a tensor")
            if parameter.dtype not in (None, tensor.dtype):
                raise DTypeError(f"{where} takes {parameter.dtype}, got {tensor.dtype}")
        if not (self.strided or tensor.type.contiguous):
            raise ArgumentError(
                f"{where} has shape {tensor.shape} and strides {tensor.type.strides}; pass "
                "tensor.contiguous(), or make the kernel with strided=True and pass the strides"
            )
        if tensor.requires_grad and mode.enabled:
            raise GradientError(
                f"{where} requires grad, and a RawKernel has no derivative; make a function of it "
                "by flame.cuda.raw_op with a vjp, pass x.detach(), or call it under flame.no_grad()"
            )

    def _packed(self, args: Sequence[Any], sizes: tuple[int, ...]) -> _Packed:
        if len(args) != len(sizes):
            raise ArgumentError(
                f"RawKernel {self.name} takes {len(sizes)} arguments, got {len(args)}"
            )
        values = []
        for position, (a, size) in enumerate(zip(args, sizes, strict=True)):
            declared = None if self.parameters is None else self.parameters[position]
            value = self._bytes(position, a, declared)
            if len(value) != size:
                raise DTypeError(
                    f"RawKernel {self.name}: argument {position} has {len(value)} bytes "
                    f"({type(a).__name__}), the kernel's parameter {size}; pass a NumPy scalar of "
                    "its type, as numpy.int32(n)"
                )
            values.append(value)
        return _Packed(values)

    def _bytes(self, position: int, a: Any, declared: Parameter | None) -> bytes:
        if is_tensor(a):
            return int(a.pointer).to_bytes(8, "little")
        if a is None:
            return bytes(8)
        where = f"RawKernel {self.name}: argument {position}"
        wanted = None if declared is None else declared.number
        if isinstance(a, np.generic):
            if wanted not in (None, a.dtype.name):
                raise DTypeError(f"{where} takes {wanted}, got numpy.{a.dtype.name}")
            return a.tobytes()
        if not isinstance(a, (bool, int, float)):
            raise DTypeError(f"{where}: tensors, numbers and None are taken, got {a!r}")
        if wanted is None:
            wanted = {bool: "bool", int: "int64"}.get(type(a), "float64")
        return _converted(where, a, wanted)


def _converted(where: str, a: Any, wanted: str) -> bytes:
    """A number of Python as the type that a parameter has."""
    kind = np.dtype(ml_dtypes.bfloat16 if wanted == "bfloat16" else wanted)
    if kind.kind in "iu":
        if isinstance(a, float):
            raise DTypeError(f"{where} takes {wanted}, got the float {a!r}")
        limits = np.iinfo(kind)
        if not limits.min <= a <= limits.max:
            raise DTypeError(f"{where} takes {wanted}, which {a} does not fit")
    return np.asarray(a).astype(kind).tobytes()


class _Packed:
    """Values at aligned places, and the array of their addresses."""

    def __init__(self, values: Sequence[bytes]) -> None:
        places, end = [], 0
        for value in values:
            places.append(end)
            end += -(-len(value) // 16) * 16
        self.content = ctypes.create_string_buffer(end + 16)
        start = ctypes.addressof(self.content)
        for place, value in zip(places, values, strict=True):
            ctypes.memmove(start + place, value, len(value))
        self.addresses = (ctypes.c_void_p * max(len(values), 1))(*(start + p for p in places))
