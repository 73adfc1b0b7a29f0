"""The packages of NVIDIA that FLAME uses, imported at their first use; what is missing is told with
the command that brings it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flame.core.errors import DeviceError

INSTALL = "pip install 'flame-engine[cuda13]'"

# Library, as pathfinder names it -> the package that brings it.
LIBRARIES = {
    "cudart": "nvidia-cuda-runtime",
    "nvrtc": "nvidia-cuda-nvrtc",
    "cublasLt": "nvidia-cublas",
    "cudnn": "nvidia-cudnn-cu13",
}


def bindings(name: str) -> Any:
    """The module ``cuda.bindings.<name>``. Raises DeviceError where the package is missing."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise DeviceError(
            f"CUDA needs the package cuda-bindings, which cannot be imported ({error}): {INSTALL}"
        ) from error


def _pathfinder() -> Any:
    try:
        return importlib.import_module("cuda.pathfinder")
    except ImportError as error:
        raise DeviceError(
            f"CUDA needs the package cuda-pathfinder, which cannot be imported ({error}): {INSTALL}"
        ) from error


def load_library(name: str) -> str:
    """Load a library of `LIBRARIES` into the process; its path. Raises DeviceError where there is
    none."""
    finder = _pathfinder()
    try:
        return str(finder.load_nvidia_dynamic_lib(name).abs_path)
    except (RuntimeError, OSError) as error:
        raise DeviceError(
            f"CUDA needs the library {name} of the package {LIBRARIES[name]}, which cannot be "
            f"loaded ({error}): {INSTALL}"
        ) from error


@functools.cache
def include_directories() -> tuple[str, ...]:
    """Where cuda_fp16.h and its like are. Raises DeviceError where they are missing."""
    finder = _pathfinder()
    try:
        found = finder.find_nvidia_header_directory("cudart")
    except RuntimeError as error:
        raise DeviceError(f"CUDA's headers cannot be looked for ({error}): {INSTALL}") from error
    if found is None:
        raise DeviceError(
            "CUDA's headers (cuda_fp16.h, cuda_bf16.h) are missing; the package "
            f"nvidia-cuda-runtime brings them: {INSTALL}"
        )
    # cooperative_groups, cub and libcu++, where the package nvidia-cuda-cccl is installed
    more = os.path.join(found, "cccl")
    return (found, more) if os.path.isdir(more) else (found,)


def calling(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call of cuda.bindings that may be the first to look for its library; its absence is a
    DeviceError."""
    try:
        return function(*arguments)
    except RuntimeError as error:  # pathfinder's, where the library is not found
        raise DeviceError(
            f"CUDA: {function.__name__} cannot be called, as its library is missing ({error}): "
            f"{INSTALL}"
        ) from error


def package_version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
