"""What stands around a kernel's loop: includes, functions, arguments, scratch memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from flame.kernel.geometry import WARP, Geometry
from flame.kernel.program import Kernel
from flame.kernel.values import Buffer
from flame.render.cuda_folds import slots_name
from flame.render.cuda_geometry import scratch_bytes, scratch_places
from flame.render.cuda_instructions import C_TYPE, memory_type
from flame.render.cuda_items import Column, find_item, table_type

if TYPE_CHECKING:
    from flame.render.cuda import Renderer

_INCLUDES: Final = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}


def frame(
    kernel: Kernel, geometry: Geometry, written: set[Buffer], made: Renderer, loop: list[str]
) -> str:
    """The whole text around the lines of the parallel loop."""
    team, block = geometry.team, geometry.block
    lanes = "1 thread" if team == 1 else f"{team} threads"
    head = f"// {kernel.name}: {geometry.teams} teams of {lanes} in a block"
    if geometry.teams == 1:
        head = f"// {kernel.name}: a block of {lanes} for each iteration"
    items, columns = geometry.items, [*_buffers(kernel, written), *_sizes(kernel, geometry)]
    arguments = ",\n".join(f"    {a}" for a in _arguments(kernel, geometry, written))
    said = set(re.findall(r"\w+", " ".join(loop)))
    constants = [line for name, line in _constants(kernel, geometry, written) if name in said]
    found = find_item(items) if items else ()
    opening = [*found, *constants, *_slots(made), *_scratch(kernel, geometry, said)]
    body = "\n".join(f"  {line}" for line in [*opening, *loop])
    signature = (
        f'extern "C" __global__ void __launch_bounds__({block}) @SYMBOL(\n{arguments}) {{\n'
        f"{body}\n}}\n"
    )
    table = [table_type(columns, items)] if items else []
    text = "\n\n".join((*made.helpers.texts.values(), *table, signature))
    includes = [f"#include <{file}>" for type_, file in _INCLUDES.items() if type_ in text]
    start = [head, *includes]
    return "\n".join(start) + "\n\n" + text


def _buffers(kernel: Kernel, written: set[Buffer]) -> Iterator[Column]:
    for operand in kernel.operands:
        if isinstance(operand, Buffer):
            const = "" if operand in written else "const "
            yield f"{const}{memory_type(operand.dtype)}*", operand.name


def _sizes(kernel: Kernel, geometry: Geometry) -> Iterator[Column]:
    suffix = "" if geometry.wide else "_word"
    yield from (("long long", f"{s.attr}{suffix}") for s in (*kernel.sizes, kernel.body.extent))


def _arguments(kernel: Kernel, geometry: Geometry, written: set[Buffer]) -> Iterator[str]:
    if geometry.items:
        yield "const __grid_constant__ Items items"
    buffers = _buffers(kernel, written)
    for operand in kernel.operands:
        if isinstance(operand, Buffer):
            if not geometry.items:
                yield " ".join(next(buffers))
        elif geometry.by_pointer:
            yield f"const {C_TYPE[operand.dtype]}* {operand.attr}_word"
        else:
            yield f"const {C_TYPE[operand.dtype]} {operand.attr}"
    if geometry.items:
        return
    if scratch_bytes(kernel) and not geometry.shared:
        yield "unsigned char* scratch"
    yield from (f"const {type_} {name}" for type_, name in _sizes(kernel, geometry))


def _constants(
    kernel: Kernel, geometry: Geometry, written: set[Buffer]
) -> Iterator[tuple[str, str]]:
    """Names that the loop may use, and the lines that declare them."""
    if geometry.items:
        for type_, name in _buffers(kernel, written):
            yield name, f"{type_} {name} = items.{name}[item];"
        if geometry.wide:
            for type_, name in _sizes(kernel, geometry):
                yield name, f"const {type_} {name} = items.{name}[item];"
    if geometry.by_pointer:
        for operand in kernel.operands:
            if not isinstance(operand, Buffer):
                type_, name = C_TYPE[operand.dtype], operand.attr
                yield name, f"const {type_} {name} = *{name}_word;"
    if not geometry.wide:
        for size in (*kernel.sizes, kernel.body.extent):
            word = f"items.{size.attr}_word[item]" if geometry.items else f"{size.attr}_word"
            yield size.attr, f"const int {size.attr} = (int){word};"
    team = geometry.team
    if team > 1:
        place = "threadIdx.x" if geometry.teams == 1 else f"threadIdx.x % {team}"
        yield "lane", f"const int lane = {place};"
    if team == WARP:
        yield "mates", "const unsigned mates = 0xffffffffu;"
    elif 1 < team < WARP:
        first = f"(threadIdx.x % {WARP} / {team} * {team})"
        yield "mates", f"const unsigned mates = {(1 << team) - 1}u << {first};"


def _slots(made: Renderer) -> Iterator[str]:
    warps = made.team // WARP
    for type_, count in made.folds.slots.items():
        yield f"__shared__ {type_} {slots_name(type_)}[2][{count}][{warps}];"
    if made.folds.slots:
        yield "int turn = 0;"


def _scratch(kernel: Kernel, geometry: Geometry, said: set[str]) -> Iterator[str]:
    """Private memory, and the buffers of it that the loop speaks of."""
    nbytes, teams = scratch_bytes(kernel), geometry.teams
    buffers = [b for b, _ in (*kernel.scratch, *kernel.local) if b.name in said]
    if not buffers:
        return
    number = f"threadIdx.x / {geometry.team}" if teams > 1 else "0"
    if geometry.shared:
        yield f"__shared__ __align__(16) unsigned char scratch[{nbytes * teams}];"
    else:
        number = f"((long long)blockIdx.x * {teams} + {number})"
    yield f"unsigned char* mine = scratch + {number} * {nbytes};"
    places = scratch_places(kernel)
    for buffer in buffers:
        type_ = memory_type(buffer.dtype)
        yield f"{type_}* {buffer.name} = ({type_}*)(mine + {places[buffer.name]});"
