"""Tensors of a recording that failed, where somebody still holds them: they can only raise.

Invariant: no tensor without memory ever reaches a kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any, NoReturn

from flame.core.errors import TraceError
from flame.recording.lines import user_line
from flame.tensor import Tensor


class _Gone(Tensor):
    """A tensor that was never computed."""

    @property
    def type(self) -> NoReturn:  # type: ignore[override]
        raise TraceError(
            f"{user_line()}: this tensor was made while a step was recorded, and the recording "
            "failed, so it was never computed"
        )

    def __repr__(self) -> str:
        return "tensor(of a recording that failed)"


def close(storages: Iterable[Any]) -> None:
    """Let every tensor over these raise at whatever is done with it."""
    lost = {id(s) for s in storages}
    if not lost:
        return
    for found in gc.get_objects():  # a storage's referrers may be bare dicts, without the tensor
        if issubclass(type(found), Tensor) and id(found.__dict__.get("storage")) in lost:
            found.__class__ = _Gone
