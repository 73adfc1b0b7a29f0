"""linear: a product and a bias in one kernel.

The bias is written into a tile of the result first, and the library adds the product to it while
the tile is warm in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.core.errors import DTypeError, ShapeError
from flame.core.types import TensorType, tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder, Lowering
from flame.kernel.values import const
from flame.ops.arithmetic import add
from flame.ops.op import Arg, Op, Sample, Types
from flame.ops.products import (
    LIBRARY,
    advance,
    matmul,
    matrix_of,
    swapped,
    tile_of,
    walkable,
    work_of,
)
from flame.ops.reductions import sum_to
from flame.ops.shapes import reshape, transpose

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__: list[str] = []


def _infer_linear(types: Types) -> TensorType:
    x, weight, bias = types
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    assert isinstance(bias, TensorType)
    if not x.dtype is weight.dtype is bias.dtype or x.dtype not in LIBRARY:
        raise DTypeError(
            f"linear: operands are {x.dtype.name}, {weight.dtype.name} and {bias.dtype.name}; "
            "all must be float32, or all float64"
        )
    if bias.shape != weight.shape[:1] or x.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"linear: input {x.shape}, weight {weight.shape} and bias {bias.shape} do not fit; "
            "they must be (..., in), (out, in) and (out,)"
        )
    return tensor_type(x.dtype, (x.shape[0], weight.shape[0]), None, x.device)


def _lower_linear(types: Types, outputs: tuple[TensorType, ...]) -> Lowering:
    """Tiles of rows or columns: filled with the bias, then the product is added by the library."""
    x, weight, bias = types
    (out,) = outputs
    assert isinstance(x, TensorType)
    assert isinstance(weight, TensorType)
    assert isinstance(bias, TensorType)
    (m, n), inner = out.shape, x.shape[-1]
    turned = swapped(weight)
    k = KernelBuilder("linear")
    sources = [k.tensor("input", i, t) for i, t in enumerate((x, turned, bias))]
    target = k.tensor("output", 0, out)
    tall = m >= n
    step, tiles = tile_of(m if tall else n, (n if tall else m) * inner)
    with k.parallel(tiles, work=work_of(step, (n if tall else m) * inner)) as (tile,):
        begin = tile * step
        length = values.binary("min", k.size(m if tall else n) - begin, const(step))
        rows, columns = (length, k.size(n)) if tall else (k.size(m), length)
        first = begin if not tall else const(0)
        with k.loop(rows) as i, k.vector(columns, 2) as j:
            row = begin + i if tall else i
            k.store(target, (row, first + j), sources[2][first + j])
        matrices = [
            matrix_of(k, t, o, const(0))
            for t, o in zip((x, turned, out), (*sources[:2], target), strict=True)
        ]
        moved = 0 if tall else 1
        matrices[moved] = advance(k, matrices[moved], (x, turned)[moved], begin, rows=tall)
        matrices[2] = advance(k, matrices[2], out, begin, rows=tall)
        left, right, result = matrices
        k.gemm(rows, columns, k.size(inner), left, right, result, beta=const(1))
    return k.finish()


_linear = Op(
    "linear",
    inputs=("x", "weight", "bias"),
    infer=_infer_linear,
    lower=_lower_linear,
    vjp=(
        lambda g, weight: matmul(g, weight),
        lambda g, x: matmul(transpose(g, 0, 1), x),
        lambda g, bias_type: sum_to(g, bias_type.shape),
    ),
    reference=lambda x, weight, bias: x @ weight.T + bias,
    samples=[
        Sample((Arg((5, 4), kind="double"), Arg((3, 4), kind="double"), Arg((3,), kind="double"))),
        Sample(
            (Arg((2, 40), kind="double"), Arg((70, 40), kind="double"), Arg((70,), kind="double"))
        ),
        Sample((Arg((0, 4), kind="double"), Arg((3, 4), kind="double"), Arg((3,), kind="double"))),
    ],
    reads=lambda t: t.ndim < 2 or walkable(t),
    tolerance=4.0,
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias; input (..., in), weight (out, in) or (in,), bias (out,) or scalar.

    Raises ShapeError naming both shapes where the sizes differ.
    """
    if input.ndim == 0 or input.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"linear: input of shape {input.shape} needs a last dimension of {weight.shape[-1]}, "
            f"the last size of the weight {weight.shape}"
        )
    if weight.ndim == 1:
        made = matmul(input, weight)
    elif bias is not None and _fusable(input, weight, bias):
        rows = reshape(input, (-1, input.shape[-1])) if input.ndim != 2 else input
        made = _linear(rows, weight, bias)
        return made if input.ndim == 2 else reshape(made, (*input.shape[:-1], weight.shape[0]))
    else:
        made = matmul(input, transpose(weight, 0, 1))
    return made if bias is None else add(made, bias)


def _fusable(input: Tensor, weight: Tensor, bias: Tensor) -> bool:
    same = input.dtype is weight.dtype is bias.dtype and input.dtype in LIBRARY
    return same and bias.shape == weight.shape[:1] and input.numel() > 0 and weight.numel() > 0
