"""LLVM IR text of the worker pool and of the `launch` builtin.

Invariants of the pool's protocol, on the words of one shared state:
- `generation` is odd while a region is open. The owner writes the job before it opens the region
  and touches the job again only after it has closed the region and `active` has come back to 0.
- A worker enters (`active` + 1) before it looks whether the region is open, and both sides use
  sequentially consistent operations: either the worker sees the region closed, or the owner sees
  the worker. So a worker that comes late costs nothing and never reads a job half written.
- One owner at a time; who does not get the lock runs its kernel in its own thread.
- A sleeper sleeps on the value that it read: a change between the reading and the sleeping wakes
  it.
"""

from __future__ import annotations

import platform
import sys

# Offsets in bytes into the state; words that different threads write stand on different cache
# lines.
STATE_BYTES = 320
GENERATION = 0  # i32, futex
STOP = 4  # i32
SLEEPERS = 8  # i32
THREADS = 16  # i64: callers and workers together; 0 means that the pool has not started
STARTER = 24  # PyObject *: starts the pool, called with the GIL
SPINS = 32  # i64: turns of waiting before a thread sleeps
JOB = 64  # kernel, arguments, n, grain
NEXT = 128  # i64: the first iteration that nobody has taken
ACTIVE = 192  # i32, futex
OWNER_WAITS = 196  # i32
OWNER = 256  # i32: the lock

MAXIMUM_ARGUMENTS = 128

_FUTEX_SYSCALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}
_PAUSE["AMD64"] = _PAUSE["x86_64"]
_PAUSE["arm64"] = _PAUSE["aarch64"]


def _at(offset: int) -> str:
    return f"getelementptr (i8, ptr @flame_pool_state, i64 {offset})"


def waiting_text(*, futex: bool | None = None) -> str:
    """@wait(word, expected) returns some time after word != expected; @wake ends waits on a word.

    With futexes on Linux; elsewhere by looking every 50 µs, which needs no system interface that
    differs between systems and costs an idle worker about one percent of a core.
    """
    if futex is None:
        futex = sys.platform == "linux" and platform.machine() in _FUTEX_SYSCALL
    if futex:
        number = _FUTEX_SYSCALL[platform.machine()]
        return f"""
declare i64 @syscall(i64, ...)
define internal void @wait(ptr %word, i32 %expected) noinline {{
  %value = zext i32 %expected to i64
  %status = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i64 128, i64 %value, ptr null)
  ret void
}}
define internal void @wake(ptr %word, i32 %count) noinline {{
  %value = zext i32 %count to i64
  %status = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i64 129, i64 %value)
  ret void
}}
"""
    return """
declare i32 @usleep(i32)
define internal void @wait(ptr %word, i32 %expected) noinline {
  %now = load atomic i32, ptr %word seq_cst, align 4
  %same = icmp eq i32 %now, %expected
  br i1 %same, label %sleep, label %done
sleep:
  %status = call i32 @usleep(i32 50)
  br label %done
done:
  ret void
}
define internal void @wake(ptr %word, i32 %count) {
  ret void
}
"""


def _pause_text() -> str:
    declaration, call = _PAUSE.get(platform.machine(), ("", ""))
    return f"""
{declaration}
define internal void @pause() alwaysinline {{
  {call}
  ret void
}}
define void @flame_pool_spin(i64 %turns) {{
entry:
  br label %head
head:
  %turn = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %turn, %turns
  br i1 %more, label %body, label %done
body:
  call void @pause()
  %next = add i64 %turn, 1
  br label %head
done:
  ret void
}}
"""


_CHUNKS = f"""
define internal void @run_chunks(i64 %worker) {{
entry:
  %kernel = load ptr, ptr {_at(JOB)}
  %arguments = load ptr, ptr {_at(JOB + 8)}
  %n = load i64, ptr {_at(JOB + 16)}
  %grain = load i64, ptr {_at(JOB + 24)}
  br label %take
take:
  %begin = atomicrmw add ptr {_at(NEXT)}, i64 %grain seq_cst
  %any = icmp slt i64 %begin, %n
  br i1 %any, label %run, label %done
run:
  ; The rest is at least 1, so neither side of the comparison can overflow.
  %rest = sub i64 %n, %begin
  %whole = icmp slt i64 %grain, %rest
  %length = select i1 %whole, i64 %grain, i64 %rest
  %end = add i64 %begin, %length
  call void %kernel(ptr %arguments, i64 %begin, i64 %end, i64 %worker)
  br label %take
done:
  ret void
}}
"""

_WORKER = f"""
define void @flame_pool_worker(i64 %index) {{
entry:
  %spins = load i64, ptr {_at(SPINS)}
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %seen, %sleep ], [ %seen.next, %left ]
  br label %look
look:
  %turn = phi i64 [ 0, %idle ], [ %turn.next, %spin ]
  %generation = load atomic i32, ptr {_at(GENERATION)} seq_cst, align 4
  %stop = load atomic i32, ptr {_at(STOP)} seq_cst, align 4
  %stopping = icmp ne i32 %stop, 0
  br i1 %stopping, label %leave, label %running
running:
  %parity = and i32 %generation, 1
  %open = icmp eq i32 %parity, 1
  %new = icmp ne i32 %generation, %seen
  %go = and i1 %open, %new
  br i1 %go, label %enter, label %rest
rest:
  %awake = icmp slt i64 %turn, %spins
  br i1 %awake, label %spin, label %sleep
spin:
  call void @pause()
  %turn.next = add i64 %turn, 1
  br label %look
sleep:
  %sleepers.before = atomicrmw add ptr {_at(SLEEPERS)}, i32 1 seq_cst
  call void @wait(ptr {_at(GENERATION)}, i32 %generation)
  %sleepers.after = atomicrmw sub ptr {_at(SLEEPERS)}, i32 1 seq_cst
  br label %idle
enter:
  %active.before = atomicrmw add ptr {_at(ACTIVE)}, i32 1 seq_cst
  %current = load atomic i32, ptr {_at(GENERATION)} seq_cst, align 4
  %current.parity = and i32 %current, 1
  %inside = icmp eq i32 %current.parity, 1
  br i1 %inside, label %work, label %out
work:
  call void @run_chunks(i64 %index)
  br label %out
out:
  %seen.next = select i1 %inside, i32 %current, i32 %seen
  %active.after = atomicrmw sub ptr {_at(ACTIVE)}, i32 1 seq_cst
  %last = icmp eq i32 %active.after, 1
  br i1 %last, label %tell, label %left
tell:
  %waits = load atomic i32, ptr {_at(OWNER_WAITS)} seq_cst, align 4
  %waiting = icmp ne i32 %waits, 0
  br i1 %waiting, label %wake.owner, label %left
wake.owner:
  call void @wake(ptr {_at(ACTIVE)}, i32 1)
  br label %left
left:
  br label %idle
leave:
  ret void
}}
"""

_PARALLEL = f"""
define i32 @flame_pool_try_lock() {{
  %pair = cmpxchg ptr {_at(OWNER)}, i32 0, i32 1 seq_cst seq_cst
  %got = extractvalue {{ i32, i1 }} %pair, 1
  %answer = zext i1 %got to i32
  ret i32 %answer
}}
define void @flame_pool_unlock() {{
  store atomic i32 0, ptr {_at(OWNER)} seq_cst, align 4
  ret void
}}
define void @flame_pool_stop() {{
  store atomic i32 1, ptr {_at(STOP)} seq_cst, align 4
  %before = atomicrmw add ptr {_at(GENERATION)}, i32 2 seq_cst
  call void @wake(ptr {_at(GENERATION)}, i32 2147483647)
  ret void
}}
define void @flame_parallel(ptr %kernel, ptr %arguments, i64 %n, i64 %grain) {{
entry:
  %single = icmp sle i64 %n, %grain
  br i1 %single, label %alone, label %try
alone:
  call void %kernel(ptr %arguments, i64 0, i64 %n, i64 0)
  ret void
try:
  %got = call i32 @flame_pool_try_lock()
  %owner = icmp eq i32 %got, 1
  br i1 %owner, label %owning, label %alone
owning:
  %threads = load i64, ptr {_at(THREADS)}
  %many = icmp sgt i64 %threads, 1
  br i1 %many, label %publish, label %unowned
unowned:
  call void @flame_pool_unlock()
  br label %alone
publish:
  store ptr %kernel, ptr {_at(JOB)}
  store ptr %arguments, ptr {_at(JOB + 8)}
  store i64 %n, ptr {_at(JOB + 16)}
  store i64 %grain, ptr {_at(JOB + 24)}
  store atomic i64 0, ptr {_at(NEXT)} seq_cst, align 8
  %opened = atomicrmw add ptr {_at(GENERATION)}, i32 1 seq_cst
  %sleepers = load atomic i32, ptr {_at(SLEEPERS)} seq_cst, align 4
  %asleep = icmp sgt i32 %sleepers, 0
  br i1 %asleep, label %rouse, label %work
rouse:
  ; One thread a chunk is enough, and the caller is one of them: rounded up chunks - 1.
  %rest = sub i64 %n, 1
  %others = sdiv i64 %rest, %grain
  %few = icmp slt i64 %others, %threads
  %wanted = select i1 %few, i64 %others, i64 %threads
  %count = trunc i64 %wanted to i32
  call void @wake(ptr {_at(GENERATION)}, i32 %count)
  br label %work
work:
  call void @run_chunks(i64 0)
  %closed = atomicrmw add ptr {_at(GENERATION)}, i32 1 seq_cst
  %spins = load i64, ptr {_at(SPINS)}
  br label %look
look:
  %turn = phi i64 [ 0, %work ], [ %turn.next, %spin ]
  %active = load atomic i32, ptr {_at(ACTIVE)} seq_cst, align 4
  %clear = icmp eq i32 %active, 0
  br i1 %clear, label %done, label %more
more:
  %awake = icmp slt i64 %turn, %spins
  br i1 %awake, label %spin, label %drowsy
spin:
  call void @pause()
  %turn.next = add i64 %turn, 1
  br label %look
drowsy:
  store atomic i32 1, ptr {_at(OWNER_WAITS)} seq_cst, align 4
  br label %asleep.look
asleep.look:
  %left = load atomic i32, ptr {_at(ACTIVE)} seq_cst, align 4
  %finished = icmp eq i32 %left, 0
  br i1 %finished, label %awaken, label %sleep
sleep:
  call void @wait(ptr {_at(ACTIVE)}, i32 %left)
  br label %asleep.look
awaken:
  store atomic i32 0, ptr {_at(OWNER_WAITS)} seq_cst, align 4
  br label %done
done:
  call void @flame_pool_unlock()
  ret void
}}
"""


_NO_NUMBER = "launch: argument %zd (address, n, grain, *arguments) must be a number, not %R"
_WRONG_COUNT = (
    f"launch: takes address, n, grain and at most {MAXIMUM_ARGUMENTS} arguments; got %zd in all"
)
_WRONG_HEAD = "launch: the address must not be 0, and the grain must be at least 1"


def _constant(name: str, text: str) -> str:
    return f'@{name} = internal constant [{len(text) + 1} x i8] c"{text}\\00"'


def _launch_text() -> str:
    # The type is the last word of an object's header, in builds with and without the GIL.
    type_offset = object.__basicsize__ - 8
    return f"""
declare i64 @PyLong_AsLongLong(ptr)
declare double @PyFloat_AsDouble(ptr)
declare ptr @PyErr_Occurred()
declare i32 @PyErr_ExceptionMatches(ptr)
declare ptr @PyErr_Format(ptr, ptr, ...)
declare i32 @PyType_IsSubtype(ptr, ptr)
declare ptr @PyObject_CallNoArgs(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @PyErr_Clear()
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)
@PyFloat_Type = external global i8
@_Py_NoneStruct = external global i8
@PyExc_TypeError = external global ptr
@PyExc_ValueError = external global ptr

{_constant("number", _NO_NUMBER)}
{_constant("shape", _WRONG_COUNT)}
{_constant("head", _WRONG_HEAD)}

define ptr @flame_launch(ptr %self, ptr %objects, i64 %count) {{
entry:
  %words = alloca [{MAXIMUM_ARGUMENTS + 3} x i64], align 16
  %few = icmp slt i64 %count, 3
  %many = icmp sgt i64 %count, {MAXIMUM_ARGUMENTS + 3}
  %wrong = or i1 %few, %many
  br i1 %wrong, label %bad.count, label %convert
convert:
  %i = phi i64 [ 0, %entry ], [ %i.next, %keep ]
  %slot = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %slot
  %type.slot = getelementptr i8, ptr %object, i64 {type_offset}
  %type = load ptr, ptr %type.slot
  %float = icmp eq ptr %type, @PyFloat_Type
  br i1 %float, label %real, label %whole
real:
  %number.real = call double @PyFloat_AsDouble(ptr %object)
  %bits = bitcast double %number.real to i64
  br label %keep
whole:
  %number.whole = call i64 @PyLong_AsLongLong(ptr %object)
  %doubtful = icmp eq i64 %number.whole, -1
  br i1 %doubtful, label %ask, label %keep
ask:
  %error = call ptr @PyErr_Occurred()
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %keep, label %failed
failed:
  ; A subclass of float (numpy.float64 is one) is a float all the same.
  %subclass = call i32 @PyType_IsSubtype(ptr %type, ptr @PyFloat_Type)
  %is.float = icmp ne i32 %subclass, 0
  br i1 %is.float, label %clear, label %explain
clear:
  call void @PyErr_Clear()
  br label %real
explain:
  %type.error = load ptr, ptr @PyExc_TypeError
  %matches = call i32 @PyErr_ExceptionMatches(ptr %type.error)
  %is.type.error = icmp ne i32 %matches, 0
  br i1 %is.type.error, label %rename, label %fail
rename:
  call void @PyErr_Clear()
  %renamed = call ptr (ptr, ptr, ...) @PyErr_Format(ptr %type.error, ptr @number, i64 %i, ptr %type)
  br label %fail
keep:
  %word = phi i64 [ %bits, %real ], [ %number.whole, %whole ], [ %number.whole, %ask ]
  %word.slot = getelementptr i64, ptr %words, i64 %i
  store i64 %word, ptr %word.slot
  %i.next = add i64 %i, 1
  %more = icmp slt i64 %i.next, %count
  br i1 %more, label %convert, label %ready
ready:
  %address = load i64, ptr %words
  %n.slot = getelementptr i64, ptr %words, i64 1
  %n = load i64, ptr %n.slot
  %grain.slot = getelementptr i64, ptr %words, i64 2
  %grain = load i64, ptr %grain.slot
  %arguments = getelementptr i64, ptr %words, i64 3
  %null = icmp eq i64 %address, 0
  %grainless = icmp slt i64 %grain, 1
  %senseless = or i1 %null, %grainless
  br i1 %senseless, label %bad.head, label %sized
sized:
  %kernel = inttoptr i64 %address to ptr
  %nothing = icmp slt i64 %n, 1
  br i1 %nothing, label %done, label %something
something:
  %small = icmp sle i64 %n, %grain
  br i1 %small, label %inline, label %large
inline:
  call void %kernel(ptr %arguments, i64 0, i64 %n, i64 0)
  br label %done
large:
  %threads = load atomic i64, ptr {_at(THREADS)} monotonic, align 8
  %cold = icmp eq i64 %threads, 0
  br i1 %cold, label %start, label %region
start:
  %starter = load ptr, ptr {_at(STARTER)}
  %started = call ptr @PyObject_CallNoArgs(ptr %starter)
  %unstarted = icmp eq ptr %started, null
  br i1 %unstarted, label %fail, label %release
release:
  call void @Py_DecRef(ptr %started)
  br label %region
region:
  %thread = call ptr @PyEval_SaveThread()
  call void @flame_parallel(ptr %kernel, ptr %arguments, i64 %n, i64 %grain)
  call void @PyEval_RestoreThread(ptr %thread)
  br label %done
done:
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
bad.count:
  %type.error.2 = load ptr, ptr @PyExc_TypeError
  %formatted = call ptr (ptr, ptr, ...) @PyErr_Format(ptr %type.error.2, ptr @shape, i64 %count)
  br label %fail
bad.head:
  %value.error = load ptr, ptr @PyExc_ValueError
  %formatted.2 = call ptr (ptr, ptr, ...) @PyErr_Format(ptr %value.error, ptr @head)
  br label %fail
fail:
  ret ptr null
}}
"""


def native_text() -> str:
    """The whole module: state, pool and `launch`."""
    return "\n".join(
        (
            f"@flame_pool_state = global [{STATE_BYTES} x i8] zeroinitializer, align 64",
            waiting_text(),
            _pause_text(),
            _CHUNKS,
            _WORKER,
            _PARALLEL,
            _launch_text(),
        )
    )
