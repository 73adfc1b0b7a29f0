"""Plan: one operation made ready to run on operands of given types.

Invariant: a Plan depends on the types and attributes alone, never on a tensor's memory, so it
serves every call with the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flame.core.types import TensorType
from flame.kernel.builder import Ref
from flame.ops.op import Op, Types

if TYPE_CHECKING:
    from flame.compiler.gpu.call import GpuCall


@dataclass(frozen=True, eq=False)
class Step:
    """One kernel launch: ``extent`` iterations in chunks of ``grain``."""

    address: int
    extent: int
    grain: int
    operands: tuple[Ref, ...]
    scratch: tuple[int, ...]  # bytes for each worker
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """What an operation does on operands of these types.

    ``direct`` is the common case: one kernel whose operands are all inputs, then all outputs.
    """

    op: Op
    types: Types
    outputs: tuple[TensorType, ...]
    steps: tuple[Step, ...]
    temporaries: tuple[int, ...]
    direct: Step | None
    checked: bool
    view_offset: int | None = None
    copies: tuple[int, ...] = ()  # operands that must be copied to row-major memory first
    host: Callable[[Sequence[Any], Sequence[Any]], None] | None = None  # instead of steps
    constants: tuple[Any, ...] = ()  # arrays that the steps read
    attributes: Mapping[str, Any] = field(default_factory=dict)
    gpu: GpuCall | None = None  # instead of steps, on a GPU
    quick: bool = False  # machine code that was made in little time, and takes more to run
    moves: bool = False  # the result is the operand's bytes on another device
