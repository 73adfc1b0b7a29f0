"""Loads and stores in LLVM IR: whole vectors, masked ones, gathers and scatters.

Invariant: a lane that is masked off touches no memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from flame.kernel import values
from flame.kernel.program import Statement, Store, Target
from flame.kernel.values import Buffer, Value
from flame.render import llvm_instructions as instructions
from flame.render.llvm_instructions import memory_type


class MemoryAccess(ABC):
    """The part of the renderer that turns loads and stores into instructions."""

    lanes: int
    vector_var: str | None
    mask: str | None
    counters: dict[str, str]
    pointers: dict[Buffer, str]

    @abstractmethod
    def emit(self, instruction: str, level: int | None = None) -> str: ...
    @abstractmethod
    def emit_void(self, line: str, level: int | None = None) -> None: ...
    @abstractmethod
    def declare(self, signature: str) -> None: ...
    @abstractmethod
    def fresh(self, prefix: str = "%t") -> str: ...
    @abstractmethod
    def value(self, value: Value, lanes: int) -> str: ...
    @abstractmethod
    def varying(self, value: Value) -> bool: ...
    @abstractmethod
    def branch(
        self, condition: str, emit: Callable[[], None], body: tuple[Statement, ...]
    ) -> None: ...
    @abstractmethod
    def forget_loads(self, stored: Iterable[Buffer]) -> None: ...

    def _slope(self, index: Value) -> int | None:
        """Elements between neighbouring lanes: 0, 1, or None where it is neither."""
        assert self.vector_var is not None
        if not self.varying(index):
            return 0
        line = values.linear(index, self.vector_var)
        if line is None or any(self.varying(part) for part in line):
            return None
        return 1 if values.is_const(line[0], 1) else None

    def address(self, buffer: Buffer, index: Value, level: int | None) -> str:
        """The address of an element, for the first lane."""
        assert self.vector_var is None or not self.varying(index) or self._slope(index) == 1
        type_ = memory_type(buffer.dtype)
        return self.emit(
            f"getelementptr {type_}, ptr {self.pointers[buffer]}, i64 {self._first(index, level)}",
            level,
        )

    def _first(self, index: Value, level: int | None) -> str:
        """``index`` in the first lane, as a scalar."""
        if self.vector_var is None or not self.varying(index):
            return self.value(index, 1)
        line = values.linear(index, self.vector_var)
        assert line is not None
        counter = self.counters[self.vector_var]
        if values.is_const(line[1], 0):
            return counter
        return self.emit(f"add i64 {counter}, {self.value(line[1], 1)}", level)

    def _addresses(self, buffer: Buffer, index: Value, lanes: int, level: int | None) -> str:
        type_, indices = memory_type(buffer.dtype), self.value(index, lanes)
        return self.emit(
            f"getelementptr {type_}, ptr {self.pointers[buffer]}, <{lanes} x i64> {indices}", level
        )

    def load(self, value: Value, lanes: int, level: int) -> str:
        buffer, index = value.attr, value.args[0]
        where = value.args[1] if len(value.args) > 1 else None
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        if lanes == 1 and where is None:
            raw = self.emit(f"load {type_}, ptr {self.address(buffer, index, level)}", level)
            return instructions.from_memory(self, buffer.dtype, raw, 1, level)
        if lanes == 1:
            return self._guarded_scalar(value, level)
        mask = self.mask
        otherwise = "poison"
        if where is not None:
            wanted = self.value(where, lanes)
            if mask is not None:
                wanted = self.emit(f"and <{lanes} x i1> {mask}, {wanted}", level)
            mask = wanted
            known = self.value(value.args[2], lanes)
            otherwise = instructions.to_memory(self, buffer.dtype, known, lanes, level)
        whole = f"<{lanes} x {type_}>"
        slope = self._slope(index)
        if slope == 1 and mask is None:
            address = self.address(buffer, index, level)
            raw = self.emit(f"load {whole}, ptr {address}, align {align}", level)
        elif slope == 1:
            raw = self._masked_load(self.address(buffer, index, level), whole, lanes, type_, align,
                                    str(mask), otherwise, level)  # fmt: skip
        else:
            # unused lanes of the last vector address its last element, so only `where` needs a mask
            chosen = "splat (i1 true)" if where is None else str(mask)
            raw = self._gather(
                self._addresses(buffer, index, lanes, level),
                whole, lanes, type_, align, chosen, otherwise, level,
            )  # fmt: skip
        return instructions.from_memory(self, buffer.dtype, raw, lanes, level)

    def _masked_load(
        self, address: str, whole: str, lanes: int, type_: str, align: int, mask: str,
        otherwise: str, level: int | None,
    ) -> str:  # fmt: skip
        name = f"@llvm.masked.load.v{lanes}{suffix_of(type_)}.p0"
        self.declare(f"{whole} {name}(ptr, <{lanes} x i1>, {whole})")
        return self.emit(
            f"call {whole} {name}(ptr align {align} {address}, <{lanes} x i1> {mask}, "
            f"{whole} {otherwise})",
            level,
        )

    def _gather(
        self, addresses: str, whole: str, lanes: int, type_: str, align: int, mask: str,
        otherwise: str, level: int | None,
    ) -> str:  # fmt: skip
        name = f"@llvm.masked.gather.v{lanes}{suffix_of(type_)}.v{lanes}p0"
        self.declare(f"{whole} {name}(<{lanes} x ptr>, <{lanes} x i1>, {whole})")
        return self.emit(
            f"call {whole} {name}(<{lanes} x ptr> align {align} {addresses}, "
            f"<{lanes} x i1> {mask}, {whole} {otherwise})",
            level,
        )

    def _guarded_scalar(self, value: Value, level: int) -> str:
        """A load that must not be done where its condition fails, as a vector of one lane."""
        buffer, (index, where, otherwise) = value.attr, value.args
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        address = self.address(buffer, index, level)
        condition = self.value(where, 1)
        mask = self.emit(f"insertelement <1 x i1> poison, i1 {condition}, i64 0", level)
        other = instructions.to_memory(self, buffer.dtype, self.value(otherwise, 1), 1, level)
        others = self.emit(f"insertelement <1 x {type_}> poison, {type_} {other}, i64 0", level)
        raw = self._masked_load(address, f"<1 x {type_}>", 1, type_, align, mask, others, level)
        scalar = self.emit(f"extractelement <1 x {type_}> {raw}, i64 0", level)
        return instructions.from_memory(self, buffer.dtype, scalar, 1, level)

    def store(self, statement: Store) -> None:
        lanes = self.lanes if self.vector_var is not None else 1
        ready = []
        for target in statement.targets:
            name = self.value(target.value, lanes)
            ready.append(instructions.to_memory(self, target.buffer.dtype, name, lanes, None))
        for target, raw in zip(statement.targets, ready, strict=True):
            if lanes == 1:
                self._store_scalar(target, raw)
            else:
                self._store_vector(target, raw, lanes)
        stored = {target.buffer for target in statement.targets}
        self.forget_loads(stored)

    def _store_scalar(self, target: Target, raw: str) -> None:
        type_ = memory_type(target.buffer.dtype)

        def write() -> None:
            address = self.address(target.buffer, target.index, None)
            self.emit_void(f"store {type_} {raw}, ptr {address}")

        if target.where is None:
            write()
        else:
            self.branch(self.value(target.where, 1), write, ())

    def _store_vector(self, target: Target, raw: str, lanes: int) -> None:
        buffer = target.buffer
        type_, align = memory_type(buffer.dtype), buffer.dtype.itemsize
        mask = self.mask
        if target.where is not None:
            wanted = self.value(target.where, lanes)
            mask = wanted if mask is None else self.emit(f"and <{lanes} x i1> {mask}, {wanted}")
        whole = f"<{lanes} x {type_}>"
        slope = self._slope(target.index)
        if slope == 1 and mask is None:
            address = self.address(buffer, target.index, None)
            self.emit_void(f"store {whole} {raw}, ptr {address}, align {align}")
        elif slope == 1:
            address = self.address(buffer, target.index, None)
            name = f"@llvm.masked.store.v{lanes}{suffix_of(type_)}.p0"
            self.declare(f"void {name}({whole}, ptr, <{lanes} x i1>)")
            self.emit_void(
                f"call void {name}({whole} {raw}, ptr align {align} {address}, "
                f"<{lanes} x i1> {mask})"
            )
        else:
            chosen = "splat (i1 true)" if mask is None else mask
            addresses = self._addresses(buffer, target.index, lanes, None)
            name = f"@llvm.masked.scatter.v{lanes}{suffix_of(type_)}.v{lanes}p0"
            self.declare(f"void {name}({whole}, <{lanes} x ptr>, <{lanes} x i1>)")
            self.emit_void(
                f"call void {name}({whole} {raw}, <{lanes} x ptr> align {align} {addresses}, "
                f"<{lanes} x i1> {chosen})"
            )


def suffix_of(type_: str) -> str:
    return {"float": "f32", "double": "f64", "half": "f16"}.get(type_, type_)
