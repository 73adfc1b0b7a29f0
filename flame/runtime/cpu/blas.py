"""OpenBLAS for kernels. Invariant: it runs in the calling thread only; parallelism is the pool's.

Kernels `declare` the functions of FUNCTIONS and call them as CBLAS (32-bit integers); the library
is loaded when the first such kernel is.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache, partial
from pathlib import Path

from flame.core.errors import DeviceError
from flame.runtime.cpu.jit import hold_over_forks, register_symbol

# What a kernel declares -> what the library exports.
FUNCTIONS = {
    "flame_sgemm": "scipy_cblas_sgemm",
    "flame_dgemm": "scipy_cblas_dgemm",
    "flame_sgemv": "scipy_cblas_sgemv",
    "flame_dgemv": "scipy_cblas_dgemv",
}

_loading = threading.RLock()
hold_over_forks(_loading)


def _path() -> Path:
    try:
        import scipy_openblas32
    except ImportError as error:
        raise DeviceError(
            f"OpenBLAS is missing ({error}): install it with `pip install scipy-openblas32`"
        ) from error
    directory = Path(scipy_openblas32.get_lib_dir())
    found = sorted(
        path
        for path in directory.glob("libscipy_openblas*")
        if path.suffix in (".so", ".dylib") or ".so." in path.name
    )
    if not found:
        raise DeviceError(
            f"OpenBLAS is missing: no libscipy_openblas in {directory}; reinstall it with "
            "`pip install --force-reinstall scipy-openblas32`"
        )
    return found[0]


@cache
def _load() -> ctypes.CDLL:
    path = _path()
    # OpenBLAS starts its threads while it is loaded, unless the environment says that there are
    # none.
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        library = ctypes.CDLL(str(path))
        library.scipy_openblas_set_num_threads(1)
        for exported in FUNCTIONS.values():
            getattr(library, exported)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"OpenBLAS at {path} cannot be used ({error}); reinstall it with "
            "`pip install --force-reinstall scipy-openblas32`"
        ) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return library


def library() -> ctypes.CDLL:
    """The loaded OpenBLAS, set to one thread. Raises DeviceError where it cannot be had."""
    with _loading:
        return _load()


def address(name: str) -> int:
    """The address of the function that kernels declare as `name` (a key of FUNCTIONS)."""
    function = getattr(library(), FUNCTIONS[name])
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def version() -> str:
    """OpenBLAS's own description: version, build options, the core that it chose."""
    describe = library().scipy_openblas_get_config
    describe.restype = ctypes.c_char_p
    text: bytes = describe()
    return text.decode()


for _name in FUNCTIONS:
    register_symbol(_name, partial(address, _name))
