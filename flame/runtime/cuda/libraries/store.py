"""Choices and plans on disk, so that a process finds what another has worked out.

Invariant: the key holds everything that the value depends on, versions and device included; what is
damaged is no entry, and what a library refuses is worked out again and written over.
"""

from __future__ import annotations

import hashlib

from flame.runtime.cpu.cache import DiskCache, Entry, default_directory

FORMAT_VERSION = 1


class Store:
    """Bytes under keys of text; the directory is that of the process's environment now."""

    def __init__(self) -> None:
        self._cache: DiskCache | None = None

    def _disk(self) -> DiskCache:
        directory = default_directory() / "cuda" / "plans"
        if self._cache is None or self._cache.directory != directory:
            self._cache = DiskCache(directory)
        return self._cache

    def read(self, key: str) -> bytes | None:
        entry = self._disk().read(_digest(key))
        return None if entry is None else entry.machine_code

    def write(self, key: str, value: bytes) -> None:
        self._disk().write(_digest(key), Entry(value, ()))


def _digest(key: str) -> str:
    return hashlib.sha256(f"{FORMAT_VERSION}\n{key}".encode()).hexdigest()
