"""The disk cache: whole entries or none, and never fatal."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest

from flame.core.errors import FlameWarning
from flame.runtime.cpu.cache import DiskCache, Entry, default_directory

pytestmark = pytest.mark.unit

ENTRY = Entry(bytes(range(256)) * 8, ("flame_sgemm", "sinf"))
KEY = "ff" * 32
PRUNING_KEY = "00" * 32


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a" / "b")
    assert cache.read(KEY) is None
    cache.write(KEY, ENTRY)
    assert cache.read(KEY) == ENTRY
    assert cache.size() == (1, len(ENTRY.pack()))
    bare = Entry(b"code", ())
    cache.write("aa" * 32, bare)
    assert cache.read("aa" * 32) == bare
    assert not list(cache.directory.glob("*.tmp"))


@pytest.mark.parametrize("length", [0, 3, 8, 40, 43, 44, 100, -1])
def test_a_truncated_entry_is_noticed_and_removed(tmp_path: Path, length: int) -> None:
    cache = DiskCache(tmp_path)
    cache.write(KEY, ENTRY)
    path = tmp_path / f"{KEY}.o"
    path.write_bytes(path.read_bytes()[:length])
    assert cache.read(KEY) is None
    assert not path.exists()


@pytest.mark.parametrize("position", [0, 7, 8, 39, 40, 44, 70, 2000])
def test_a_damaged_byte_is_noticed(tmp_path: Path, position: int) -> None:
    cache = DiskCache(tmp_path)
    cache.write(KEY, ENTRY)
    path = tmp_path / f"{KEY}.o"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))
    assert cache.read(KEY) is None


def test_an_unusable_directory_warns_once_and_is_not_fatal(tmp_path: Path) -> None:
    # A file in the place of the directory fails for every user, root included.
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = DiskCache(blocked / "cache")
    with pytest.warns(FlameWarning, match=r"FLAME_CACHE_DIR") as caught:
        cache.write(KEY, ENTRY)
    assert str(blocked) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.write(KEY, ENTRY)
        assert cache.read(KEY) is None
    assert cache.size() == (0, 0)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = DiskCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.warns(FlameWarning, match="No space left on device"):
            cache.write(KEY, ENTRY)
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_entries_go_first_and_abandoned_files_go(tmp_path: Path) -> None:
    size = len(ENTRY.pack())
    cache = DiskCache(tmp_path, size_limit=8 * size)
    now = time.time()
    for index in range(12):
        key = f"f{index:x}" * 32
        cache.write(key, ENTRY)
        os.utime(tmp_path / f"{key}.o", (now - 1000 + index, now - 1000 + index))
    old = tmp_path / ".killed.tmp"
    old.write_bytes(b"x")
    os.utime(old, (now - 1e5, now - 1e5))
    young = tmp_path / ".writing.tmp"
    young.write_bytes(b"x")
    cache.write(PRUNING_KEY, ENTRY)
    assert cache.read(PRUNING_KEY) == ENTRY
    assert cache.read("f0" * 32) is None
    assert cache.read("fb" * 32) == ENTRY
    entries, _ = cache.size()
    assert entries in (5, 6)
    assert not old.exists()
    assert young.exists()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FLAME_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_directory() == Path("/home/someone/.cache/flame")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/flame")
    monkeypatch.setenv("FLAME_CACHE_DIR", "/here")
    assert default_directory() == Path("/here")
