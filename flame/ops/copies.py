"""Views given as copies, and copies with a part replaced."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flame.core.errors import ShapeError
from flame.core.types import Shape
from flame.ops import dimensions, shapes, slicing
from flame.ops.conversion import clone

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "alias_copy", "as_strided", "as_strided_copy", "as_strided_scatter", "diagonal_copy",
    "diagonal_scatter", "expand_copy", "narrow_copy", "permute_copy", "select_scatter",
    "slice_scatter", "split_with_sizes_copy", "squeeze_copy", "t_copy", "transpose_copy",
    "unbind_copy", "unfold_copy", "unsafe_chunk", "unsafe_split", "unsqueeze_copy", "view_copy",
]  # fmt: skip
METHODS = (
    "as_strided", "as_strided_scatter", "diagonal_scatter", "narrow_copy", "select_scatter",
    "slice_scatter",
)  # fmt: skip


def as_strided(input: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
    """A view by sizes, strides and an offset (in elements) into the tensor's memory.

    Without an offset it begins where the tensor does. Raises ShapeError where it would leave the
    memory.
    """
    sizes, strides = tuple(size), tuple(stride)
    if len(sizes) != len(strides) or any(s < 0 for s in (*sizes, *strides)):
        raise ShapeError(
            f"as_strided: sizes {sizes} and strides {strides} must be as many, and not negative"
        )
    begin = input.storage_offset()
    offset = begin if storage_offset is None else int(storage_offset)
    reach = (
        sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if math.prod(sizes) else -1
    )
    if offset < 0 or (offset + reach + 1) * input.itemsize > input.storage.nbytes:
        raise ShapeError(
            f"as_strided: sizes {sizes}, strides {strides} and offset {offset} leave the tensor's "
            f"memory of {input.storage.nbytes // input.itemsize} elements"
        )
    result: Tensor = shapes.as_strided(input, shape=sizes, strides=strides, offset=offset - begin)
    return result


def as_strided_copy(
    input: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> Tensor:
    """`as_strided` as a copy."""
    return clone(as_strided(input, size, stride, storage_offset))


def alias_copy(input: Tensor) -> Tensor:
    """A copy."""
    return clone(input)


def diagonal_copy(input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """`diagonal` as a copy."""
    return clone(slicing.diagonal(input, offset, dim1, dim2))


def expand_copy(input: Tensor, size: Any, *, implicit: bool = False) -> Tensor:
    """`expand` as a copy."""
    return clone(shapes.expand(input, size))


def narrow_copy(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`narrow` as a copy."""
    return clone(shapes.narrow(input, dim, start, length))


def permute_copy(input: Tensor, dims: Any) -> Tensor:
    """`permute` as a copy."""
    return clone(shapes.permute(input, dims))


def split_with_sizes_copy(input: Tensor, split_sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """`split_with_sizes` as copies."""
    return tuple(clone(x) for x in slicing.split_with_sizes(input, split_sizes, dim))


def squeeze_copy(input: Tensor, dim: Any = None) -> Tensor:
    """`squeeze` as a copy."""
    return clone(shapes.squeeze(input) if dim is None else shapes.squeeze(input, dim))


def t_copy(input: Tensor) -> Tensor:
    """`t` as a copy."""
    return clone(dimensions.t(input))


def transpose_copy(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """`transpose` as a copy."""
    return clone(shapes.transpose(input, dim0, dim1))


def unbind_copy(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """`unbind` as copies."""
    return tuple(clone(x) for x in slicing.unbind(input, dim))


def unfold_copy(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """`unfold` as a copy."""
    return clone(slicing.unfold(input, dimension, size, step))


def unsqueeze_copy(input: Tensor, dim: int) -> Tensor:
    """`unsqueeze` as a copy."""
    return clone(shapes.unsqueeze(input, dim))


def view_copy(input: Tensor, size: Any) -> Tensor:
    """`view` as a copy."""
    return clone(shapes.view(input, size))


def unsafe_chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """As `chunk`."""
    return slicing.chunk(input, chunks, dim)


def unsafe_split(input: Tensor, split_size: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """As `split`."""
    return slicing.split(input, split_size, dim)


# --- a part replaced ------------------------------------------------------------------------------


def _replaced(name: str, input: Tensor, src: Tensor, part: Any) -> Tensor:
    made = clone(input)
    target = part(made)
    if src.shape != target.shape:
        raise ShapeError(
            f"{name}: a part of shape {target.shape} cannot be replaced by {src.shape}"
        )
    target.copy_(src)
    return made


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """A copy in which ``src`` stands in place of ``select(dim, index)``."""
    return _replaced("select_scatter", input, src, lambda x: slicing.select(x, dim, index))


def slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Tensor:  # fmt: skip
    """A copy in which ``src`` stands in place of a slice of ``dim``."""
    where = shapes.wrap_dim("slice_scatter", dim, input.ndim)

    def part(x: Tensor) -> Tensor:
        found: Tensor = x[(slice(None),) * where + (slice(start, end, step),)]
        return found

    return _replaced("slice_scatter", input, src, part)


def diagonal_scatter(
    input: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    """A copy in which ``src`` stands on a diagonal."""
    return _replaced(
        "diagonal_scatter", input, src, lambda x: slicing.diagonal(x, offset, dim1, dim2)
    )


def as_strided_scatter(
    input: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> Tensor:
    """A copy in which ``src`` stands in place of a strided part."""
    from flame.ops.conversion import contiguous

    sizes: Shape = tuple(size)
    return _replaced(
        "as_strided_scatter", contiguous(input), src,
        lambda x: as_strided(x, sizes, stride, storage_offset or 0),
    )  # fmt: skip
