"""How many threads run a kernel, from the sizes of a call.

Invariant: every choice is right for every kernel; it is here for speed alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from flame.core import dtypes
from flame.kernel import values
from flame.kernel.builder import BoundKernel
from flame.kernel.geometry import WARP, Geometry
from flame.kernel.program import Accumulate, Declare, Kernel, Loop, LoopKind, Transpose
from flame.render.cuda_held import Held, held_of, team_of
from flame.render.cuda_index import Bounds, Indices, loops, walk
from flame.render.cuda_packs import packs_of

PROCESSORS: Final = 132  # of an H100; threads are spread over about so many multiprocessors
RESIDENT: Final = 1024  # threads that keep one of them busy
BUSY: Final = PROCESSORS * 256  # threads with packs that hide the latency of memory
MOST_BLOCKS: Final = PROCESSORS * 64
MOST_BLOCKS_WITH_SCRATCH: Final = PROCESSORS * 8
SHARED_BYTES: Final = 40 * 1024  # for scratch; static shared memory is 48 KiB
ALIGN: Final = 16
# the team for rows of so many elements; so few of the longest are under way that they stay in cache
TEAMS: Final = ((1024, WARP), (2048, 128), (16384, 256), (32768, 512))
LARGEST: Final = 1024
PACKS: Final = 8  # that a thread reads of a row which is read once
UNKNOWN: Final = 1024  # taken for the extent of a vector loop that depends on data


def geometry_of(bound: BoundKernel, *, by_pointer: bool = False) -> Geometry:
    """The teams and blocks for one call."""
    bounds, kernel = Bounds(bound), bound.kernel
    held = held_of(kernel)
    found = None if held is None else team_of(held, bounds, bound.extent, BUSY)
    if found is None:
        team, turns, width = _team(bound, bounds), 0, 0
    else:
        assert held is not None
        (team, turns, width), kernel = found, without(kernel, held)
    block = team if team > WARP else _block(team, bound.extent)
    while block > max(team, WARP) and scratch_bytes(kernel) * (block // team) > SHARED_BYTES:
        block //= 2
    return Geometry(
        team,
        block,
        wide=bound.extent >= 1 << 30 or not bounds.fit(kernel, Indices(kernel)),
        shared=scratch_bytes(kernel) * (block // team) <= SHARED_BYTES,
        by_pointer=by_pointer,
        held=turns,
        width=width,
    )


def without(kernel: Kernel, held: Held) -> Kernel:
    """A kernel whose held buffers take no memory."""
    return replace(kernel, local=tuple((b, n) for b, n in kernel.local if b not in held.local))


def _team(bound: BoundKernel, bounds: Bounds) -> int:
    fixed = _fixed_packs(bound.kernel)
    if 0 < fixed <= WARP:
        return power_of_two(fixed)
    longest, most_packs, columns = 1, 1, False
    for loop in loops(bound.kernel.body):
        if loop.kind is LoopKind.VECTOR:
            extent = bounds.of(loop.extent)
            steps = UNKNOWN if extent is None else extent[1]
            packs = packs_of(loop)
            packed = steps if packs is None else -(-steps // packs.width)
            if any(isinstance(s, Loop) for s in walk(loop.body)):
                columns, steps = True, packed
            longest, most_packs = max(longest, steps), max(most_packs, packed)
    if any(isinstance(s, Transpose) for s in walk(bound.kernel.body.body)):
        longest = max(longest, UNKNOWN)
    lanes = power_of_two(most_packs)
    if lanes <= WARP and bound.extent * lanes >= BUSY:
        return lanes  # short rows, of which there are many
    lanes = power_of_two(longest)
    if lanes <= WARP or (columns and lanes <= 256):
        return lanes
    if _reads_once(bound.kernel):
        team = min(LARGEST, max(WARP, power_of_two(most_packs // PACKS + 1) // 2))
    else:
        team = next((team for most, team in TEAMS if longest <= most), LARGEST)
    while team < 1024 and team * 4 < longest and bound.extent * team < PROCESSORS * RESIDENT:
        team *= 2
    return team


def _vectors(kernel: Kernel) -> list[Loop]:
    return [loop for loop in loops(kernel.body) if loop.kind is LoopKind.VECTOR]


def _fixed_packs(kernel: Kernel) -> int:
    """The packs of a row, where all vector loops have a length of their own; else 0. What such a
    kernel does element by element is the rest of its work."""
    vectors = _vectors(kernel)
    if not all(values.is_const(loop.extent) for loop in vectors):
        return 0
    found = ((loop, packs_of(loop)) for loop in vectors)
    return max((int(values.number_of(v.extent)) // p.width for v, p in found if p), default=0)


def _reads_once(kernel: Kernel) -> bool:
    """Whether rows are only summed up, or the like: by one vector loop, which stores nothing. What
    its threads have found is then folded, which larger teams wait for longer."""
    vectors = _vectors(kernel)
    return len(vectors) == 1 and all(isinstance(s, (Declare, Accumulate)) for s in vectors[0].body)


def power_of_two(number: int) -> int:
    """The smallest one that is not less than ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def _block(team: int, extent: int) -> int:
    """Small blocks where there are few threads, so that they reach all multiprocessors."""
    return 128 if extent * team > PROCESSORS * 128 else WARP


def grid_of(geometry: Geometry, kernel: Kernel, extent: int) -> int:
    """Blocks that are started."""
    wanted = -(-extent // geometry.teams)
    private = scratch_bytes(kernel) > 0 and not geometry.shared
    return max(1, min(wanted, MOST_BLOCKS_WITH_SCRATCH if private else MOST_BLOCKS))


def scratch_places(kernel: Kernel) -> dict[str, int]:
    """The offset in bytes of each scratch and local buffer in a team's part."""
    places, end = {}, 0
    for buffer, count in (*kernel.scratch, *kernel.local):
        places[buffer.name] = end
        size = buffer.dtype.itemsize if buffer.dtype is not dtypes.bool_ else 1
        end += -(-count * size // ALIGN) * ALIGN
    return places


def scratch_bytes(kernel: Kernel) -> int:
    """Bytes of scratch and local memory of a team."""
    private = (*kernel.scratch, *kernel.local)
    return sum(-(-count * b.dtype.itemsize // ALIGN) * ALIGN for b, count in private)
