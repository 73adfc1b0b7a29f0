"""How a kernel is launched on a GPU.

A *team* of threads runs one iteration of the kernel's parallel loop at a time: its threads share
the vector loops, and compute everything else alike. A team is a power of two: 1 thread, a part of a
warp, or a whole block. Teams take iterations in turn, so any grid is right.
"""

from __future__ import annotations

from dataclasses import dataclass

from flame.core.errors import CompileError

WARP = 32


@dataclass(frozen=True)
class Geometry:
    """What of a launch stands in the kernel's text.

    team: threads of a team. block: threads of a block, a multiple of the team. wide: whether
    offsets need 64 bits. shared: whether scratch memory stands in shared memory. by_pointer:
    whether numbers of the call arrive as pointers to their 64-bit words on the device. held: packs
    of a row that each thread keeps in registers; 0: none, see `flame.render.cuda_held`. width: the
    elements of such a pack; 0: as many of the smallest as fill 16 bytes. items: how many calls one
    launch serves at most, each by blocks of its own; 0: one call, without a table.
    """

    team: int
    block: int
    wide: bool = False
    shared: bool = True
    by_pointer: bool = False
    held: int = 0
    width: int = 0
    items: int = 0

    def __post_init__(self) -> None:
        whole = self.team & (self.team - 1) == 0 and self.team > 0 and self.block % self.team == 0
        if not whole or (self.team > WARP and self.team != self.block) or self.block > 1024:
            raise CompileError(
                f"teams of {self.team} threads in blocks of {self.block}: a team is a power of two "
                f"of at most {WARP} threads, or one whole block of at most 1024"
            )
        if self.items and (self.by_pointer or not self.shared):
            raise CompileError(
                "a launch of many calls takes numbers as they are, and has no scratch memory on "
                "the device"
            )

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.block // self.team


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel's text with the launch of one call.

    Arguments in order: one 64-bit word for each operand (pointers; numbers as int64 or double, or
    pointers to them), a pointer to ``scratch`` bytes of device memory if that is not 0, the
    sizes as int64, the extent of the parallel loop as int64. Where one launch serves many calls:
    a table of 64-bit words, see `flame.render.cuda_items`, then the numbers.
    """

    text: str
    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    scratch: int  # bytes of device memory that all teams share out
