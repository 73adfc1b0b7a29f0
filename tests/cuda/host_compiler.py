"""CUDA C++ texts compiled for the host by g++, many at a time, with `cuda_host.h` in front.

Invariant: a library is named by a digest of all that goes into it (texts, headers, compiler), so
one that is there need not be made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.core.errors import CompileError

HERE = Path(__file__).parent
PARTS = ("cuda_host.h", "cuda_host_numbers.h", "host_compiler.py")
OPTIONS = (
    "-std=gnu++17", "-O0", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-msse4.1",
    "-U_FORTIFY_SOURCE", "-fPIC", "-w",
)  # fmt: skip

_KERNEL = re.compile(
    r"__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\([^;{]*?\)\s*)?(?:void\s+)?(\w+)\s*\("
)
_WAITS = re.compile(r"\b__(?:sync\w+|shfl\w*|ballot\w*|any\w*|all\w*|match\w*)\b")
_DYNAMIC = re.compile(
    r"^(?!\s*#)(.*)\bextern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w\s]+?)\s*(\w+)\[\];",
    re.MULTILINE,
)
_BOUND = 'extern "C" char'  # where the linker puts the ends of a text's static shared memory
_WEAK = '__attribute__((weak, visibility("hidden")))'
_JOINED = re.compile(r"^namespace (flame_text_\d+) \{$", re.MULTILINE)  # of `modules.join`
DEFINE = re.compile(r"^\s*#\s*define\s+(\w+)", re.MULTILINE)


def kernels_of(text: str) -> list[str]:
    """Names of the kernels in a text."""
    return list(dict.fromkeys(_KERNEL.findall(text)))


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"flame-cuda-on-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def compiler_identity() -> str:
    """Changes whenever a text might give something else."""
    try:
        said = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError("the emulation of CUDA needs g++; install it") from error
    parts = "".join((HERE / name).read_text() for name in PARTS)
    return hashlib.sha256((said.stdout + parts + str(OPTIONS)).encode()).hexdigest()[:16]


def unit_of(texts: Sequence[str]) -> str:
    """One C++ file of many texts, each in a namespace of its own, and what launches its kernels."""
    parts = ['#include "cuda_host.h"\n']
    for number, text in enumerate(texts):
        space = f"text_{number}"
        body = re.sub(r"^\s*#\s*include\s*[<\"].*$", "", text, flags=re.MULTILINE)
        body = re.sub(r'\bextern\s+"C"', "", body)
        body = _JOINED.sub(r"inline namespace \1 {", body)  # what extern "C" does for launchers
        body = _DYNAMIC.sub(r"\1\2* \3 = (\2*)flame_host_dynamic_shared();", body)
        parts.append(
            "#undef __shared__\n"
            f'#define __shared__ static __attribute__((section("shared_{space}")))\n'
            f"{_BOUND} __start_shared_{space}[] {_WEAK};\n"
            f"{_BOUND} __stop_shared_{space}[] {_WEAK};\n"
            f'namespace {{ namespace {space} {{\n#line 1 "{space}"\n{body}\n}} }}\n'
        )
        waits = bool(_WAITS.search(text))
        parts += [_launcher(space, name, waits=waits) for name in kernels_of(text)]
        parts += [f"#undef {name}\n" for name in dict.fromkeys(DEFINE.findall(text))]
    return "".join(parts)


def _launcher(space: str, name: str, *, waits: bool) -> str:
    return (
        f'extern "C" int launch_{name}(const flame::Launch* l, void** words, char* error) {{\n'
        f"  return flame::run(l, {int(waits)}, [](void* w) {{\n"
        f"    flame::call({space}::{name}, (void**)w);\n"
        f"  }}, words, __start_shared_{space}, __stop_shared_{space}, error);\n"
        "}\n"
        f'extern "C" int arguments_{name}(int* sizes) {{\n'
        f"  return flame::argument_sizes({space}::{name}, sizes);\n"
        "}\n"
    )


def build(texts: Sequence[str]) -> Path:
    """A shared library of all texts. Raises CompileError with g++'s words."""
    digest = hashlib.sha256("\0".join([compiler_identity(), *texts]).encode()).hexdigest()[:24]
    made = cache_folder() / f"{digest}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernels.cpp"
            source.write_text(unit_of(texts))
            _compile(made, "-shared", f"-I{precompiled_header()}", f"-I{HERE}", str(source))
    return made


@functools.cache
def precompiled_header() -> Path:
    """The folder of `cuda_host.h`, read by g++ once: two thirds of the time of a small kernel."""
    folder = cache_folder() / f"header-{compiler_identity()}"
    folder.mkdir(exist_ok=True)
    made = folder / "cuda_host.h.gch"
    if not made.exists():
        _compile(made, "-x", "c++-header", str(HERE / "cuda_host.h"))
    return folder


def _compile(made: Path, *words: str) -> None:
    """Run g++; what it makes appears whole. Raises CompileError with g++'s words."""
    beside = made.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    command = ["g++", *OPTIONS, *words, "-o", str(beside)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        beside.unlink(missing_ok=True)
        raise CompileError(f"g++ refused a kernel:\n{said.stderr[:4000]}")
    beside.replace(made)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("descending", ctypes.c_int),
    )


class KernelFault(RuntimeError):
    """What a kernel did that it must not: a barrier that threads miss, a write out of bounds."""


class HostLibrary:
    """The kernels of some texts, ready to run. One launch runs at a time in a process."""

    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self._library: Any = ctypes.CDLL(str(path))

    @classmethod
    def of(cls, texts: Sequence[str]) -> HostLibrary:
        """The kernels of texts, compiled together."""
        return cls(build(texts))

    def argument_sizes(self, symbol: str) -> tuple[int, ...] | None:
        """Bytes of each argument of a kernel; None if there is no such kernel."""
        try:
            function = getattr(self._library, f"arguments_{symbol}")
        except AttributeError:
            return None
        sizes = (ctypes.c_int * 4096)()
        return tuple(sizes[: function(sizes)])

    def launch(
        self, symbol: str, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int,
        words: int, *, descending: bool = False,
    ) -> None:  # fmt: skip
        """Run a kernel to its end. ``words``: address of an array of addresses of arguments.

        Raises KernelFault. descending: threads and blocks run in the opposite order, which gives
        the same results unless a barrier is missing.
        """
        dims = ctypes.c_uint * 3
        given = _Launch(dims(*grid), dims(*block), shared, descending)
        message = ctypes.create_string_buffer(512)
        function = getattr(self._library, f"launch_{symbol}")
        with self._lock:
            failed = function(ctypes.byref(given), ctypes.c_void_p(words), message)
        if failed:
            raise KernelFault(f"{symbol}: {message.value.decode()}")
