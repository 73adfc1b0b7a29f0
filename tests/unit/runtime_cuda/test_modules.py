"""Kernels from memory, disk and the compiler."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flame.core.errors import CompileError
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cuda import modules
from flame.runtime.cuda.modules import Modules, joined_groups

from .fake import FakeDriver


def text(name: str) -> str:
    return f'#include <cuda_fp16.h>\nextern "C" __global__ void {name}(float* x) {{}}\n'


def test_memory_and_disk(fake: FakeDriver, tmp_path: Path) -> None:
    first = modules.load(0, text("k"), "k")
    assert modules.load(0, text("k"), "k") == first
    found = modules.statistics()
    assert (found.compiled, found.memory_hits, found.disk_hits) == (1, 1, 0)
    modules.load(1, text("k"), "k")  # another device of the same kind: loaded, not compiled
    assert modules.statistics().compiled == 1
    assert len(fake.named("load_module")) == 2

    again = Modules(fake, DiskCache(tmp_path / "cuda"))
    again.load(0, text("k"), "k", 0)
    assert (again.statistics.compiled, again.statistics.disk_hits) == (0, 1)


def test_shared_memory_is_a_part_of_a_function(fake: FakeDriver) -> None:
    small, large = modules.load_many(0, [(text("k"), "k", 0), (text("k"), "k", 100_000)])
    assert small != large
    assert len(fake.named("load_module")) == 1


def test_many_texts_are_compiled_together_and_found_one_by_one(
    fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_NUM_THREADS", "2")
    names = [f"k{i}" for i in range(10)]
    requests = [(text(name), name, 0) for name in names]
    handles = modules.load_many(0, [*requests, requests[3]])
    assert len(set(handles)) == 10
    assert handles[10] == handles[3]
    assert [fake.functions[h] for h in handles[:10]] == names
    found = modules.statistics()
    assert (found.compiled, found.programs) == (10, 2)
    assert len(fake.named("load_module")) == 2

    again = Modules(fake, DiskCache(tmp_path / "cuda"))
    assert [fake.functions[h] for h in again.load_many(0, requests[5:8])] == names[5:8]
    assert again.statistics.disk_hits == 3
    assert len(fake.named("load_module")) == 3  # one, as all three stand in one program
    again.load_many(0, requests)
    assert again.statistics.compiled == 0


def test_what_was_compiled_before_is_only_loaded(fake: FakeDriver) -> None:
    requests = [(text(name), name, 0) for name in ("a", "b", "c")]
    modules.compile_many(0, requests)
    made = modules.statistics().programs
    assert made
    assert not fake.named("load_module")
    modules.load_many(0, requests)
    assert modules.statistics().programs == made
    assert fake.named("load_module")


def test_work_meanwhile_is_done_though_no_thread_begins() -> None:
    with ThreadPoolExecutor(1) as threads:
        waits = [modules.meanwhile(threads, divmod, 7, 2)]
        failing = modules.meanwhile(threads, divmod, 7, 0)
    waits.append(modules.meanwhile(threads, divmod, 7, 2))  # it has shut down, as at the very end
    assert [wait() for wait in waits] == [(3, 1), (3, 1)]
    with pytest.raises(ZeroDivisionError):
        failing()


def test_a_damaged_entry_is_compiled_again(fake: FakeDriver, tmp_path: Path) -> None:
    requests = [(text(name), name, 0) for name in ("a", "b", "c")]
    modules.load_many(0, requests)
    files = sorted((tmp_path / "cuda").glob("*.o"), key=lambda path: path.stat().st_size)
    assert len(files) >= 3
    for path in files:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = Modules(fake, DiskCache(tmp_path / "cuda"))
    again.load_many(0, requests)
    assert (again.statistics.compiled, again.statistics.disk_hits) == (3, 0)
    # A joint program that is gone is a miss for all that stood in it.
    for path in (tmp_path / "cuda").glob("*.o"):
        if b"FAKE" in path.read_bytes():
            path.unlink()
    third = Modules(fake, DiskCache(tmp_path / "cuda"))
    third.load_many(0, requests)
    assert third.statistics.compiled == 3


def test_another_compiler_compiles_again(fake: FakeDriver, tmp_path: Path) -> None:
    modules.load(0, text("k"), "k")
    fake.identity = "fake 2"
    again = Modules(fake, DiskCache(tmp_path / "cuda"))
    again.load(0, text("k"), "k", 0)
    assert again.statistics.compiled == 1


def test_one_wrong_text_is_named_and_the_others_are_not_to_blame(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_NUM_THREADS", "1")
    good = (text("good"), "good", 0)
    with pytest.raises(CompileError, match="kernel bad is wrong"):
        modules.load_many(0, [good, (text("bad") + "wrong", "bad", 0)])
    assert modules.load_many(0, [good])


def test_texts_that_do_not_join_stand_alone() -> None:
    macro = "#define N 3\n" + text("m")
    options = "// nvrtc: --maxrregcount=64\n" + text("o")
    condition = f"#ifdef __CUDA_ARCH__\n#else\n#endif\n{text('k0')}"  # leaves nothing behind
    plain = [(condition, "k0"), *((text(f"k{i}"), f"k{i}") for i in range(1, 5))]
    pragma = (f"#pragma once\n{text('p')}", "p")
    groups = joined_groups([(macro, "m"), (options, "o"), pragma, *plain, ("twice", "k0")], 2)
    assert [[symbol for _, symbol in group] for group in groups] == [
        ["m"],
        ["o"],
        ["k0"],
        ["p", "k0", "k1"],
        ["k2", "k3", "k4"],
    ]
    assert len(joined_groups([(text(f"k{i}"), f"k{i}") for i in range(100)], 1)) == 7
