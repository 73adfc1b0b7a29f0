"""raw_op: a differentiable function made of kernels of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flame.autograd.function import Function
from flame.core.errors import ArgumentError, DeviceError, GradientError
from flame.core.handle import is_tensor
from flame.core.types import tensor_type
from flame.cuda._raw_kernel import RawKernel
from flame.runtime.storage import Storage
from flame.tensor import Tensor

Many = tuple[Any, ...]


class RawOp:
    """What `raw_op` returns: call it with the inputs."""

    def __init__(
        self,
        kernel: RawKernel,
        outputs: Callable[..., Any],
        launch: Callable[[Many, Many], Sequence[Any]],
        vjp: Callable[[Many, Many, Many], Any] | None,
        arguments: Callable[[Many, Many], Sequence[Any]] | None,
    ) -> None:
        self.kernel, self.outputs, self.launch = kernel, outputs, launch
        self.vjp, self.arguments = vjp, arguments
        self.function = _function(self)

    def __call__(self, *inputs: Any) -> Any:
        # A kernel sees bare memory; the copy, where one is needed, is recorded as any operation.
        dense = [x.contiguous() if is_tensor(x) else x for x in inputs]
        return self.function.apply(*dense)

    def __repr__(self) -> str:
        return f"<flame.cuda.raw_op {self.kernel.name}>"

    def run(self, inputs: Many) -> tuple[Tensor, ...] | Tensor:
        """The results, without a history."""
        device = next((x.type.device for x in inputs if is_tensor(x)), "cpu")
        if device == "cpu":
            raise DeviceError(
                f"raw_op {self.kernel.name} runs on a CUDA device, and takes at least one tensor "
                "that is on one; move tensors there by .to('cuda')"
            )
        specs = self.outputs(*inputs)
        several = isinstance(specs, list)
        results = tuple(_empty(spec, device) for spec in (specs if several else [specs]))
        found = tuple(self.launch(inputs, results))
        if len(found) not in (2, 3):
            raise ArgumentError(
                f"raw_op {self.kernel.name}: launch gives (grid, block) or (grid, block, bytes of "
                f"shared memory), got {found!r}"
            )
        arguments = (*inputs, *results)
        if self.arguments is not None:
            arguments = tuple(self.arguments(inputs, results))
        self.kernel(found[0], found[1], arguments, shared_mem=found[2] if len(found) == 3 else 0)
        return results if several else results[0]


def _empty(spec: Any, device: str) -> Tensor:
    shape, dtype = spec
    type_ = tensor_type(dtype, tuple(int(size) for size in shape), None, device)
    storage = Storage.allocate(type_.span * dtype.itemsize, device)
    return Tensor.wrap(storage, storage.pointer, type_)


def _function(operation: RawOp) -> type[Function]:
    """What the tape sees of an operation; it has the kernel's name."""
    name = operation.kernel.name

    def forward(ctx: Any, *inputs: Any) -> Any:
        made = operation.run(inputs)
        results = made if isinstance(made, tuple) else (made,)
        ctx.numbers = [None if is_tensor(x) else x for x in inputs]
        ctx.tensors = [is_tensor(x) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if is_tensor(x)), *results)
        return made

    def backward(ctx: Any, *grads: Any) -> Any:
        if operation.vjp is None:
            raise GradientError(
                f"raw_op {name} has no derivative; give it a vjp, or detach its inputs"
            )
        saved = list(ctx.saved_tensors)
        inputs = tuple(
            saved.pop(0) if tensor else number
            for tensor, number in zip(ctx.tensors, ctx.numbers, strict=True)
        )
        made = operation.vjp(tuple(g.contiguous() for g in grads), inputs, tuple(saved))
        found = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        if len(found) != len(inputs):
            raise GradientError(
                f"raw_op {name}: vjp gave {len(found)} gradients for {len(inputs)} inputs; give "
                "one for each, None where there is none"
            )
        return found

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: type[Function] = type(name, (Function,), parts)
    return made


def raw_op(
    kernel: RawKernel,
    *,
    outputs: Callable[..., Any],
    launch: Callable[[Many, Many], Sequence[Any]],
    vjp: Callable[[Many, Many, Many], Any] | None = None,
    arguments: Callable[[Many, Many], Sequence[Any]] | None = None,
) -> RawOp:
    """A function of tensors and numbers that a kernel computes, with a derivative.

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
    differentiated again. Inputs and grads arrive contiguous.
    """
    return RawOp(kernel, outputs, launch, vjp, arguments)
