"""Convolution on a GPU: by the vendor's library where it takes the problem, else by `direct`.

Invariants: the library gets the weight in the memory order of the images, channels-last or
row-major; what lies otherwise is copied into a temporary first, by a kernel of the same lowering.
"""

from __future__ import annotations

from dataclasses import replace

from flame.core.device import device_index
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel.builder import Bound, BoundCall, BoundKernel, KernelBuilder, Lowering, Ref
from flame.kernel.library import ConvolutionProblem, Direction
from flame.kernel.values import cast
from flame.ops.conversion import copy
from flame.ops.convolution import direct
from flame.ops.convolution.geometry import Geometry
from flame.ops.elementwise import compute_dtype
from flame.runtime.cuda.driver import driver

Roles = dict[str, tuple[Ref, TensorType]]  # x, weight, y
ORDER: dict[Direction, tuple[str, str, str]] = {
    "forward": ("x", "weight", "y"),
    "input_gradient": ("y", "weight", "x"),
    "weight_gradient": ("y", "x", "weight"),
}


def channels_last_type(type_: TensorType) -> TensorType:
    """The type with the second dimension innermost in memory."""
    n, c, *space = type_.shape
    steps = contiguous_strides((n, *space, c))
    return tensor_type(type_.dtype, type_.shape, (steps[0], steps[-1], *steps[1:-1]), type_.device)


def lower_convolution(
    direction: Direction,
    types: tuple[TensorType, TensorType, TensorType | None],
    out: TensorType,
    *,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
) -> Lowering:
    """The calls of one direction; ``types``: the op's operands, in the problem's order."""
    if not out.numel:
        return Lowering(())
    first, second, bias = types
    names = ORDER[direction]
    known: Roles = {
        names[0]: (Ref("input", 0), first),
        names[1]: (Ref("input", 1), second),
        names[2]: (Ref("output", 0), out),
    }
    found = _by_library(direction, known, bias, stride, padding, dilation, groups)
    if found is not None:
        return found
    weight = known["weight"][1]
    geometry = Geometry.of(weight.shape[2:], stride, padding, dilation, groups)
    return direct.lower(direction, {n: t for n, (_, t) in known.items()}, bias, geometry)


def _by_library(
    direction: Direction, known: Roles, bias: TensorType | None, stride: Shape, padding: Shape,
    dilation: Shape, groups: int,
) -> Lowering | None:  # fmt: skip
    """None where the library refuses."""
    before: list[Bound] = []
    after: list[Bound] = []
    temporaries: list[int] = []
    images = [known[n][1] for n in ("x", "y")]
    last = any(t is channels_last_type(t) and not t.contiguous for t in images)
    roles = dict(known)
    for name, (ref, type_) in known.items():
        wanted = channels_last_type(type_) if last else tensor_type(
            type_.dtype, type_.shape, None, type_.device
        )  # fmt: skip
        if type_ is wanted or (type_.contiguous and wanted.contiguous):
            roles[name] = (ref, wanted)
            continue
        temporaries.append(max(type_.numel, 1) * type_.dtype.itemsize)
        made = Ref("temporary", len(temporaries) - 1)
        roles[name] = (made, wanted)
        if ref.role == "output":
            after.append(_copied(wanted, made, type_, ref))
        else:
            before.append(_copied(type_, ref, wanted, made))
    problem = ConvolutionProblem(
        direction, roles["x"][1], roles["weight"][1], roles["y"][1], stride, padding, dilation,
        groups,
    )  # fmt: skip
    operands = tuple(roles[name][0] for name in ORDER[direction])
    device = device_index(known["x"][1].device)
    if bias is not None:
        fused = replace(problem, bias=True)
        if bias.contiguous and driver().prepare(fused, device) is not None:
            calls = (*before, BoundCall(fused, (*operands, Ref("input", 2))), *after)
            return Lowering((), tuple(temporaries), calls=calls)
        result = known[ORDER[direction][2]]
        after.append(_add_bias(bias, *result))
    if driver().prepare(problem, device) is None:
        return None
    calls = (*before, BoundCall(problem, operands), *after)
    return Lowering((), tuple(temporaries), calls=calls)


def _copied(source: TensorType, read: Ref, target: TensorType, written: Ref) -> Bound:
    (step,) = copy.lowering((source,), (target,), {}).steps
    places = {"input": read, "output": written}
    operands = tuple(places[ref.role] for ref in step.operands if ref is not None)
    return replace(step, operands=operands)


def _add_bias(bias: TensorType, ref: Ref, out: TensorType) -> BoundKernel:
    """The result plus a number for each channel, in place."""
    from flame.ops.elementwise import walk
    from flame.ops.loops import by_stride, coalesce

    k = KernelBuilder("add_bias")
    along = tuple(bias.strides[0] if d == 1 else 0 for d in range(out.ndim))
    nest = coalesce(out.shape, [out.strides, along], by_stride(out.strides, out.shape))
    target = k.tensor(ref.role, ref.position, tensor_type(out.dtype, nest.sizes, nest.strides[0]))
    given = k.tensor("input", 2, tensor_type(bias.dtype, nest.sizes, nest.strides[1]))
    wide = compute_dtype(out.dtype)
    walk(
        k,
        nest,
        lambda i: k.store(target, i, cast(target[i], wide) + cast(given[i], wide)),
        light=True,
        device=out.device,
    )
    return k.bind()
