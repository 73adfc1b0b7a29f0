"""Whether only operations that give the same bits on every run are wanted."""

from __future__ import annotations

_wanted = False


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """Ask for operations that give the same bits on every run.

    With the same build, seed and thread count every operation on the CPU does: sums are taken in an
    order that depends on sizes alone, and gradients of indexing add up in the order of the indices.
    So nothing changes there by this call, and nothing has to raise. On a GPU that holds for FLAME's
    kernels; NVIDIA's libraries are told to take deterministic plans, and none for its measured
    speed, as that choice could differ from run to run.
    """
    global _wanted
    _wanted = bool(mode)


def are_deterministic_algorithms_enabled() -> bool:
    """What `use_deterministic_algorithms` was last told."""
    return _wanted
