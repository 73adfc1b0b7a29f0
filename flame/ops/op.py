"""Op: what one operation means, declared in one place.

Invariants: every fact about an op stands in its declaration; a derivative formula sees exactly
what it names, and the tape keeps exactly that; calling an op goes through the current interpreter,
so no op can bypass autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from flame.core.autocast import Policy
from flame.core.dtypes import DType
from flame.core.errors import FlameError, StateError
from flame.core.types import TensorType
from flame.kernel.builder import Lowering

if TYPE_CHECKING:
    from flame.tensor import Tensor

T = TypeVar("T")
InputType = TensorType | type | None  # of a tensor, a Python number, or an operand left out
Types = tuple[InputType, ...]


@dataclass(frozen=True)
class Arg:
    """A tensor that tests draw for an op: uniform in [low, high), away from the points in
    ``avoid``.
    """

    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    # float | double (float32, float64) | int | bool | any | index (int64) | int32 | float32
    kind: str = "float"
    avoid: tuple[float, ...] = ()
    distinct: bool = False  # all elements differ well beyond a finite difference's step
    differentiable: bool = True
    contiguous: bool = False  # the op's meaning depends on the layout; tests keep it row-major
    values: tuple[float, ...] = ()  # in row-major order; instead of drawn ones


@dataclass(frozen=True)
class Sample:
    """One call of an op in the generated tests: Args become arrays, all else is passed as it is."""

    inputs: tuple[Any, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class NotDifferentiable:
    """Says that an op has no derivative, on purpose."""


NOT_DIFFERENTIABLE: Final = NotDifferentiable()


class Formula:
    """A derivative formula; its parameters' names say what it needs of the forward call.

    ``g``: gradient of the output (a tuple for several outputs); ``out``: the output(s); the name
    of an
    input: that tensor or number; ``<input>_type``: its TensorType only; an attribute's name;
    ``needs``: which inputs want a gradient (joint formulas only).
    """

    __slots__ = ("function", "names", "saved")

    def __init__(self, function: Callable[..., Any], op: str, known: Sequence[str]) -> None:
        self.function = function
        self.names = tuple(inspect.signature(function).parameters)
        inputs = {name.lstrip("*") for name in known}
        self.saved = tuple(n for n in self.names if n == "out" or n in inputs)
        for name in self.names:
            if name.startswith("_"):
                raise StateError(f"op {op}: formula parameter {name!r} must have a meaning")


@dataclass(frozen=True)
class Joint:
    """One formula for the gradients of all inputs: returns a tuple, None where not needed."""

    function: Callable[..., Any]


Vjp = Sequence[Callable[..., Any] | None] | Joint | NotDifferentiable


class Op:
    """One operation. ``infer`` gives the output types, ``lower`` the kernels.

    inputs: names of the operands; one that starts with ``*`` takes the rest.
    infer(types, **attributes): TensorType, or a tuple of them. Raises ShapeError and DTypeError.
    lower(types, outputs, **attributes): Lowering.
    lower_cuda(types, outputs, **attributes): as lower, on a GPU; default: the kernels of lower.
    lower_fused(types, outputs, epilogue, prologues, **attributes): as lower, where an Epilogue gets
        the results instead of memory, and Prologues (by operand) give elements of operands; None
        where the op has no such form. See `flame.ops.contraction`.
    vjp: a formula for each input (None where it has no gradient), a Joint, or NOT_DIFFERENTIABLE.
    reference(*arrays, **attributes): the meaning, in NumPy.
    failure(code, types): the error for a number that a kernel put into its error slot.
    updates: the result starts as a copy of the first input, which the first kernel makes; it is
    left
        out where the op runs in place on that input.
    reads(type): whether the kernel can read an operand of this layout; others are copied first.
    extras: how many of the last outputs serve the backward pass alone. No gradient flows through
    them,
        and ``out`` holds only them (None in place of the others), so a large result is not kept.
    of_memory: what it means depends on how its first operand lies in memory, so that keeps its
        layout. images: which operands are images (N, C, H, W) that are best channels-last.
        any_layout: it writes channels-last results as well as
        the row-major ones that it infers. flops(types, outputs): multiplications and additions.
    materialize: whether its formula gets zeros for the gradient of a result that nobody used; else
        None.
    overlays: operands that its first result may lie over, where their types are equal: an element
        is read for the last time by the thread that writes the same element of the result.
    widens: its kernels compute half-width floats in float32, so they read them where float32 is
        meant.
    moves: its result is on the device that `infer` says, not on that of its operands.
    autocast: what an autocast region does with floating operands, nothing if None; see `Policy`.
    """

    updates = False
    extras = 0

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        infer: Callable[..., Any],
        lower: Callable[..., Lowering],
        vjp: Vjp,
        reference: Callable[..., Any],
        samples: Sequence[Sample] = (),
        failure: Callable[..., FlameError] | None = None,
        tolerance: float = 1.0,
        updates: bool = False,
        reads: Callable[[TensorType], bool] | None = None,
        extras: int = 0,
        lower_fused: Callable[..., Lowering] | None = None,
        lower_cuda: Callable[..., Lowering] | None = None,
        of_memory: bool = False,
        images: Sequence[int] = (),
        any_layout: bool = False,
        flops: Callable[[Types, Sequence[TensorType]], int] | None = None,
        moves: bool = False,
        materialize: bool = True,
        widens: bool = False,
        overlays: Sequence[int] = (),
        autocast: Policy | None = None,
        register: bool = True,
    ) -> None:
        self.name = name
        self.reads = reads
        self.extras = extras
        self.inputs = tuple(inputs)
        self.infer = infer
        self.lower = lower
        self.lower_fused = lower_fused
        self.lower_cuda = lower_cuda or lower
        self.of_memory, self.images, self.any_layout = of_memory, tuple(images), any_layout
        self.flops = flops
        self.moves, self.materialize, self.widens = moves, materialize, widens
        self.overlays = tuple(overlays)
        self.autocast = autocast
        self.reference = reference
        self.samples = tuple(samples)
        self.failure = failure
        self.updates = updates
        self.tolerance = tolerance  # how many times the usual tolerance tests allow
        self.variadic = bool(self.inputs) and self.inputs[-1].startswith("*")
        self.takes_tensors = any(isinstance(x, Arg) for s in self.samples for x in s.inputs)
        self.differentiable = not isinstance(vjp, NotDifferentiable)
        self.joint: Formula | None = None
        self.formulas: tuple[Formula | None, ...] = ()
        if isinstance(vjp, Joint):
            self.joint = Formula(vjp.function, name, self.inputs)
        elif not isinstance(vjp, NotDifferentiable):
            self.formulas = tuple(None if f is None else Formula(f, name, self.inputs) for f in vjp)
            if len(self.formulas) != len(self.inputs):
                raise StateError(
                    f"op {name} has {len(self.inputs)} inputs but {len(self.formulas)} formulas"
                )
        if register:
            _register(self)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        return _interpreter.apply(self, inputs, attributes)

    def into(self, out: tuple[Any, ...], *inputs: Any, **attributes: Any) -> Any:
        """Call with the results written into the tensors ``out``, in place."""
        return _interpreter.apply(self, inputs, attributes, out)

    def foreach(
        self,
        inputs: Sequence[tuple[Any, ...]],
        *shared: Any,
        out: Sequence[tuple[Any, ...]],
        attributes: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Many calls that have the operands ``shared`` in common, each written into its own tensors
        of ``out``; see `Interpreter.foreach`."""
        _interpreter.foreach(self, inputs, shared, out, attributes)

    def lowering(
        self, types: Types, outputs: tuple[TensorType, ...], attributes: Mapping[str, Any]
    ) -> Lowering:
        """What the op does on the device of its results."""
        on_gpu = any(t.device != "cpu" for t in outputs)
        return (self.lower_cuda if on_gpu else self.lower)(types, outputs, **attributes)

    def inline(self, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
        """The op on scalar values, inside another kernel; only elementwise ops can."""
        raise StateError(f"{self.name} is no elementwise op and cannot stand inside a fused one")


class Stale(Exception):
    """Raised by what a compiled step repeats, where it is no longer what was recorded."""


class Interpreter:
    """What gives op calls their effect: eager execution, or a recorder."""

    recording = False
    modes_set: set[int]  # of a recorder: ids of the modules whose mode the step itself sets

    def apply(
        self,
        op: Op,
        inputs: tuple[Any, ...],
        attributes: dict[str, Any],
        out: tuple[Any, ...] | None = None,
    ) -> Any:
        raise StateError(f"op {op.name} was called before `import flame` was complete")

    def foreach(
        self,
        op: Op,
        inputs: Sequence[tuple[Any, ...]],
        shared: tuple[Any, ...],
        out: Sequence[tuple[Any, ...]],
        attributes: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Many calls, as if one after the other: each of its own ``inputs`` (tensors) and then of
        ``shared`` (tensors and numbers), written into its own ``out``. attributes: of each call, if
        there are any."""
        given = attributes or [{}] * len(inputs)
        for own, targets, each in zip(inputs, out, given, strict=True):
            self.apply(op, (*own, *shared), each, targets)

    def constant(self, data: Any, **options: Any) -> Any:
        """A tensor of numbers that an op's wrapper brings along."""
        raise StateError("a constant was made before `import flame` was complete")

    def cast(self, tensor: Any, dtype: DType) -> Any:
        """``tensor`` in the dtype that autocast wants; casts of parameters may be kept."""
        raise StateError("a tensor was cast before `import flame` was complete")

    def empty(self, type_: TensorType) -> Any:
        """A tensor whose values are not set."""
        raise StateError("a tensor was made before `import flame` was complete")

    def repeat(
        self,
        action: Callable[[], T],
        again: Callable[[], Any] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> T:
        """Python's own work of a step: a schedule's count, a range of random numbers.

        Done now, and again (by ``again`` if given) before each later run of a compiled step. A
        tuple of numbers that it returns is known anew at each step, so a recorder gives stand-ins.
        ``undo`` takes the latest one back, where the step fails.
        """
        return action()

    def refuse(self, what: str) -> None:
        """``what`` was asked for, which differs from step to step; a recorder raises TraceError."""

    def made(self, tensor: Any) -> None:
        """A tensor was made from Python data."""

    def meets(self, module: Any) -> None:
        """A module was called."""


OPS: Final[dict[str, Op]] = {}
_interpreter = Interpreter()


def _register(op: Op) -> None:
    if op.name in OPS:
        raise StateError(f"two ops are named {op.name}")
    OPS[op.name] = op


def constant(data: Any, **options: Any) -> Tensor:
    """A tensor with the numbers of an array (not copied), a sequence, or a single number."""
    made: Tensor = _interpreter.constant(data, **options)
    return made


def empty_of(type_: TensorType) -> Any:
    """A tensor of this type whose values are not set."""
    return _interpreter.empty(type_)


def interpreter() -> Interpreter:
    """The current interpreter."""
    return _interpreter


def set_interpreter(interpreter: Interpreter) -> Interpreter:
    """Make ``interpreter`` the current one; returns the one before."""
    global _interpreter
    before, _interpreter = _interpreter, interpreter
    return before
