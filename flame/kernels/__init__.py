"""Hand-written CUDA C++: kernels that the generator cannot do well, as texts of this folder.

Invariants: a text is complete by itself (files of this folder stand in place of their includes,
each once) and its constants are defined in front of it, so equal texts are equal kernels and the
text alone is the key of the cache.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from flame.core.errors import CompileError

__all__ = ["source"]

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_FOLDER = Path(__file__).parent


@cache
def _read(name: str) -> str:
    try:
        return (_FOLDER / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CompileError(
            f"flame.kernels has no file {name}; the installation is incomplete, install FLAME again"
        ) from None


def _inlined(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    return _INCLUDE.sub(lambda found: _inlined(found[1], seen), _read(name))


def source(name: str, **defines: int | str) -> str:
    """The text of ``name``.cu, its includes inlined, with ``defines`` in front of it.

    Raises CompileError where a file is missing.
    """
    front = "".join(f"#define {key} {value}\n" for key, value in defines.items())
    return front + _inlined(f"{name}.cu", set())
