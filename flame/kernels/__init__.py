"""Hand-written CUDA C++: what the generator of kernels cannot do well.

Invariant: a text is whole; `source` puts the package's own headers into it, so it compiles alone.
"""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


@functools.cache
def _text(name: str) -> str:
    """A file of this package, with the package's headers in place of their includes."""
    found = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: _text(match[1]), found)


def source(name: str, **defines: Any) -> str:
    """The text of ``name``.cu with ``#define KEY value`` lines in front."""
    head = "".join(f"#define {key} {value}\n" for key, value in defines.items())
    return head + _text(f"{name}.cu")
