"""LLVM IR of a function that transposes a matrix in memory by vectors.

Blocks of as many rows as a vector has lanes are turned in registers: in the step of distance d,
rows i and i + d swap the lanes whose numbers differ in that bit (Eklundh 1972). Blocks that are
not full do the same under masks.
"""

from __future__ import annotations


def transpose_function(type_: str, lanes: int) -> tuple[str, str]:
    """(name, text) of void (source, its rows' distance, target, its rows' distance, rows, columns).

    target[j, i] = source[i, j]; distances are in elements of ``type_``.
    """
    name = f"@transpose_{type_}_{lanes}"
    whole, mask, suffix = f"<{lanes} x {type_}>", f"<{lanes} x i1>", f"v{lanes}{_short(type_)}"
    full = _block(type_, lanes, "f", masked=False)
    part = _block(type_, lanes, "p", masked=True)
    numbers = "<" + ", ".join(f"i64 {i}" for i in range(lanes)) + ">"
    text = f"""
declare {whole} @llvm.masked.load.{suffix}.p0(ptr, {mask}, {whole})
declare void @llvm.masked.store.{suffix}.p0({whole}, ptr, {mask})
define internal void {name}(ptr %source, i64 %in, ptr %target, i64 %out, i64 %rows, i64 %columns)
noinline {{ entry:
  br label %columns.head
columns.head:
  %c = phi i64 [ 0, %entry ], [ %c.next, %columns.next ]
  %c.more = icmp slt i64 %c, %columns
  br i1 %c.more, label %rows.head, label %done
rows.head:
  %r = phi i64 [ 0, %columns.head ], [ %r.next, %rows.next ]
  %r.more = icmp slt i64 %r, %rows
  br i1 %r.more, label %block, label %columns.next
block:
  %r.left = sub i64 %rows, %r
  %c.left = sub i64 %columns, %c
  %r.full = icmp sge i64 %r.left, {lanes}
  %c.full = icmp sge i64 %c.left, {lanes}
  %both = and i1 %r.full, %c.full
  %from.row = mul i64 %r, %in
  %from.index = add i64 %from.row, %c
  %from = getelementptr {type_}, ptr %source, i64 %from.index
  %to.row = mul i64 %c, %out
  %to.index = add i64 %to.row, %r
  %to = getelementptr {type_}, ptr %target, i64 %to.index
  br i1 %both, label %full, label %part
full:
{full}
  br label %rows.next
part:
  %r.one = insertelement <{lanes} x i64> poison, i64 %r.left, i64 0
  %r.all = shufflevector <{lanes} x i64> %r.one, <{lanes} x i64> poison, <{lanes} x i32>
  zeroinitializer %r.mask = icmp slt <{lanes} x i64> {numbers}, %r.all %c.one = insertelement
  <{lanes} x i64> poison, i64 %c.left, i64 0 %c.all = shufflevector <{lanes} x i64> %c.one,
  <{lanes} x i64> poison, <{lanes} x i32> zeroinitializer %c.mask = icmp slt <{lanes} x i64>
  {numbers}, %c.all
{part}
  br label %rows.next
rows.next:
  %r.next = add nsw i64 %r, {lanes}
  br label %rows.head
columns.next:
  %c.next = add nsw i64 %c, {lanes}
  br label %columns.head
done:
  ret void
}}
"""
    return name, text


def _short(type_: str) -> str:
    return {"float": "f32", "double": "f64"}.get(type_, type_)


ALIGN = {"float": 4, "double": 8, "i32": 4, "i64": 8}


def _block(type_: str, lanes: int, tag: str, *, masked: bool) -> str:
    """Load the rows of a block at %from, turn it, store it at %to."""
    lines: list[str] = []
    rows = []
    for i in range(lanes):
        rows.append(f"%{tag}.l{i}")
        lines += _load(type_, lanes, i, rows[-1], masked=masked)
    distance = 1
    while distance < lanes:
        rows = _swap(lines, type_, rows, distance, tag)
        distance *= 2
    for j, row in enumerate(rows):
        lines += _store(type_, lanes, j, row, f"%{tag}.s{j}", masked=masked)
    return "\n".join(f"  {line}" for line in lines)


def _load(type_: str, lanes: int, i: int, row: str, *, masked: bool) -> list[str]:
    whole, mask = f"<{lanes} x {type_}>", f"<{lanes} x i1>"
    lines = [
        f"{row}.o = mul i64 %in, {i}",
        f"{row}.a = getelementptr {type_}, ptr %from, i64 {row}.o",
    ]
    if not masked:
        return [*lines, f"{row} = load {whole}, ptr {row}.a, align {ALIGN[type_]}"]
    function = f"{whole} @llvm.masked.load.v{lanes}{_short(type_)}.p0"
    operands = f"ptr align {ALIGN[type_]} {row}.a, {mask} {row}.m, {whole} zeroinitializer"
    return [
        *lines,
        # rows beyond the last one load nothing
        f"{row}.in = icmp slt i64 {i}, %r.left",
        f"{row}.m = select i1 {row}.in, {mask} %c.mask, {mask} zeroinitializer",
        f"{row} = call {function}({operands})",
    ]


def _swap(lines: list[str], type_: str, rows: list[str], distance: int, tag: str) -> list[str]:
    """One step: rows i and i + distance exchange half of their lanes."""
    lanes = len(rows)
    whole = f"<{lanes} x {type_}>"
    made = list(rows)
    low = [n if not n & distance else lanes + n - distance for n in range(lanes)]
    high = [n + distance if not n & distance else lanes + n for n in range(lanes)]
    for i in range(lanes):
        if i & distance:
            continue
        a, b = rows[i], rows[i + distance]
        for place, order in ((i, low), (i + distance, high)):
            name = f"%{tag}.{distance}.{place}"
            numbers = ", ".join(f"i32 {n}" for n in order)
            chosen = f"<{lanes} x i32> <{numbers}>"
            lines.append(f"{name} = shufflevector {whole} {a}, {whole} {b}, {chosen}")
            made[place] = name
    return made


def _store(type_: str, lanes: int, j: int, row: str, at: str, *, masked: bool) -> list[str]:
    whole, mask = f"<{lanes} x {type_}>", f"<{lanes} x i1>"
    lines = [
        f"{at}.o = mul i64 %out, {j}",
        f"{at}.a = getelementptr {type_}, ptr %to, i64 {at}.o",
    ]
    if not masked:
        return [*lines, f"store {whole} {row}, ptr {at}.a, align {ALIGN[type_]}"]
    function = f"void @llvm.masked.store.v{lanes}{_short(type_)}.p0"
    operands = f"{whole} {row}, ptr align {ALIGN[type_]} {at}.a, {mask} {at}.m"
    return [
        *lines,
        f"{at}.in = icmp slt i64 {j}, %c.left",
        f"{at}.m = select i1 {at}.in, {mask} %r.mask, {mask} zeroinitializer",
        f"call {function}({operands})",
    ]
