"""Recorder: an interpreter that writes operations into a graph instead of running them.

Invariants: it derives from eager execution, so autograd, views and changes in place go the same
way; tensors that the code reaches from outside become inputs of the graph by themselves, once for
each storage; only the thread that records is recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from flame.autograd.mode import mode
from flame.compiler.pipeline import check_operands, describe
from flame.compiler.plan import Plan
from flame.core.autocast import autocast
from flame.core.dtypes import DType
from flame.core.errors import TraceError
from flame.core.types import TensorType
from flame.eager import Eager, as_operand, beside, record
from flame.graph import Node, Number, Symbol
from flame.kernel.values import Value
from flame.ops.autocast import cast_operands
from flame.ops.conversion import convert, copy
from flame.ops.op import Interpreter, Op, T, set_interpreter
from flame.ops.overwriting import overwrite
from flame.ops.shapes import as_strided
from flame.recording.aside import Aside
from flame.recording.lines import user_line
from flame.recording.memory import Memory, RecordedStorage, is_recorded, whole_type
from flame.recording.numbers import RecordedFloat, RecordedInt, stand_in
from flame.recording.outside import Seen
from flame.runtime.transfer import on_host
from flame.tensor import Tensor

_NUMBERS = frozenset({float, int, bool, type(None)})


@dataclass(frozen=True)
class Repeated:
    """Python's own work of each step. ``numbers``: symbols of what it returns; ``first``: those
    of the step that was recorded; ``undo`` takes the latest one back.
    """

    again: Callable[[], Any]
    numbers: tuple[Symbol, ...]
    first: tuple[Any, ...]
    undo: Callable[[], None] | None


class Recorder(Eager):
    """Records the ops of one thread; `beneath` runs those of all others."""

    recording = True

    def __init__(self, beneath: Interpreter) -> None:
        super().__init__()
        self.beneath = beneath
        self.thread = threading.get_ident()
        self.nodes: list[Node] = []
        self.memories: dict[int, Memory] = {}  # by id of the storage; of those from outside
        self.recorded: weakref.WeakKeyDictionary[RecordedStorage, Memory] = (
            weakref.WeakKeyDictionary()
        )
        self.arguments: list[Memory] = []
        self.states: list[Memory] = []
        self.constants: dict[Symbol, Any] = {}
        self.repeated: list[Repeated] = []
        self.captured: dict[int, Tensor] = {}  # tensors from outside that ops met, by id
        self.seen = Seen()
        self.born: set[int] = set()  # ids of storages made from Python data while recording
        self.kept: list[Any] = []  # what must live as long as the recording
        self._count = 0

    # --- calls ------------------------------------------------------------------------------------

    def apply(
        self,
        op: Op,
        inputs: tuple[Any, ...],
        attributes: dict[str, Any],
        out: tuple[Any, ...] | None = None,
    ) -> Any:
        if threading.get_ident() != self.thread:
            return self.beneath.apply(op, inputs, attributes, out)
        if any(x.__class__ is Value for x in inputs):
            return op.inline(inputs, attributes)
        if op.autocast is not None and autocast.on and out is None:
            inputs = cast_operands(op.autocast, inputs)
        inputs = tuple([self._operand(op, x) for x in inputs])
        inputs = beside(inputs) or inputs
        types = tuple([_type_of(x) for x in inputs])
        check_operands(op, types)
        plan = describe(op, types, attributes, None if out is None else tuple(t.type for t in out))
        if out is not None:
            return self._in_place(plan, inputs, attributes, out)
        if plan.view_offset is not None:
            return self._view(plan, inputs[0], attributes)
        outputs = self.execute(plan, inputs)
        tracked = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if tracked and mode.enabled and op.differentiable:
            record(plan, inputs, attributes, outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _operand(self, op: Op, x: Any) -> Any:
        if x.__class__ in _NUMBERS or isinstance(x, (Tensor, RecordedFloat, RecordedInt)):
            return x
        return as_operand(op, x)

    def execute(
        self, plan: Plan, inputs: tuple[Any, ...], out: tuple[Any, ...] | None = None
    ) -> list[Any]:
        operands = tuple([self._symbol_or_number(x) for x in inputs])
        results = tuple([self.fresh(t) for t in plan.outputs])
        line = user_line()
        self.nodes.append(Node(plan.op, operands, results, dict(plan.attributes), line))
        if out is not None:
            for target, symbol in zip(out, results, strict=True):
                self.write(target, symbol)
            return list(out)
        return [self.wrap(symbol, line) for symbol in results]

    def _view(self, plan: Plan, x: Any, attributes: dict[str, Any]) -> Any:
        made = super()._view(plan, x, attributes)
        memory = self.memory_of(x)
        place = (made.pointer - memory.begin, made.type)
        if place not in memory.views:
            symbol = self.fresh(made.type)
            source = self.symbol_of(x)
            self.nodes.append(Node(plan.op, (source,), (symbol,), dict(attributes), user_line()))
            memory.views[place] = symbol
        return made

    def cast(self, tensor: Any, dtype: DType) -> Any:
        """Recorded each time: equal casts are merged by the compiler."""
        if threading.get_ident() != self.thread:
            return self.beneath.cast(tensor, dtype)
        return convert(tensor, dtype=dtype)

    # --- tensors made otherwise -------------------------------------------------------------------

    def constant(self, data: Any, **options: Any) -> Any:
        made = self.beneath.constant(data, **options)
        if threading.get_ident() == self.thread:
            self.made(made)
        return made

    def made(self, tensor: Any) -> None:
        """A tensor was made from Python data: its numbers are a constant of the step."""
        if threading.get_ident() == self.thread:
            self.born.add(id(tensor.storage))
            self.kept.append(tensor.storage)

    def empty(self, type_: TensorType) -> Any:
        if threading.get_ident() != self.thread:
            return self.beneath.empty(type_)
        storage = RecordedStorage(type_.span * type_.dtype.itemsize, user_line())
        self.recorded[storage] = Memory(storage, type_, None)
        return Tensor.wrap(storage, 0, type_)  # type: ignore[arg-type]

    def wrap(self, symbol: Symbol, line: str) -> Tensor:
        """A tensor over recorded memory that holds ``symbol``."""
        type_ = symbol.type
        assert isinstance(type_, TensorType)
        storage = RecordedStorage(type_.span * type_.dtype.itemsize, line)
        memory = Memory(storage, type_, None)
        memory.write(symbol)
        self.recorded[storage] = memory
        return Tensor.wrap(storage, 0, type_)  # type: ignore[arg-type]

    # --- Python's own work ------------------------------------------------------------------------

    def repeat(
        self,
        action: Callable[[], T],
        again: Callable[[], Any] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> T:
        if threading.get_ident() != self.thread:
            return action()
        with self.aside():
            made = action()
        if not isinstance(made, tuple):
            self.repeated.append(Repeated(again or action, (), (), undo))
            return made
        symbols = tuple([self.fresh(type(n), "n") for n in made])
        self.repeated.append(Repeated(again or action, symbols, made, undo))
        stand_ins: Any = tuple([stand_in(s, n) for s, n in zip(symbols, made, strict=True)])
        return stand_ins  # type: ignore[no-any-return]

    def refuse(self, what: str) -> None:
        if threading.get_ident() == self.thread:
            raise TraceError(
                f"{user_line()}: {what} was asked for, which changes from step to step; a compiled "
                "step would keep that of now. Ask outside of the step"
            )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, operations run at once, on tensors that the step itself does not compute."""
        watcher = Aside(self)
        before, mode.recorder = mode.recorder, watcher
        set_interpreter(watcher)
        try:
            yield
        finally:
            set_interpreter(self)
            mode.recorder = before

    # --- symbols ----------------------------------------------------------------------------------

    def fresh(self, type_: TensorType | type, prefix: str = "t") -> Symbol:
        self._count += 1
        return Symbol(f"{prefix}{self._count}", type_)

    def argument(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor that is handed in at each call."""
        type_ = tensor.type
        storage = RecordedStorage(type_.span * type_.dtype.itemsize, "an argument of the step")
        memory = Memory(storage, type_, self.fresh(type_, "x"))
        self.recorded[storage] = memory
        self.arguments.append(memory)
        made = type(tensor).wrap(storage, 0, type_)  # type: ignore[arg-type]
        made.tracked = tensor.requires_grad
        return made

    def memory_of(self, tensor: Tensor) -> Memory:
        storage: Any = tensor.storage
        if isinstance(storage, RecordedStorage):
            return self.recorded[storage]
        self.captured.setdefault(id(tensor), tensor)
        self.seen.use(tensor)
        found = self.memories.get(id(storage))
        if found is None:
            found = self.memories[id(storage)] = self._outside(tensor)
        return found

    def _outside(self, tensor: Tensor) -> Memory:
        """Memory from outside that is met for the first time: a constant, or state."""
        type_ = whole_type(tensor)
        constant = id(tensor.storage) in self.born
        symbol = self.fresh(type_, "c" if constant else "s")
        memory = Memory(tensor.storage, type_, symbol)
        if constant:
            memory.given = None
            storage = on_host(tensor.storage)
            self.constants[symbol] = np.array(
                storage.as_numpy(type_.dtype.numpy, type_.shape, type_.strides)
            )
        else:
            self.states.append(memory)
        return memory

    def has_written(self, tensor: Tensor) -> bool:
        """Whether the step so far has changed the memory of a tensor from outside."""
        memory = self.memories.get(id(tensor.storage))
        return memory is not None and memory.whole is not memory.first

    def meets_value(self, tensor: Tensor) -> None:
        """Python asks for the numbers of a tensor."""
        if is_recorded(tensor):  # which says so itself
            return
        if self.has_written(tensor):
            raise TraceError(
                f"{user_line()}: the value of a tensor was asked for after the compiled step "
                "changed it, but nothing runs yet; return the tensor and look at it after the call"
            )
        if id(tensor.storage) not in self.born:
            self.seen.value(tensor)

    def meets_flag(self, tensor: Tensor) -> None:
        """``requires_grad`` of a tensor is about to change."""
        self.seen.flag(tensor)

    def meets_replacement(self, tensor: Tensor) -> None:
        """The memory of a tensor is about to be replaced."""
        if not is_recorded(tensor):
            raise TraceError(
                f"{user_line()}: .data of a tensor from outside is assigned in a compiled step; "
                "change its memory in place: x.copy_(...) under flame.no_grad()"
            )

    def symbol_of(self, tensor: Tensor) -> Symbol:
        """What a tensor holds now."""
        memory = self.memory_of(tensor)
        offset = tensor.pointer - memory.begin
        found = memory.views.get((offset, tensor.type))
        if found is None:
            found = self._part(memory, offset, tensor.type)
            memory.views[offset, tensor.type] = found
        return found

    def _part(self, memory: Memory, offset: int, type_: TensorType) -> Symbol:
        """A view into the present content."""
        whole = self._whole(memory)
        assert isinstance(whole.type, TensorType)
        if whole.type.dtype is not type_.dtype:
            raise TraceError(
                f"{user_line()}: memory of {whole.type.dtype.name} is read as {type_.dtype.name} "
                "after it was written to; a compiled step cannot record that, clone it first"
            )
        symbol = self.fresh(type_)
        attributes = {
            "shape": type_.shape,
            "strides": type_.strides,
            "offset": offset // type_.dtype.itemsize,
        }
        self.nodes.append(Node(as_strided, (whole,), (symbol,), attributes, user_line()))
        return symbol

    def _whole(self, memory: Memory) -> Symbol:
        if memory.whole is None:  # nothing was written: any numbers will do
            from flame.ops.creation import zeros

            made = zeros(memory.type.shape, dtype=memory.type.dtype, device=memory.type.device)
            symbol = self.symbol_of(made)
            if symbol.type is not memory.type:
                symbol = self._relaid(symbol, memory.type)
            memory.write(symbol)
        assert memory.whole is not None
        return memory.whole

    def _relaid(self, symbol: Symbol, type_: TensorType) -> Symbol:
        """The same numbers with the strides of ``type_``."""
        made = self.fresh(type_)
        self.nodes.append(Node(copy, (symbol,), (made,), {}, user_line()))
        return made

    def write(self, target: Tensor, symbol: Symbol) -> None:
        """``target`` was given new content."""
        memory = self.memory_of(target)
        offset = target.pointer - memory.begin
        if offset == 0 and target.type is memory.type:
            memory.write(symbol)
            return
        whole = self._whole(memory)
        assert isinstance(whole.type, TensorType)
        if whole.type.dtype is not target.type.dtype:
            raise TraceError(
                f"{user_line()}: memory of {whole.type.dtype.name} is written as "
                f"{target.type.dtype.name}; a compiled step cannot record that"
            )
        flat = {"strides": target.type.strides, "offset": offset // target.type.dtype.itemsize}
        changed = self.fresh(memory.type)
        self.nodes.append(Node(overwrite, (whole, symbol), (changed,), flat, user_line()))
        memory.write(changed)
        memory.views[offset, target.type] = symbol

    def _symbol_or_number(self, x: Any) -> Symbol | Number | None:
        if isinstance(x, Tensor):
            return self.symbol_of(x)
        if isinstance(x, (RecordedFloat, RecordedInt)):
            return x.symbol
        number: Number | None = x
        return number


def _type_of(x: Any) -> TensorType | type | None:
    if isinstance(x, Tensor):
        return x.type
    if x is None:
        return None
    if isinstance(x, RecordedFloat):
        return float
    return int if isinstance(x, RecordedInt) else type(x)
