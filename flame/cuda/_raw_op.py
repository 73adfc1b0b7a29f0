"""raw_op: an operation whose kernel is the user's own.

It is an op like FLAME's, so it runs eagerly, on the tape, and inside of compiled steps. The user's
kernel becomes a device function, which a kernel with FLAME's calling convention calls: pointers,
pointers to numbers that are known on the device alone, and 64-bit words.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flame.core.dtypes import DType
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    GradientError,
    UnsupportedError,
)
from flame.core.types import Shape, TensorType, tensor_type
from flame.cuda._raw_kernel import RawKernel
from flame.cuda._signature import Parameter, as_device_function
from flame.kernel.builder import BoundSource, Lowering, Ref
from flame.ops.op import Joint, Op, Types

Many = tuple[Any, ...]
Static = tuple[tuple[str, Any], ...]


class Described:
    """A tensor as far as it is known before it exists: its shape and dtype."""

    def __init__(self, type_: TensorType, ref: Ref) -> None:
        self.type, self.ref = type_, ref

    @property
    def shape(self) -> Shape:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def ndim(self) -> int:
        return self.type.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the size of one dimension."""
        return self.type.shape if dim is None else self.type.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self.type.numel

    def __repr__(self) -> str:
        return f"<{self.type}>"


class Unknown:
    """A number among the inputs: its value may change from call to call."""

    def __init__(self, kind: type, ref: Ref) -> None:
        self.kind, self.ref = kind, ref

    def _refuse(self, *_: Any) -> NoReturn:
        raise ArgumentError(
            "raw_op: the value of a number among the inputs is known when the kernel runs, and can "
            "only be handed on to it; pass numbers that decide shapes or launches as keywords"
        )

    __index__ = __int__ = __float__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


class RawOp:
    """What `raw_op` returns: call it with tensors and numbers; keywords go to its functions."""

    def __init__(
        self,
        kernel: RawKernel,
        outputs: Callable[..., Any],
        launch: Callable[..., Sequence[Any]],
        vjp: Callable[..., Any] | None,
        arguments: Callable[..., Sequence[Any]] | None,
    ) -> None:
        if kernel.parameters is None:
            raise ArgumentError(
                f"raw_op {kernel.name}: the kernel's parameters cannot be read from its text; "
                f'write extern "C" __global__ void {kernel.name}(...) without a macro'
            )
        self.kernel, self.outputs, self.launch = kernel, outputs, launch
        self.vjp, self.arguments = vjp, arguments
        self.name = kernel.name
        self.op = Op(
            self.name,
            inputs=("*inputs",),
            infer=self._infer,
            lower=self._lower_on_cpu,
            lower_cuda=self._lower,
            vjp=Joint(self._gradients),
            reference=self._reference,
            reads=lambda type_: type_.contiguous,
            register=False,
        )

    def __call__(self, *inputs: Any, **static: Any) -> Any:
        try:
            hash(tuple(static.values()))
        except TypeError as error:
            raise ArgumentError(
                f"raw_op {self.name}: keywords select a kernel's launch, and must be hashable "
                f"({error})"
            ) from error
        return self.op(*inputs, static=tuple(sorted(static.items())))

    def __repr__(self) -> str:
        return f"<flame.cuda.raw_op {self.name}>"

    # --- what the op declares ---------------------------------------------------------------------

    def _infer(self, types: Types, *, static: Static) -> tuple[TensorType, ...]:
        specs = self.outputs(*_inputs(types), **dict(static))
        found = []
        for spec in specs if isinstance(specs, list) else [specs]:
            try:
                shape, dtype = spec
                sizes = tuple([int(size) for size in shape])
            except (TypeError, ValueError):
                raise ArgumentError(
                    f"raw_op {self.name}: outputs gives (shape, dtype), or a list of them, got "
                    f"{specs!r}"
                ) from None
            if not isinstance(dtype, DType):
                raise DTypeError(f"raw_op {self.name}: outputs gives dtypes, got {dtype!r}")
            found.append(tensor_type(dtype, sizes))
        return tuple(found)

    def _lower_on_cpu(self, *_: Any, **__: Any) -> NoReturn:
        raise DeviceError(
            f"raw_op {self.name} runs on a CUDA device, and takes at least one tensor that is on "
            "one; move tensors there by .to('cuda')"
        )

    def _reference(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"raw_op {self.name} means what its kernel does, on a GPU alone")

    def _gradients(self, g: Any, out: Any, inputs: Any, static: Static) -> Many:
        if self.vjp is None:
            raise GradientError(
                f"raw_op {self.name} has no derivative; give it a vjp, or detach its inputs"
            )
        grads = tuple([x.contiguous() for x in (g if isinstance(g, tuple) else (g,))])
        results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        made = self.vjp(grads, tuple(inputs), results, **dict(static))
        found = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        if len(found) != len(inputs):
            raise GradientError(
                f"raw_op {self.name}: vjp gave {len(found)} gradients for {len(inputs)} inputs; "
                "give one for each, None where there is none"
            )
        return found

    def _lower(self, types: Types, outputs: tuple[TensorType, ...], *, static: Static) -> Lowering:
        inputs = _inputs(types)
        results = tuple([Described(t, Ref("output", i)) for i, t in enumerate(outputs)])
        options = dict(static)
        found = tuple(self.launch(inputs, results, **options))
        if len(found) not in (2, 3):
            raise ArgumentError(
                f"raw_op {self.name}: launch gives (grid, block) or (grid, block, bytes of shared "
                f"memory), got {found!r}"
            )
        arguments = (*inputs, *results)
        if self.arguments is not None:
            arguments = tuple(self.arguments(inputs, results, **options))
        text, operands, words = self._calling(arguments)
        nothing = not any(t.numel for t in outputs)
        grid, block = self.kernel.dims(1 if nothing else found[0], found[1])
        bound = BoundSource(
            name=self.name,
            text=text,
            symbol=f"{self.name}_called",
            operands=operands,
            sizes=words,
            grid=grid,
            block=block,
            shared=int(found[2]) if len(found) == 3 else 0,
            extent=0 if nothing else 1,
        )
        return Lowering((), calls=(bound,))

    def _calling(self, arguments: Many) -> tuple[str, tuple[Ref, ...], tuple[int, ...]]:
        """The text with a kernel that calls the user's, its operands, and its words."""
        parameters = self.kernel.parameters
        assert parameters is not None
        self.kernel.check_count(arguments)
        operands: list[Ref] = []
        words: list[int] = []
        passed = []
        for position, (a, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            where = f"raw_op {self.name}: argument {position} ({parameter.text})"
            if isinstance(a, (Described, Unknown)):
                passed.append(_operand(where, a, parameter, len(operands)))
                operands.append(a.ref)
            elif a is None and parameter.pointer:
                passed.append("nullptr")
            else:
                passed.append(_word(where, a, parameter, len(words), words))
        body, bounds = as_device_function(self.kernel.text, self.name)
        declared = [f"const void* p{i}" for i in range(len(operands))]
        declared += [f"long long w{i}" for i in range(len(words))]
        text = (
            f'{body}\nextern "C" __global__ void {bounds} {self.name}_called('
            f"{', '.join(declared)}) {{\n    {self.name}({', '.join(passed)});\n}}\n"
        )
        return text, tuple(operands), tuple(words)


def _inputs(types: Types) -> tuple[Any, ...]:
    found: list[Any] = []
    for i, t in enumerate(types):
        ref = Ref("input", i)
        if t is None:
            found.append(None)
        else:
            found.append(Described(t, ref) if isinstance(t, TensorType) else Unknown(t, ref))
    return tuple(found)


def _operand(where: str, a: Described | Unknown, parameter: Parameter, place: int) -> str:
    """An expression of C++ for what stands behind pointer number ``place``."""
    if isinstance(a, Unknown):
        if parameter.number is None:
            raise DTypeError(f"{where} cannot take a number; its type is none that is known")
        if a.kind is float and parameter.number.lstrip("u").startswith(("int", "bool")):
            raise DTypeError(f"{where} takes {parameter.number}, got a float")
        kept = "double" if a.kind is float else "long long"
        return f"({parameter.type})*(const {kept}*)p{place}"
    if not parameter.pointer:
        raise DTypeError(f"{where} takes a number, got a tensor")
    if parameter.dtype not in (None, a.dtype):
        raise DTypeError(f"{where} takes {parameter.dtype}, got {a.dtype}")
    if parameter.written and a.ref.role == "input":
        raise ArgumentError(
            f"{where} may be written, but an operation leaves its inputs as they are; declare it "
            "as a pointer to const, or pass an output"
        )
    return f"({parameter.type})p{place}"


def _word(where: str, a: Any, parameter: Parameter, place: int, words: list[int]) -> str:
    """An expression of C++ for a number that is known now, which is added to ``words``."""
    if not isinstance(a, (bool, int, float)):
        raise DTypeError(f"{where}: inputs, outputs, numbers and None can be passed, got {a!r}")
    if parameter.number is None:
        raise DTypeError(f"{where} takes a tensor, got {a!r}")
    if isinstance(a, float):
        if parameter.number.lstrip("u").startswith(("int", "bool")):
            raise DTypeError(f"{where} takes {parameter.number}, got the float {a!r}")
        words.append(int.from_bytes(struct.pack("<d", a), "little", signed=True))
        return f"({parameter.type})__longlong_as_double(w{place})"
    if not -(1 << 63) <= a < 1 << 63:
        raise DTypeError(f"{where}: {a} does not fit 64 bits")
    words.append(int(a))
    return f"({parameter.type})w{place}"


def raw_op(
    kernel: RawKernel,
    *,
    outputs: Callable[..., Any],
    launch: Callable[..., Sequence[Any]],
    vjp: Callable[..., Any] | None = None,
    arguments: Callable[..., Sequence[Any]] | None = None,
) -> RawOp:
    """An operation that a kernel computes, eagerly and in compiled steps, with a derivative.

        square = flame.cuda.raw_op(
            kernel,  # (const float* x, float* y, long long n)
            outputs=lambda x: (x.shape, x.dtype),
            launch=lambda inputs, outputs: (-(-inputs[0].numel() // 256), 256),
            arguments=lambda inputs, outputs: (*inputs, *outputs, inputs[0].numel()),
            vjp=lambda grads, inputs, outputs: 2 * inputs[0] * grads[0],
        )
        y = square(x)

    outputs(*inputs): (shape, dtype) of the result, or a list of them for several results.
    launch(inputs, outputs): (grid, block) or (grid, block, bytes of shared memory).
    arguments(inputs, outputs): of the kernel; inputs and then outputs, unless given.
    vjp(grads, inputs, outputs): the gradient of each input (None for numbers), from those of the
    outputs. Written with FLAME's operations, or with another raw_op that has a vjp, it can be
    differentiated again.

    The first three see shapes and dtypes, before there is memory; vjp gets tensors. Numbers among
    the inputs can change from call to call at no cost, and are handed on to the kernel alone;
    keywords of a call are given to all four functions, which may compute with them.
    The kernel writes all of its outputs and nothing else, and its results depend on its arguments
    alone. Inputs and grads arrive contiguous.
    """
    return RawOp(kernel, outputs, launch, vjp, arguments)
