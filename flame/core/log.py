"""What FLAME tells of its work: named channels, printed to stderr where FLAME_LOG names them.

    FLAME_LOG=compile,schedule python train.py        FLAME_LOG=all python train.py

Invariant: a channel that nobody asked for costs one look-up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from flame.core.errors import ArgumentError

CHANNELS: Final = {
    "compile": "what is recorded and compiled, and how long it takes",
    "graph": "graphs before and after the passes",
    "schedule": "tasks and the nodes that they cover",
    "memory": "memory plans",
    "kernels": "kernels as they are compiled or found",
    "cache": "whole programs kept on disk, found, or missed, and why",
}
ALL: Final = "all"


def _chosen() -> set[str]:
    names = {name.strip() for name in os.environ.get("FLAME_LOG", "").split(",")} - {""}
    unknown = names - CHANNELS.keys() - {ALL}
    if unknown:
        raise ArgumentError(
            f"FLAME_LOG names {', '.join(sorted(unknown))}; the channels are {', '.join(CHANNELS)} "
            f"and {ALL}"
        )
    return set(CHANNELS) if ALL in names else names


_open: set[str] = _chosen()


def enabled(channel: str) -> bool:
    """Whether someone reads this channel."""
    return channel in _open


def log(channel: str, message: str | Callable[[], str]) -> None:
    """Print a message, or what a function makes where making it costs something."""
    if channel not in CHANNELS:
        raise ArgumentError(f"log: no channel {channel!r}; there are {', '.join(CHANNELS)}")
    if channel in _open:
        text = message if isinstance(message, str) else message()
        print(f"[flame {channel}] {text}", file=sys.stderr, flush=True)


@contextmanager
def logging(*channels: str) -> Iterator[None]:
    """Read these channels inside the block."""
    opened = set(channels) - _open
    _open.update(opened)
    try:
        yield
    finally:
        _open.difference_update(opened)
