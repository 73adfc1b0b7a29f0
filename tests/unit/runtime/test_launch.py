"""The launch builtin and the worker pool."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from flame.core.errors import ArgumentError
from flame.runtime import cpu
from flame.runtime.cpu import native
from flame.runtime.cpu.jit import load, load_symbols
from flame.runtime.cpu.pool import default_threads, pool

from .conftest import COPY, COUNT, WITNESS, RunPython

pytestmark = pytest.mark.unit


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = cpu.get_num_threads()
    cpu.set_num_threads(request.param)
    yield request.param
    cpu.set_num_threads(before)


@pytest.mark.parametrize(
    ("n", "grain"), [(1, 1), (2, 1), (7, 3), (64, 64), (65, 64), (1000, 7), (9973, 1), (10**5, 997)]
)
def test_each_iteration_runs_once(threads: int, n: int, grain: int) -> None:
    address = load(COUNT, "count")
    counts = np.zeros(n + 1, np.int64)
    for _ in range(20):
        assert cpu.launch(address, n, grain, counts.ctypes.data) is None
    assert (counts[:n] == 20).all()
    assert counts[n] == 0


def test_workers_sleep_and_wake(threads: int) -> None:
    address = load(COUNT, "count")
    counts = np.zeros(50, np.int64)
    for _ in range(20):
        time.sleep(0.001)
        cpu.launch(address, 50, 1, counts.ctypes.data)
    assert (counts == 20).all()


def test_the_chunks_and_workers_that_a_kernel_sees(threads: int) -> None:
    address = load(WITNESS, "witness")
    for _ in range(50):
        seen = np.full((100, 3), -1, np.int64)
        cpu.launch(address, 100, 8, seen.ctypes.data)
        rows = seen[seen[:, 0] >= 0]
        if threads == 1:
            assert rows.tolist() == [[0, 100, 0]]
            continue
        np.testing.assert_array_equal(rows[:, 0], np.arange(0, 100, 8))
        np.testing.assert_array_equal(rows[:, 1], np.minimum(rows[:, 0] + 8, 100))
        assert rows[:, 2].min() >= 0
        assert rows[:, 2].max() < threads


def test_a_grain_near_the_limit_of_the_integers() -> None:
    address = load(WITNESS, "witness")
    seen = np.full((2, 3), -1, np.int64)
    cpu.launch(address, 2, 2**63 - 1, seen.ctypes.data)
    assert seen[0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("n", [0, -1])
def test_nothing_to_do_runs_nothing(n: int) -> None:
    seen = np.full((1, 3), -1, np.int64)
    cpu.launch(load(WITNESS, "witness"), n, 1, seen.ctypes.data)
    assert (seen == -1).all()


def test_every_kind_of_argument_arrives() -> None:
    class Index:
        def __index__(self) -> int:
            return 77

    values = [3, -1, True, False, 1.5, -0.0, math.inf, np.float64(2.5), np.int32(-9), Index()]
    values += [2**63 - 1, -(2**63)]
    out = np.zeros(len(values), np.int64)
    cpu.launch(load(COPY, "copy"), len(values), 1000, out.ctypes.data, *values)
    for value, word in zip(values, out, strict=True):
        if isinstance(value, float):
            assert np.float64(value).view(np.int64) == word
        elif isinstance(value, Index):
            assert word == 77
        else:
            assert word == value


def test_as_many_arguments_as_allowed_and_no_more() -> None:
    address = load(COPY, "copy")
    most = native.MAXIMUM_ARGUMENTS
    out = np.zeros(most - 1, np.int64)
    cpu.launch(address, most - 1, 1000, out.ctypes.data, *range(most - 1))
    np.testing.assert_array_equal(out, np.arange(most - 1))
    with pytest.raises(TypeError, match=f"at most {most} arguments; got {most + 4} in all"):
        cpu.launch(address, 1, 1, out.ctypes.data, *range(most))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((), TypeError, "got 0 in all"),
        ((1, 2), TypeError, "got 2 in all"),
        ((0, 1, 1), ValueError, "must not be 0"),
        ((1, 1, 0), ValueError, "at least 1"),
        ((1, 1, -3), ValueError, "at least 1"),
        ((1, 1, 1, "x"), TypeError, r"argument 3 .* not <class 'str'>"),
        ((1, None, 1), TypeError, r"argument 1 .* not <class 'NoneType'>"),
        ((1, 1, 1, 5, np.float32(1)), TypeError, r"argument 4 .*float32"),
        ((1, 1, 1, 2**63), OverflowError, "int"),
    ],
)
def test_bad_arguments_raise(
    arguments: tuple[object, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        cpu.launch(*arguments)


def test_an_error_in_an_argument_is_its_own() -> None:
    class Broken:
        def __index__(self) -> int:
            raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        cpu.launch(1, 1, 1, Broken())


def test_launches_from_several_python_threads(threads: int) -> None:
    address = load(COUNT, "count")
    arrays = [np.zeros(3000 + index, np.int64) for index in range(4)]

    def work(counts: np.ndarray) -> None:
        for round_ in range(200):
            cpu.launch(address, counts.size, 1 + round_ % 300, counts.ctypes.data)

    callers = [threading.Thread(target=work, args=(counts,)) for counts in arrays]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for counts in arrays:
        assert (counts == 200).all()


def test_the_size_changes_while_others_launch() -> None:
    address = load(COUNT, "count")
    before = cpu.get_num_threads()
    counts = np.zeros(500, np.int64)
    rounds = 0
    over = threading.Event()

    def work() -> None:
        nonlocal rounds
        while not over.is_set():
            cpu.launch(address, 500, 9, counts.ctypes.data)
            rounds += 1

    caller = threading.Thread(target=work)
    caller.start()
    for count in (1, 3, 2, 4, 1, 2):
        cpu.set_num_threads(count)
        assert cpu.get_num_threads() == count
        time.sleep(0.005)
    over.set()
    caller.join()
    cpu.set_num_threads(before)
    assert rounds > 0
    assert (counts == rounds).all()


def test_a_kernel_may_open_a_region_of_its_own(threads: int) -> None:
    outer = """
declare void @flame_parallel(ptr, ptr, i64, i64)
define void @outer(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %inner = load ptr, ptr %args
  %rows = getelementptr i64, ptr %args, i64 1
  br label %head
head:
  %i = phi i64 [ %begin, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
  %row = getelementptr i64, ptr %rows, i64 %i
  call void @flame_parallel(ptr %inner, ptr %row, i64 100, i64 10)
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}"""
    counts = np.zeros((16, 100), np.int64)
    rows = [counts.ctypes.data + 800 * index for index in range(16)]
    cpu.launch(load(outer, "outer"), 16, 1, load(COUNT, "count"), *rows)
    assert (counts == 1).all()


@pytest.mark.parametrize("count", [0, -1, 100000])
def test_senseless_thread_counts_raise(count: int) -> None:
    with pytest.raises(ArgumentError, match="set_num_threads"):
        cpu.set_num_threads(count)


def test_the_thread_count_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.setenv("FLAME_NUM_THREADS", "many")
    with pytest.raises(ArgumentError, match=r"FLAME_NUM_THREADS .* 'many'"):
        default_threads()
    monkeypatch.delenv("FLAME_NUM_THREADS")
    assert default_threads() >= 1


def test_idle_workers_sleep() -> None:
    before = cpu.get_num_threads()
    cpu.set_num_threads(3)
    counts = np.zeros(4, np.int64)
    cpu.launch(load(COUNT, "count"), 4, 1, counts.ctypes.data)
    sleepers = ctypes.c_int32.from_address(pool().state_address + native.SLEEPERS)
    deadline = time.monotonic() + 5
    while sleepers.value < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sleepers.value == 2
    cpu.set_num_threads(before)


def test_waiting_without_futexes() -> None:
    text = (
        native.waiting_text(futex=False)
        + """
define void @await(ptr %word) {
  call void @wait(ptr %word, i32 5)
  ret void
}"""
    )
    (address,) = load_symbols(text, ("await",))
    word = ctypes.c_int32(5)
    wait = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    started = time.perf_counter()
    wait(ctypes.addressof(word))
    assert time.perf_counter() - started >= 50e-6
    word.value = 6
    wait(ctypes.addressof(word))


FORKED = """
import os, sys
import numpy as np
from flame.runtime import cpu
from flame.runtime.cpu.jit import load
address = load(sys.argv[1], "count")
counts = np.zeros(1000, np.int64)
cpu.set_num_threads(3)
cpu.launch(address, 1000, 10, counts.ctypes.data)
for _ in range(3):
    child = os.fork()
    if child == 0:
        for _ in range(50):
            cpu.launch(address, 1000, 10, counts.ctypes.data)
        good = (counts[:] >= 51).all() and cpu.get_num_threads() == 3
        other = load(sys.argv[1].replace("@count", "@count_in_child"), "count_in_child")
        cpu.launch(other, 1000, 10, counts.ctypes.data)
        cpu.set_num_threads(2)
        cpu.launch(other, 1000, 10, counts.ctypes.data)
        os._exit(0 if good and (counts == 53).all() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
cpu.launch(address, 1000, 10, counts.ctypes.data)
assert (counts == 2).all()
print("done")
"""


def test_a_forked_child_has_a_pool_of_its_own(run_python: RunPython) -> None:
    run_python(FORKED, COUNT)


EXIT = """
import os, sys, threading, time
import numpy as np
from flame.runtime import cpu
from flame.runtime.cpu.jit import load
address = load(sys.argv[1], "count")
launch = cpu.launch
counts = np.zeros(100000, np.int64)
late = np.zeros(1000, np.int64)
if sys.argv[2] != "unstarted":
    launch(address, counts.size, 10, counts.ctypes.data)
class Late:
    def __del__(self, launch=launch, address=address, pointer=late.ctypes.data, write=os.write):
        launch(address, 1000, 10, pointer)
        write(1, b"late")
sys.modules["keeper"] = keeper = Late()
keeper.kept = late
if sys.argv[2] == "busy":
    def work():
        while True:
            launch(address, counts.size, 10, counts.ctypes.data)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.02)
"""


POLLING = """
import sys, time
import numpy as np
from flame.runtime.cpu import native
futexless = native.waiting_text(futex=False)
native.waiting_text = lambda: futexless
from flame.runtime import cpu
from flame.runtime.cpu.jit import load
address = load(sys.argv[1], "count")
counts = np.zeros(1000, np.int64)
for round in range(100):
    cpu.launch(address, 1000, 10, counts.ctypes.data)
    if round % 10 == 0:
        time.sleep(0.001)
cpu.set_num_threads(2)
cpu.launch(address, 1000, 10, counts.ctypes.data)
assert (counts == 101).all()
"""


def test_the_pool_without_futexes(run_python: RunPython) -> None:
    run_python(POLLING, COUNT, FLAME_NUM_THREADS="4")


@pytest.mark.parametrize("state", ["unstarted", "idle", "busy"])
def test_the_interpreter_exits_cleanly(run_python: RunPython, state: str) -> None:
    started = time.monotonic()
    done = run_python(EXIT, COUNT, state, FLAME_NUM_THREADS="3")
    assert done.stderr == ""
    if state != "busy":
        # The kernel that a finalizer launches when most of the interpreter is gone ran too.
        assert done.stdout == "late"
    assert time.monotonic() - started < 20
