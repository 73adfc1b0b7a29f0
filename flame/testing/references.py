"""Compares an op with its NumPy reference."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.ops.op import Op, Sample
from flame.tensor import Tensor
from flame.testing.sampling import attributes_on, make_inputs

# (relative, absolute) error allowed by dtype; float16 and bfloat16 store what float32 computed
TOLERANCE: Final = {
    dtypes.float64: (1e-11, 1e-11),
    dtypes.float32: (2e-5, 2e-5),
    dtypes.float16: (4e-3, 4e-3),
    dtypes.bfloat16: (3e-2, 3e-2),
}


def check_reference(
    op: Op, sample: Sample, dtype: DType, layout: str = "contiguous", device: str = "cpu"
) -> None:
    """Raise AssertionError unless ``op`` equals its reference on operands of this dtype, layout and
    device.
    """
    operands, arrays = make_inputs(sample, dtype, layout=layout, device=device)
    before = [x.storage.version for x in operands if isinstance(x, Tensor)]
    made = op(*operands, **attributes_on(op, sample, device))
    assert before == [x.storage.version for x in operands if isinstance(x, Tensor)]
    with np.errstate(all="ignore"):
        expected = op.reference(*[_widened(a) for a in arrays], **sample.attributes)
    results = made if isinstance(made, tuple) else (made,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert len(results) == len(wanted), f"{op.name} gave {len(results)} results"
    for result, want in zip(results, wanted, strict=True):
        compare(result, np.asarray(want), dtype, op.tolerance, f"{op.name} {dtype.name} {layout}")


def _widened(x: Any) -> Any:
    """Half-width floats as float32, which is what kernels compute in."""
    if isinstance(x, np.ndarray) and x.dtype in (np.float16, dtypes.bfloat16.numpy):
        return x.astype(np.float32)
    return x


def compare(
    result: Tensor, want: np.ndarray[Any, Any], dtype: DType, factor: float, label: str
) -> None:
    """Raise AssertionError with the worst element where ``result`` and ``want`` differ too much."""
    got = result.detach().cpu().numpy()
    assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
    if result.dtype.kind != "f":
        np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=label)
        return
    relative, absolute = TOLERANCE[min((result.dtype, dtype), key=_precision)]
    np.testing.assert_allclose(
        got.astype(np.float64),
        want.astype(np.float64),
        rtol=relative * factor,
        atol=absolute * factor,
        err_msg=label,
    )


def _precision(dtype: DType) -> int:
    order = (dtypes.bfloat16, dtypes.float16, dtypes.float32, dtypes.float64)
    return order.index(dtype) if dtype in order else len(order)
