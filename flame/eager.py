"""Eager execution: every op call runs at once, and is put on the tape where a gradient may be
wanted.

The warm path is one dictionary look-up by the operands' types, an allocation, and a launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from flame import foreach
from flame.autograd.engine import edge_of
from flame.autograd.mode import mode, no_grad
from flame.autograd.node import Edge, Node, OpNode
from flame.compiler.foreach import ForeachPlans
from flame.compiler.pipeline import make_plan
from flame.compiler.plan import Plan, Step
from flame.core import dtypes
from flame.core.autocast import autocast
from flame.core.dtypes import DType
from flame.core.errors import DTypeError, GradientError, ShapeError, StateError
from flame.core.precision import choose_float32_matmul_precision
from flame.core.types import TensorType
from flame.kernel.values import Value
from flame.ops.autocast import cast_operands
from flame.ops.conversion import convert
from flame.ops.op import Interpreter, Op, interpreter
from flame.ops.transfer import move
from flame.runtime import cpu, transfer
from flame.runtime.storage import Storage
from flame.tensor import Tensor, from_array

MAX_PLANS = 20_000  # signatures kept; beyond, all are dropped and found again by need
TRIAL = 64  # calls of a signature with quickly made machine code, before better is made


class Eager(Interpreter):
    """Runs ops as they are called."""

    def __init__(self) -> None:
        self.plans: dict[Any, Plan] = {}
        self.lists = ForeachPlans()  # of many calls
        # Plans with quickly made code and how often each was used: apart, for `plans` to stay the
        # one look-up of what is called often.
        self.trials: dict[Any, tuple[Plan, int]] = {}

    def forget_plans(self) -> None:
        """Prepare all calls anew, as what they depend on beside their signatures has changed."""
        self.plans.clear()
        self.trials.clear()
        self.lists.clear()

    def apply(
        self,
        op: Op,
        inputs: tuple[Any, ...],
        attributes: dict[str, Any],
        out: tuple[Any, ...] | None = None,
    ) -> Any:
        if op.autocast is not None and autocast.on and out is None:
            inputs = cast_operands(op.autocast, inputs)
        signature: list[Any] = [op]
        tracked = False
        for x in inputs:
            if isinstance(x, Tensor):
                signature.append(x.type)
                if x.tracked or x.base is not None:
                    tracked = True
            elif x.__class__ is Value:
                return op.inline(inputs, attributes)
            elif x.__class__ in _PLAIN:
                signature.append(x.__class__)
            else:
                return self.apply(op, tuple([as_operand(op, y) for y in inputs]), attributes, out)
        if attributes:
            signature.append(tuple(attributes.items()))
        if out is not None:
            signature.append(tuple([t.type for t in out]))
        key = tuple(signature)
        plan = self.plans.get(key)
        if plan is None:
            moved = beside(inputs)
            if moved is not None:
                return self.apply(op, moved, attributes, out)
            plan = self._prepare(key, op, inputs, attributes, out)
        if plan.copies:
            inputs = tuple(
                [x.contiguous() if i in plan.copies else x for i, x in enumerate(inputs)]
            )
            return self.apply(op, inputs, attributes, out)
        if out is not None:
            return self._in_place(plan, inputs, attributes, out)
        if plan.view_offset is not None:
            return self._view(plan, inputs[0], attributes)
        outputs = self.execute(plan, inputs)
        if tracked and mode.enabled and op.differentiable:
            record(plan, inputs, attributes, outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def foreach(
        self,
        op: Op,
        inputs: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        out: Sequence[tuple[Any, ...]],
        attributes: Sequence[dict[str, Any]] = (),
    ) -> None:
        if self.recording:
            super().foreach(op, inputs, shared, out, attributes)
            return
        shared = tuple([as_operand(op, x) for x in shared])
        for part in foreach.by_device(foreach.Calls(op, inputs, shared, out, attributes)):
            if not foreach.can_run_together(part) or not foreach.run_together(self, part):
                super().foreach(*part)

    def constant(self, data: Any, **options: Any) -> Tensor:
        from flame.creation import tensor

        plain = isinstance(data, np.ndarray) and not options
        return from_array(data) if plain else tensor(data, **options)

    def cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        """The casts of leaves are kept until the outermost autocast region ends."""
        leaf = tensor.tracked and tensor.node is None and tensor.base is None
        casts = autocast.casts
        if not leaf or casts is None or not autocast.settings.caches or dtype is dtypes.float32:
            return convert(tensor, dtype=dtype)
        # a cast made without the tape lets no gradient through, so it is no other's
        key = (id(tensor), dtype, mode.enabled)
        held, version, made = casts.get(key, (None, 0, None))
        if held is not tensor or version != tensor.storage.version:
            made = convert(tensor, dtype=dtype)
            casts[key] = (tensor, tensor.storage.version, made)
        found: Tensor = made
        return found

    def empty(self, type_: TensorType) -> Tensor:
        storage = Storage.allocate(type_.span * type_.dtype.itemsize, type_.device)
        return Tensor.wrap(storage, storage.pointer, type_)

    def execute(
        self, plan: Plan, inputs: tuple[Any, ...], out: tuple[Any, ...] | None = None
    ) -> list[Any]:
        """The results of a call, written into ``out`` if given."""
        return run(plan, inputs, out)

    def _prepare(
        self,
        key: Any,
        op: Op,
        inputs: tuple[Any, ...],
        attributes: dict[str, Any],
        out: tuple[Any, ...] | None,
    ) -> Plan:
        """The plan of a call that `plans` does not have."""
        trial = self.trials.pop(key, None)
        if trial is not None and trial[1] < TRIAL:
            self.trials[key] = (trial[0], trial[1] + 1)
            return trial[0]
        types = tuple(
            x.type if isinstance(x, Tensor) else None if x is None else type(x) for x in inputs
        )
        written = None if out is None else tuple(t.type for t in out)
        plan = make_plan(op, types, attributes, written, quick=trial is None)
        if len(self.plans) + len(self.trials) >= MAX_PLANS:
            self.forget_plans()
        if plan.quick:
            self.trials[key] = (plan, 1)
        else:
            self.plans[key] = plan
        return plan

    def _view(self, plan: Plan, x: Any, attributes: dict[str, Any]) -> Any:
        type_ = plan.outputs[0]
        assert plan.view_offset is not None
        made = Tensor.wrap(x.storage, x.pointer + plan.view_offset * type_.dtype.itemsize, type_)
        base = x.base
        made.base = x if base is None else base
        if mode.enabled and x.requires_grad:
            record(plan, (x,), attributes, [made])
        made.base_node = made.base.node
        return made

    def _in_place(
        self, plan: Plan, inputs: tuple[Any, ...], attributes: dict[str, Any], out: tuple[Any, ...]
    ) -> Any:
        tracking = (
            mode.enabled
            and plan.op.differentiable
            and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        )
        for target in out:
            _check_target(plan.op, target, mode.enabled)
        updated = inputs[0] if plan.op.updates and inputs[0] is out[0] else None
        safe = tuple(
            [x if x is updated and not i else _apart(plan.op, x, out) for i, x in enumerate(inputs)]
        )
        if tracking:
            # the node sees the operands as they were called, with their versions before the write
            node = make_node(plan, inputs, attributes, out)
        copies: list[tuple[Any, Any]] = list(zip(inputs, safe, strict=True))
        if any(x is not y and x.type is not y.type for x, y in copies):
            with no_grad():  # a copy may be laid out in another way, which is another plan
                self.apply(plan.op, safe, attributes, out)
        else:
            self.execute(plan, safe, out)
        for target in out:
            target.storage.version += 1
        if tracking and True in node.needs:
            if "out" in node.names:
                node.keep_outputs(out)
            for position, target in enumerate(out):
                target.rebase(node, position, inputs)
        elif mode.enabled:
            for target in out:
                if target.requires_grad:
                    edge = edge_of(target)
                    target.rebase(
                        None if target.base is not None else _Replaced(edge, target), 0, ()
                    )
        return out[0] if len(out) == 1 else out


_PLAIN = frozenset({float, int, bool, type(None)})


def beside(inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The operands with numbers on the CPU (0-d tensors) moved beside the others, if there are any
    and the others are on a GPU."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    device = next((t.type.device for t in tensors if t.type.device != "cpu"), None)
    if device is None or not any(t.type.device == "cpu" and not t.type.ndim for t in tensors):
        return None
    return tuple(
        [
            move(x, device)
            if isinstance(x, Tensor) and x.type.device == "cpu" and not x.type.ndim
            else x
            for x in inputs
        ]
    )


def as_operand(op: Op, x: Any) -> Any:
    """What is no tensor as a plain number: those of NumPy and of other subclasses too."""
    if isinstance(x, Tensor) or x.__class__ in _PLAIN:
        return x
    if isinstance(x, np.ndarray):
        return from_array(x)
    if isinstance(x, np.generic):
        x = float(x) if x.dtype.kind in "fV" else x.item()
    for kind in (bool, int, float):
        if isinstance(x, kind):
            return kind(x)
    raise DTypeError(
        f"{op.name} takes tensors and numbers, got {type(x).__name__}; convert it by flame.tensor"
    )


def _check_target(op: Op, target: Any, recording: bool) -> None:
    if recording:
        owner = target if target.base is None else target.base
        if owner.tracked and owner.current_node() is None:
            kind = "a leaf" if owner is target else "a view of a leaf"
            raise GradientError(
                f"{op.name} in place on {kind} that requires grad would lose its gradient; do it "
                "under flame.no_grad(), or on a clone"
            )
    type_: TensorType = target.type
    if any(s == 0 and n > 1 for s, n in zip(type_.strides, type_.shape, strict=True)):
        raise ShapeError(
            f"{op.name} in place on an expanded tensor of shape {type_.shape}, in which several "
            "elements share memory; use .clone() first"
        )


def _apart(op: Op, x: Any, out: tuple[Any, ...]) -> Any:
    """``x``, or a copy where it overlaps a target in another way than element on element."""
    if not isinstance(x, Tensor):
        return x
    for target in out:
        if x.storage is not target.storage:
            continue
        same = x.pointer == target.pointer and x.type.shape == target.type.shape
        if same and x.type.strides == target.type.strides and hasattr(op, "scalar"):
            continue
        return x.detach().clone()
    return x


def run(plan: Plan, inputs: tuple[Any, ...], out: tuple[Any, ...] | None = None) -> list[Any]:
    """Allocate the outputs (unless given) and launch."""
    if plan.gpu is not None or plan.moves:
        return _run_on_gpu(plan, inputs, out)
    if out is None:
        outputs = []
        for type_ in plan.outputs:
            storage = Storage.allocate(type_.span * type_.dtype.itemsize)
            outputs.append(Tensor.wrap(storage, storage.pointer, type_))
    else:
        outputs = list(out)
    step = plan.direct
    try:
        if step is not None:
            cpu.launch(
                step.address,
                step.extent,
                step.grain,
                *[x.pointer if isinstance(x, Tensor) else x for x in inputs],
                *[t.pointer for t in outputs],
                *step.sizes,
            )
        elif plan.steps:
            _run_steps(plan, inputs, outputs)
        elif plan.host is not None:
            arrays = [x._array() if isinstance(x, Tensor) else x for x in inputs]
            plan.host(arrays, [t._array() for t in outputs])
    except OverflowError as error:
        numbers = [x for x in inputs if isinstance(x, int)]
        if all(-(1 << 63) <= x < 1 << 63 for x in numbers):
            raise
        raise DTypeError(f"{plan.op.name}: a number of {numbers} does not fit int64") from error
    return outputs


def _run_on_gpu(plan: Plan, inputs: tuple[Any, ...], out: tuple[Any, ...] | None) -> list[Any]:
    if out is None:
        outputs = []
        for type_ in plan.outputs:
            storage = Storage.allocate(type_.span * type_.dtype.itemsize, type_.device)
            outputs.append(Tensor.wrap(storage, storage.pointer, type_))
    else:
        outputs = list(out)
    if plan.gpu is None:
        non_blocking = bool(plan.attributes.get("non_blocking"))
        transfer.move(outputs[0], inputs[0], non_blocking=non_blocking)
        return outputs
    in_place = (
        plan.op.updates and inputs[0] is outputs[0]
    )  # its copy of the first input is left out
    plan.gpu.run(inputs, outputs, skip=1 if in_place else 0)
    return outputs


def _run_steps(plan: Plan, inputs: tuple[Any, ...], outputs: list[Any]) -> None:
    temporaries = [Storage.allocate(n) for n in plan.temporaries]
    slot = Storage.allocate(64) if plan.checked else None
    if slot is not None:
        ctypes.memset(slot.pointer, 0, 16)

    def pointer(role: str, position: int) -> Any:
        if role == "input":
            x = inputs[position]
            return x.pointer if isinstance(x, Tensor) else x
        if role == "output":
            return outputs[position].pointer
        if role == "temporary":
            return temporaries[position].pointer
        if role == "constant":
            return plan.constants[position].ctypes.data
        assert slot is not None
        return slot.pointer

    steps = plan.steps
    if plan.op.updates and inputs[0] is outputs[0]:
        steps = steps[1:]  # its copy of the first input
    for step in steps:
        _launch(step, [pointer(r.role, r.position) for r in step.operands])
    if slot is not None:
        flag, code = (ctypes.c_int64 * 2).from_address(slot.pointer)
        if flag:
            assert plan.op.failure is not None
            raise plan.op.failure(code, plan.types)


def _launch(step: Step, operands: list[Any]) -> None:
    scratch = []
    if step.scratch:
        from flame.runtime.cpu.pool import get_num_threads

        scratch = [Storage.allocate(nbytes * get_num_threads()) for nbytes in step.scratch]
    cpu.launch(
        step.address, step.extent, step.grain, *operands, *[s.pointer for s in scratch], *step.sizes
    )


def make_node(
    plan: Plan,
    inputs: tuple[Any, ...],
    attributes: dict[str, Any],
    overwritten: tuple[Any, ...] = (),
) -> OpNode:
    """The tape's record of a call, which will write into the tensors ``overwritten``."""
    edges: list[Edge] = []
    needs: list[bool] = []
    formulas = plan.op.formulas
    for position, x in enumerate(inputs):
        edge = None
        wanted = not formulas or formulas[position] is not None
        if wanted and isinstance(x, Tensor) and x.requires_grad and x.dtype.kind == "f":
            edge = edge_of(x)
        edges.append(edge)
        needs.append(edge is not None)
    results = plan.outputs[: len(plan.outputs) - plan.op.extras]
    return OpNode(
        plan.op, inputs, plan.types, attributes, tuple(needs), edges, results, overwritten
    )


def record(
    plan: Plan, inputs: tuple[Any, ...], attributes: dict[str, Any], outputs: list[Any]
) -> None:
    """Put a call on the tape, if any gradient can flow."""
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad:
            break
    else:
        return
    node = make_node(plan, inputs, attributes)
    if True not in node.needs:
        return
    if "out" in node.names:
        node.keep_outputs(tuple(outputs))
    for position, made in enumerate(outputs[: len(node.outputs)]):
        if made.type.dtype.kind == "f":
            made.node = node
            made.output_index = position
            made.tracked = True


class _Replaced(Node):
    """All values were replaced by ones without history: no gradient goes on."""

    __slots__ = ()

    name = "replaced"

    def __init__(self, edge: Edge, target: Tensor) -> None:
        super().__init__([edge], (target.type,))

    def apply(
        self, grads: Any, differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> list[Any]:
        return [None]


class SliceNode(Node):
    """An in-place operation seen from the tensor whose part it changed.

    The gradient of the changed part goes through the operation's own node, the rest passes by.
    """

    __slots__ = ("inner", "selves", "view_type", "where")

    name = "in_place_on_view"

    def __init__(
        self, inner: Node | None, selves: tuple[int, ...], base: Any, view: Any, edges: list[Edge]
    ) -> None:
        super().__init__(edges, (base.type,))
        self.inner, self.selves = inner, selves
        self.view_type = view.type
        self.where = (view.pointer - base.pointer) // view.dtype.itemsize

    def apply(
        self, grads: Any, differentiable: bool, wanted: Sequence[bool] | None = None
    ) -> list[Any]:
        from flame.ops.creation import zeros
        from flame.ops.shapes import as_strided

        view, base = self.view_type, self.outputs[0]
        memory = zeros(
            (base.span,), dtype=base.dtype, device=base.device
        )  # the base's, gaps included
        whole = as_strided(memory, shape=base.shape, strides=base.strides, offset=0)
        whole.copy_(grads[0])
        part = as_strided(memory, shape=view.shape, strides=view.strides, offset=self.where)
        inner: list[Any] = []
        change: Any = 0.0
        if self.inner is not None:
            given = part.clone()
            asked = None if wanted is None else [True] * len(self.inner.edges)
            inner = list(self.inner.apply([given], differentiable, asked))
            for position in self.selves:
                if inner[position] is not None:
                    change = change + inner[position]
        part.copy_(change)
        return [whole, *inner]

    def release(self) -> None:
        if self.inner is not None:
            self.inner.release()


def set_float32_matmul_precision(precision: str) -> None:
    """How exactly processors with a matrix unit for bfloat16 multiply float32 matrices.

    "highest" (the default): as exactly as float32 multiplications and additions. "high": two
    bfloat16 parts of each number count, 16 binary digits. "medium": one, 8 digits. Sums are in
    float32 always. Other processors, and small products, are exact in any case. Raises
    ArgumentError for another name, StateError inside a function that is being compiled.
    """
    current = interpreter()
    if not isinstance(current, Eager):
        raise StateError(
            "set_float32_matmul_precision: call it outside of functions that are being compiled"
        )
    choose_float32_matmul_precision(precision)
    current.forget_plans()
