"""What this machine has for CUDA, and what is missing, for `flame doctor`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from flame.core.errors import DeviceError, FlameError
from flame.runtime.cpu.allocator import readable
from flame.runtime.cpu.cache import DiskCache, default_directory
from flame.runtime.cuda.driver import Driver, driver
from flame.runtime.cuda.packages import (
    INSTALL,
    LIBRARIES,
    include_directories,
    load_library,
    package_version,
)

_PACKAGES = ("cuda-bindings", "cuda-pathfinder", "nvmath-python", "nvidia-cudnn-frontend")


def _dotted(number: int, *scales: int) -> str:
    """The parts of a version that a library packs into one number."""
    parts = []
    for scale in scales:
        parts.append(str(number // scale))
        number %= scale
    return ".".join(parts)


def _cudart(path: str) -> str:
    number = ctypes.c_int()
    ctypes.CDLL(path).cudaRuntimeGetVersion(ctypes.byref(number))
    return _dotted(number.value, 1000, 10)


def _nvrtc(path: str) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _cublaslt(path: str) -> str:
    ask = ctypes.CDLL(path).cublasLtGetVersion
    ask.restype = ctypes.c_size_t
    return _dotted(ask(), 10000, 100, 1)


def _cudnn(path: str) -> str:
    ask = ctypes.CDLL(path).cudnnGetVersion
    ask.restype = ctypes.c_size_t
    return _dotted(ask(), 10000, 100, 1)


_VERSIONS: dict[str, Callable[[str], str]] = {
    "cudart": _cudart,
    "nvrtc": _nvrtc,
    "cublasLt": _cublaslt,
    "cudnn": _cudnn,
}


def library_versions() -> dict[str, str]:
    """Library -> its version, as it answers itself; for one that is missing, what to do."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = _VERSIONS[name](load_library(name))
        except DeviceError as error:
            found[name] = str(error)
    return found


def _device(made: Driver, index: int) -> str:
    try:
        known = made.properties(index)
        made.use(index)
        free, total = made.memory_info(index)
    except FlameError as error:
        return str(error)
    major, minor = known.capability
    return (
        f"{known.name}, compute capability {major}.{minor}, {known.multiprocessor_count} "
        f"multiprocessors, {readable(free)} of {readable(total)} free"
    )


def info() -> dict[str, str]:
    """Label -> text, in the order to print. What is missing is told in its line, with the command
    that brings it; nothing is raised."""
    told: dict[str, str] = {}
    missing = [name for name in _PACKAGES if package_version(name) is None]
    for name in _PACKAGES:
        told[f"  {name}"] = package_version(name) or "missing"
    if "cuda-pathfinder" not in missing:
        for name, text in library_versions().items():
            told[f"  {name}"] = text
        try:
            told["  headers"] = include_directories()[0]
        except DeviceError as error:
            told["  headers"] = str(error)
    try:
        made = driver()
    except DeviceError as error:
        return {"cuda": f"not available: {error}", **told}
    devices = {f"  cuda:{i}": _device(made, i) for i in range(made.device_count())}
    state = f"packages are missing: {INSTALL}" if missing else "available"
    version = made.versions().get("driver", "unknown")
    entries, size = DiskCache(default_directory() / "cuda").size()
    cache = f"{default_directory() / 'cuda'} ({entries} entries, {readable(size)})"
    return {"cuda": state, "  driver": str(version), **devices, **told, "  kernel cache": cache}
