"""The three operations of convolution: itself, its input gradient, its weight gradient.

Invariant: convolution is linear in each operand, so each of the three is the derivative of the
others, and derivatives of any order are convolutions again. Spatial sizes of the result stand in
``size``; what a window reads outside its source is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame.core.dtypes import DType
from flame.core.errors import DTypeError, ShapeError, UnsupportedError
from flame.core.types import Shape, TensorType, contiguous_strides, tensor_type
from flame.kernel.builder import BoundKernel, KernelBuilder, Lowering, Ref
from flame.kernel.library import Direction
from flame.kernel.values import const
from flame.ops.convolution import (
    depthwise,
    library,
    pointwise,
    pointwise_gradient,
    references,
    winograd,
    winograd_gradient,
)
from flame.ops.convolution.blocking import Tile, tile_for
from flame.ops.convolution.contraction import Operands, Target, contract
from flame.ops.convolution.geometry import (
    Contraction,
    Geometry,
    forward,
    gradient_phases,
    spatial_view,
)  # fmt: skip
from flame.ops.convolution.interleaving import Phases, interleave
from flame.ops.convolution.packing import (
    fill_table,
    pack_source,
    pack_weight,
    packed_source_type,
    packed_weight_type,
    table_type,
)  # fmt: skip
from flame.ops.convolution.weight_gradient import (
    add_partials,
    layout_for,
    pack_gradient,
    packed_gradient_type,
    sum_products,
)  # fmt: skip
from flame.ops.elementwise import compute_dtype
from flame.ops.op import Op, Types
from flame.ops.reductions import sum as sum_
from flame.ops.rows import type_of

if TYPE_CHECKING:
    from flame.tensor import Tensor


def _tensors(name: str, types: Types) -> tuple[TensorType, TensorType]:
    a, b = types[0], types[1]
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    if a.dtype is not b.dtype:
        raise DTypeError(
            f"{name}: operands of {a.dtype.name} and {b.dtype.name}; convert one of them"
        )
    if a.dtype.kind == "b":
        raise DTypeError(f"{name} is not defined for bool tensors; convert them")
    if a.ndim != b.ndim or not 3 <= a.ndim <= 5:
        raise ShapeError(
            f"{name} takes operands of equal rank from 3 to 5, got {a.shape} and {b.shape}"
        )
    return a, b


def channels_last(x: TensorType) -> bool:
    """Whether the channels of (N, C, ...) lie side by side and the rest is in order."""
    if x.contiguous or x.shape[1] == 1:
        return False
    order = (0, *range(2, x.ndim), 1)
    permuted = tensor_type(
        x.dtype, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order)
    )
    return permuted.contiguous


def result_type(model: TensorType, shape: Shape) -> TensorType:
    """A result in channels-last order if ``model`` is."""
    if not channels_last(model):
        return tensor_type(model.dtype, shape, None, model.device)
    n, c, *space = shape
    steps = contiguous_strides((n, *space, c))
    return tensor_type(model.dtype, shape, (steps[0], steps[-1], *steps[1:-1]), model.device)


class _Temporaries:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def add(self, type_: TensorType) -> int:
        self.sizes.append(max(type_.numel, 1) * type_.dtype.itemsize)
        return len(self.sizes) - 1


def _source(
    x: TensorType, position: int, dtype: DType, groups: int, c: Contraction,
    kernels: list[BoundKernel], temporaries: _Temporaries,
) -> tuple[Ref, TensorType]:  # fmt: skip
    """The operand in packed order: as it is where its memory is in that order, else a copy."""
    padded = tuple(max(1, p) for p in c.padded)
    n, channels, *sizes = x.shape
    inside = all(p <= s for p, s in zip(padded, sizes, strict=True)) and not any(c.low)
    if x.dtype is dtype and inside and x.strides[1] == 1:
        own = channels // groups
        strides = (x.strides[0], own, *x.strides[2:], 1)
        return Ref("input", position), tensor_type(dtype, (n, groups, *sizes, own), strides)
    packed = packed_source_type(x, dtype, groups, padded)
    temporary = temporaries.add(packed)
    kernels.append(pack_source(x, position, packed, temporary, c.low))
    return Ref("temporary", temporary), packed


def _contraction(
    types: Types, out: TensorType, c: Contraction, geometry: Geometry, *, summed_axis: int
) -> Lowering:
    """The kernels of a forward (``summed_axis`` 1) or input gradient (0) over ``types``."""
    x, weight, bias = types
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    if not (out.contiguous or channels_last(out)):
        raise UnsupportedError(f"a convolution cannot write into strides {out.strides} in place")
    x, weight, out = spatial_view(x), spatial_view(weight), spatial_view(out)
    if not out.numel:
        return Lowering(())
    dtype = compute_dtype(x.dtype)
    groups = geometry.groups
    lanes, summed = out.shape[1] // groups, x.shape[1] // groups
    if depthwise.fits(groups, summed, lanes):
        direct = depthwise.forward if summed_axis == 1 else depthwise.input_gradient
        return direct(x, weight, bias if isinstance(bias, TensorType) else None, out, geometry)
    biased = bias if isinstance(bias, TensorType) else None
    plan = winograd.plan_for(x, out, geometry, forward=summed_axis == 1)
    if plan is not None:
        return winograd.lower(plan, winograd.Operands(x, weight, biased, out, summed_axis))
    ends = (x, out) if summed_axis == 1 else (out, x)
    product = pointwise.plan_for(*ends, geometry)
    if product is not None and (product.last or weight.contiguous):
        return pointwise.lower(product, weight, biased, c.phases[0], forward=summed_axis == 1)
    tile = tile_for(dtype, lanes)
    kernels: list[BoundKernel] = []
    temporaries = _Temporaries()
    strided = any(a.spread != 1 for p in c.phases for a in p.axes) or not c.phases
    if not c.phases:
        return _only_bias(out, biased)
    phases = Phases(c, out, dtype)
    place = temporaries.add(phases.type) if strided else -1
    source = _source(x, 0, dtype, groups, c, kernels, temporaries)
    for phase in c.phases:
        packed = packed_weight_type(dtype, groups, summed, lanes, tile, phase.taps)
        weights = temporaries.add(packed)
        kernels.append(
            pack_weight(weight, 1, packed, weights, phase, summed_axis=summed_axis, lanes=lanes)
        )
        table = temporaries.add(table_type(x.shape[0], phase))
        kernels.append(fill_table(source[1], phase, table))
        target = Target(Ref("output", 0), out)
        if strided:
            base = phases.base(tuple(a.place for a in phase.axes))
            target = Target(Ref("temporary", place), phases.phase_type(), base)
        operands = Operands(
            *source, Ref("temporary", weights), packed,
            None if biased is None else Ref("input", 2), biased,
        )  # fmt: skip
        kernels.append(contract(operands, target, phase, tile, dtype, table))
    constants: tuple[Any, ...] = ()
    if strided:
        kernel, constants = interleave(phases, place, biased)
        kernels.append(kernel)
    return Lowering(tuple(kernels), tuple(temporaries.sizes), constants=constants)


def _only_bias(out: TensorType, bias: TensorType | None) -> Lowering:
    """Results that no tap reaches."""
    k = KernelBuilder("only_bias")
    other = None if bias is None else k.tensor("input", 2, bias)
    target = k.tensor("output", 0, out)
    n, c, d, h, w = out.shape
    with k.parallel(n, c, d, h, work=w) as (i, j, a, b), k.vector(k.size(w)) as v:
        value = const(0, out.dtype) if other is None else other[j]
        k.store(target, (i, j, a, b, v), value)
    return k.finish()


def _flops(result: TensorType, weight: Any) -> int:
    """For each element of the convolution's result, the taps and channels of its group."""
    return 2 * result.numel * int(math.prod(weight.shape[1:]))


# --- convolution ----------------------------------------------------------------------------------


def _infer(
    types: Types, *, stride: Shape, padding: Shape, dilation: Shape, groups: int, size: Shape
) -> TensorType:
    x, weight = _tensors("convolution", types)
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ShapeError(
            f"convolution: input {x.shape} does not fit weight {weight.shape} with {groups} "
            f"groups; the weight wants {weight.shape[1] * groups} input channels"
        )
    return result_type(x, (x.shape[0], weight.shape[0], *size))


def _lower(
    types: Types, outputs: tuple[TensorType, ...], *, stride: Shape, padding: Shape,
    dilation: Shape, groups: int, size: Shape,
) -> Lowering:  # fmt: skip
    weight = types[1]
    assert isinstance(weight, TensorType)
    geometry = Geometry.of(weight.shape[2:], stride, padding, dilation, groups)
    extent = spatial_view(outputs[0]).shape[2:]
    return _contraction(types, outputs[0], forward(geometry, extent), geometry, summed_axis=1)


def _on_gpu(direction: Direction) -> Callable[..., Lowering]:
    """The lowering of a direction for a GPU."""

    def lower(
        types: Types, outputs: tuple[TensorType, ...], *, size: Shape, **geometry: Any
    ) -> Lowering:
        bias = types[2] if len(types) > 2 else None
        biased = None if bias is None else type_of(bias)
        given = (type_of(types[0]), type_of(types[1]), biased)
        return library.lower_convolution(direction, given, outputs[0], **geometry)

    return lower


def _bias_gradient(g: Tensor) -> Tensor:
    return sum_(g, dim=(0, *range(2, g.ndim)))


def _x_gradient(g: Any, x_type: TensorType, weight: Any, stride: Shape, padding: Shape,
                dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution_input_gradient(
        g, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=x_type.shape[2:],
    )  # fmt: skip


def _w_gradient(g: Any, x: Any, weight_type: TensorType, stride: Shape, padding: Shape,
                dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution_weight_gradient(
        g, x, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=weight_type.shape[2:],
    )  # fmt: skip


convolution = Op(
    "convolution", inputs=("x", "weight", "bias"), infer=_infer, lower=_lower,
    vjp=(_x_gradient, _w_gradient, _bias_gradient), lower_cuda=_on_gpu("forward"),
    images=(0,), flops=lambda types, outputs: _flops(outputs[0], types[1]),
    reference=references.convolution, samples=references.convolution_samples(), tolerance=4.0,
)  # fmt: skip


# --- input gradient -------------------------------------------------------------------------------


def _infer_input_gradient(
    types: Types, *, stride: Shape, padding: Shape, dilation: Shape, groups: int, size: Shape
) -> TensorType:
    g, weight = _tensors("convolution_input_gradient", types)
    if g.shape[1] != weight.shape[0] or weight.shape[0] % groups:
        raise ShapeError(
            f"convolution_input_gradient: {g.shape} does not fit weight {weight.shape} with "
            f"{groups} groups; the weight wants {weight.shape[0]} channels"
        )
    return result_type(g, (g.shape[0], weight.shape[1] * groups, *size))


def _lower_input_gradient(
    types: Types, outputs: tuple[TensorType, ...], *, stride: Shape, padding: Shape,
    dilation: Shape, groups: int, size: Shape,
) -> Lowering:  # fmt: skip
    weight = types[1]
    assert isinstance(weight, TensorType)
    geometry = Geometry.of(weight.shape[2:], stride, padding, dilation, groups)
    extent = spatial_view(outputs[0]).shape[2:]
    return _contraction(
        types, outputs[0], gradient_phases(geometry, extent), geometry, summed_axis=0
    )


def _from_input_gradient(g: Any, y_type: TensorType, weight: Any, stride: Shape, padding: Shape,
                         dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution(
        g, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=y_type.shape[2:],
    )  # fmt: skip


def _weight_from_input_gradient(g: Any, y: Any, weight_type: TensorType, stride: Shape,
                                padding: Shape, dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution_weight_gradient(
        y, g, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=weight_type.shape[2:],
    )  # fmt: skip


convolution_input_gradient = Op(
    "convolution_input_gradient", inputs=("y", "weight", "bias"),
    infer=_infer_input_gradient, lower=_lower_input_gradient,
    vjp=(_from_input_gradient, _weight_from_input_gradient, _bias_gradient),
    lower_cuda=_on_gpu("input_gradient"),
    images=(0,), flops=lambda types, outputs: _flops(type_of(types[0]), types[1]),
    reference=references.input_gradient, samples=references.input_gradient_samples(), tolerance=4.0,
)  # fmt: skip


# --- weight gradient ------------------------------------------------------------------------------


def _infer_weight_gradient(
    types: Types, *, stride: Shape, padding: Shape, dilation: Shape, groups: int, size: Shape
) -> TensorType:
    g, x = _tensors("convolution_weight_gradient", types)
    if g.shape[0] != x.shape[0] or g.shape[1] % groups or x.shape[1] % groups:
        raise ShapeError(
            f"convolution_weight_gradient: {g.shape} and {x.shape} do not fit with {groups} groups"
        )
    shape = (g.shape[1], x.shape[1] // groups, *size)
    if x.device != "cpu":  # the library wants the weight in the images' memory order
        return result_type(x, shape)
    return tensor_type(x.dtype, shape, None, x.device)


def _lower_weight_gradient(
    types: Types, outputs: tuple[TensorType, ...], *, stride: Shape, padding: Shape,
    dilation: Shape, groups: int, size: Shape,
) -> Lowering:  # fmt: skip
    g, x = types
    assert isinstance(g, TensorType)
    assert isinstance(x, TensorType)
    g, x, out = spatial_view(g), spatial_view(x), spatial_view(outputs[0])
    if not out.numel:
        return Lowering(())
    dtype = compute_dtype(x.dtype)
    geometry = Geometry.of(size, stride, padding, dilation, groups)
    if depthwise.fits(groups, out.shape[1], out.shape[0] // groups):
        return depthwise.weight_gradient(g, x, out, geometry)
    plan = winograd_gradient.plan_for(g, x, geometry)
    if plan is not None:
        return winograd_gradient.lower(plan, g, x, out)
    product = pointwise.plan_for(x, g, geometry)
    if product is not None and pointwise_gradient.fits(product):
        return pointwise_gradient.lower(product, out)
    c = forward(geometry, g.shape[2:])
    phase = c.phases[0]
    kernels: list[BoundKernel] = []
    temporaries = _Temporaries()
    source = _source(x, 1, dtype, groups, c, kernels, temporaries)
    tile: Tile = tile_for(dtype, out.shape[0] // groups)
    columns = packed_gradient_type(g, dtype, groups, tile)
    place = temporaries.add(columns)
    kernels.append(pack_gradient(g, 0, columns, place))
    table = temporaries.add(table_type(x.shape[0], phase))
    kernels.append(fill_table(source[1], phase, table))
    layout = layout_for(source[1], phase, tile, columns.shape[1])
    partial_type = layout.partial_type(dtype, groups, columns.shape[1], tile.lanes)
    partial = temporaries.add(partial_type), partial_type
    kernels.append(
        sum_products(
            source, (Ref("temporary", place), columns), partial, table, phase, tile, layout
        )
    )
    kernels.append(add_partials(partial, out, phase, layout))
    return Lowering(tuple(kernels), tuple(temporaries.sizes))


def _g_from_weight_gradient(g: Any, x: Any, y_type: TensorType, stride: Shape, padding: Shape,
                            dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution(
        x, g, None, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=y_type.shape[2:],
    )  # fmt: skip


def _x_from_weight_gradient(g: Any, y: Any, x_type: TensorType, stride: Shape, padding: Shape,
                            dilation: Shape, groups: int) -> Any:  # fmt: skip
    return convolution_input_gradient(
        y, g, None, stride=stride, padding=padding, dilation=dilation, groups=groups,
        size=x_type.shape[2:],
    )  # fmt: skip


convolution_weight_gradient = Op(
    "convolution_weight_gradient", inputs=("y", "x"),
    infer=_infer_weight_gradient, lower=_lower_weight_gradient,
    vjp=(_g_from_weight_gradient, _x_from_weight_gradient),
    lower_cuda=_on_gpu("weight_gradient"),
    images=(0, 1), flops=lambda types, outputs: _flops(type_of(types[0]), outputs[0]),
    reference=references.weight_gradient, samples=references.weight_gradient_samples(),
    tolerance=4.0,
)  # fmt: skip
