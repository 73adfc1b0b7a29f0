"""Text to machine code: the caches, what LLVM refuses, names outside the text."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame.runtime
from flame.core.errors import CompileError, FlameWarning
from flame.runtime.cpu import blas
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cpu.jit import Compiler

ROOT = str(Path(flame.runtime.__file__ or "").parents[2])

pytestmark = pytest.mark.unit

ANSWER = "define i64 @answer() {\n  ret i64 42\n}\n"


def call(address: int, result: Any = ctypes.c_int64) -> Any:
    return ctypes.CFUNCTYPE(result)(address)()


def test_compiled_then_from_memory_then_from_disk(tmp_path: Path) -> None:
    first = Compiler(DiskCache(tmp_path))
    (address,) = first.load(ANSWER, ("answer",))
    assert call(address) == 42
    assert first.load(ANSWER, ("answer",)) == (address,)
    counts = first.statistics
    assert (counts.compiled, counts.disk_hits, counts.memory_hits) == (1, 0, 1)
    assert counts.seconds > 0

    second = Compiler(DiskCache(tmp_path))
    assert call(second.load(ANSWER, ("answer",))[0]) == 42
    counts = second.statistics
    assert (counts.compiled, counts.disk_hits, counts.memory_hits) == (0, 1, 0)


def test_a_damaged_entry_is_rebuilt(tmp_path: Path) -> None:
    Compiler(DiskCache(tmp_path)).load(ANSWER, ("answer",))
    (path,) = tmp_path.glob("*.o")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = Compiler(DiskCache(tmp_path))
    assert call(again.load(ANSWER, ("answer",))[0]) == 42
    assert again.statistics.compiled == 1
    assert len(path.read_bytes()) == len(whole)


def test_quick_code_serves_until_better_is_known(tmp_path: Path) -> None:
    compiler = Compiler(DiskCache(tmp_path))
    (quick,) = compiler.load(ANSWER, ("answer",), quick=True)
    assert call(quick) == 42
    assert compiler.load(ANSWER, ("answer",), quick=True) == (quick,)
    (better,) = compiler.load(ANSWER, ("answer",))
    assert better != quick
    assert call(better) == 42
    assert compiler.load(ANSWER, ("answer",), quick=True) == (better,)
    assert compiler.statistics.compiled == 2

    again = Compiler(DiskCache(tmp_path))
    found = again.load(ANSWER, ("answer",), quick=True)
    assert again.load(ANSWER, ("answer",)) == found
    assert again.statistics.compiled == 0


def test_quick_code_on_disk(tmp_path: Path) -> None:
    Compiler(DiskCache(tmp_path)).load(ANSWER, ("answer",), quick=True)
    again = Compiler(DiskCache(tmp_path))
    assert call(again.load(ANSWER, ("answer",), quick=True)[0]) == 42
    assert (again.statistics.compiled, again.statistics.disk_hits) == (0, 1)
    again.load_many([(ANSWER, "answer")])  # a program runs for long: nothing quick will do
    assert again.statistics.compiled == 1


def test_the_key_tells_texts_and_options_apart(tmp_path: Path) -> None:
    compiler = Compiler(DiskCache(tmp_path))
    compiler.load(ANSWER, ("answer",), quick=True)
    compiler.load(ANSWER, ("answer",))
    assert compiler.statistics.compiled == 2
    compiler.load(ANSWER + "\n", ("answer",))
    assert compiler.statistics.compiled == 3
    assert compiler.disk.size()[0] == 3


def test_an_unwritable_cache_warns_and_compiles(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    compiler = Compiler(DiskCache(blocked / "cache"))
    with pytest.warns(FlameWarning, match="FLAME_CACHE_DIR"):
        (address,) = compiler.load(ANSWER, ("answer",))
    assert call(address) == 42
    assert call(compiler.load(ANSWER + ";", ("answer",))[0]) == 42


def test_one_symbol_in_different_texts(tmp_path: Path) -> None:
    compiler = Compiler(DiskCache(tmp_path))
    one = compiler.load(ANSWER, ("answer",))[0]
    two = compiler.load(ANSWER.replace("42", "43"), ("answer",))[0]
    assert (call(one), call(two)) == (42, 43)


def test_a_refused_text_shows_the_lines_around_the_fault(tmp_path: Path) -> None:
    source = "define i64 @answer() {\n  %x = add i64 1, 2\n  ret i32 %x\n}\n"
    with pytest.raises(CompileError) as caught:
        Compiler(DiskCache(tmp_path)).load(source, ("answer",))
    text = str(caught.value)
    assert "kernel answer" in text
    assert ">    3 |   ret i32 %x" in text
    assert "     2 |   %x = add i64 1, 2" in text


def test_a_text_that_does_not_verify_is_refused(tmp_path: Path) -> None:
    source = "define i64 @f(i1 %c) {\n br i1 %c, label %a, label %b\na:\n %x = add i64 1, 1\n"
    source += " br label %b\nb:\n ret i64 %x\n}\n"
    with pytest.raises(CompileError, match="kernel f"):
        Compiler(DiskCache(tmp_path)).load(source, ("f",))


def test_a_missing_symbol_and_an_unknown_name_are_errors(tmp_path: Path) -> None:
    compiler = Compiler(DiskCache(tmp_path))
    with pytest.raises(CompileError, match="does not define"):
        compiler.load(ANSWER, ("question",))
    source = "declare i64 @nowhere()\ndefine i64 @f() {\n %x = call i64 @nowhere()\n ret i64 %x\n}"
    with pytest.raises(CompileError, match="it declares nowhere"):
        compiler.load(source, ("f",))
    assert call(compiler.load(ANSWER, ("answer",))[0]) == 42


def test_machine_code_that_calls_what_the_process_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The code generator may call helpers that the text does not declare: an entry without its
    # declared names stands for such machine code.
    source = "declare i64 @nowhere()\ndefine i64 @f() {\n %x = call i64 @nowhere()\n ret i64 %x\n}"
    compiler = Compiler(DiskCache(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiler, "_resolve", lambda *_: None)
        with pytest.raises(CompileError, match="kernel f"):
            compiler.load(source, ("f",))
    capfd.readouterr()  # LLVM tells the name on the standard error stream


def test_libm_and_openblas_are_found_also_from_disk(tmp_path: Path) -> None:
    sine = "declare double @sin(double)\ndefine double @f() {\n"
    sine += " %x = call double @sin(double 1.0)\n ret double %x\n}"
    product = """
declare void @flame_dgemm(i32, i32, i32, i32, i32, i32, double, ptr, i32, ptr, i32, double, ptr,
i32) define void @product(ptr %args, i64 %begin, i64 %end, i64 %worker) { %a = load ptr, ptr %args
%b.slot = getelementptr ptr, ptr %args, i64 1 %b = load ptr, ptr %b.slot %c.slot = getelementptr
ptr, ptr %args, i64 2 %c = load ptr, ptr %c.slot call void @flame_dgemm(i32 101, i32 111, i32 111,
i32 5, i32 7, i32 3, double 1.0, ptr %a, i32 3, ptr %b, i32 7, double 0.0, ptr %c, i32 7) ret void
}"""
    a = np.arange(15.0).reshape(5, 3)
    b = np.arange(21.0).reshape(3, 7) - 4
    for _ in range(2):
        compiler = Compiler(DiskCache(tmp_path))
        address = compiler.load(sine, ("f",))[0]
        assert call(address, ctypes.c_double) == pytest.approx(np.sin(1.0), abs=0)
        address = compiler.load(product, ("product",))[0]
        c = np.full((5, 7), np.nan)
        words = (ctypes.c_int64 * 3)(a.ctypes.data, b.ctypes.data, c.ctypes.data)
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3)(address)
        kernel(ctypes.addressof(words), 0, 1, 0)
        np.testing.assert_array_equal(c, a @ b)
    assert compiler.statistics.disk_hits == 2


def test_openblas_runs_on_one_thread() -> None:
    assert blas.library().scipy_openblas_get_num_threads() == 1
    assert all(blas.address(name) != 0 for name in blas.FUNCTIONS)
    assert "OpenBLAS" in blas.version()


def test_several_threads_compile_at_once(tmp_path: Path) -> None:
    compiler = Compiler(DiskCache(tmp_path))
    results: list[tuple[int, int]] = []

    def work(start: int) -> None:
        for number in range(start, start + 8):
            address = compiler.load(ANSWER.replace("42", str(number)), ("answer",))[0]
            results.append((number, call(address)))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    assert all(number == got for number, got in results)
    assert compiler.statistics.compiled == 16


CONCURRENT = """
import ctypes, sys
from flame.runtime.cpu.jit import load, statistics
for number in range(12):
    source = f"define i64 @answer() {{ ret i64 {number} }}"
    assert ctypes.CFUNCTYPE(ctypes.c_int64)(load(source, "answer"))() == number
print(statistics().compiled + statistics().disk_hits)
"""


def test_concurrent_processes_share_a_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "FLAME_CACHE_DIR": str(tmp_path), "PYTHONPATH": ROOT}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CONCURRENT],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == "12"
    cache = DiskCache(tmp_path / "cpu")
    assert cache.size()[0] == 12
    assert not list(cache.directory.glob(".*"))
