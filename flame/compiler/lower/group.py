"""Which kernels a group becomes, or that it is better not to be one.

Rules, as far as they are about one group:
 - without reductions: `pointwise`. All nodes stand at the full level.
 - reductions whose rows stay in cache, and are enough to share among threads: `rows`.
 - such rows, and sums over the rows beside them: `crossed`.
 - other reductions: `parts`; what needs their results at the full level is another group.
 - vectors along the innermost loop: every operand that is not small has a step of 0 or 1 there.
 - at most so many operands, so many instructions: what does not fit registers is no gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flame.compiler.lower.atoms import Atom, Mismatch
from flame.compiler.lower.crossed import can_cross, lower_crossed
from flame.compiler.lower.parts import lower_parts
from flame.compiler.lower.passes import in_place_pairs, passes_of
from flame.compiler.lower.pointwise import lower_pointwise
from flame.compiler.lower.rows import lower_rows, rows_in
from flame.compiler.lower.scalars import weight_of
from flame.compiler.lower.space import Access, Space
from flame.graph import Node, tensor_of
from flame.kernel.builder import Lowering
from flame.ops import schedules
from flame.ops.loops import broadcast_strides
from flame.ops.reductions import Reduction
from flame.ops.rows import Rows

MAX_OPERANDS = 24
MAX_WEIGHT = 640
ROW = 32768  # points of the longest row that is visited several times
ROW_ACROSS = 2048  # points of the longest row beside others
ROWS = 8  # rows that are enough to share among threads
CUT = 4  # parts of rows side by side that are worth a second kernel
SMALL = 65536  # points of all loops below which one thread does


@dataclass(frozen=True, eq=False)
class Kind:
    """A way to lower a space."""

    name: str
    lower: Callable[[Space], Lowering]


POINTWISE = Kind("pointwise", lower_pointwise)
ROWS_IN_CACHE = Kind("rows", lower_rows)
CROSSED = Kind("crossed rows", lower_crossed)
PARTS = Kind("parts", lower_parts)


def kind_of(space: Space) -> Kind:
    """How a space is lowered. Raises Mismatch where it cannot be, or should not be."""
    if len(space.accesses) + len(space.stores) > MAX_OPERANDS or _weight(space) > MAX_WEIGHT:
        raise Mismatch
    if not space.reduced and not any(isinstance(n.op, Reduction) for n in space.nodes):
        if any(node not in space.full for node in space.nodes):
            raise Mismatch
        _check_vectors(space, len(space.loops) - 1)
        return POINTWISE
    rows = rows_in(space)
    length, count = rows.length, rows.count
    few = length * count <= SMALL
    if space.crossed and not can_cross(space, rows):
        raise Mismatch
    if space.on_gpu and _in_parts(space, rows):
        _check_vectors(space, len(space.loops) - 1)
        return PARTS
    if few or (length <= (ROW_ACROSS if rows.columns else ROW) and count >= ROWS):
        classes = [atom in space.reduced for atom in space.loops]
        wanted = not rows.columns
        inner = max((i for i, gone in enumerate(classes) if gone == wanted), default=-1)
        _check_vectors(space, inner)
        return CROSSED if space.crossed else ROWS_IN_CACHE
    if space.crossed or not space.reduced or _uses_results(space):
        raise Mismatch
    _check_vectors(space, len(space.loops) - 1)
    return PARTS


def _in_parts(space: Space, rows: Rows) -> bool:
    """Whether rows of a GPU are better cut: they are few or lie side by side, and only reduced."""
    if space.crossed or not space.reduced or _uses_results(space):
        return False
    if rows.columns:
        return schedules.column_parts(rows.length, rows.count) >= CUT
    return schedules.row_parts(rows.length, rows.count) > 1


def _weight(space: Space) -> int:
    return sum(weight_of(n) for n in space.nodes if not isinstance(n.op, Reduction))


def _check_vectors(space: Space, inner: int) -> None:
    """Raise Mismatch where a large operand would be gathered or scattered, but for the group."""
    if inner < 0:
        return
    atom = space.loops[inner]
    if any(_across(access, atom) for access in space.stores):
        raise Mismatch
    for (node, position), access in space.reads.items():
        if _across(access, atom) and not _gathers(node, position):
            raise Mismatch


def _across(access: Access, atom: Atom) -> bool:
    large = math.prod(a.size for a in access.steps) > 4096
    return large and access.steps.get(atom, 0) not in (0, 1)


def _gathers(node: Node, position: int) -> bool:
    """Whether a node by itself steps over its operand's memory."""
    if isinstance(node.op, Reduction):
        return False
    operand, result = tensor_of(node.inputs[position]), tensor_of(node.outputs[0])
    steps = broadcast_strides(operand, result.shape)
    inner = min((d for d, n in enumerate(result.shape) if n != 1), key=lambda d: result.strides[d])
    return steps[inner] not in (0, 1)


def _uses_results(space: Space) -> bool:
    """Whether a node at the full level needs one at the kept level."""
    kept = {s for n in space.nodes for s in n.outputs}
    kept -= {s for n in space.full if not isinstance(n.op, Reduction) for s in n.outputs}
    return any(space.inside(x) in kept for n in space.full for x in n.inputs)


def pairs_of(space: Space) -> frozenset[tuple[int, int]]:
    """See `Task.in_place`."""
    return in_place_pairs(passes_of(space))
