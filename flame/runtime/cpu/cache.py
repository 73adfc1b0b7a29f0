"""Machine code on disk. Invariant: an entry is complete and checked, or the reader finds none.

Entries are written to a temporary name and moved into place, so concurrent processes see whole
files only; a checksum finds what a crash or a bad disk damaged. Nothing here is ever fatal: a
cache that cannot be used costs compile time, and one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from flame.core.errors import FlameWarning

# Part of every key: a change of the entry format, or of what kernels may assume, starts a new
# cache.
FORMAT_VERSION = 1
SIZE_LIMIT = 512 << 20

_MAGIC = b"FLAMEOBJ"
_CHECKSUM_BYTES = 32
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """Machine code and the names outside it that it calls."""

    machine_code: bytes
    externals: tuple[str, ...]

    def pack(self) -> bytes:
        names = "\n".join(self.externals).encode()
        body = len(names).to_bytes(4, "little") + names + self.machine_code
        return _MAGIC + hashlib.sha256(body).digest() + body

    @staticmethod
    def unpack(data: bytes) -> Entry | None:
        """The entry, or None where the bytes are not what `pack` wrote."""
        start = len(_MAGIC) + _CHECKSUM_BYTES
        body = data[start:]
        if data[: len(_MAGIC)] != _MAGIC or len(body) < 4:
            return None
        if hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
            return None
        end = 4 + int.from_bytes(body[:4], "little")
        names = body[4:end].decode()
        return Entry(body[end:], tuple(names.split("\n")) if names else ())


def default_directory() -> Path:
    """$FLAME_CACHE_DIR, else $XDG_CACHE_HOME/flame, else ~/.cache/flame."""
    if chosen := os.environ.get("FLAME_CACHE_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flame"
    return Path(os.path.expanduser("~/.cache")) / "flame"


class DiskCache:
    """A directory of entries under hexadecimal keys, bounded in size."""

    def __init__(self, directory: Path, *, size_limit: int = SIZE_LIMIT) -> None:
        self.directory = directory
        self.size_limit = size_limit
        self._warned = False
        self._writable = True

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.o"

    def read(self, key: str) -> Entry | None:
        """The entry under `key`; None where there is none or it is damaged (it is removed)."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            # Absent, or unreadable: compiling is the answer to both, and `write` tells of the
            # latter.
            return None
        entry = Entry.unpack(data)
        if entry is None:
            with contextlib.suppress(OSError):
                path.unlink()
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Keep `entry`. Warns once, and writes no more, where the directory or the disk refuses."""
        if not self._writable:
            return
        temporary = ""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.directory)
            with os.fdopen(handle, "wb") as file:
                file.write(entry.pack())
            os.replace(temporary, self._path(key))
        except OSError as error:
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._writable = False
            self._warn(error)
            return
        # Keys are uniform, so this is one write in 64: the bound costs nothing on the common path.
        if int(key[:2], 16) < 4:
            self.prune()

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"cannot write compiled kernels to {self.directory} ({error.strerror or error}); they "
            "are compiled again in every process. Set FLAME_CACHE_DIR to a directory that can be "
            "written and has room.",
            FlameWarning,
            stacklevel=2,
        )

    def _files(self) -> list[tuple[float, int, str]]:
        """(modification time, bytes, path) of each file; what vanishes meanwhile is left out."""
        found = []
        try:
            with os.scandir(self.directory) as listing:
                for item in listing:
                    with contextlib.suppress(OSError):
                        status = item.stat(follow_symlinks=False)
                        if item.name.endswith((".o", ".tmp")):
                            found.append((status.st_mtime, status.st_size, item.path))
        except OSError:
            return []
        return found

    def size(self) -> tuple[int, int]:
        """(number of entries, bytes) on disk."""
        files = [file for file in self._files() if file[2].endswith(".o")]
        return len(files), sum(size for _, size, _ in files)

    def prune(self) -> None:
        """Remove what killed processes left behind and, beyond the limit, the oldest entries."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        # Down to 3/4 at once, so that a full cache is not pruned at every chance.
        target = self.size_limit * 3 // 4 if total > self.size_limit else total
        now = time.time()
        for modified, size, path in files:
            abandoned = path.endswith(".tmp") and now - modified > _ABANDONED_SECONDS
            oldest = path.endswith(".o") and total > target
            if abandoned or oldest:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= size
