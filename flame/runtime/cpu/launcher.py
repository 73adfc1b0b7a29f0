"""The `launch` builtin, and how builtins are made.

Invariant: what Python reads of them lives as long as the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from flame.runtime.cpu.pool import pool

_METH_FASTCALL = 0x0080
_DOC = b"""launch(address, n, grain, *arguments)
--

Run the kernel at `address` over the iterations 0..n-1, in chunks of `grain` on the worker pool.

The kernel is void(i64 *arguments, i64 begin, i64 end, i64 worker). Integers (pointers, sizes) and
bools become i64, floats the bits of a double. With n <= grain it runs at once in the calling
thread; else the GIL is released and the calling thread is worker 0 of the pool. Where another
thread is using the pool, the whole range runs in the calling thread as one chunk, so a kernel must
not rely on the chunks it gets."""


class _MethodDefinition(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_definitions: list[_MethodDefinition] = []


def builtin(name: bytes, address: int, doc: bytes) -> Callable[..., Any]:
    """A function of Python from machine code of CPython's type _PyCFunctionFast."""
    definition = _MethodDefinition(name, address, _METH_FASTCALL, doc)
    _definitions.append(definition)
    # Builtins may be called after this module is gone; the definition must not go with it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(definition))
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        ("PyCFunction_NewEx", ctypes.pythonapi)
    )
    built: Callable[..., Any] = make(ctypes.addressof(definition), None, None)
    return built


@cache
def launcher() -> Callable[..., None]:
    """`launch(address, n, grain, *arguments)`, made from machine code at the first call."""
    return builtin(b"launch", pool().launch_address, _DOC)
