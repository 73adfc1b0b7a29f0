"""The flow from an operation to a program, one verb and one noun a stage.

call -> Graph -> Lowering (kernels, sizes) -> Source (text) -> Step (machine code) -> Plan
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from flame.compiler.plan import Plan, Step
from flame.core.errors import ArgumentError, DeviceError, DTypeError, FlameError, ShapeError
from flame.core.types import TensorType, on_device
from flame.graph import Graph, one_op
from flame.graph.graph import device_of
from flame.kernel.builder import BoundKernel, Lowering, Ref
from flame.kernel.program import Kernel
from flame.ops.op import Op, Types
from flame.ops.views import ViewOp

if TYPE_CHECKING:
    from flame.render.llvm import Source


# Bytes that a call may touch, and still run for less time than its kernel is compiled, dozens of
# times over, with machine code that was made quickly.
QUICK_BYTES: Final = 32 << 10


def make_plan(
    op: Op, types: Types, attributes: dict[str, Any], out: tuple[TensorType, ...] | None,
    *, quick: bool = False,
) -> Plan:  # fmt: skip
    """Compile one call. ``out``: types of given output tensors, for writing in place. quick: of a
    call on little data the machine code may be such as is made in little time.

    Raises the op's own ShapeError or DTypeError, DeviceError where devices differ, CompileError.
    """
    check_operands(op, types)
    copies = unreadable(op, types)
    if copies:
        return Plan(op, types, (), (), (), None, False, copies=copies)
    if isinstance(op, ViewOp):
        return describe(op, types, attributes, out)
    graph = one_op(op, types, attributes)
    outputs = results(graph, out)
    lowering = lower(graph, outputs)
    if moves_between(op, types, outputs):
        return Plan(op, types, outputs, (), (), None, False, attributes=attributes, moves=True)
    if outputs[0].device != "cpu":
        return gpu_plan(op, types, outputs, lowering)
    quick = quick and touched(types, outputs, lowering) <= QUICK_BYTES
    sources = [source_of(bound.kernel) for bound in lowering.kernels]
    steps = [
        load(b, s, quick=quick) for b, s in zip(lowering.kernels, sources, strict=True) if b.extent
    ]
    return Plan(
        op,
        types,
        outputs,
        tuple(steps),
        lowering.temporaries,
        direct_step(steps, types, outputs),
        checked=any(r.role == "error" for s in steps for r in s.operands),
        host=lowering.host,
        constants=lowering.constants,
        quick=quick and bool(steps),
    )


def touched(types: Types, outputs: tuple[TensorType, ...], lowering: Lowering) -> int:
    """Bytes of all operands, results and temporaries of a call."""
    tensors = [t for t in (*types, *outputs) if isinstance(t, TensorType)]
    return sum(t.span * t.dtype.itemsize for t in tensors) + sum(lowering.temporaries)


def gpu_plan(op: Op, types: Types, outputs: tuple[TensorType, ...], lowering: Lowering) -> Plan:
    """The plan of a call whose kernels run on a GPU."""
    from flame.compiler.gpu.call import GpuCall

    failure = None if op.failure is None else functools.partial(_failure, op, types)
    call = GpuCall(op.name, lowering, outputs[0].device, failure)
    return Plan(op, types, outputs, (), lowering.temporaries, None, False, gpu=call)


def _failure(op: Op, types: Types, code: int) -> FlameError:
    assert op.failure is not None
    return op.failure(code, types)


def moves_between(op: Op, types: Types, outputs: tuple[TensorType, ...]) -> bool:
    """Whether a call moves its operand from one device to another."""
    return op.moves and outputs[0].device != device_of(types)


def describe(
    op: Op, types: Types, attributes: dict[str, Any], out: tuple[TensorType, ...] | None
) -> Plan:
    """What a call gives, without the code that does it."""
    if isinstance(op, ViewOp):
        made, offset = op.view(types, **attributes)
        device = device_of(types)
        made = made if device is None else on_device(made, device)
        return Plan(op, types, (made,), (), (), None, False, offset, attributes=attributes)
    outputs = results(one_op(op, types, attributes), out)
    return Plan(op, types, outputs, (), (), None, False, attributes=attributes)


def unreadable(op: Op, types: Types) -> tuple[int, ...]:
    """Operands whose layout the op's kernel cannot read, and that are to be copied first."""
    if op.reads is None:
        return ()
    tensors = ((i, t) for i, t in enumerate(types) if isinstance(t, TensorType))
    return tuple(i for i, t in tensors if not op.reads(t))


def results(graph: Graph, out: tuple[TensorType, ...] | None) -> tuple[TensorType, ...]:
    """The types of what the graph gives, or of the tensors that it is written into."""
    (node,) = graph.nodes
    inferred = tuple(s.type for s in node.outputs if isinstance(s.type, TensorType))
    if out is None:
        return inferred
    check_out(node.op, inferred, out)
    return out


def lower(graph: Graph, outputs: tuple[TensorType, ...]) -> Lowering:
    """The kernels of a graph of one node."""
    (node,) = graph.nodes
    return node.op.lowering(node.types, outputs, node.attributes)


@functools.lru_cache(maxsize=256)
def source_of(kernel: Kernel) -> Source:
    """The LLVM IR of a kernel for this machine."""
    from flame.render.llvm import render

    return render(kernel, vector_bytes())


def load(bound: BoundKernel, source: Source, *, quick: bool = False) -> Step:
    """Machine code for a source, from the caches or from the compiler. quick: see `jit.load`."""
    from flame.runtime.cpu import jit  # llvmlite is loaded with the first kernel, not with FLAME

    return Step(
        jit.load(source.text, source.symbol, quick=quick),
        bound.extent,
        bound.grain,
        bound.operands,
        tuple(-(-count * b.dtype.itemsize // 64) * 64 for b, count in bound.kernel.scratch),
        bound.sizes,
    )


def direct_step(
    steps: Sequence[Step], types: Types, outputs: tuple[TensorType, ...]
) -> Step | None:
    """The only step, if its operands are all inputs and then all outputs."""
    wanted = tuple(Ref("input", i) for i in range(len(types)))
    wanted += tuple(Ref("output", i) for i in range(len(outputs)))
    if len(steps) == 1 and not steps[0].scratch and steps[0].operands == wanted:
        return steps[0]
    return None


@functools.cache
def vector_bytes() -> int:
    """Width of the host's vector registers."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def check_operands(op: Op, types: Types) -> None:
    """Raise where the number of operands is wrong, none is a tensor, or devices differ."""
    least = len(op.inputs) - op.variadic
    if len(types) < least or (len(types) > least and not op.variadic):
        wanted = ", ".join(op.inputs) or "no operands"
        raise ArgumentError(f"{op.name} takes {wanted}; got {len(types)} operands")
    if types and not any(isinstance(t, TensorType) for t in types) and op.takes_tensors:
        raise DTypeError(f"{op.name} needs at least one tensor among its operands")
    devices = {t.device for t in types if isinstance(t, TensorType)}
    if len(devices) > 1:
        raise DeviceError(
            f"{op.name}: operands are on {' and '.join(sorted(devices))}; move them to one device"
        )


def check_out(op: Op, inferred: tuple[TensorType, ...], out: tuple[TensorType, ...]) -> None:
    """Raise where results do not fit the tensors that they are written into."""
    if len(inferred) != len(out):
        raise ShapeError(
            f"{op.name} gives {len(inferred)} results, but {len(out)} were given to fill"
        )
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
