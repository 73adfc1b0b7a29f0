"""``flame.special``: special functions, by PyTorch's names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flame.ops.autocast import autocasts
from flame.ops.bivariate import xlog1py, xlogy
from flame.ops.comparison import where
from flame.ops.gamma import digamma, erfinv, i0, i0e, i1, i1e, lgamma, polygamma, zeta
from flame.ops.mathematics import erf, erfc, exp2, expm1, log1p, sigmoid

if TYPE_CHECKING:
    from flame.tensor import Tensor

__all__ = [
    "digamma", "entr", "erf", "erfc", "erfinv", "exp2", "expit", "expm1", "gammaln", "i0", "i0e",
    "i1", "i1e", "log1p", "ndtr", "ndtri", "polygamma", "psi", "xlog1py", "xlogy", "zeta",
]  # fmt: skip

expit, gammaln, psi = sigmoid, lgamma, digamma


def entr(input: Tensor) -> Tensor:
    """-x log(x); 0 at 0, -inf below."""
    floats = input if input.dtype.kind == "f" else input * 1.0
    made: Tensor = where(floats < 0, -math.inf, -xlogy(floats, floats))
    return made


def ndtr(input: Tensor) -> Tensor:
    """The probability that a standard normal number is below ``input``."""
    result: Tensor = erfc(input * -math.sqrt(0.5)) * 0.5
    return result


@autocasts("plain")
def ndtri(input: Tensor) -> Tensor:
    """The inverse of `ndtr`."""
    result: Tensor = erfinv(input * 2.0 - 1.0) * math.sqrt(2)
    return result
