"""LLVM IR text of the executor: a program's steps in order, in one call.

A program is a block of words, and all that it points to:

    program ::= busy threads count kinds words patches patch_count steps step_count wide clocks
    step    ::= kind kernel arguments n grain error 0 0
    patch   ::= target word offset           *target = words[word] + offset, before the first step
    region  ::= starts pieces                chunk i is the pieces starts[i] up to starts[i + 1]
    piece   ::= kernel arguments begin end

Invariants: `busy` is held from the patching to the last step, a stop at a host step included, so
nobody changes the words of a program that runs; no step after one that set its error slot runs.
"""

from __future__ import annotations

from flame.runtime.cpu.native import STARTER, THREADS

# Offsets in words into a program.
BUSY, BUILT_FOR, COUNT, KINDS, WORDS, PATCHES, PATCH_COUNT, STEPS, STEP_COUNT, WIDE, CLOCKS = range(
    11
)
PROGRAM_WORDS = 16
STEP_WORDS = 8
# Kinds of steps.
INLINE, PARALLEL, REGION, HOST = range(4)
# A status is 0, or the number of a step times 8 plus one of these.
FAILED, AT_HOST, MORE_THREADS, IS_BUSY = range(1, 5)

COPY_BLOCK = 1 << 16  # bytes that one iteration of flame_copy moves

_WRONG_COUNT = "the program takes %zd words (arguments, then results), got %zd"


def _field(word: int) -> str:
    return f"getelementptr i64, ptr %program, i64 {word}"


_KERNELS = f"""
declare ptr @memcpy(ptr, ptr, i64)

; arguments: target, source, bytes
define void @flame_copy(ptr %args, i64 %begin, i64 %end, i64 %worker) {{
  %target = load ptr, ptr %args
  %source.slot = getelementptr i64, ptr %args, i64 1
  %source = load ptr, ptr %source.slot
  %size.slot = getelementptr i64, ptr %args, i64 2
  %size = load i64, ptr %size.slot
  %first = mul i64 %begin, {COPY_BLOCK}
  %last.block = mul i64 %end, {COPY_BLOCK}
  %short = icmp slt i64 %size, %last.block
  %last = select i1 %short, i64 %size, i64 %last.block
  %length = sub i64 %last, %first
  %to = getelementptr i8, ptr %target, i64 %first
  %from = getelementptr i8, ptr %source, i64 %first
  %same = call ptr @memcpy(ptr %to, ptr %from, i64 %length)
  ret void
}}

define internal void @region(ptr %args, i64 %begin, i64 %end, i64 %worker) {{
entry:
  %starts = load ptr, ptr %args
  %pieces.slot = getelementptr i64, ptr %args, i64 1
  %pieces = load ptr, ptr %pieces.slot
  %first.slot = getelementptr i64, ptr %starts, i64 %begin
  %first = load i64, ptr %first.slot
  %last.slot = getelementptr i64, ptr %starts, i64 %end
  %last = load i64, ptr %last.slot
  br label %head
head:
  %i = phi i64 [ %first, %entry ], [ %i.next, %body ]
  %more = icmp slt i64 %i, %last
  br i1 %more, label %body, label %done
body:
  %at = mul i64 %i, 4
  %kernel.slot = getelementptr i64, ptr %pieces, i64 %at
  %kernel = load ptr, ptr %kernel.slot
  %arguments.slot = getelementptr i64, ptr %kernel.slot, i64 1
  %arguments = load ptr, ptr %arguments.slot
  %from.slot = getelementptr i64, ptr %kernel.slot, i64 2
  %from = load i64, ptr %from.slot
  %to.slot = getelementptr i64, ptr %kernel.slot, i64 3
  %to = load i64, ptr %to.slot
  call void %kernel(ptr %arguments, i64 %from, i64 %to, i64 %worker)
  %i.next = add i64 %i, 1
  br label %head
done:
  ret void
}}
"""

_STEPS = f"""
declare void @flame_parallel(ptr, ptr, i64, i64)
declare i32 @clock_gettime(i32, ptr)

define internal i64 @now() noinline {{
  %time = alloca [2 x i64], align 8
  %status = call i32 @clock_gettime(i32 1, ptr %time)
  %seconds = load i64, ptr %time
  %rest.slot = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %rest.slot
  %whole = mul i64 %seconds, 1000000000
  %sum = add i64 %whole, %rest
  ret i64 %sum
}}

define internal i64 @execute(ptr %program, i64 %first) {{
entry:
  %steps.slot = {_field(STEPS)}
  %steps = load ptr, ptr %steps.slot
  %count.slot = {_field(STEP_COUNT)}
  %count = load i64, ptr %count.slot
  %clocks.slot = {_field(CLOCKS)}
  %clocks = load ptr, ptr %clocks.slot
  %timed = icmp ne ptr %clocks, null
  br label %head
head:
  %i = phi i64 [ %first, %entry ], [ %i.next, %following ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %at = mul i64 %i, {STEP_WORDS}
  %step = getelementptr i64, ptr %steps, i64 %at
  %kind = load i64, ptr %step
  %kernel.slot = getelementptr i64, ptr %step, i64 1
  %kernel = load ptr, ptr %kernel.slot
  %arguments.slot = getelementptr i64, ptr %step, i64 2
  %arguments = load ptr, ptr %arguments.slot
  %n.slot = getelementptr i64, ptr %step, i64 3
  %n = load i64, ptr %n.slot
  br i1 %timed, label %start, label %choose
start:
  %clock.start = getelementptr [2 x i64], ptr %clocks, i64 %i
  %time.start = call i64 @now()
  store i64 %time.start, ptr %clock.start
  br label %choose
choose:
  switch i64 %kind, label %inline [
    i64 {PARALLEL}, label %parallel
    i64 {REGION}, label %merged
    i64 {HOST}, label %host
  ]
inline:
  call void %kernel(ptr %arguments, i64 0, i64 %n, i64 0)
  br label %ran
parallel:
  %grain.slot = getelementptr i64, ptr %step, i64 4
  %grain = load i64, ptr %grain.slot
  call void @flame_parallel(ptr %kernel, ptr %arguments, i64 %n, i64 %grain)
  br label %ran
merged:
  call void @flame_parallel(ptr @region, ptr %arguments, i64 %n, i64 1)
  br label %ran
ran:
  br i1 %timed, label %stop, label %check
stop:
  %clock.pair = getelementptr [2 x i64], ptr %clocks, i64 %i
  %clock.stop = getelementptr i64, ptr %clock.pair, i64 1
  %time.stop = call i64 @now()
  store i64 %time.stop, ptr %clock.stop
  br label %check
check:
  %error.slot = getelementptr i64, ptr %step, i64 5
  %error = load ptr, ptr %error.slot
  %unchecked = icmp eq ptr %error, null
  br i1 %unchecked, label %following, label %look
look:
  %flag = load i64, ptr %error
  %fine = icmp eq i64 %flag, 0
  br i1 %fine, label %following, label %failed
following:
  %i.next = add i64 %i, 1
  br label %head
failed:
  call void @release(ptr %program)
  %code = mul i64 %i, 8
  %status = or i64 %code, {FAILED}
  ret i64 %status
host:
  %host.code = mul i64 %i, 8
  %host.status = or i64 %host.code, {AT_HOST}
  ret i64 %host.status
done:
  call void @release(ptr %program)
  ret i64 0
}}

define internal void @release(ptr %program) {{
  store atomic i64 0, ptr %program seq_cst, align 8
  ret void
}}
"""

_CALLS = f"""
@flame_pool_state = external global i8
declare i64 @PyLong_AsLongLong(ptr)
declare double @PyFloat_AsDouble(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare ptr @PyErr_Occurred()
declare ptr @PyErr_Format(ptr, ptr, ...)
declare ptr @PyObject_CallNoArgs(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_DecRef(ptr)
@PyExc_TypeError = external global ptr
@count_text = internal constant [{len(_WRONG_COUNT) + 1} x i8] c"{_WRONG_COUNT}\\00"

; (address, *words) -> status
define ptr @flame_program_run(ptr %self, ptr %objects, i64 %count) {{
entry:
  %object = load ptr, ptr %objects
  %address = call i64 @PyLong_AsLongLong(ptr %object)
  %program = inttoptr i64 %address to ptr
  %given = sub i64 %count, 1
  %wanted.slot = {_field(COUNT)}
  %wanted = load i64, ptr %wanted.slot
  %right = icmp eq i64 %given, %wanted
  br i1 %right, label %ready, label %wrong
wrong:
  %type.error = load ptr, ptr @PyExc_TypeError
  %formatted = call ptr (ptr, ptr, ...) @PyErr_Format(
    ptr %type.error, ptr @count_text, i64 %wanted, i64 %given)
  ret ptr null
ready:
  %wide.slot = {_field(WIDE)}
  %wide = load i64, ptr %wide.slot
  %narrow = icmp eq i64 %wide, 0
  br i1 %narrow, label %enter, label %pool
pool:
  %threads.slot = getelementptr i8, ptr @flame_pool_state, i64 {THREADS}
  %threads = load atomic i64, ptr %threads.slot monotonic, align 8
  %cold = icmp eq i64 %threads, 0
  br i1 %cold, label %start, label %enough
start:
  %starter.slot = getelementptr i8, ptr @flame_pool_state, i64 {STARTER}
  %starter = load ptr, ptr %starter.slot
  %started = call ptr @PyObject_CallNoArgs(ptr %starter)
  %unstarted = icmp eq ptr %started, null
  br i1 %unstarted, label %fail, label %drop
drop:
  call void @Py_DecRef(ptr %started)
  br label %pool
enough:
  %built.slot = {_field(BUILT_FOR)}
  %built = load i64, ptr %built.slot
  %grown = icmp sgt i64 %threads, %built
  br i1 %grown, label %more.threads, label %enter
more.threads:
  %more.status = call ptr @PyLong_FromLongLong(i64 {MORE_THREADS})
  ret ptr %more.status
enter:
  %pair = cmpxchg ptr %program, i64 0, i64 1 seq_cst seq_cst
  %mine = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %mine, label %convert, label %busy
busy:
  %busy.status = call ptr @PyLong_FromLongLong(i64 {IS_BUSY})
  ret ptr %busy.status
convert:
  %kinds.slot = {_field(KINDS)}
  %kinds = load ptr, ptr %kinds.slot
  %words.slot = {_field(WORDS)}
  %words = load ptr, ptr %words.slot
  br label %argument
argument:
  %i = phi i64 [ 0, %convert ], [ %i.next, %keep ]
  %any = icmp slt i64 %i, %given
  br i1 %any, label %look, label %patch
look:
  %i.next = add i64 %i, 1
  %word.object.slot = getelementptr ptr, ptr %objects, i64 %i.next
  %word.object = load ptr, ptr %word.object.slot
  %kind.slot = getelementptr i8, ptr %kinds, i64 %i
  %kind = load i8, ptr %kind.slot
  %float = icmp ne i8 %kind, 0
  br i1 %float, label %real, label %whole
real:
  %number = call double @PyFloat_AsDouble(ptr %word.object)
  %bits = bitcast double %number to i64
  %real.doubtful = fcmp oeq double %number, -1.0
  br i1 %real.doubtful, label %ask, label %keep
whole:
  %integer = call i64 @PyLong_AsLongLong(ptr %word.object)
  %whole.doubtful = icmp eq i64 %integer, -1
  br i1 %whole.doubtful, label %ask, label %keep
ask:
  %asked = phi i64 [ %bits, %real ], [ %integer, %whole ]
  %error = call ptr @PyErr_Occurred()
  %harmless = icmp eq ptr %error, null
  br i1 %harmless, label %keep, label %refused
refused:
  call void @release(ptr %program)
  br label %fail
keep:
  %word = phi i64 [ %bits, %real ], [ %integer, %whole ], [ %asked, %ask ]
  %word.slot = getelementptr i64, ptr %words, i64 %i
  store i64 %word, ptr %word.slot
  br label %argument
patch:
  %thread = call ptr @PyEval_SaveThread()
  %patches.slot = {_field(PATCHES)}
  %patches = load ptr, ptr %patches.slot
  %patch.count.slot = {_field(PATCH_COUNT)}
  %patch.count = load i64, ptr %patch.count.slot
  br label %patch.head
patch.head:
  %p = phi i64 [ 0, %patch ], [ %p.next, %patch.body ]
  %unpatched = icmp slt i64 %p, %patch.count
  br i1 %unpatched, label %patch.body, label %go
patch.body:
  %patch.at = mul i64 %p, 3
  %target.slot = getelementptr i64, ptr %patches, i64 %patch.at
  %target = load ptr, ptr %target.slot
  %index.slot = getelementptr i64, ptr %target.slot, i64 1
  %index = load i64, ptr %index.slot
  %offset.slot = getelementptr i64, ptr %target.slot, i64 2
  %offset = load i64, ptr %offset.slot
  %base.slot = getelementptr i64, ptr %words, i64 %index
  %base = load i64, ptr %base.slot
  %patched = add i64 %base, %offset
  store i64 %patched, ptr %target
  %p.next = add i64 %p, 1
  br label %patch.head
go:
  %status = call i64 @execute(ptr %program, i64 0)
  call void @PyEval_RestoreThread(ptr %thread)
  %answer = call ptr @PyLong_FromLongLong(i64 %status)
  ret ptr %answer
fail:
  ret ptr null
}}

; (address) -> 1 where the program was idle, and is held now; else 0
define ptr @flame_program_hold(ptr %self, ptr %objects, i64 %count) {{
  %object = load ptr, ptr %objects
  %address = call i64 @PyLong_AsLongLong(ptr %object)
  %program = inttoptr i64 %address to ptr
  %pair = cmpxchg ptr %program, i64 0, i64 1 seq_cst seq_cst
  %got = extractvalue {{ i64, i1 }} %pair, 1
  %number = zext i1 %got to i64
  %answer = call ptr @PyLong_FromLongLong(i64 %number)
  ret ptr %answer
}}

; (address, step) -> status: go on at a step, after a stop at a host step
define ptr @flame_program_resume(ptr %self, ptr %objects, i64 %count) {{
  %object = load ptr, ptr %objects
  %address = call i64 @PyLong_AsLongLong(ptr %object)
  %program = inttoptr i64 %address to ptr
  %step.slot = getelementptr ptr, ptr %objects, i64 1
  %step.object = load ptr, ptr %step.slot
  %step = call i64 @PyLong_AsLongLong(ptr %step.object)
  %thread = call ptr @PyEval_SaveThread()
  %status = call i64 @execute(ptr %program, i64 %step)
  call void @PyEval_RestoreThread(ptr %thread)
  %answer = call ptr @PyLong_FromLongLong(i64 %status)
  ret ptr %answer
}}
"""


def executor_text() -> str:
    """The whole module."""
    return _KERNELS + _STEPS + _CALLS
