"""One operation on operands of given types, made ready to run: infer, lower, render, load.

Invariant: a Plan depends on the types and attributes alone, never on a tensor's memory, so it serves
every call with the same signature.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.core.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from flame.core.types import TensorType
from flame.kernel.builder import BoundKernel, Lowering, Ref
from flame.kernel.program import Kernel
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.render.llvm import Source


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


def make_plan(
    op: Op, types: Types, attributes: dict[str, Any], out: tuple[TensorType, ...] | None
) -> Plan:
    """Infer, lower, render and load. ``out``: types of given output tensors, for writing in place."""
    _check_count(op, types)
    devices = {t.device for t in types if isinstance(t, TensorType)}
    if len(devices) > 1:
        raise DeviceError(
            f"{op.name}: operands are on {' and '.join(sorted(devices))}; move them to one device"
        )
    if op.reads is not None:
        copies = tuple(
            i for i, t in enumerate(types) if isinstance(t, TensorType) and not op.reads(t)
        )
        if copies:
            return Plan(op, types, (), (), (), None, False, copies=copies)
    if isinstance(op, ViewOp):
        made, offset = op.view(types, **attributes)
        return Plan(op, types, (made,), (), (), None, False, offset)
    inferred = op.infer(types, **attributes)
    outputs = inferred if isinstance(inferred, tuple) else (inferred,)
    if out is not None:
        _check_out(op, outputs, out)
        outputs = out
    lowering: Lowering = op.lower(types, outputs, **attributes)
    steps = tuple(_load(bound) for bound in lowering.kernels if bound.extent)
    wanted = [Ref("input", i) for i, t in enumerate(types) if t is not None]
    wanted += [Ref("output", i) for i in range(len(outputs))]
    direct = None
    if len(steps) == 1 and not steps[0].scratch and steps[0].operands == tuple(wanted):
        direct = steps[0] if len(wanted) == len(types) + len(outputs) else None
    checked = any(r.role == "error" for s in steps for r in s.operands)
    return Plan(op, types, outputs, steps, lowering.temporaries, direct, checked)


def _check_count(op: Op, types: Types) -> None:
    least = len(op.inputs) - op.variadic
    if len(types) < least or (len(types) > least and not op.variadic):
        wanted = ", ".join(op.inputs) or "no operands"
        raise ArgumentError(f"{op.name} takes {wanted}; got {len(types)} operands")
    if types and not any(isinstance(t, TensorType) for t in types) and op.takes_tensors:
        raise DTypeError(f"{op.name} needs at least one tensor among its operands")


def _check_out(op: Op, inferred: tuple[TensorType, ...], out: tuple[TensorType, ...]) -> None:
    if len(inferred) != len(out):
        raise ShapeError(f"{op.name} gives {len(inferred)} results, but {len(out)} were given to fill")
    for made, given in zip(inferred, out, strict=True):
        if made.shape != given.shape:
            raise ShapeError(
                f"{op.name}: a result of shape {made.shape} does not fit a tensor of shape "
                f"{given.shape} in place"
            )
        order = {"b": 0, "u": 1, "i": 1, "f": 2}
        if order[made.dtype.kind] > order[given.dtype.kind]:
            raise DTypeError(
                f"{op.name}: a {made.dtype.name} result cannot be stored in a {given.dtype.name} "
                "tensor in place; convert the tensor first"
            )


def _load(bound: BoundKernel) -> Step:
    kernel = bound.kernel
    scratch = tuple(-(-count * b.dtype.itemsize // 64) * 64 for b, count in kernel.scratch)
    return Step(
        _address(kernel), bound.extent, bound.grain, bound.operands, scratch, bound.sizes
    )


def _address(kernel: Kernel) -> int:
    from flame.runtime.cpu import jit  # llvmlite is loaded with the first kernel, not with FLAME

    source = source_of(kernel)
    return jit.load(source.text, source.symbol)


def source_of(kernel: Kernel) -> Source:
    """The LLVM IR of a kernel for this machine."""
    from flame.render.llvm import render

    return render(kernel, vector_bytes())


@functools.cache
def vector_bytes() -> int:
    """Width of the host's vector registers."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16
